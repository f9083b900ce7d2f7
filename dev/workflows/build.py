"""Writes the files in workflows/. `python dev.py run -m dev.workflows.build [--server URL]`.

The tool reads the list of nodes from a ComfyUI with this pack: the one running at URL, or one that it starts (COMFYUI_PATH, as
for the tests). Users open the written files; they do not need this tool.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from dev.client import Client
from dev.server import Server

from . import real_models, small_world

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
SHEETS = {**small_world.SHEETS, **real_models.SHEETS}


def write(object_info: dict) -> None:
    for name, build in SHEETS.items():
        text = json.dumps(build(name, object_info).document(), indent=1, ensure_ascii=False)
        (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
        print(f"wrote {name}.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", help="address of a running ComfyUI with this pack")
    address = parser.parse_args().server
    if address:
        write(Client(address).object_info())
        return
    with Server(Path(sys.executable), Path(os.environ["COMFYUI_PATH"])) as server:
        write(server.client.object_info())


if __name__ == "__main__":
    main()
