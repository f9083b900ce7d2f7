"""Reads the published checkpoint format (docs/method.md, "Published checkpoints"): a pickled dict, never executed.

`torch.load(weights_only=True)` builds tensors and plain containers only; the harmless types that training scripts
leave in such dicts (numpy scalars and arrays, paths, namespaces) are allowed for the length of one call.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import logging
import pathlib
import pickle
import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch
from torch import Tensor

from .base import ClassifierError, MapLayout
from .network import NetworkConfig
from .steps import PAPER_TIMESTEPS, StepMapping

LOGGER = logging.getLogger("learn_to_steer")
LICENCE = ("The terms of the checkpoint's source apply. The Learn-to-Steer authors' own checkpoints are for "
           "non-commercial use only.")
# Layers x heads of known models (docs/method.md, "Maps").
_SD_CHANNELS = {"(sd|stablediffusion)v?2": 195, "(sd|stablediffusion)v?1": 128}
# Older ones could be made to run code in spite of weights_only (CVE-2025-32434).
SAFE_TORCH = (2, 6)
_HARMLESS_MODULES = ("torch", "collections", "numpy", "_codecs", "pathlib", "argparse")
_MODEL_KEYS = ("backbone", "model", "model_name", "model_id", "model_type", "name")


def read_published(path: Path, backbone: str | None, relations: Sequence[str] | None) -> dict[str, Any]:
    """The fields of checkpoint.ClassifierFile, by name.

    backbone, relations: used in place of what the file says or what is guessed from it.
    """
    content = _unpickle(path)
    try:
        return _fields(path, content, backbone, relations)
    except ClassifierError:
        raise
    except (TypeError, ValueError, OverflowError, AttributeError, RuntimeError) as error:
        raise ClassifierError(f"an entry of the file has another type than it should ({error}). The file is damaged or of an "
                              "unknown kind; get it again.") from error


def _fields(path: Path, content: object, backbone: str | None, relations: Sequence[str] | None) -> dict[str, Any]:
    if not isinstance(content, Mapping) or not isinstance(content.get("model_state_dict"), Mapping):
        raise ClassifierError("this is not a relation classifier: a published checkpoint is a dict with the entries "
                              "model_state_dict, config and rel_name_to_idx. Choose another file.")
    training = content.get("training_config")
    if not isinstance(training, (Mapping, argparse.Namespace, type(None))):
        raise ClassifierError(f"the entry training_config is a {type(training).__name__} instead of a dict. The file is damaged "
                              "or of an unknown kind; get it again.")
    training = dict(vars(training) if isinstance(training, argparse.Namespace) else training or {})
    if not isinstance(content.get("config"), Mapping):
        raise ClassifierError("the entry config is missing. The file is damaged or of an unknown kind; get it again.")
    config = NetworkConfig.from_dict(_plain(content["config"]))
    weights = {_bare(str(name)): tensor for name, tensor in content["model_state_dict"].items()}
    names = tuple(relations) if relations else _relations(content)
    return {"config": config, "input_channels": _input_channels(content, weights, config), "relations": names,
            "layout": _layout(path, content, training, config, weights, backbone), "steps": _steps(training, config),
            "weights": weights, "training": _plain(training), "licence": LICENCE}


def _unpickle(path: Path) -> object:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < SAFE_TORCH:
        raise ClassifierError(f"reading a pickled checkpoint safely needs PyTorch {'.'.join(map(str, SAFE_TORCH))} or "
                              f"newer; here is {torch.__version__}. Update PyTorch, or convert the file to "
                              ".safetensors on a machine that has it "
                              "(`python dev.py run -m learn_to_steer.classifiers.convert`).")
    try:
        with _allowed_only(_harmless_types()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's readers raise on damaged bytes: there is no closed list
        names = _foreign_names(path, str(error)) if isinstance(error, pickle.UnpicklingError) else []
        if not names:
            raise _broken(path, error) from error
        raise ClassifierError(f"the file holds code or a type that a classifier has no need of ({', '.join(names)}); "
                              "nothing of it was run. Do not use this file; get one from a source you "
                              "trust.") from error


@contextlib.contextmanager
def _allowed_only(types: list) -> Iterator[None]:
    """These types alone are allowed, whatever others have registered before; what they registered stays.

    ComfyUI itself puts a function that returns None in the place of numpy's scalars (host: comfy.utils), so
    that a number in a file of numpy 1 would come out as None.
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(types)
        yield
    finally:
        meanwhile = set(torch.serialization.get_safe_globals()) - set(types)  # torch registers its own when first used
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals([*before, *meanwhile])


def _foreign_names(path: Path, refusal: str) -> list[str]:
    """Names of code in the file's pickle, beside tensors and containers; read from its opcodes, for the message.

    refusal: what torch said; a name that it speaks of counts whatever its module.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = b"".join(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    else:
        pickled = path.read_bytes()
    names: list[str] = []
    stream = io.BytesIO(pickled)
    try:
        while stream.tell() < len(pickled):  # files of old PyTorch hold several pickles, then raw numbers
            names += _globals(stream)
    except (ValueError, IndexError, KeyError, UnicodeError):
        LOGGER.debug("What follows in %s is not a pickle.", path)
    allowed = {item[1] if isinstance(item, tuple) else f"{item.__module__}.{item.__qualname__}" for item in _harmless_types()}
    return [name for name in dict.fromkeys(names) if name not in allowed
            and (name in refusal or name.split(".")[0] not in _HARMLESS_MODULES)][:3]


def _globals(stream: BinaryIO) -> Iterator[str]:
    """Every "module.name" that the next pickle refers to, by its opcodes alone; ValueError where it is damaged."""
    words: list[str | None] = []
    memo: list[str | None] = []
    last = None
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL":
            yield argument.replace(" ", ".")
        elif opcode.name == "STACK_GLOBAL":
            yield ".".join(str(word) for word in words[-2:])
        elif opcode.name == "MEMOIZE":
            memo.append(last)
        elif opcode.name in ("BINGET", "LONG_BINGET") and argument < len(memo):
            words.append(memo[argument])
        last = argument if isinstance(argument, str) else None
        if last is not None:
            words.append(last)


def _broken(path: Path, error: Exception) -> ClassifierError:
    with path.open("rb") as file:
        start = file.read(4)
    if start[:2] == b"PK" and not zipfile.is_zipfile(path):
        what = "the file is cut off: its end is missing"
    else:
        what = f"the file is cut off or not a PyTorch checkpoint ({type(error).__name__})"
    return ClassifierError(f"{what}. Copy or download it again.")


def _harmless_types() -> list:
    """Types that hold data only, under the names that old and new numpy and other systems write."""
    multiarray = numpy._core.multiarray if hasattr(numpy, "_core") else numpy.core.multiarray
    data_types = [getattr(numpy.dtypes, name) for name in numpy.dtypes.__all__ if name != "ObjectDType"] \
        if hasattr(numpy, "dtypes") else []
    allowed: list = [numpy.dtype, numpy.ndarray, argparse.Namespace, *data_types]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        allowed += [(multiarray.scalar, f"{module}.scalar"), (multiarray._reconstruct, f"{module}._reconstruct")]
    for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        allowed += [(pathlib.PurePosixPath, f"{module}.{kind}") for module in ("pathlib", "pathlib._local")]  # 3.13's name
    return allowed


def _bare(name: str) -> str:
    """A weight's name without what DataParallel and torch.compile put in front of it."""
    for prefix in ("_orig_mod.", "module."):
        name = name.removeprefix(prefix)
    return name


def _relations(content: Mapping) -> tuple[str, ...]:
    """Names in the order of the logits."""
    by_name, by_index = content.get("rel_name_to_idx"), content.get("idx_to_rel_name")
    try:
        if isinstance(by_name, Mapping) and by_name:
            places = {int(index): str(name) for name, index in by_name.items()}
            count = len(by_name)
        elif isinstance(by_index, Mapping) and by_index:
            places = {int(index): str(name) for index, name in by_index.items()}
            count = len(by_index)
        else:
            raise ClassifierError("the relations are missing (rel_name_to_idx). Get the file again, or name them when "
                                  "converting: `--relations above below \"to the left of\" ...`.")
    except (TypeError, ValueError) as error:
        raise ClassifierError(f"the relations are damaged (rel_name_to_idx: {error}). Get the file again.") from error
    if sorted(places) != list(range(count)):
        raise ClassifierError(f"the relations are damaged: their indices are {sorted(places)}, not 0 to {count - 1}. "
                              "Get the file again.")
    return tuple(places[index] for index in range(count))


def _input_channels(content: Mapping, weights: Mapping, config: NetworkConfig) -> int:
    """Length of the position table: the table itself says it, else the entry of that name."""
    table = weights.get("object_extractor.positional_encoding.pe")
    if isinstance(table, Tensor) and table.numel() and table.numel() % config.d_model == 0:
        return table.numel() // config.d_model
    try:
        return max(1, int(content.get("input_channels", 1)))
    except (TypeError, ValueError) as error:
        raise ClassifierError(f"input_channels is {content.get('input_channels')!r}, not a number. Get the file "
                              "again.") from error


def _steps(training: Mapping, config: NetworkConfig) -> StepMapping:
    try:
        length = int(training.get("num_timesteps", config.num_timesteps))
        listed = training.get("timesteps")
        return StepMapping(PAPER_TIMESTEPS[length] if listed is None else listed, length)
    except KeyError as error:
        raise ClassifierError(f"training_config.timesteps is missing, and for a schedule of {length} steps there is "
                              "no default. Get the file again.") from error
    except (TypeError, ValueError) as error:
        if isinstance(error, ClassifierError):
            raise
        raise ClassifierError(f"training_config.timesteps is damaged ({error}). Get the file again.") from error


def _layout(path: Path, content: Mapping, training: Mapping, config: NetworkConfig, weights: Mapping,
            backbone: str | None) -> MapLayout:
    words = [str(group[key]) for group in (training, content["config"], content) for key in _MODEL_KEYS if key in group]
    stated = backbone or _backbone_by_name(words)
    backbone = stated or _guessed_backbone(path, config)
    # SD's layers have several resolutions, so its maps are always resized, and then divided by their sum.
    native = backbone == "mmdit" and _native(training, config)
    channels = None
    if backbone == "mmdit":
        channels = _input_channels(content, weights, config)
    elif backbone == "unet":
        squeezed = [re.sub(r"[^a-z0-9]", "", word.lower()) for word in (*words, path.stem)]
        places = _input_channels(content, weights, config)
        channels = next((count for mark, count in _SD_CHANNELS.items()
                         if count <= places and any(re.search(mark, word) for word in squeezed)), None)
    return MapLayout(size=config.map_size, normalise="never" if native else "always", channels=channels,
                     backbone=backbone, guessed=stated is None and backbone is not None)


def _backbone_by_name(words: Sequence[str]) -> str | None:
    for word in words:
        if "flux" in word.lower() or "schnell" in word.lower():
            return "mmdit"
        if re.search(r"unet|stable|(^|[^a-z])sd", word.lower()):
            return "unet"
    return None


def _guessed_backbone(path: Path, config: NetworkConfig) -> str | None:
    """From the file's name, else the depth that the paper gives each family."""
    named = _backbone_by_name([path.stem])
    if named is not None:
        return named
    guess = {2: "unet", 4: "mmdit"}.get(config.extractor.num_layers)
    LOGGER.warning("%s does not say which model it was trained on; from its network it is taken for %s. Choose its backbone in "
                   "Relation Classifier Loader to be explicit, or convert it with --backbone.", path.name, guess or "fit for any")
    return guess


def _native(training: Mapping, config: NetworkConfig) -> bool:
    """Whether the maps it was trained on had the classifier's resolution already, and so stayed raw."""
    size = training.get("orig_map_size")
    if size is None:
        return int(training.get("num_timesteps", config.num_timesteps)) == 4
    size = _plain(size)
    return size == config.map_size or size == [config.map_size] * 2


def _plain(value: object) -> Any:
    """`value` in JSON's types: numpy scalars and arrays become numbers and lists, anything unknown its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (numpy.generic, numpy.ndarray)):
        return _plain(value.tolist())
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)
