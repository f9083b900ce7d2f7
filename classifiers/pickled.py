"""Reads what `torch.save` wrote as data: tensors and plain values, out of a pickle of which nothing is run.

`torch.load(weights_only=True)` would follow a numpy dtype's own offsets into foreign memory, expand tensors, and read numbers
without bound. Here a tensor or array is built from its shape, the name of a plain numeric type, and bytes that are counted.
"""
from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy
import torch
from torch import Tensor

from ..files.archives import Archive
from ..files.faults import FileFault, shown
from ..files.pickles import LARGEST_PICKLE, Call, Name, Pickle, Reference, read_pickle
from ..files.reading import faults_named

UNPACKED = 2
"""Times the file's size: what its entries, and its weights as float32, may take. A network is held twice for a moment."""
ALLOWANCE = 2 ** 20
MOST_PLAIN = 2 ** 19
"""Cost of the plain values of an entry: 8 each, and 1 for each character of a text."""
_DEEPEST = 32
_MOST_AXES = 16
_LONGEST_AXIS = 65536
"""Of a tensor without elements."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool}.items()}
_DTYPES = {f"torch.{name}" for name in (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64", "complex128",
    "float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v3")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_TYPED = "torch._tensor._rebuild_from_type_v2"
_OTHER_TENSORS = tuple(f"torch._utils._rebuild_{kind}" for kind in (
    "meta_tensor_no_storage", "sparse_tensor", "qtensor", "device_tensor_from_numpy", "device_tensor_from_cpu_tensor",
    "nested_tensor", "wrapper_subclass"))
_SCALARS = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
_ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_PATHS = tuple(f"{module}.{kind}" for module in ("pathlib", "pathlib._local")
               for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"))
_LISTS = ("builtins.set", "builtins.frozenset", "torch.Size")
_KNOWN = {*_STORAGES, *_DTYPES, *_UNTYPED, *_TENSORS, *_PARAMETERS, _TYPED, *_OTHER_TENSORS, *_SCALARS, *_ARRAYS, *_PATHS,
          *_LISTS, "torch.Tensor", "torch.nn.parameter.Parameter", "torch.device", "torch.storage.TypedStorage",
          "torch.storage._load_from_bytes", "torch.serialization._get_layout", "numpy.dtype", "numpy.ndarray",
          "argparse.Namespace", "_codecs.encode", "builtins.bytes", "builtins.complex", "collections.OrderedDict",
          "collections.Counter"}
_ANOTHER_FILE = "the file is cut off or not a PyTorch checkpoint"


class ForeignCode(FileFault):
    """A pickle refers to code, or to types that hold more than data."""


@dataclass
class Checkpoint:
    """What `torch.save` wrote: inert data, and the bytes of its tensors. size: of the file, in bytes."""

    content: object
    storages: Mapping[str, bytearray]
    size: int

    def weights(self, entries: Mapping) -> dict[str, object]:
        """The tensors of a state dict, on the CPU; what is no dense tensor of a known type stays as it is.

        Their elements are summed, and held against the bytes behind them, before the first is made.
        """
        names = {str(name) if isinstance(name, (str, int)) else "": value for name, value in entries.items()}
        plans = {name: self._plan(value) for name, value in names.items()}
        needed = 4 * sum(math.prod(plan.shape) for plan in plans.values() if plan)
        if needed > UNPACKED * self.size + ALLOWANCE:
            raise FileFault("the file's tensors would take more memory than the file has numbers for")
        return {name: names[name] if plan is None else plan.build() for name, plan in plans.items()}

    def kind(self, value: object) -> str:
        """In a word."""
        return type(value).__name__ if not isinstance(value, Call) else "Tensor" if self._plan(value) else "object"

    def plain(self, value: object) -> object:
        """`value` in JSON's types: arrays and small tensors become lists, what JSON cannot hold its text."""
        return _Plain(self).of(value, 0)

    def _plan(self, value: object, depth: int = 0) -> _TensorPlan | None:
        if not isinstance(value, Call) or depth > 4:
            return None
        arguments = value.arguments
        if value.name in _PARAMETERS and arguments:
            return self._plan(arguments[0], depth + 1)
        if value.name == _TYPED and len(arguments) >= 3 and isinstance(arguments[0], Name) and isinstance(arguments[2], tuple):
            return self._plan(Call(arguments[0].text, arguments[2]), depth + 1)
        if value.name not in _TENSORS:
            return None
        if len(arguments) < 4 or not isinstance(arguments[0], Reference):
            raise FileFault("a tensor in it is damaged")
        key, dtype, _ = _storage(arguments[0])
        if dtype is None:
            name = next((item.text for item in arguments[4:] if isinstance(item, Name) and item.text in _DTYPES), "")
            dtype = getattr(torch, name.removeprefix("torch."), None) if name else None
            if dtype is None or dtype not in _STORAGES.values():
                return None
        offset, shape, stride = arguments[1:4]
        shape = shape.arguments[0] if isinstance(shape, Call) and shape.name == "torch.Size" and shape.arguments else shape
        if key not in self.storages:
            raise FileFault("the numbers of a tensor are missing in it")
        return _TensorPlan(self.storages[key], dtype, _whole(offset), _wholes(shape), _wholes(stride))


@dataclass(frozen=True)
class _TensorPlan:
    """A tensor before it is made: a view of `content`, all of whose elements lie within it and are there once."""

    content: bytearray
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        there = len(self.content) // self.dtype.itemsize
        count = math.prod(self.shape)
        last = self.offset + sum((length - 1) * step for length, step in zip(self.shape, self.stride, strict=False))
        if len(self.shape) != len(self.stride) or max(self.shape, default=0) > max(there, _LONGEST_AXIS) or (
                count and (count > there or last >= there)):
            raise FileFault("a tensor in it says that it has more elements than there are numbers")

    def build(self) -> Tensor:
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=self.dtype)
        count = len(self.content) // self.dtype.itemsize
        return torch.frombuffer(self.content, dtype=self.dtype, count=count).as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class _Numbers:
    """A numpy array or, without axes, scalar before it is made."""

    dtype: numpy.dtype
    shape: tuple[int, ...]
    content: bytes
    by_columns: bool = False


class _Plain:
    """Turns inert data into JSON's types; values that are there by reference count each time."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._left = checkpoint, MOST_PLAIN

    def of(self, value: object, depth: int):
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
        if isinstance(value, Name) and value.text in _DTYPES:
            return value.text
        if isinstance(value, Call):
            return self._of_call(value, depth + 1)
        raise FileFault("the file holds a value of an unknown kind")

    def _of_call(self, call: Call, depth: int):
        name, arguments = call.name, call.arguments
        if name in _ARRAYS or name in _SCALARS:
            return self._of_numbers(_array(call) if name in _ARRAYS else _scalar(call), depth)
        if (plan := self._checkpoint._plan(call)) is not None:
            self._pay(8 * math.prod(max(length, 1) for length in plan.shape))
            return self.of(plan.build().tolist(), depth)
        if name == "numpy.dtype":
            return str(_dtype(call))
        if name == "_codecs.encode":
            return self.of(_bytes(call), depth)
        if name in _PATHS:
            return self.of(str(PurePosixPath(*(part for part in arguments if isinstance(part, str)))), depth)
        if name == "torch.device":
            return self.of(":".join(str(part) for part in arguments if isinstance(part, (str, int))), depth)
        if name == "builtins.complex":
            return self.of([part for part in arguments if isinstance(part, float)], depth)
        if name == "argparse.Namespace":
            return self.of(call.state if isinstance(call.state, dict) else {}, depth)
        if name == "collections.Counter" or name in _LISTS:
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


def read_checkpoint(path: Path) -> Checkpoint:
    """Raises ForeignCode naming what is no data, FileFault for everything else that is wrong."""
    with faults_named():
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(2)
    return _read_zip(path, size) if start == b"PK" else _read_legacy(path, size)


def _read_zip(path: Path, size: int) -> Checkpoint:
    with Archive(path, UNPACKED * size + ALLOWANCE) as archive:
        found = [name for name in archive.names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(found) != 1:
            raise FileFault(_ANOTHER_FILE)
        if archive.size(found[0]) > LARGEST_PICKLE:
            raise FileFault(f"the file's entries take more than {LARGEST_PICKLE} bytes beside the weights")
        root = found[0].removesuffix("data.pkl")
        if f"{root}byteorder" in archive.names and archive.read(f"{root}byteorder").strip() != b"little":
            raise FileFault("the file was written on a machine with another order of bytes")
        pickle = _without_code(read_pickle(io.BytesIO(archive.read(found[0]))))
        storages = {}
        for key, (dtype, count) in _storages(pickle).items():
            content = bytearray(archive.read(f"{root}data/{key}"))
            if len(content) != count * (dtype.itemsize if dtype else 1):
                raise FileFault("a tensor in it has more or fewer numbers than it says")
            storages[key] = content
        return Checkpoint(pickle.value, storages, size)


def _read_legacy(path: Path, size: int) -> Checkpoint:
    """The format before PyTorch 1.6: several pickles, then the numbers of each storage behind their count."""
    with faults_named(), path.open("rb") as file:
        stream = io.BytesIO(file.read(LARGEST_PICKLE))
        if _begins_as(stream) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
            raise FileFault(_ANOTHER_FILE)
        read_pickle(stream)  # of the machine that wrote it
        pickle = _without_code(read_pickle(stream))
        wanted, keys = _storages(pickle), read_pickle(stream).value
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(wanted):
            raise FileFault("the numbers of a tensor are missing in the file")
        file.seek(stream.tell())
        storages = {}
        for key in keys:
            dtype, count = wanted[key]
            length = count * (dtype.itemsize if dtype else 1)
            if int.from_bytes(file.read(8), "little") != count or length > size - file.tell():
                raise FileFault("the file is cut off or damaged")
            storages[key] = bytearray(file.read(length))
        return Checkpoint(pickle.value, storages, size)


def _begins_as(stream: io.BytesIO) -> tuple[object, object]:
    """The values of the first two pickles. A bare pickle has one; what it refers to is named before it is refused."""
    try:
        return _without_code(read_pickle(stream)).value, read_pickle(stream).value
    except ForeignCode:
        raise
    except FileFault as error:
        raise FileFault(_ANOTHER_FILE) from error


def _without_code(pickle: Pickle) -> Pickle:
    if foreign := [name for name in pickle.names if name not in _KNOWN]:
        raise ForeignCode(", ".join(shown(name).strip("'") for name in foreign[:3]))
    return pickle


def _storages(pickle: Pickle) -> dict[str, tuple[torch.dtype | None, int]]:
    """Type and count of each storage that the pickle refers to; None: bytes without a type."""
    found: dict[str, tuple[torch.dtype | None, int]] = {}
    for reference in pickle.references:
        key, dtype, count = _storage(reference)
        if found.setdefault(key, (dtype, count)) != (dtype, count):
            raise FileFault("two tensors in it disagree about their numbers")
    return found


def _storage(reference: Reference) -> tuple[str, torch.dtype | None, int]:
    """Key, type and count of elements."""
    identity = reference.identity
    if not (isinstance(identity, tuple) and len(identity) >= 5 and identity[0] == "storage" and isinstance(identity[1], Name)
            and isinstance(identity[2], str) and len(identity[2]) <= 100):
        raise FileFault("the file is damaged")
    kind = identity[1].text
    if kind not in _STORAGES and kind not in _UNTYPED:
        raise FileFault(f"the file holds numbers of a kind that a classifier has no need of ({kind})")
    return identity[2], _STORAGES.get(kind), _whole(identity[4])


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
    return _Numbers(_dtype(dtype), _wholes(shape), _bytes(content), by_columns is True)


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


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2 ** 62:
        raise FileFault("a tensor in it is damaged")
    return value


def _wholes(values: object) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)) or len(values) > _MOST_AXES:
        raise FileFault("a tensor in it is damaged")
    return tuple(_whole(value) for value in values)
