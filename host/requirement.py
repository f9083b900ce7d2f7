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
    except ImportError:  # ComfyUI has named its version in this module since January 2025
        return _complaint("this one is older")
    if not _numbers(found) or _numbers(found) >= _numbers(OLDEST_HOST):
        return None
    return _complaint(f"this is {found}")


def _complaint(running: str) -> str:
    return f"Learn to Steer needs ComfyUI {OLDEST_HOST} or newer; {running}. Its nodes are not loaded: update ComfyUI."
