"""The oldest supported ComfyUI. Imports only the host's version, so that the check works on any host."""
from __future__ import annotations

import re

OLDEST_HOST = "0.16.3"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def unmet_requirement() -> str | None:
    """A message for the user if the running ComfyUI is too old, else None.

    A version without numbers (a development build) passes.
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
