"""Makes the repository root importable after everything else (it has a `nodes/` that must not shadow the host's)."""
from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))
