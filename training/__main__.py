"""`python -m training build ...` makes a dataset of attention maps; `python -m training train ...` trains a classifier on it.

Run it from the repository root, with COMFYUI_PATH set (`python dev.py run -m training ...` sets it). The same command, given
again, resumes where it stopped.
"""
from __future__ import annotations

import sys

from dev.standalone import load_pack

load_pack()

from learn_to_steer.training.command import main  # noqa: E402  (the host must be on the path first)

if __name__ == "__main__":
    sys.exit(main())
