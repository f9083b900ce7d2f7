"""The error of reading and writing files, and how a value of a file is shown in a message."""
from __future__ import annotations

_LONGEST = 60


class FileFault(ValueError):
    """A file cannot be used; the message says what is wrong with it. Callers add its name and what to do."""


def shown(value: object) -> str:
    """A value of a file, short enough for a message."""
    if isinstance(value, (dict, list, tuple)):
        return f"a {'group' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10 ** 20:
        return "a number of more than 20 digits"  # Python refuses to write one of more than 4,300
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"{value[:_LONGEST]!r}..."
    if value is None or isinstance(value, (str, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


def reason(error: OSError) -> str:
    """What the system said, without the path, which the caller names in its own words."""
    return error.strerror or type(error).__name__
