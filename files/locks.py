"""A lock on a folder for one process at a time. The system releases it when the process dies."""
from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from .faults import FileFault

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOGGER = logging.getLogger("learn_to_steer")
LOCK = "in_use.lock"
_BYTE = 2 ** 30
"""The byte that Windows locks. It lies far behind the text, so that other processes can read who holds the lock."""
_HELD = {errno.EACCES, errno.EAGAIN, errno.EDEADLK}


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock. Raises FileFault, naming the holder, where another process holds it.

    On a file system without locks it logs a warning and continues.
    """
    with open(folder / LOCK, "a+b", buffering=0) as file:
        try:
            _lock(file.fileno())
        except OSError as error:
            if error.errno not in _HELD:
                LOGGER.warning("%s cannot be locked (%s): do not start a second run on it.", folder, error.strerror)
                yield
                return
            raise FileFault(f"another run is at work there{_holder(folder)}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}".encode())
        try:
            yield
        finally:
            file.truncate(0)
            _unlock(file.fileno())


def _holder(folder: Path) -> str:
    with contextlib.suppress(OSError):
        text = (folder / LOCK).read_bytes()[:40]
        if text.startswith(b"process ") and text[8:].isdigit():
            return f" ({text.decode()})"
    return ""


def _lock(number: int) -> None:
    if fcntl is not None:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    os.lseek(number, _BYTE, os.SEEK_SET)
    msvcrt.locking(number, msvcrt.LK_NBLCK, 1)


def _unlock(number: int) -> None:
    if fcntl is not None:
        fcntl.flock(number, fcntl.LOCK_UN)
        return
    os.lseek(number, _BYTE, os.SEEK_SET)
    msvcrt.locking(number, msvcrt.LK_UNLCK, 1)
