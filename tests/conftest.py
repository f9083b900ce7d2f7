"""Makes the repository importable as `learn_to_steer`, and `dev` beside it.

The root goes to the end of the path, so that its `nodes/` does not shadow the host's module.
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import dev  # noqa: E402, F401  (registers the pack)
