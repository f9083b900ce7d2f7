"""Makes the repository importable as `learn_to_steer`, and `dev` beside it.

The root comes after everything else on the path: its `nodes/` must not shadow the host's.
"""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import dev  # noqa: E402, F401  (registers the pack)
