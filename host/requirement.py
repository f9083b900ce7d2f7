"""The oldest ComfyUI that the pack runs on. Imports nothing of the host but its version, so that any host can ask."""
from __future__ import annotations

import re

OLDEST_HOST = "0.16.3"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def unmet_requirement() -> str | None:
    """What to tell the user where the running ComfyUI is too old, else None.

    A version that is not made of numbers (a development build) passes.
    """
    try:
        from comfyui_version import __version__ as found
    except ImportError:
        found = "0"  # ComfyUI has named its version in this module since early 2025
    if not _numbers(found) or _numbers(found) >= _numbers(OLDEST_HOST):
        return None
    named = "this ComfyUI" if found == "0" else f"this is {found}"
    return f"Learn to Steer needs ComfyUI {OLDEST_HOST} or newer, {named}. Its nodes are not loaded; update ComfyUI."
