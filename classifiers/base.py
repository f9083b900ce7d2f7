"""The contract between the optimizer and a relation classifier, and the checks on its inputs."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..files.faults import shown
from ..prompts.relations import ABOVE, BELOW, LEFT, RIGHT

BACKBONES = ("unet", "mmdit")
NORMALISATIONS = ("resized", "always", "never")
_BACKBONE_WORDS = {"unet": "a UNet", "mmdit": "a FLUX model"}


class ClassifierError(ValueError):
    """A classifier cannot be read or used; the message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class MapLayout:
    """The stack of cross-attention maps that a classifier expects.

    size: each map is [size, size]; maps of another resolution are resized bilinearly.
    normalise: "always" divides each map by its sum (+1e-8). "never" keeps raw probabilities. "resized" divides only if the
        resolution of some layer differs from `size` (docs/method.md, "Maps").
    channels: expected number of layers x heads; None: any number up to `max_channels`.
    backbone: "unet", "mmdit" or None (any).
    max_channels: length of the position table, which may exceed the stack; None: no limit.
    guessed: True if the file does not state `backbone`, which then follows from the file's name or the network's depth.
    """

    size: int = 16
    normalise: str = "resized"
    channels: int | None = None
    backbone: str | None = None
    max_channels: int | None = None
    guessed: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ClassifierError(f"Map layout: size must be 1 or more, not {self.size}.")
        if self.normalise not in NORMALISATIONS:
            raise ClassifierError(f"Map layout: normalise must be one of {', '.join(NORMALISATIONS)}, "
                                  f"not {shown(self.normalise)}.")
        if self.backbone is not None and self.backbone not in BACKBONES:
            raise ClassifierError(f"Map layout: backbone must be one of {', '.join(BACKBONES)} or None, "
                                  f"not {shown(self.backbone)}.")


@runtime_checkable
class RelationClassifier(Protocol):
    """The interface of a classifier to the optimizer.

    name: for messages and reports; relations: names in the order of the logits; layout: the maps that it expects.
    channel_weights: [C], how well each channel localises its word's object. The compactness term weights channels by it;
        None weights all channels equally.
    """

    name: str
    relations: tuple[str, ...]
    layout: MapLayout
    channel_weights: Tensor | None = None

    def logits(self, subject_maps: Tensor, object_maps: Tensor, progress: Tensor) -> Tensor:
        """Logits over `relations`, differentiable with respect to the maps.

        subject_maps, object_maps: [B, channels, size, size].
        progress: [B] in [0, 1), the completed fraction of the schedule (step index / number of steps).
        Returns [B, len(relations)].
        """
        ...

    def to(self, device: torch.device | str) -> RelationClassifier:
        """The classifier on `device`. It may be a copy or the same object, moved."""
        ...


def working_dtype(maps: Tensor) -> torch.dtype:
    """Precision for computing on maps: float64 for float64 maps (gradient checks), float32 for all others."""
    return torch.float64 if maps.dtype == torch.float64 else torch.float32


def check_layout(classifier: RelationClassifier, channels: int, backbone: str) -> None:
    """Raises ClassifierError where a model of `backbone` with `channels` maps per word does not fit the classifier."""
    layout = classifier.layout
    fits_backbone = layout.backbone is None or layout.backbone == backbone
    fits_count = layout.channels is None or layout.channels == channels
    if not (fits_backbone and fits_count):
        count = "the maps" if layout.channels is None else f"{layout.channels} maps"
        source = "" if layout.backbone is None else f" of {_words(layout.backbone)}"
        guess = "" if not layout.guessed else (
            f" The file does not say so: {_words(layout.backbone)} is a guess. If it is wrong, choose {backbone!r} as "
            "'backbone' in Relation Classifier Loader.")
        raise ClassifierError(f"Classifier {classifier.name!r}: this classifier was trained on {count}{source}; this "
                              f"model gives {channels} maps of {_words(backbone)}. Load a classifier trained for this "
                              f"model, or use the geometric one.{guess}")
    if layout.max_channels is not None and channels > layout.max_channels:
        raise ClassifierError(f"Classifier {classifier.name!r}: this classifier has positions for at most "
                              f"{layout.max_channels} maps; this model gives {channels} maps of {_words(backbone)}. "
                              "Load a classifier trained for this model, or use the geometric one.")


def check_maps(classifier: RelationClassifier, subject_maps: Tensor, object_maps: Tensor) -> None:
    """Raises ClassifierError unless both stacks are [B, channels, size, size], of the same shape."""
    size = classifier.layout.size
    if subject_maps.shape != object_maps.shape or subject_maps.ndim != 4 or tuple(subject_maps.shape[2:]) != (size, size):
        raise ClassifierError(f"Classifier {classifier.name!r} expects two stacks of maps [batch, channels, {size}, "
                              f"{size}]; it got {list(subject_maps.shape)} and {list(object_maps.shape)}. Resize the "
                              "maps to the classifier's layout first.")


def diagonal_name(predicates: Sequence[str]) -> str | None:
    """The name of a diagonal given as two predicates ("above and to the left of"), or None if they are no diagonal."""
    vertical = [name for name in predicates if name in (ABOVE, BELOW)]
    horizontal = [name for name in predicates if name in (LEFT, RIGHT)]
    if len(predicates) == 2 and len(vertical) == len(horizontal) == 1:
        return f"{vertical[0]} and {horizontal[0]}"
    return None


def relation_indices(classifier: RelationClassifier, predicates: Sequence[str]) -> list[int]:
    """Indices of the target logits of one relation. The relation's loss is the mean of their cross-entropies.

    A diagonal has two predicates. If the classifier has a class for the diagonal, as the geometric one does, that class is
    the only target; otherwise both predicates are targets (docs/method.md, "The loss").
    Raises ClassifierError naming every unknown relation and the known ones.
    """
    if isinstance(predicates, str):
        predicates = [predicates]
    diagonal = diagonal_name(predicates)
    if diagonal in classifier.relations:
        predicates = [diagonal]
    unknown = [name for name in predicates if name not in classifier.relations]
    if unknown:
        raise ClassifierError(f"Classifier {classifier.name!r} does not know the relation "
                              f"{', '.join(repr(name) for name in unknown)}. It knows: "
                              f"{', '.join(classifier.relations)}. Use one of these, or load another classifier.")
    if not predicates:
        raise ClassifierError(f"Classifier {classifier.name!r}: a relation without a predicate was asked for. "
                              f"Use one of: {', '.join(classifier.relations)}.")
    return [classifier.relations.index(name) for name in predicates]


def _words(backbone: str) -> str:
    return _BACKBONE_WORDS.get(backbone, f"a model of kind {backbone!r}")
