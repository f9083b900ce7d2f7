"""The contract between the optimizer and any relation classifier, and the checks that come before its use."""
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
    """What stack of cross-attention maps a classifier expects.

    size: maps are [size, size].
    normalise: "resized": bilinear resize, then divide each map by its sum (+1e-8), when any layer's resolution
        differs from `size` (docs/method.md, "Maps"); raw probabilities otherwise. "always": always divide by the
        sum. "never": never.
    channels: number of layers x heads expected; None: any number (up to `max_channels`).
    backbone: "unet", "mmdit" or None (any).
    max_channels: length of a position table that may be longer than the stack; None: no limit.
    guessed: the classifier's file does not state `backbone`; it follows from the file's name or the network's depth.
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
    """What the optimizer sees of a classifier.

    channel_weights: [C], how well each channel knows where its word's object is, for the term that keeps an object in one
    place; None: all channels count alike there.
    """

    name: str
    relations: tuple[str, ...]
    layout: MapLayout
    channel_weights: Tensor | None = None

    def logits(self, subject: Tensor, object: Tensor, progress: Tensor) -> Tensor:
        """Logits over `relations`, differentiable with respect to the maps.

        subject, object: [B, channels, size, size]; progress: [B] in [0, 1), the fraction of the schedule that lies
        behind (step index / number of steps). Returns [B, len(relations)].
        """
        ...

    def to(self, device: torch.device | str) -> RelationClassifier:
        """The classifier on `device`: itself, moved, or a copy."""
        ...


def working_dtype(maps: Tensor) -> torch.dtype:
    """Precision for computing on maps: float64 stays (gradient checks), everything else is float32."""
    return torch.float64 if maps.dtype == torch.float64 else torch.float32


def check_layout(classifier: RelationClassifier, channels: int, backbone: str) -> None:
    """Raises ClassifierError, in words, where a model's `channels` maps of `backbone` do not fit the classifier."""
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


def check_maps(classifier: RelationClassifier, subject: Tensor, object: Tensor) -> None:
    """Raises ClassifierError where the two stacks are not [B, channels, size, size] of one shape."""
    size = classifier.layout.size
    if subject.shape != object.shape or subject.ndim != 4 or tuple(subject.shape[2:]) != (size, size):
        raise ClassifierError(f"Classifier {classifier.name!r} expects two stacks of maps [batch, channels, {size}, "
                              f"{size}]; it got {list(subject.shape)} and {list(object.shape)}. Resize the maps to "
                              "the classifier's layout first.")


def diagonal_name(predicates: Sequence[str]) -> str | None:
    """The one name of a diagonal given as two predicates, vertical first ("above and to the left of"), or None."""
    vertical = [name for name in predicates if name in (ABOVE, BELOW)]
    horizontal = [name for name in predicates if name in (LEFT, RIGHT)]
    if len(predicates) == 2 and len(vertical) == len(horizontal) == 1:
        return f"{vertical[0]} and {horizontal[0]}"
    return None


def relation_indices(classifier: RelationClassifier, predicates: Sequence[str]) -> list[int]:
    """Indices of the logits that are the targets of one relation; its loss is the mean of their cross-entropies.

    A diagonal is two predicates. Where the classifier has a class for the diagonal itself (the geometric one does),
    that class is the only target; otherwise both predicates are (docs/method.md, "The loss").
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
