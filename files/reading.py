"""Reads JSON and text within bounds, so that a small file cannot cost much memory or time.

Every fault is a FileFault. Its message never quotes the content, because the file may be private.
"""
from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from .faults import FileFault, reason

LARGEST_DOCUMENT = 2 ** 23
MOST_VALUES = 200_000
DEEPEST = 64
LARGEST_ITEM = 2 ** 18
"""Of a list or object that is read piece by piece: GQA's scene graphs have 6 kB."""
LARGEST_HEADER = 2 ** 20
_CHUNK = 2 ** 16
# A string without its closing quote matches too. Otherwise the search would restart at every quote, in quadratic time.
_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_SPACES = re.compile(r"[ \t\r\n]*")


def read_text(path: Path, most: int = LARGEST_DOCUMENT) -> str:
    """The text of a file in UTF-8, or UTF-16 with a byte order mark. most: limit in bytes. Raises FileFault."""
    with faults_named(), open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise FileFault(f"the file is larger than {most} bytes")
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise FileFault("the file is not written in UTF-8") from None  # the error would quote a byte


def parse_json(text: str) -> object:
    """Parses JSON of bounded depth and number of values. Raises FileFault, also for NaN and infinity."""
    if text.count(",") + text.count("[") + text.count("{") > MOST_VALUES:
        raise FileFault(f"the file holds more than {MOST_VALUES} values")
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > DEEPEST:
            raise FileFault(f"the file is nested deeper than {DEEPEST} levels")
    with _json_faults():
        return _DECODER.decode(text)


def read_json(path: Path) -> object:
    return parse_json(read_text(path))


def iterate_json(path: Path, kind: type) -> Iterator[tuple[str | int, dict]]:
    """The objects in a JSON file, read one by one, so that the file may be larger than memory.

    kind: list for a file that is one list, dict for one that is one object. Yields each object with its number from 1 (list)
    or its key (dict). Raises FileFault.
    """
    opening, closing = ("[", "]") if kind is list else ("{", "}")
    with faults_named(), _json_faults(), open(path, encoding="utf-8-sig", newline="") as file:
        text = _JsonText(file)
        if text.next() != opening:
            raise FileFault(f"the file is not one {'list' if kind is list else 'object'}")
        text.take(opening)
        number = 0
        while text.next() != closing:
            if number:
                text.take(",")
            number += 1
            key: str | int = number
            if kind is dict:
                key = text.value('"')
                text.take(":")
            yield key, text.value("{")
        text.take(closing)
        if text.next():
            raise FileFault("something follows behind its end")


class _JsonText:
    """A buffer of JSON text that has been read but not yet parsed."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._text, self._place = file, "", 0

    def next(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self._place = _SPACES.match(self._text, self._place).end()
            if self._place < len(self._text) or not self._more():
                return self._text[self._place:self._place + 1]

    def take(self, character: str) -> None:
        if self.next() != character:
            raise FileFault("the file is not JSON, or is cut off")
        self._place += 1

    def value(self, opening: str):
        """The next value, which begins with `opening`."""
        if self.next() != opening:
            raise FileFault(f"a value of another kind stands where {'an object' if opening == '{' else 'a text'} must be")
        while True:
            try:
                value, self._place = _DECODER.raw_decode(self._text, self._place)
                return value
            except json.JSONDecodeError:
                if len(self._text) - self._place > LARGEST_ITEM:
                    raise FileFault(f"an object is larger than {LARGEST_ITEM} bytes") from None
                if not self._more(len(self._text)):  # doubling keeps the total cost of all tries linear
                    raise

    def _more(self, count: int = 0) -> bool:
        chunk = self._file.read(max(count, _CHUNK))
        self._text, self._place = self._text[self._place:] + chunk, 0
        return bool(chunk)


@contextlib.contextmanager
def faults_named() -> Iterator[None]:
    """Turns the system's errors of opening and reading into FileFaults."""
    try:
        yield
    except FileNotFoundError:
        raise FileFault("there is no such file") from None
    except IsADirectoryError:
        raise FileFault("the file is a folder") from None
    except OSError as error:
        raise FileFault(f"the file cannot be read ({reason(error)})") from None


@contextlib.contextmanager
def _json_faults() -> Iterator[None]:
    try:
        yield
    except FileFault:
        raise
    except RecursionError:
        raise FileFault("the file is nested too deeply") from None
    except UnicodeDecodeError:
        raise FileFault("the file is not written in UTF-8") from None
    except json.JSONDecodeError as error:
        raise FileFault(f"the file is not JSON, or is cut off (line {error.lineno}, column {error.colno})") from None
    except ValueError:  # a number with thousands of digits
        raise FileFault("the file holds a number that no computer has use for") from None


def check_header(path: Path, most: int = LARGEST_HEADER) -> None:
    """Raises FileFault for a safetensors file whose header is longer than `most` bytes, or than the file."""
    with faults_named(), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = file.seek(0, 2)
    if not 2 <= length <= size - 8:
        raise FileFault("the file is cut off or not a safetensors file")
    if length > most:
        raise FileFault(f"the file's header is larger than {most} bytes")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise FileFault("the file holds a number that is not finite")
    return value


def _refuse(constant: str) -> None:
    raise FileFault(f"the file holds {constant}, which is not a number of JSON")


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)
