"""Typed access to the entries of a file. Each value is checked when it is read, and a FileFault names its entry."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .faults import FileFault, shown

MOST = 2 ** 31 - 1
LONGEST_TEXT = 10_000
_NEEDED = object()


@dataclass(frozen=True)
class Entries:
    """A group of entries. place: the group's name followed by a dot, empty for the outermost group."""

    values: Mapping
    place: str = ""

    @staticmethod
    def of(value: object, place: str = "the content") -> Entries:
        if not isinstance(value, Mapping):
            raise FileFault(f"{place} is {shown(value)}, but must be a group of entries")
        return Entries(value)

    def whole(self, name: str, least: int = 0, most: int = MOST, default: object = _NEEDED) -> int:
        return self._checked(name, default, lambda value: _is_whole(value) and least <= value <= most,
                             f"a whole number from {least} to {most}")

    def number(self, name: str, least: float = -1e12, most: float = 1e12) -> float:
        return float(self._checked(name, _NEEDED, lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
                                   and least <= value <= most, f"a number from {least:g} to {most:g}"))

    def text(self, name: str, choices: Sequence[str] = (), default: object = _NEEDED) -> str:
        return self._checked(name, default, lambda value: isinstance(value, str) and len(value) <= LONGEST_TEXT
                             and (not choices or value in choices),
                             f"one of {', '.join(choices)}" if choices else f"a text of at most {LONGEST_TEXT} characters")

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(self._checked(name, _NEEDED, lambda value: isinstance(value, list) and all(
            isinstance(item, str) and 0 < len(item) <= LONGEST_TEXT for item in value), "a list of texts"))

    def wholes(self, name: str) -> tuple[int, ...]:
        return tuple(self._checked(name, _NEEDED, lambda value: isinstance(value, list) and all(
            _is_whole(item) and 0 <= item <= MOST for item in value), "a list of whole numbers"))

    def items(self, name: str) -> list:
        return self._checked(name, _NEEDED, lambda value: isinstance(value, list), "a list")

    def group(self, name: str, default: object = _NEEDED) -> Entries:
        found = self._checked(name, default, lambda value: isinstance(value, Mapping), "a group of entries")
        return Entries(found, f"{self.place}{name}.")

    def _checked(self, name: str, default: object, holds, wanted: str):
        """The entry's value, or `default` for a missing entry. With the default None, the file may hold null.

        Raises FileFault for a missing entry without default, and for a value of which `holds` is false.
        """
        if name not in self.values:
            if default is _NEEDED:
                raise FileFault(f"the entry {self.place}{name} is missing")
            return default
        value = self.values[name]
        if default is None and value is None:
            return None
        if not holds(value):
            raise FileFault(f"{self.place}{name} is {shown(value)}, but must be {wanted}")
        return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
