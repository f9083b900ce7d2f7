"""Geometric classifier: no training, no network. Logits over directions follow from the centres and extents of two maps.

A relation's logit is minus its *violation*, divided by a temperature. The violation of "above" has two terms: a hinge on
the distance by which the subject's centre lies above the object's, less a fraction of both extents (GenEval's rule), and a
weighted hinge on the sideways offset. A diagonal has a distance hinge on both axes. The cross-entropy to "above" therefore
moves the subject up and into line with the object. The probability of "above" is high only if "above" holds with a margin
and no other direction does. All lengths are fractions of the picture's side; y grows downward.

Not every layer and head localises its word's object. Channel weights, calibrated on a few labelled pictures
(training/calibration.py), adapt the rule to one model. Without them all channels have equal weight.
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
# Length of a uniform bar in standard deviations: converts a map's deviation to the side of a box.
_SIDE_PER_DEVIATION = 12 ** 0.5
# Root-mean-square radius of an object's map up to which there is no penalty, as a fraction of the picture's side.
COMPACT_RADIUS = 0.15
# Added to every cell, so that a flat map becomes the uniform distribution instead of 0 / 0.
_FLOOR = 1e-6
# Relative deviation below which a channel counts as flat, so that rounding errors are not amplified into a map.
_FLAT = 1e-3
_TINY = 1e-20


@dataclass(frozen=True)
class GeometricSettings:
    """Settings of the geometric loss. Lengths are fractions of the picture's side.

    sharpness: exponent applied to the averaged map, after its minimum is subtracted and before it is normalised to sum 1.
    margin: required distance along the relation's axis, after `extent_share` of the extents is subtracted.
    extent_share: share of both objects' extents that is subtracted from every distance (GenEval: 0.1).
    diagonal_margin: the margin on each axis of a diagonal.
    tolerance: sideways offset without penalty.
    sideways: weight of the hinge on the sideways offset.
    pairwise: 0 takes the violation of the mean positions, 1 the mean violation over all pairs of subject and object cells;
        values between mix both. Pairs penalise mass on the wrong side even if the centre is right (a doubled object).
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
    """The distribution of one object's attention over the cells, and its moments.

    rows, columns: marginal distributions, [B, size].
    centre, deviation: mean and standard deviation as (x, y), [B, 2], in fractions of the side; 0 is the middle and y grows
        downward.
    """

    rows: Tensor
    columns: Tensor
    centre: Tensor
    deviation: Tensor


class GeometricClassifier(RelationClassifier):
    """The geometric rule as a RelationClassifier.

    Without `channel_weights` it works on any backbone and any number of channels.
    channel_weights: [C], each 0 or more and not all 0, in the order of one model's channels; backbone: that model's.
    training, licence: as in LearnedClassifier.
    Raises ClassifierError for invalid weights.
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

    def logits(self, subject_maps: Tensor, object_maps: Tensor, progress: Tensor) -> Tensor:
        """Two stacks [B, C, size, size] -> [B, 8]. `progress` is ignored. See RelationClassifier.logits."""
        check_maps(self, subject_maps, object_maps)
        settings = self.settings
        first, second = (locate(maps, settings.sharpness, self.channel_weights) for maps in (subject_maps, object_maps))
        violations = [_violation(first, second, direction, settings) for direction in DIRECTIONS.values()]
        return -torch.stack(violations, dim=1) / settings.temperature

    def to(self, device: torch.device | str) -> GeometricClassifier:
        """Returns itself; channel weights move to the maps' device on use."""
        return self


def _checked(weights: Tensor, name: str) -> Tensor:
    """Channel weights [C] as an ordinary float tensor. Raises ClassifierError unless all are 0 or more and one is not 0."""
    with torch.inference_mode(False):
        weights = weights.detach().float().clone()
    if not (weights.ndim == 1 and weights.isfinite().all() and (weights >= 0).all() and weights.any()):
        raise ClassifierError(f"Classifier {name!r}: channel weights must be a list of numbers of 0 or more, not all 0. "
                              "Calibrate it on more labelled pictures.")
    return weights


def averaged(maps: Tensor, weights: Tensor | None) -> Tensor:
    """Averages maps over channels: [B, C, H, W] -> [B, H, W].

    Without weights this is the plain mean. With weights [C] it is the positive part of the weighted mean of standardised
    channels. A standardised channel has mean 0 and deviation 1 over its cells, so a channel with high attention everywhere
    does not outweigh one that localises its word. A flat channel becomes 0.
    """
    maps = maps.to(working_dtype(maps))
    if weights is None:
        return maps.mean(dim=1)
    level = maps.mean(dim=(2, 3), keepdim=True)
    variance = (maps - level).square().mean(dim=(2, 3), keepdim=True)
    standard = (maps - level) * (variance + (_FLAT * level).square() + _TINY).rsqrt()
    return torch.einsum("bchw,c->bhw", standard, (weights / weights.sum()).to(maps)).relu()


def locate(maps: Tensor, sharpness: float, weights: Tensor | None = None) -> SoftObject:
    """Averages maps [B, C, H, W] over channels, and normalises the result to a distribution with its moments.

    weights: see `averaged`. A flat map becomes the uniform distribution and has gradient 0, not NaN.
    """
    mean = averaged(maps, weights)
    low, high = mean.amin(dim=(1, 2), keepdim=True), mean.amax(dim=(1, 2), keepdim=True)
    span = high - low
    # Scaled to [0, 1] first: powers of raw cells, about 1/256, would underflow.
    scaled = (mean - low) / torch.where(span > 0, span, torch.ones_like(span))
    mass = scaled ** sharpness + _FLOOR
    cells = mass / mass.sum(dim=(1, 2), keepdim=True)
    rows, columns = cells.sum(dim=2), cells.sum(dim=1)
    (x, spread_x), (y, spread_y) = _moments(columns), _moments(rows)
    return SoftObject(rows, columns, torch.stack([x, y], dim=1), torch.stack([spread_x, spread_y], dim=1))


def _positions(like: Tensor) -> Tensor:
    """Centres of the cells of a line, [size], in fractions of its length; 0 is the middle."""
    size = like.shape[-1]
    return (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) / size - 0.5


def _moments(marginal: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a distribution [B, size] over a line of cells."""
    positions = _positions(marginal)
    centre = marginal @ positions
    variance = (marginal * (positions - centre[:, None]) ** 2).sum(dim=1)
    # The last term is the variance within one cell; it also keeps the gradient of the root finite.
    return centre, (variance + 1 / (12 * marginal.shape[-1] ** 2)).sqrt()


def compactness_penalty(subject_maps: Tensor, object_maps: Tensor, weights: Tensor | None = None) -> Tensor:
    """By how much the attention to both objects spreads beyond COMPACT_RADIUS, [B], in fractions of the picture's side.

    subject_maps, object_maps: [B, channels, H, W]; weights: see `averaged`.
    The penalty is large if an object is about to be drawn twice. The relation's loss misses that, because the centre may
    still be right.
    """
    radii = (locate(maps, GeometricSettings.sharpness, weights).deviation.square().sum(dim=1).sqrt()
             for maps in (subject_maps, object_maps))
    return sum(torch.relu(radius - COMPACT_RADIUS) for radius in radii)


def _violation(first: SoftObject, second: SoftObject, direction: tuple[int, int],
               settings: GeometricSettings) -> Tensor:
    """By how much, [B], `first` fails to lie in `direction` from `second`; 0 if it lies there with the margin."""
    margin = settings.diagonal_margin if all(direction) else settings.margin
    total = 0
    for axis, sign in enumerate(direction):
        if sign:
            total = total + _along(first, second, axis, sign, margin, settings)
        else:
            offset = (first.centre[:, axis] - second.centre[:, axis]).abs()
            total = total + settings.sideways * torch.relu(offset - settings.tolerance)
    return total


def _along(first: SoftObject, second: SoftObject, axis: int, sign: int, margin: float,
           settings: GeometricSettings) -> Tensor:
    """Hinge, [B], on the signed distance along one axis (0: x, 1: y)."""
    distance = sign * (first.centre[:, axis] - second.centre[:, axis])
    sides = _SIDE_PER_DEVIATION * (first.deviation[:, axis] + second.deviation[:, axis])
    of_means = torch.relu(margin - (distance - settings.extent_share * sides))
    if settings.pairwise == 0:
        return of_means
    first_marginal, second_marginal = ((place.columns, place.rows)[axis] for place in (first, second))
    positions = _positions(first_marginal)
    shortfall = torch.relu(margin - sign * (positions[:, None] - positions[None, :]))
    of_pairs = ((first_marginal @ shortfall) * second_marginal).sum(dim=1)
    return (1 - settings.pairwise) * of_means + settings.pairwise * of_pairs
