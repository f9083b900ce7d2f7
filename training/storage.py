"""TrainingError, and file access that raises it."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..files import reading
from ..files.faults import FileFault
from ..files.locks import locked


class TrainingError(ValueError):
    """Training data or a training run cannot be used; the message says what is wrong, where, and what to do."""


@contextlib.contextmanager
def faults_of(place: object, advice: str = "") -> Iterator[None]:
    """Turns a FileFault inside the context into a TrainingError that names `place` and ends with `advice`."""
    try:
        yield
    except FileFault as error:
        raise TrainingError(f"{place}: {error}.{' ' * bool(advice)}{advice}") from error


def read_json(path: Path) -> object:
    """Reads a JSON file. Raises TrainingError naming a file that is missing or not JSON."""
    with faults_of(path):
        return reading.read_json(path)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder's lock. Raises TrainingError where another process builds or trains in the folder."""
    with contextlib.ExitStack() as stack:
        with faults_of(folder, "Wait until it has ended, or choose another folder."):
            stack.enter_context(locked(folder))
        yield
