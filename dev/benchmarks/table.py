"""Shared by all benchmarks: the description of the machine, a table for the terminal, and JSON output."""
from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from learn_to_steer.files.writing import replace_file


def machine() -> str:
    """Processor, number of threads and versions, in one line."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text(encoding="utf-8"))
        name = found.group(1).strip() if found else name
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{name}, {os.cpu_count()} cores"
    return (f"{device}; {torch.get_num_threads()} threads; {platform.system()}; Python {platform.python_version()}; "
            f"torch {torch.__version__}")


def print_table(rows: Sequence[dict]) -> None:
    """Prints rows in aligned columns. The columns are the keys of the first row."""
    columns = list(rows[0])
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[index]) for line in cells) for index in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) if index == 0 else cell.rjust(width)
                        for index, (cell, width) in enumerate(zip(line, widths, strict=True))), flush=True)


def _cell(value) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def write_json(path: Path | None, content: dict) -> None:
    """Writes a JSON file whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
