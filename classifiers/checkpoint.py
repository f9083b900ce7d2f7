"""Classifier files: reads and writes our safetensors format, and reads the published pickled format (published.py).

A safetensors file describes the classifier in one metadata entry, `relation_classifier`, as JSON. It is a single entry
because safetensors writes several in random order, and equal classifiers must give equal files. The JSON holds
`format_version`, `config`, `input_channels`, `relations`, `layout`, `steps`, `training` and `licence`. A calibrated
geometric classifier has `kind` and `settings` instead of `config`, `input_channels`, `relations` and `steps`.

Reading a file never runs code from it. Every fault raises a ClassifierError naming the file.
"""
from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..files.entries import Entries
from ..files.faults import FileFault, reason
from ..files.reading import check_header, parse_json
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
# Tables whose singleton dimensions may differ in published files.
_RESHAPED = ("positional_encoding.pe", "query_vector")
# Published files hold 256 rows. The head's sequence has one element, so only the first row is ever added.
_FIRST_ROW_ONLY = "relation_classifier.positional_encoding.pe"
_NAMED = 4
_LONGEST_NAME = 100
_LONGEST_TABLE = 65536
_LARGEST_SETTING = 1000
_LARGEST_MAP = 256


@dataclass(frozen=True)
class ClassifierFile:
    """The content of a network's file in either format, before the network is built."""

    config: NetworkConfig
    input_channels: int
    relations: tuple[str, ...]
    layout: MapLayout
    steps: StepMapping
    weights: dict[str, Tensor]
    training: Mapping
    licence: str


def load_classifier(path: str | os.PathLike, *, backbone: str | None = None,
                    relations: Sequence[str] | None = None) -> LearnedClassifier | GeometricClassifier:
    """Reads a classifier onto the CPU. Its name is the file's name without the suffix.

    backbone, relations: override those of the file, or the guess for a published file.
    Raises ClassifierError for a file that is missing, empty, cut off, damaged or no classifier.
    """
    path = Path(path)
    try:
        _check_file(path)
        with torch.inference_mode(False):
            if path.suffix.lower() == ".safetensors":
                content = _read_safetensors(path)
                if isinstance(content, GeometricClassifier):
                    if backbone or relations:
                        raise ClassifierError("this is a calibrated geometric classifier, whose backbone and relations are "
                                              "fixed. Leave them out (input 'backbone': \"from the file\").")
                    return content
            else:
                content = ClassifierFile(**read_published(path, backbone, relations))
            layout = content.layout if backbone is None else _with_backbone(content.layout, backbone)
            return LearnedClassifier(_build(content), relations or content.relations, layout, content.steps,
                                     name=path.stem, training=content.training, licence=content.licence)
    except ClassifierError as error:
        raise ClassifierError(f"{path.name}: {error}") from error
    except OSError as error:
        raise ClassifierError(f"{path.name}: the file cannot be read ({reason(error)}). Check its permissions and those of its "
                              "folder.") from error
    except MemoryError as error:
        raise ClassifierError(f"{path.name}: there is not enough memory to read the file.") from error


def save_classifier(path: str | os.PathLike, classifier: LearnedClassifier | GeometricClassifier,
                    precision: torch.dtype = torch.float32) -> None:
    """Writes a classifier in our format. An existing file is replaced whole or not at all.

    precision: dtype of the stored weights; a classifier always computes in float32. Equal classifiers give equal bytes.
    `classifier.training` may hold JSON's types only. Raises ClassifierError for a geometric classifier without channel
    weights and for weights that overflow `precision`, WriteError if the file cannot be written.
    """
    replace_file(Path(path), classifier_bytes(classifier, precision))


def classifier_bytes(classifier: LearnedClassifier | GeometricClassifier, precision: torch.dtype = torch.float32) -> bytes:
    """The content of a classifier's file."""
    description, weights = _described(classifier, precision)
    try:
        text = json.dumps(description, allow_nan=False)
    except ValueError as error:
        raise ClassifierError(f"Classifier {classifier.name!r}: a number in its description is not finite, which no file may "
                              "hold.") from error
    return save(weights, {METADATA_KEY: text})


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
        raise ClassifierError(f"this is not a classifier file: its name must end in {', '.join(SUFFIXES)}.")
    if not path.is_file():
        raise ClassifierError(f"There is no classifier file {path}. Put it there, or choose another one.")
    if path.stat().st_size == 0:
        raise ClassifierError("the file is empty (0 bytes). Copy or download it again.")


def _read_safetensors(path: Path) -> ClassifierFile | GeometricClassifier:
    try:
        check_header(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except FileFault as error:
        raise ClassifierError(f"{error}. Copy or download it again.") from error
    except OSError:
        raise
    except Exception as error:  # safetensors documents no list of what it raises on damaged bytes
        raise ClassifierError("the file is cut off or not a safetensors file. Copy or download it again.") from error
    if METADATA_KEY not in metadata:
        raise ClassifierError("this safetensors file is not a relation classifier: its metadata has no entry "
                              f"{METADATA_KEY!r}. Choose another file, or convert a published .pth with "
                              "`python dev.py run -m learn_to_steer.classifiers.convert`.")
    try:
        entries = Entries.of(parse_json(metadata[METADATA_KEY]))
        if entries.whole("format_version") != FORMAT_VERSION:
            raise ClassifierError(f"format version {entries.whole('format_version')} is unknown here (known: "
                                  f"{FORMAT_VERSION}). Update the node pack.")
        if entries.text("kind", default=None) == GEOMETRIC:
            return _geometric(entries, weights, path.stem)
        return _learned(entries, weights)
    except FileFault as error:
        raise ClassifierError(f"its metadata is damaged: {error}. Get the file again.") from error


def _learned(entries: Entries, weights: dict[str, Tensor]) -> ClassifierFile:
    steps = entries.group("steps")
    return ClassifierFile(
        config=NetworkConfig.from_dict(entries.group("config").values), input_channels=entries.whole("input_channels"),
        relations=entries.texts("relations"), layout=_layout(entries.group("layout")),
        steps=StepMapping(steps.wholes("timesteps"), steps.whole("num_timesteps", 1)), weights=weights,
        training=dict(entries.group("training").values), licence=entries.text("licence"))


def _layout(entries: Entries) -> MapLayout:
    return MapLayout(size=entries.whole("size", 1, _LARGEST_MAP, default=MapLayout.size),
                     normalise=entries.text("normalise", default=MapLayout.normalise),
                     channels=entries.whole("channels", 1, _LONGEST_TABLE, default=None),
                     backbone=entries.text("backbone", default=None),
                     max_channels=entries.whole("max_channels", 1, _LONGEST_TABLE, default=None))


def _geometric(entries: Entries, weights: Mapping[str, Tensor], name: str) -> GeometricClassifier:
    if set(weights) != {WEIGHTS}:
        raise ClassifierError(f"a geometric classifier holds the tensor {WEIGHTS!r} alone, this file holds "
                              f"{_some(sorted(weights)) or 'nothing'}. Get the file again.")
    layout, settings = _layout(entries.group("layout")), entries.group("settings")
    known = {field.name for field in fields(GeometricSettings)}
    if unknown := [name for name in settings.values if name not in known]:
        raise FileFault(f"the settings {_some(unknown)} are unknown")
    numbers = {name: settings.number(name, 0, _LARGEST_SETTING) for name in settings.values}
    classifier = GeometricClassifier(
        GeometricSettings(**numbers), layout.size, weights[WEIGHTS], name=name, backbone=layout.backbone,
        training=dict(entries.group("training").values), licence=entries.text("licence"))
    if classifier.layout.channels != layout.channels:
        raise ClassifierError(f"its metadata says {layout.channels} channels, it has weights for "
                              f"{classifier.layout.channels}. The file is damaged; get it again.")
    return classifier


def _with_backbone(layout: MapLayout, backbone: str) -> MapLayout:
    return replace(layout, backbone=backbone, guessed=False)


def _build(content: ClassifierFile) -> RelationNetwork:
    """The network with the file's weights. Checks that names and shapes fit and that values are finite.

    Weights are moved out of `content`, so that they are not held twice.
    """
    if not 1 <= content.input_channels <= _LONGEST_TABLE or not content.relations:
        raise ClassifierError(f"{content.input_channels} input channels and {len(content.relations)} relations cannot "
                              "be right. The file is damaged; get it again.")
    # The meta device allocates nothing, so a damaged config cannot exhaust memory.
    with torch.device("meta"):
        network = RelationNetwork(content.config, content.input_channels, len(content.relations))
    wanted = network.state_dict()
    weights = content.weights
    for name in [name for name in weights if name not in wanted and _unused(name, content.config)]:
        del weights[name]
    _check_names(wanted, weights)
    ready = {name: _checked(name, weights.pop(name), wanted[name].shape) for name in list(weights)}
    broken = [name for name, tensor in ready.items() if not tensor.isfinite().all()]
    if broken:
        raise ClassifierError(f"{_some(broken)} holds values that are not finite (NaN or infinity). The file is "
                              "damaged, or its training diverged; get or train it again.")
    network.load_state_dict(ready, assign=True)
    return network


def _unused(name: str, config: NetworkConfig) -> bool:
    """Whether the config switches this weight off. A file may hold it all the same."""
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
    if name == _FIRST_ROW_ONLY and tensor.numel() and tensor.shape[-1:] == shape[-1:]:
        tensor = tensor.reshape(-1, shape[-1])[:1]
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
    return ", ".join(name[:_LONGEST_NAME] for name in names[:_NAMED]) + more
