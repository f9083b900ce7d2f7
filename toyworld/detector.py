"""Exact detector of the small world: template matching by colour and shape, and GenEval's rule for relations.

A plane is fitted to the background. Every noun, size and position gets a score: the share of the template's energy, relative
to that background, that the picture explains. Pixels inside the object's shape have most of the weight. The score is 1 for a
perfect match and 0 for bare background.
"""
from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .scenes import EXTRA_NOUNS, NOUNS, SIZES, relation_parts, sprite, true_relations

THRESHOLD = 0.5
"""Least score of a detection. Chosen on drawn pictures with noise and blur, see tests/unit/test_toyworld_detector.py."""
OVERLAP = 0.3
"""A detection is dropped if it shares more than this fraction of the smaller box with a stronger one."""
CANDIDATES = 48
BOX_SHARE = 0.25
"""Weight of the whole box in the score. The rest is the weight of the object's shape: the boxes of neighbours may overlap even
if their objects do not."""


@dataclass(frozen=True)
class Detection:
    """A detected object. box: (x0, y0, x1, y1) in pixels; score: at most 1."""

    noun: str
    box: tuple[int, int, int, int]
    score: float

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows one relation.

    both_present: both objects are detected, at least once.
    clean: the picture shows both objects exactly once and nothing else.
    relation: the relation holds by GenEval's rule; False if an object is missing.
    exact: `clean` and `relation`.
    """

    both_present: bool
    clean: bool
    relation: bool
    exact: bool


@dataclass(frozen=True)
class MultiVerdict:
    """Whether a picture shows several relations. relations: for each, whether it holds. The rest is as in Verdict."""

    all_present: bool
    clean: bool
    relations: tuple[bool, ...]
    exact: bool


@dataclass(frozen=True)
class _Templates:
    """The templates of N nouns at one size S.

    extents: (height, width) of each noun, in pixels.
    kernels: [8N, 3, S, S]; per noun, opacity times colour, then opacity on each channel; then the same inside the shape.
    shapes: [N, 1, S, S], 1 inside the shape.
    """

    size: int
    extents: tuple[tuple[int, int], ...]
    kernels: torch.Tensor
    shapes: torch.Tensor
    energy: torch.Tensor
    """[N, 2, 5], in the box and inside the shape: sums of a^2 |T|^2, a^2 T per channel, a^2 (a: opacity, T: colour)."""


@functools.cache
def _templates(size: int, nouns: tuple[str, ...]) -> _Templates:
    kernels = torch.zeros(len(nouns), 2, 4, 3, size, size)
    shapes = torch.zeros(len(nouns), 1, size, size)
    energy = torch.zeros(len(nouns), 2, 5)
    extents = []
    for index, noun in enumerate(nouns):
        colours, opacity = sprite(noun, size)
        colour = torch.from_numpy(colours.copy()).permute(2, 0, 1) / 255
        alpha = torch.from_numpy(opacity[..., 0].copy())
        height, width = alpha.shape
        extents.append((height, width))
        shapes[index, 0, :height, :width] = alpha > 0.5
        for part, weight in enumerate((alpha, alpha * (alpha > 0.5))):
            kernels[index, part, 0, :, :height, :width] = weight * colour
            for channel in range(3):
                kernels[index, part, 1 + channel, channel, :height, :width] = weight
            squared = weight ** 2
            energy[index, part, 0] = (squared * colour ** 2).sum()
            energy[index, part, 1:4] = (squared * colour).sum(dim=(1, 2))
            energy[index, part, 4] = squared.sum()
    return _Templates(size, tuple(extents), kernels.flatten(0, 2), shapes, energy)


def fit_background(images: torch.Tensor) -> torch.Tensor:
    """The plane that fits most pixels, [B, 3, H, W], by reweighted least squares. images: [B, 3, H, W] from 0 to 1."""
    count, _, height, width = images.shape
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    design = torch.stack([torch.ones_like(x), x, y]).flatten(1).T
    pixels = images.flatten(2).transpose(1, 2)
    plane = pixels.median(dim=1, keepdim=True).values.expand_as(pixels)
    for scale in (0.2, 0.1, 0.05, 0.05, 0.03, 0.03):
        distance = (pixels - plane).square().sum(dim=2, keepdim=True)
        weights = 1 / (1 + distance / scale ** 2) ** 2
        normal = design.T @ (weights * design)
        plane = design @ torch.linalg.solve(normal, design.T @ (weights * pixels))
    return plane.transpose(1, 2).reshape(count, 3, height, width)


def _score_maps(images: torch.Tensor, background: torch.Tensor, templates: _Templates) -> torch.Tensor:
    """Scores [B, N, H, W], indexed by the box's upper left corner; -1 where the box would leave the picture."""
    difference = images - background
    size, nouns = templates.size, len(templates.extents)
    margin = (0, size - 1, 0, size - 1)
    products = torch.nn.functional.conv2d(torch.nn.functional.pad(difference, margin), templates.kernels)
    products = products.unflatten(1, (nouns, 2, 4))
    squares = difference.square().sum(dim=1, keepdim=True)
    inside = torch.nn.functional.conv2d(torch.nn.functional.pad(squares, margin), templates.shapes)
    integral = torch.nn.functional.pad(squares[:, 0].cumsum(1).cumsum(2), (1, 0, 1, 0))
    scores = torch.full((images.shape[0], nouns, *images.shape[2:]), -1.0)
    for index, (height, width) in enumerate(templates.extents):
        rows, columns = images.shape[2] - height + 1, images.shape[3] - width + 1
        local = background[:, :, height // 2:height // 2 + rows, width // 2:width // 2 + columns]
        in_box = (integral[:, height:, width:] + integral[:, :rows, :columns]
                  - integral[:, height:, :columns] - integral[:, :rows, width:])
        scores[:, index, :rows, :columns] = 0
        for part, (seen, share) in enumerate(((in_box, BOX_SHARE), (inside[:, index, :rows, :columns], 1 - BOX_SHARE))):
            product = products[:, index, part, :, :rows, :columns]
            matched = product[:, 0] - (local * product[:, 1:]).sum(dim=1)
            square, linear, area = templates.energy[index, part].split((1, 3, 1))
            energy = square - 2 * torch.einsum("bchw,c->bhw", local, linear) + area * local.square().sum(dim=1)
            scores[:, index, :rows, :columns] += share * (1 - (seen - 2 * matched + energy) / energy)
    return scores


@torch.no_grad()
def detect(images: np.ndarray | torch.Tensor, threshold: float = THRESHOLD,
           nouns: tuple[str, ...] = NOUNS + EXTRA_NOUNS) -> list[tuple[Detection, ...]]:
    """The detected objects of each picture, highest score first.

    images: uint8 [B, 64, 64, 3], or float of that shape from 0 to 1 (ComfyUI's IMAGE). Raises ValueError for other shapes.
    """
    pixels = torch.as_tensor(images)
    if pixels.ndim != 4 or pixels.shape[3] != 3:
        raise ValueError(f"pictures must have the shape [B, H, W, 3], got {list(pixels.shape)}")
    pixels = pixels.float() / (255 if pixels.dtype == torch.uint8 else 1)
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    background = fit_background(pixels)
    found: list[list[Detection]] = [[] for _ in range(pixels.shape[0])]
    for size in SIZES:
        templates = _templates(size, nouns)
        scores = _score_maps(pixels, background, templates)
        best, places = scores.flatten(1).topk(CANDIDATES, dim=1)
        plane, columns = scores.shape[2] * scores.shape[3], scores.shape[3]
        for picture in range(pixels.shape[0]):
            for score, place in zip(best[picture].tolist(), places[picture].tolist(), strict=True):
                if score < threshold:
                    break
                noun, corner = divmod(place, plane)
                y0, x0 = divmod(corner, columns)
                height, width = templates.extents[noun]
                found[picture].append(Detection(nouns[noun], (x0, y0, x0 + width, y0 + height), score))
    return [_strongest(candidates) for candidates in found]


def _strongest(candidates: list[Detection]) -> tuple[Detection, ...]:
    kept: list[Detection] = []
    for candidate in sorted(candidates, key=lambda item: -item.score):
        if all(_shared(candidate.box, other.box) <= OVERLAP for other in kept):
            kept.append(candidate)
    return tuple(kept)


def _shared(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / smaller


def _holds(detections: Sequence[Detection], subject: str, predicates: Iterable[str], target: str) -> bool:
    best = {}
    for item in sorted(detections, key=lambda item: item.score):
        best[item.noun] = item
    if subject not in best or target not in best:
        return False
    return set(predicates) <= true_relations(best[subject].box, best[target].box)


def judge(detections: Sequence[Detection], subject: str, predicates: Sequence[str], target: str) -> Verdict:
    """Whether the picture shows `subject` in the relation `predicates` to `target`. Both predicates of a diagonal must hold.

    If an object is detected twice, the one with the higher score is used, as in GenEval.
    """
    names = sorted(item.noun for item in detections)
    clean = names == sorted((subject, target))
    relation = _holds(detections, subject, predicates, target)
    return Verdict(subject in names and target in names, clean, relation, clean and relation)


def judge_relations(detections: Sequence[Detection], relations: Sequence[tuple[str, str, str]]) -> MultiVerdict:
    """Whether the picture shows each of several (subject, relation phrase, object)."""
    wanted = sorted({noun for subject, _, other in relations for noun in (subject, other)})
    names = sorted(item.noun for item in detections)
    held = tuple(_holds(detections, subject, relation_parts(phrase), other) for subject, phrase, other in relations)
    clean = names == wanted
    return MultiVerdict(set(wanted) <= set(names), clean, held, clean and all(held))
