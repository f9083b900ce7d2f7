"""`python -m training build ...` makes a dataset of attention maps, `python -m training train ...` a classifier of it.

From the repository root, with COMFYUI_PATH set (`python dev.py run -m training ...` does that). Both go on where they
stopped when the same command is given again.
"""
from __future__ import annotations

import importlib
import sys

from standalone import PACKAGE, load_pack

load_pack()
main = importlib.import_module(f"{PACKAGE}.training.command").main

if __name__ == "__main__":
    sys.exit(main())
