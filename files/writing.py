"""Files that are whole or not there, whenever the process is killed."""
from __future__ import annotations

import json
import os
from pathlib import Path

PARTIAL = ".partial"


def replace_file(path: Path, content: bytes) -> None:
    """Writes aside, brings it to the disk, renames: a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}{PARTIAL}")  # hidden: GenEval takes every name that begins as a picture's does
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself is on the disk only with the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: Path, value: object) -> None:
    """Equal values give equal bytes."""
    replace_file(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def remove_partial_files(folder: Path) -> None:
    """What a killed process left half written."""
    for path in folder.glob(f"*{PARTIAL}"):
        path.unlink()
