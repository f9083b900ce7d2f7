"""Classifier files: our own safetensors format, written and read, and the published pickled one, read (published.py).

A safetensors file carries everything in one metadata entry, `relation_classifier`, as JSON (one entry, because
safetensors writes several in random order, and equal classifiers shall give equal files): `format_version`, `config`,
`input_channels`, `relations`, `layout`, `steps`, `training`, `licence`; a geometric classifier that was calibrated to a
model has `kind` and `settings` instead of a network's entries. Reading either kind of file never runs code
from it, and every fault is a ClassifierError that names the file.
"""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files.writing import replace_file
from .base import ClassifierError, MapLayout
from .geometric import GeometricClassifier, GeometricSettings
from .learned import LearnedClassifier
from .network import NetworkConfig, RelationNetwork
from .published import read_published
from .steps import StepMapping

METADATA_KEY = "relation_classifier"
FORMAT_VERSION = 1
GEOMETRIC, WEIGHTS = "geometric", "channel_weights"
SUFFIXES = (".safetensors", ".pth", ".pt")
# Tables that published files may hold with other singleton dimensions than ours.
_RESHAPED = ("positional_encoding.pe", "query_vector")
_NAMED = 4
_LONGEST_TABLE = 65536


@dataclass(frozen=True)
class ClassifierFile:
    """What a file of either kind says, before a network is built from it."""

    config: NetworkConfig
    input_channels: int
    relations: tuple[str, ...]
    layout: MapLayout
    steps: StepMapping
    weights: Mapping[str, Tensor]
    training: Mapping
    licence: str


def load_classifier(path: str | os.PathLike, *, backbone: str | None = None,
                    relations: Sequence[str] | None = None) -> LearnedClassifier | GeometricClassifier:
    """Reads a classifier on the CPU; its name is the file's.

    backbone, relations: override what the file says (or what is guessed for a published file).
    Raises ClassifierError for a file that is missing, empty, cut off, of another kind, or damaged in any way.
    """
    path = Path(path)
    _check_file(path)
    try:
        with torch.inference_mode(False):
            if path.suffix.lower() == ".safetensors":
                content = _read_safetensors(path)
                if isinstance(content, GeometricClassifier):
                    if backbone or relations:
                        raise ClassifierError("this is a calibrated geometric classifier, whose backbone and relations are "
                                              "fixed. Leave them out.")
                    return content
            else:
                content = ClassifierFile(**read_published(path, backbone, relations))
            layout = content.layout if backbone is None else _with_backbone(content.layout, backbone)
            return LearnedClassifier(_build(content), relations or content.relations, layout, content.steps,
                                     name=path.stem, training=content.training, licence=content.licence)
    except ClassifierError as error:
        raise ClassifierError(f"{path.name}: {error}") from error


def save_classifier(path: str | os.PathLike, classifier: LearnedClassifier | GeometricClassifier,
                    precision: torch.dtype = torch.float32) -> None:
    """Writes our own format; equal classifiers give equal bytes. A file already there is replaced whole or not at all.

    precision: how a network's weights are stored (a classifier computes in float32 whatever its file holds).
    `classifier.training` must hold JSON's types. Raises ClassifierError for the geometric rule without channel weights,
    and for weights that `precision` cannot hold.
    """
    path = Path(path)
    description, weights = _described(classifier, precision)
    replace_file(path, save(weights, {METADATA_KEY: json.dumps(description)}))


def _described(classifier: LearnedClassifier | GeometricClassifier,
               precision: torch.dtype) -> tuple[dict, dict[str, Tensor]]:
    """Metadata and tensors of a file."""
    common = {"format_version": FORMAT_VERSION, "layout": vars(classifier.layout), "training": classifier.training,
              "licence": classifier.licence}
    if isinstance(classifier, GeometricClassifier):
        if classifier.channel_weights is None:
            raise ClassifierError(f"Classifier {classifier.name!r}: the built-in rule has no weights to save.")
        return {**common, "kind": GEOMETRIC, "settings": asdict(classifier.settings)}, {WEIGHTS: classifier.channel_weights}
    network = classifier.network
    state = {name: tensor.detach().cpu() for name, tensor in network.state_dict().items()}
    weights = {name: tensor.to(precision).contiguous() for name, tensor in state.items()}
    if beyond := [name for name in state if weights[name].isinf().any() and state[name].isfinite().all()]:
        raise ClassifierError(f"Classifier {classifier.name!r}: {_some(beyond)} has values too large for {precision}. Save it "
                              "in single precision.")
    steps = {"timesteps": list(classifier.steps.timesteps), "num_timesteps": classifier.steps.num_timesteps}
    return ({**common, "config": network.config.to_dict(), "input_channels": network.input_channels,
             "relations": classifier.relations, "steps": steps}, weights)


def _check_file(path: Path) -> None:
    if path.suffix.lower() not in SUFFIXES:
        raise ClassifierError(f"{path.name} is not a classifier file: its name must end in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise ClassifierError(f"There is no classifier file {path}. Put it there, or choose another one.")
    if path.stat().st_size == 0:
        raise ClassifierError(f"{path.name} is empty (0 bytes). Copy or download it again.")


def _read_safetensors(path: Path) -> ClassifierFile | GeometricClassifier:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except (SafetensorError, OSError, ValueError) as error:
        raise ClassifierError(f"the file is cut off or not a safetensors file ({error}). Copy or download it "
                              "again.") from error
    if METADATA_KEY not in metadata:
        raise ClassifierError("this safetensors file is not a relation classifier: its metadata has no entry "
                              f"{METADATA_KEY!r}. Choose another file, or convert a published .pth with "
                              "`python dev.py run -m learn_to_steer.classifiers.convert`.")
    try:
        description = json.loads(metadata[METADATA_KEY])
        if description["format_version"] != FORMAT_VERSION:
            raise ClassifierError(f"format version {description['format_version']!r} is unknown here (known: "
                                  f"{FORMAT_VERSION}). Update the node pack.")
        known = {field.name for field in fields(MapLayout)}
        if description.get("kind") == GEOMETRIC:
            return _geometric(description, weights, path.stem)
        return ClassifierFile(
            config=NetworkConfig.from_dict(description["config"]), input_channels=int(description["input_channels"]),
            relations=tuple(map(str, description["relations"])),
            layout=MapLayout(**{key: value for key, value in description["layout"].items() if key in known}),
            steps=StepMapping(**description["steps"]), weights=weights, training=dict(description["training"]),
            licence=str(description["licence"]))
    except ClassifierError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ClassifierError(f"its metadata is damaged ({type(error).__name__}: {error}). Get the file "
                              "again.") from error


def _geometric(description: Mapping, weights: Mapping[str, Tensor], name: str) -> GeometricClassifier:
    if set(weights) != {WEIGHTS}:
        raise ClassifierError(f"a geometric classifier holds the tensor {WEIGHTS!r} alone, this file holds "
                              f"{_some(sorted(weights)) or 'nothing'}. Get the file again.")
    layout = description["layout"]
    classifier = GeometricClassifier(
        GeometricSettings(**description["settings"]), int(layout["size"]), weights[WEIGHTS], name=name,
        backbone=layout["backbone"], training=dict(description["training"]), licence=str(description["licence"]))
    if classifier.layout.channels != layout["channels"]:
        raise ClassifierError(f"its metadata says {layout['channels']} channels, it has weights for "
                              f"{classifier.layout.channels}. The file is damaged; get it again.")
    return classifier


def _with_backbone(layout: MapLayout, backbone: str) -> MapLayout:
    return MapLayout(**{**vars(layout), "backbone": backbone})


def _build(content: ClassifierFile) -> RelationNetwork:
    """The network with the file's weights, checked: names, shapes, finite values."""
    if not 1 <= content.input_channels <= _LONGEST_TABLE or not content.relations:
        raise ClassifierError(f"{content.input_channels} input channels and {len(content.relations)} relations cannot "
                              "be right. The file is damaged; get it again.")
    # On the meta device nothing is allocated, so that a damaged config cannot ask for all memory.
    with torch.device("meta"):
        network = RelationNetwork(content.config, content.input_channels, len(content.relations))
    wanted = network.state_dict()
    weights = {name: tensor for name, tensor in content.weights.items()
               if name in wanted or not _unused(name, content.config)}
    _check_names(wanted, weights)
    ready = {name: _checked(name, tensor, wanted[name].shape) for name, tensor in weights.items()}
    broken = [name for name, tensor in ready.items() if not tensor.isfinite().all()]
    if broken:
        raise ClassifierError(f"{_some(broken)} holds values that are not finite (NaN or infinity). The file is "
                              "damaged, or its training diverged; get or train it again.")
    network.load_state_dict(ready, assign=True)
    return network


def _unused(name: str, config: NetworkConfig) -> bool:
    """Weights that a file may hold although its config switches them off."""
    extractor = config.extractor
    return (extractor.use_mean and name.startswith("object_extractor.")) or \
        (extractor.step_mode == "off" and name.startswith("object_extractor.timestep_embedding."))


def _check_names(wanted: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    missing = [name for name in wanted if name not in weights]
    unexpected = [name for name in weights if name not in wanted]
    if missing or unexpected:
        parts = [f"{word}: {_some(names)}"
                 for word, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise ClassifierError(f"the weights do not fit the config; {'; '.join(parts)}. The file is not a relation "
                              "classifier of a known kind, or it is damaged.")


def _checked(name: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or not tensor.is_floating_point():
        raise ClassifierError(f"{name} is not a dense tensor of floating-point numbers. The file is damaged.")
    if name.endswith(_RESHAPED) and _squeezed(tensor.shape) == _squeezed(shape):
        tensor = tensor.reshape(shape)
    if tensor.shape != shape:
        raise ClassifierError(f"{name} has shape {list(tensor.shape)}, but by the config it must be {list(shape)}. "
                              "The file is damaged, or its config belongs to another one.")
    return tensor.detach().float().clone(memory_format=torch.contiguous_format)


def _squeezed(shape: torch.Size) -> list[int]:
    return [length for length in shape if length != 1]


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
