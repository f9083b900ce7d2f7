"""Reads what `torch.save` wrote as data: tensors and plain values, out of a pickle of which nothing is run.

`torch.load(weights_only=True)` would follow a numpy dtype's own offsets into foreign memory, expand tensors, and read numbers
without bound. Here a tensor or array is built from its shape, the name of a plain numeric type, and bytes that are counted.
"""
from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.archives import Archive
from ..files.faults import FileFault, shown
from ..files.pickles import LARGEST_PICKLE, Call, Name, Pickle, Reference, read_pickle
from ..files.reading import faults_named
from .plain_values import ARRAYS, DTYPES, LISTS, PATHS, SCALARS, PlainValues, whole, wholes

UNPACKED = 2
"""Times the file's size: what its entries, and its weights as float32, may take. A network is held twice for a moment."""
ALLOWANCE = 2 ** 20
_LONGEST_AXIS = 65536
"""Of a tensor without elements."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in {
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Long": torch.int64,
    "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool}.items()}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")
_TENSORS = ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v3")
_PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_TYPED = "torch._tensor._rebuild_from_type_v2"
_OTHER_TENSORS = tuple(f"torch._utils._rebuild_{kind}" for kind in (
    "meta_tensor_no_storage", "sparse_tensor", "qtensor", "device_tensor_from_numpy", "device_tensor_from_cpu_tensor",
    "nested_tensor", "wrapper_subclass"))
_KNOWN = {*_STORAGES, *DTYPES, *_UNTYPED, *_TENSORS, *_PARAMETERS, _TYPED, *_OTHER_TENSORS, *SCALARS, *ARRAYS, *PATHS,
          *LISTS, "torch.Tensor", "torch.nn.parameter.Parameter", "torch.device", "torch.storage.TypedStorage",
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
        return PlainValues(self._plan).of(value)

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
            name = next((item.text for item in arguments[4:] if isinstance(item, Name) and item.text in DTYPES), "")
            dtype = getattr(torch, name.removeprefix("torch."), None) if name else None
            if dtype is None or dtype not in _STORAGES.values():
                return None
        offset, shape, stride = arguments[1:4]
        shape = shape.arguments[0] if isinstance(shape, Call) and shape.name == "torch.Size" and shape.arguments else shape
        if key not in self.storages:
            raise FileFault("the numbers of a tensor are missing in it")
        return _TensorPlan(self.storages[key], dtype, whole(offset), wholes(shape), wholes(stride))


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
    return identity[2], _STORAGES.get(kind), whole(identity[4])
