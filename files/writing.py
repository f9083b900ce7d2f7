"""Writes files whole or not at all, also if the process is killed or the disk is full."""
from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
from pathlib import Path

from .faults import FileFault, reason

PARTIAL = ".partial"
_NUMBERS = itertools.count()
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class WriteError(OSError):
    """A file could not be written; the message says which one, why, and what to do."""


def replace_file(path: Path, content: bytes) -> None:
    """Writes a temporary file, syncs it to the disk and renames it. A reader sees the old file or the whole new one.

    Raises WriteError and leaves the old file in place.
    """
    # Hidden, because GenEval reads every file whose name begins like a picture's. Short, whatever the length of the name.
    partial = path.with_name(f".{os.getpid()}-{next(_NUMBERS)}{PARTIAL}")
    try:
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):
                partial.unlink()
    except OSError as error:
        advice = "Free some space and try again" if error.errno in _FULL else "Check the name, the folder and its permissions"
        raise WriteError(f"{path} cannot be written: {reason(error)}. {advice}.") from error
    _sync_folder(path.parent)


class FileIsThere(FileFault):
    """A file exists and may not be overwritten."""


def write_new_file(path: Path, content: bytes, overwrite: bool = False) -> None:
    """Like `replace_file`, but makes the folder, and raises FileIsThere where the file exists with other content."""
    check_new_file(path, overwrite, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, content)


def check_new_file(path: Path, overwrite: bool, content: bytes | None = None) -> None:
    """Raises FileIsThere where `path` is a folder, or exists with other content and may not be overwritten."""
    if path.is_dir():
        raise FileIsThere(f"{path} is a folder. Name a file.")
    if path.exists() and not overwrite and (content is None or path.read_bytes() != content):
        raise FileIsThere(f"{path} is there already. Choose another name, or add --overwrite to replace it.")


def write_json(path: Path, value: object) -> None:
    """Writes JSON with sorted keys, so that equal values give equal bytes."""
    replace_file(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def remove_partial_files(folder: Path) -> None:
    """Removes temporary files left by a killed process."""
    for path in folder.glob(f"*{PARTIAL}"):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Syncs the folder, without which the rename may be lost. Some network file systems do not support it."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)
