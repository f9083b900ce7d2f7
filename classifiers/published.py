"""The published checkpoint format (docs/method.md, "Published checkpoints"): interprets the entries of the pickled dict.

pickled.py reads the pickle as data. This module checks every entry that it uses.
"""
from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..files.faults import FileFault, shown
from .base import ClassifierError, MapLayout
from .network import NetworkConfig
from .pickled import Checkpoint, ForeignCode, read_checkpoint
from .steps import PAPER_TIMESTEPS, StepMapping

LOGGER = logging.getLogger("learn_to_steer")
LICENCE = ("The terms of the checkpoint's source apply. The Learn-to-Steer authors' own checkpoints are for "
           "non-commercial use only.")
# Layers x heads of known models (docs/method.md, "Maps").
_SD_CHANNELS = {"(sd|stablediffusion)v?2": 195, "(sd|stablediffusion)v?1": 128}
_MODEL_KEYS = ("backbone", "model", "model_name", "model_id", "model_type", "name")
_ENTRIES = ("config", "training_config", "rel_name_to_idx", "idx_to_rel_name", "input_channels", *_MODEL_KEYS)
_ANOTHER_TYPE = "an entry of the file has another type than it should"
_MOST_CHANNELS = 65536
_LONGEST_NAME = 200


def read_published(path: Path, backbone: str | None, relations: Sequence[str] | None) -> dict[str, Any]:
    """The fields of checkpoint.ClassifierFile, by name.

    backbone, relations: override those of the file, or the guess.
    Raises ClassifierError for a file that is damaged, holds code or is no relation classifier.
    """
    checkpoint = _read(path)
    try:
        return _fields(path, checkpoint, backbone, relations)
    except FileFault as error:
        raise ClassifierError(f"{_ANOTHER_TYPE}: {error}. The file is damaged or of an "
                              "unknown kind; get it again.") from error


def _fields(path: Path, checkpoint: Checkpoint, backbone: str | None, relations: Sequence[str] | None) -> dict[str, Any]:
    found = checkpoint.content
    if not isinstance(found, dict) or not isinstance(found.get("model_state_dict"), dict):
        raise ClassifierError("this is not a relation classifier: a published checkpoint is a dict with the entries "
                              "model_state_dict, config and rel_name_to_idx. Choose another file.")
    content = checkpoint.plain({name: found[name] for name in _ENTRIES if name in found
                                and (name not in _MODEL_KEYS or isinstance(found[name], str))})
    training = content.get("training_config")
    training = {} if training is None else training
    if not isinstance(training, dict):
        raise ClassifierError(f"the entry training_config is a {checkpoint.kind(found['training_config'])} instead "
                              "of a dict. The file is "
                              "damaged or of an unknown kind; get it again.")
    if not isinstance(content.get("config"), dict):
        raise ClassifierError("the entry config is missing. The file is damaged or of an unknown kind; get it again.")
    config = NetworkConfig.from_dict(content["config"])
    weights = {_bare(name): tensor for name, tensor in checkpoint.weights(found["model_state_dict"]).items()}
    names = tuple(relations) if relations else _relations(content)
    return {"config": config, "input_channels": _input_channels(content, weights, config), "relations": names,
            "layout": _layout(path, content, training, config, weights, backbone), "steps": _steps(training, config),
            "weights": weights, "training": training, "licence": LICENCE}


def _read(path: Path) -> Checkpoint:
    try:
        return read_checkpoint(path)
    except ForeignCode as error:
        raise ClassifierError(f"the file holds code or a type that a classifier has no need of ({error}); nothing of it was "
                              "run. Do not use this file; get one from a source you trust.") from error
    except FileFault as error:
        raise ClassifierError(f"{error}. Copy or download it again.") from error


def _bare(name: str) -> str:
    """A weight's name without the prefixes of DataParallel and torch.compile."""
    for prefix in ("_orig_mod.", "module."):
        name = name.removeprefix(prefix)
    return name


def _relations(content: Mapping) -> tuple[str, ...]:
    """Names in the order of the logits."""
    by_name, by_index = content.get("rel_name_to_idx"), content.get("idx_to_rel_name")
    if isinstance(by_name, dict) and by_name:
        pairs = [(index, name) for name, index in by_name.items()]
    elif isinstance(by_index, dict) and by_index:
        pairs = [(int(index) if re.fullmatch(r"\d{1,5}", index) else index, name) for index, name in by_index.items()]
    else:
        raise ClassifierError("the relations are missing (rel_name_to_idx). Get the file again, or name them when "
                              "converting: `--relations above below \"to the left of\" ...`.")
    try:
        places = {_whole(index, "an index"): name for index, name in pairs}
    except FileFault as error:
        raise ClassifierError(f"the relations are damaged: {_ANOTHER_TYPE} ({error}). Get the file again.") from error
    if sorted(places) != list(range(len(pairs))):
        raise ClassifierError(f"the relations are damaged: their indices are {str(sorted(places)[:20])}, not 0 to "
                              f"{len(pairs) - 1}. Get the file again.")
    if not all(isinstance(name, str) and name.strip() and len(name) <= _LONGEST_NAME for name in places.values()):
        raise ClassifierError("the relations are damaged: a name is empty, too long or no text. Get the file again.")
    return tuple(places[index] for index in range(len(pairs)))


def _input_channels(content: Mapping, weights: Mapping, config: NetworkConfig) -> int:
    """Length of the position table: from the table itself or, without one, from the entry input_channels."""
    table = weights.get("object_extractor.positional_encoding.pe")
    if isinstance(table, Tensor) and table.numel() and table.numel() % config.d_model == 0:
        return table.numel() // config.d_model
    return max(1, _whole(content.get("input_channels", 1), "input_channels", _MOST_CHANNELS))


def _steps(training: Mapping, config: NetworkConfig) -> StepMapping:
    try:
        length = _whole(training.get("num_timesteps", config.num_timesteps), "num_timesteps", _MOST_CHANNELS)
        listed = training.get("timesteps")
        if listed is None and length not in PAPER_TIMESTEPS:
            raise ClassifierError(f"training_config.timesteps is missing, and for a schedule of {length} steps there is no "
                                  "default. Get the file again.")
        if not isinstance(listed, (list, type(None))):
            raise FileFault(f"timesteps is {shown(listed)}, but must be a list")
        return StepMapping(PAPER_TIMESTEPS[length] if listed is None else [_whole(step, "a step") for step in listed], length)
    except FileFault as error:
        raise ClassifierError(f"training_config.timesteps is damaged: {_ANOTHER_TYPE} ({error}). Get the file again.") from error


def _whole(value: object, place: str, most: int = 2 ** 31) -> int:
    """A whole number from 0 to `most`, also if written as a float (5.0). Raises FileFault naming `place`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1 or not 0 <= value <= most:
        raise FileFault(f"{place} is {shown(value)}, but must be a whole number from 0 to {most}")
    return int(value)


def _layout(path: Path, content: Mapping, training: Mapping, config: NetworkConfig, weights: Mapping,
            backbone: str | None) -> MapLayout:
    words = [group[key][:_LONGEST_NAME] for group in (training, content["config"], content) for key in _MODEL_KEYS
             if isinstance(group.get(key), str)]
    stated = backbone or _backbone_by_name(words)
    backbone = stated or _guessed_backbone(path, config)
    # SD's layers have several resolutions, so its maps are always resized and therefore divided by their sum.
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
    """The backbone by the file's name or, failing that, by the network's depth, which differs between the paper's families."""
    named = _backbone_by_name([path.stem])
    if named is not None:
        return named
    guess = {2: "unet", 4: "mmdit"}.get(config.extractor.num_layers)
    LOGGER.warning("%s does not say which model it was trained on; from its network it is taken for %s. Choose its backbone in "
                   "Relation Classifier Loader to be explicit, or convert it with --backbone.", path.name, guess or "fit for any")
    return guess


def _native(training: Mapping, config: NetworkConfig) -> bool:
    """Whether the training maps had the classifier's own resolution and were therefore not normalised."""
    size = training.get("orig_map_size")
    if size is None:
        return training.get("num_timesteps", config.num_timesteps) == 4
    return size == config.map_size or size == [config.map_size] * 2
