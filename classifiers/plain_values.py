"""Plain values of a pickle that was read as data, in JSON's types: texts and numbers, also numpy's and small tensors.

An array is built from its shape, the name of a plain numeric type, and bytes that are counted; never from a dtype of the file.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Protocol

import numpy
from torch import Tensor

from ..files.faults import FileFault
from ..files.pickles import Call, Name

MOST_PLAIN = 2 ** 19
"""Cost of the plain values of an entry: 8 each, and 1 for each character of a text."""
_DEEPEST = 32
_MOST_AXES = 16
DTYPES = {f"torch.{name}" for name in (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")}
SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
PATHS = tuple(f"{module}.{kind}" for module in ("pathlib", "pathlib._local")
               for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"))
LISTS = ("builtins.set", "builtins.frozenset", "torch.Size")


class PlannedTensor(Protocol):
    """A tensor before it is made."""

    shape: tuple[int, ...]

    def build(self) -> Tensor:
        ...


@dataclass(frozen=True)
class _Numbers:
    """A numpy array or, without axes, scalar before it is made."""

    dtype: numpy.dtype
    shape: tuple[int, ...]
    content: bytes
    by_columns: bool = False


class PlainValues:
    """Turns inert data into JSON's types; values that are there by reference count each time."""

    def __init__(self, plan: Callable[[Call], PlannedTensor | None]) -> None:
        """plan: the tensor that a call stands for, if it does."""
        self._plan, self._left = plan, MOST_PLAIN

    def of(self, value: object, depth: int = 0):
        self._pay(8 + (len(value) if isinstance(value, (str, bytes)) else 0))
        if depth > _DEEPEST:
            raise FileFault(f"the file's entries are nested deeper than {_DEEPEST} levels")
        if isinstance(value, dict):
            return {str(self.of(key, depth + 1)): self.of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(item, depth + 1) for item in value]
        if isinstance(value, float):
            return value if math.isfinite(value) else str(value)
        if value is None or isinstance(value, (str, int, bool)):
            return value
        if isinstance(value, bytes):
            return str(value)
        if isinstance(value, Name) and value.text in DTYPES:
            return value.text
        if isinstance(value, Call):
            return self._of_call(value, depth + 1)
        raise FileFault("the file holds a value of an unknown kind")

    def _of_call(self, call: Call, depth: int):
        name, arguments = call.name, call.arguments
        if name in ARRAYS or name in SCALARS:
            return self._of_numbers(_array(call) if name in ARRAYS else _scalar(call), depth)
        if (plan := self._plan(call)) is not None:
            self._pay(8 * math.prod(max(length, 1) for length in plan.shape))
            return self.of(plan.build().tolist(), depth)
        if name == "numpy.dtype":
            return str(_dtype(call))
        if name == "_codecs.encode":
            return self.of(_bytes(call), depth)
        if name in PATHS:
            return self.of(str(PurePosixPath(*(part for part in arguments if isinstance(part, str)))), depth)
        if name == "torch.device":
            return self.of(":".join(str(part) for part in arguments if isinstance(part, (str, int))), depth)
        if name == "builtins.complex":
            return self.of([part for part in arguments if isinstance(part, float)], depth)
        if name == "argparse.Namespace":
            return self.of(call.state if isinstance(call.state, dict) else {}, depth)
        if name == "collections.Counter" or name in LISTS:
            return self.of(arguments[0] if arguments else [], depth)
        raise FileFault(f"the file holds a value of a kind that a classifier has no need of ({name})")

    def _of_numbers(self, numbers: _Numbers, depth: int):
        dtype, shape, content = numbers.dtype, numbers.shape, numbers.content
        self._pay(8 * math.prod(max(length, 1) for length in shape) + len(content))
        if len(content) != math.prod(shape) * dtype.itemsize:
            raise FileFault("an array in it has more or fewer numbers than it says")
        if dtype.kind == "U":
            return self.of(_text(numbers), depth)
        if dtype.kind == "c":
            return str(numpy.frombuffer(content, dtype))
        return self.of(numpy.frombuffer(content, dtype).reshape(shape, order="F" if numbers.by_columns else "C").tolist(), depth)

    def _pay(self, cost: int) -> None:
        self._left -= cost
        if self._left < 0:
            raise FileFault("the file's entries hold more values than a classifier has need of")


def _dtype(value: object) -> numpy.dtype:
    """A plain numeric type, or text, from its code and byte order alone."""
    if not (isinstance(value, Call) and value.name == "numpy.dtype" and value.arguments):
        raise FileFault("the type of an array in it is damaged")
    code, state = value.arguments[0], value.state
    order = state[1] if isinstance(state, tuple) and len(state) >= 2 else "|"
    if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16|U\d{1,4}", code) or order not in (
            "<", ">", "|", "=") or (isinstance(state, tuple) and any(part is not None for part in state[2:5])):
        raise FileFault("the file holds an array of something else than plain numbers")
    return numpy.dtype(code if order in "|=" else order + code)


def _scalar(call: Call) -> _Numbers:
    if len(call.arguments) != 2:
        raise FileFault("a number in it is damaged")
    return _Numbers(_dtype(call.arguments[0]), (), _bytes(call.arguments[1]))


def _array(call: Call) -> _Numbers:
    if not isinstance(call.state, tuple) or len(call.state) != 5:
        raise FileFault("an array in it is damaged")
    _, shape, dtype, by_columns, content = call.state
    return _Numbers(_dtype(dtype), wholes(shape), _bytes(content), by_columns is True)


def _text(numbers: _Numbers) -> str:
    """A numpy string; numpy itself does not check its letters."""
    if numbers.shape:
        raise FileFault("the file holds an array of texts")
    try:
        return numbers.content.decode("utf-32-be" if numbers.dtype.byteorder == ">" else "utf-32-le").rstrip("\0")
    except UnicodeDecodeError:
        raise FileFault("a text in it is damaged") from None


def _bytes(value: object) -> bytes:
    """Bytes, which the protocol of torch.save writes as a text of Latin-1."""
    if isinstance(value, Call) and value.name == "_codecs.encode" and value.arguments[1:] in (("latin1",), ("latin-1",)) \
            and isinstance(value.arguments[0], str) and all(ord(letter) < 256 for letter in value.arguments[0]):
        return value.arguments[0].encode("latin-1")
    if isinstance(value, Call) and value.name == "builtins.bytes" and not value.arguments:
        return b""
    if not isinstance(value, bytes):
        raise FileFault("the numbers of an array in it are damaged")
    return value


def whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2 ** 62:
        raise FileFault("a tensor in it is damaged")
    return value


def wholes(values: object) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)) or len(values) > _MOST_AXES:
        raise FileFault("a tensor in it is damaged")
    return tuple(whole(value) for value in values)
