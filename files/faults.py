"""FileFault, the error of reading and writing files, and helpers for its messages."""
from __future__ import annotations

_LONGEST = 60


class FileFault(ValueError):
    """A file cannot be used; the message says what is wrong. Callers add the file's name and what to do."""


def shown(value: object) -> str:
    """A value from a file as text, short enough for a message."""
    if isinstance(value, (dict, list, tuple)):
        return f"a {'group' if isinstance(value, dict) else 'list'} of {len(value)}"
    if isinstance(value, int) and abs(value) >= 10 ** 20:
        return "a number of more than 20 digits"  # Python refuses to format more than 4,300 digits
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"{value[:_LONGEST]!r}..."
    if value is None or isinstance(value, (str, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"


def reason(error: OSError) -> str:
    """The system's message without the path; the caller names the path."""
    return error.strerror or type(error).__name__
