"""Checks file names that must be valid on every operating system."""
from __future__ import annotations

import re

LONGEST = 255
"""Longest name in bytes, on most file systems."""
_RESERVED = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3])", re.IGNORECASE)


def fault_of_name(name: str, ending: str = "") -> str | None:
    """What is wrong with `name` as a file or folder name, and what to do; None if nothing is.

    name: without its ending; ending: such as ".safetensors", counted in the length.
    """
    if not re.fullmatch(r"\w[\w .\-]*", name) or name.endswith((".", " ")):
        return "is no plain name. Use letters, digits, spaces, - and _"
    if _RESERVED.fullmatch(name.partition(".")[0].strip()):
        return "is a name that Windows keeps for itself. Choose another one"
    if len((name + ending).encode()) > LONGEST:
        return f"is too long: with its ending a name may have {LONGEST} bytes. Choose a shorter one"
    return None
