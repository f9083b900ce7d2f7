"""Geometric classifier: no training, no weights. Soft centres and extents of the two averaged maps -> logits over directions.

A relation's logit is minus its *violation* over a temperature. The violation of "above" is a hinge on how far the
subject's centre lies above the object's (GenEval's rule: distance beyond a fraction of the two extents), plus a
weighted hinge on the sideways offset; a diagonal has a hinge on both axes. So the cross-entropy to "above" pulls the
subject up and into line, and its probability is high only where "above" holds with a margin and nothing else does.
All lengths are fractions of the picture's side; y grows downward.

Not every layer and head localises its word's object. Channel weights, calibrated on a few labelled pictures
(training/calibration.py), adapt the rule to one model; without them all channels count alike.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prompts.relations import ABOVE, BELOW, LEFT, RIGHT
from .base import ClassifierError, MapLayout, RelationClassifier, check_maps, working_dtype

# (x, y) direction in which the subject lies from the object
DIRECTIONS = {
    ABOVE: (0, -1),
    BELOW: (0, 1),
    LEFT: (-1, 0),
    RIGHT: (1, 0),
    f"{ABOVE} and {LEFT}": (-1, -1),
    f"{ABOVE} and {RIGHT}": (1, -1),
    f"{BELOW} and {LEFT}": (-1, 1),
    f"{BELOW} and {RIGHT}": (1, 1),
}
# Extent of a uniform bar in standard deviations: a soft map's counterpart of a box's side.
_SIDE_PER_DEVIATION = 12 ** 0.5
# Root-mean-square radius of one object's map that costs nothing, as a fraction of the picture's side.
COMPACT_RADIUS = 0.15
# Uniform weight under every map: a flat map becomes the uniform distribution instead of 0 / 0.
_FLOOR = 1e-6
# Deviation, as a share of a channel's mean, below which it fades out as flat: rounding must not be blown up to a map.
_FLAT = 1e-3
_TINY = 1e-20


@dataclass(frozen=True)
class GeometricSettings:
    """Knobs of the geometric loss; lengths are fractions of the picture's side.

    sharpness: power applied to the averaged map, its minimum subtracted, before it becomes a distribution.
    margin: distance wanted along the relation's axis, after the extents' share is taken off.
    extent_share: share of both objects' extents that is taken off every distance (GenEval: 0.1).
    diagonal_margin: the same as `margin`, on each axis of a diagonal.
    tolerance: sideways offset that costs nothing.
    sideways: weight of the hinge on the sideways offset.
    pairwise: 0: violation of the mean position; 1: mean violation over all pairs of subject and object cells, so that
        mass on the wrong side counts even where the centre is right (a doubled object); between: a mixture.
    temperature: violation that lowers a logit by 1.
    """

    sharpness: float = 2.0
    margin: float = 0.3
    extent_share: float = 0.1
    diagonal_margin: float = 0.2
    tolerance: float = 0.125
    sideways: float = 0.5
    pairwise: float = 0.0
    temperature: float = 0.05

    def __post_init__(self) -> None:
        if not (self.sharpness >= 1 and self.temperature > 0 and 0 <= self.pairwise <= 1):
            raise ClassifierError("Geometric classifier: sharpness must be 1 or more, temperature above 0 and pairwise "
                                  f"between 0 and 1; got {self}.")


@dataclass(frozen=True)
class SoftObject:
    """Where one object's attention lies: its distribution over the cells and that distribution's moments.

    rows, columns: marginal distributions, [B, size]; centre, deviation: mean and standard deviation as (x, y), [B, 2],
    fractions of the side with 0 in the middle and y growing downward.
    """

    rows: Tensor
    columns: Tensor
    centre: Tensor
    deviation: Tensor


class GeometricClassifier(RelationClassifier):
    """Differentiable. Without `channel_weights` the same for every backbone, for any number of channels of `size` x `size`.

    channel_weights: [C], 0 or more, not all 0, for one model's channels in their order; `backbone`: that model's.
    training, licence: as of a LearnedClassifier. Raises ClassifierError for other weights.
    """

    def __init__(self, settings: GeometricSettings | None = None, size: int = 16, channel_weights: Tensor | None = None, *,
                 name: str = "geometric", backbone: str | None = None, training: Mapping | None = None,
                 licence: str = "") -> None:
        self.name = name
        self.relations = tuple(DIRECTIONS)
        self.settings = settings or GeometricSettings()
        self.training, self.licence = dict(training or {}), licence
        self.channel_weights = None if channel_weights is None else _checked(channel_weights, name)
        channels = None if channel_weights is None else len(channel_weights)
        self.layout = MapLayout(size=size, normalise="always", channels=channels, backbone=backbone)

    def logits(self, subject: Tensor, object: Tensor, progress: Tensor) -> Tensor:
        """[B, C, size, size] twice -> [B, 8]; `progress` plays no part. See RelationClassifier.logits."""
        check_maps(self, subject, object)
        settings = self.settings
        first, second = (locate(maps, settings.sharpness, self.channel_weights) for maps in (subject, object))
        violations = [_violation(first, second, direction, settings) for direction in DIRECTIONS.values()]
        return -torch.stack(violations, dim=1) / settings.temperature

    def to(self, device: torch.device | str) -> GeometricClassifier:
        """Returns itself; channel weights move to the maps' device on use."""
        return self


def _checked(weights: Tensor, name: str) -> Tensor:
    """Channel weights [C] of classifier `name` as an ordinary tensor. ClassifierError unless 0 or more and not all 0."""
    with torch.inference_mode(False):
        weights = weights.detach().float().clone()
    if not (weights.ndim == 1 and weights.isfinite().all() and (weights >= 0).all() and weights.any()):
        raise ClassifierError(f"Classifier {name!r}: channel weights must be a list of numbers of 0 or more, not all 0. "
                              "Calibrate it on more labelled pictures.")
    return weights


def averaged(maps: Tensor, weights: Tensor | None) -> Tensor:
    """[B, C, H, W] -> [B, H, W]: the mean over channels; with weights [C] that of the standardised channels, where positive.

    A standardised channel has mean 0 and deviation 1 over its cells, so that a channel whose word takes much of the attention
    everywhere does not outweigh one that localises it. A flat channel counts as 0.
    """
    maps = maps.to(working_dtype(maps))
    if weights is None:
        return maps.mean(dim=1)
    level = maps.mean(dim=(2, 3), keepdim=True)
    variance = (maps - level).square().mean(dim=(2, 3), keepdim=True)
    standard = (maps - level) * (variance + (_FLAT * level).square() + _TINY).rsqrt()
    return torch.einsum("bchw,c->bhw", standard, (weights / weights.sum()).to(maps)).relu()


def locate(maps: Tensor, sharpness: float, weights: Tensor | None = None) -> SoftObject:
    """Averages maps [B, C, H, W] over channels and turns the result into a distribution with its moments.

    weights: see `averaged`. A flat map becomes the uniform distribution; its gradient is zero, not NaN.
    """
    mean = averaged(maps, weights)
    low, high = mean.amin(dim=(1, 2), keepdim=True), mean.amax(dim=(1, 2), keepdim=True)
    span = high - low
    # Scaled to [0, 1] first, so that the power does not underflow on maps whose cells are about 1/256.
    scaled = (mean - low) / torch.where(span > 0, span, torch.ones_like(span))
    weights = scaled ** sharpness + _FLOOR
    cells = weights / weights.sum(dim=(1, 2), keepdim=True)
    rows, columns = cells.sum(dim=2), cells.sum(dim=1)
    (x, spread_x), (y, spread_y) = _moments(columns), _moments(rows)
    return SoftObject(rows, columns, torch.stack([x, y], dim=1), torch.stack([spread_x, spread_y], dim=1))


def _positions(like: Tensor) -> Tensor:
    """Centres of a line of cells as fractions of its length, 0 in the middle: [size]."""
    size = like.shape[-1]
    return (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size - 0.5


def _moments(marginal: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a distribution [B, size] over a line of cells."""
    positions = _positions(marginal)
    centre = marginal @ positions
    variance = (marginal * (positions - centre[:, None]) ** 2).sum(dim=1)
    # A single cell has a width too; this also keeps the root's slope finite.
    return centre, (variance + 1 / (12 * marginal.shape[-1] ** 2)).sqrt()


def compactness_penalty(subject: Tensor, object: Tensor, weights: Tensor | None = None) -> Tensor:
    """How far the two objects' attention spreads beyond COMPACT_RADIUS, [B], as a fraction of the picture's side.

    subject, object: [B, channels, H, W]; weights: see `averaged`. Large where an object is about to be drawn twice, which
    a relation's loss does not see: its centre may be right all the same.
    """
    radii = (locate(maps, GeometricSettings.sharpness, weights).deviation.square().sum(dim=1).sqrt()
             for maps in (subject, object))
    return sum(torch.relu(radius - COMPACT_RADIUS) for radius in radii)


def _violation(subject: SoftObject, object: SoftObject, direction: tuple[int, int],
               settings: GeometricSettings) -> Tensor:
    """By how much, [B], the subject fails to lie in `direction` from the object; 0 where it does, with the margin."""
    margin = settings.diagonal_margin if all(direction) else settings.margin
    total = 0
    for axis, sign in enumerate(direction):
        if sign:
            total = total + _along(subject, object, axis, sign, margin, settings)
        else:
            offset = (subject.centre[:, axis] - object.centre[:, axis]).abs()
            total = total + settings.sideways * torch.relu(offset - settings.tolerance)
    return total


def _along(subject: SoftObject, object: SoftObject, axis: int, sign: int, margin: float,
           settings: GeometricSettings) -> Tensor:
    """Hinge, [B], on the signed distance along one axis (0: x, 1: y)."""
    distance = sign * (subject.centre[:, axis] - object.centre[:, axis])
    sides = _SIDE_PER_DEVIATION * (subject.deviation[:, axis] + object.deviation[:, axis])
    of_means = torch.relu(margin - (distance - settings.extent_share * sides))
    if settings.pairwise == 0:
        return of_means
    first, second = ((where.columns, where.rows)[axis] for where in (subject, object))
    positions = _positions(first)
    shortfall = torch.relu(margin - sign * (positions[:, None] - positions[None, :]))
    of_pairs = ((first @ shortfall) * second).sum(dim=1)
    return (1 - settings.pairwise) * of_means + settings.pairwise * of_pairs
