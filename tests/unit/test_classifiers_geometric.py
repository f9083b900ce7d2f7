"""The geometric classifier on synthetic blobs: exact values, gradients, extremes."""
from __future__ import annotations

import pytest
import torch
from learn_to_steer.classifiers.base import ClassifierError, relation_indices
from learn_to_steer.classifiers.geometric import DIRECTIONS, GeometricClassifier, GeometricSettings, compactness_penalty, locate

SIZE = 16
NO_PROGRESS = torch.zeros(1)


def block(x: int, y: int, side: int = 2, value: float = 1.0, channels: int = 3) -> torch.Tensor:
    """A square of `side` cells with its upper left corner at (x, y): [1, channels, 16, 16]."""
    maps = torch.zeros(1, channels, SIZE, SIZE, dtype=torch.float64)
    maps[..., y:y + side, x:x + side] = value
    return maps


def smooth(seed: int, batch: int = 1, channels: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, channels, SIZE, SIZE, dtype=torch.float64, generator=generator) ** 4


def cross_entropy(classifier, subject, object, relation):
    target = torch.tensor([relation_indices(classifier, relation)[0]] * len(subject))
    return torch.nn.functional.cross_entropy(classifier.logits(subject, object, NO_PROGRESS), target)


def test_centre_and_extent_of_a_square():
    where = locate(block(3, 9, side=4), sharpness=2.0)
    assert where.centre[0].tolist() == pytest.approx([5 / 16 - 0.5, 11 / 16 - 0.5], abs=1e-4)
    # A bar of 4 cells of 16: its side is 1/4, so its standard deviation is 1/4 / sqrt(12).
    assert where.deviation[0].tolist() == pytest.approx([0.25 / 12 ** 0.5] * 2, abs=1e-4)


@pytest.mark.parametrize(("name", "direction"), DIRECTIONS.items())
def test_exact_logits_for_all_directions(name, direction):
    """Blocks of side 2/16 with centres 8/16 apart per axis: every violation can be computed by hand."""
    settings = GeometricSettings()
    dx, dy = direction
    subject, object = block(7 + 4 * dx, 7 + 4 * dy), block(7 - 4 * dx, 7 - 4 * dy)
    got = GeometricClassifier(settings).logits(subject, object, NO_PROGRESS)[0]
    taken = settings.extent_share * (2 / 16 + 2 / 16)

    def violation(want):
        margin = settings.diagonal_margin if all(want) else settings.margin
        total = 0.0
        for sign, offset in zip(want, (dx / 2, dy / 2), strict=True):
            total += max(0, margin - (sign * offset - taken)) if sign else \
                settings.sideways * max(0, abs(offset) - settings.tolerance)
        return total

    expected = [-violation(want) / settings.temperature for want in DIRECTIONS.values()]
    assert got.tolist() == pytest.approx(expected, abs=5e-3)
    assert got.softmax(0)[list(DIRECTIONS).index(name)] > 0.95
    assert got[list(DIRECTIONS).index(name)] == pytest.approx(0, abs=5e-3)


def test_probability_grows_with_distance_and_falls_with_sideways_offset():
    classifier = GeometricClassifier()

    def above(dx, dy):
        return classifier.logits(block(7 + dx, 7 - dy), block(7, 7), NO_PROGRESS).softmax(1)[0, 0].item()

    near, middle, far = above(0, 0), above(0, 3), above(0, 6)
    assert near < 0.3 < middle < far
    assert above(0, -3) < 0.01
    assert above(6, 6) < 0.1 < above(3, 6) < far


def test_loss_on_above_moves_the_subject_up_and_into_line():
    """One gradient step on the maps: attention rises above and on the object's side, falls below."""
    classifier = GeometricClassifier()
    subject = torch.full((1, 1, SIZE, SIZE), 0.2, dtype=torch.float64)
    subject += 0.8 * block(11, 8, side=3, channels=1)
    subject.requires_grad_()
    cross_entropy(classifier, subject, block(4, 8, side=3, channels=1), "above").backward()
    before = locate(subject.detach(), 2.0).centre[0]
    after = locate((subject - 0.01 * subject.grad).detach(), 2.0).centre[0]
    assert after[1] < before[1] - 1e-4 and after[0] < before[0] - 1e-4


@pytest.mark.parametrize("settings", [
    GeometricSettings(),
    GeometricSettings(pairwise=0.4, sharpness=3.0),
])
@pytest.mark.parametrize("relation", ["above", "to the right of", "below and to the left of"])
def test_gradient_agrees_with_finite_differences(settings, relation):
    classifier = GeometricClassifier(settings)
    subject, object = smooth(1).requires_grad_(), smooth(2).requires_grad_()

    def loss(first, second):
        return cross_entropy(classifier, first, second, relation) + 6 * compactness_penalty(first, second).sum()

    value = loss(subject, object)
    gradients = torch.autograd.grad(value, (subject, object))
    for seed in range(3):
        steps = tuple(smooth(10 + seed + k) - 0.3 for k in range(2))
        size = 1e-6
        ahead = loss(subject + size * steps[0], object + size * steps[1])
        behind = loss(subject - size * steps[0], object - size * steps[1])
        slope = sum((gradient * step).sum() for gradient, step in zip(gradients, steps, strict=True))
        assert ((ahead - behind) / (2 * size)).item() == pytest.approx(slope.item(), rel=1e-5)


def test_rows_of_a_batch_do_not_influence_each_other():
    classifier = GeometricClassifier(GeometricSettings(pairwise=0.5))
    subject, object = smooth(3, batch=4), smooth(4, batch=4)
    together = classifier.logits(subject, object, torch.zeros(4))
    penalty = compactness_penalty(subject, object)
    for row in range(4):
        one = slice(row, row + 1)
        assert torch.allclose(classifier.logits(subject[one], object[one], NO_PROGRESS), together[one], atol=1e-12)
        assert torch.allclose(compactness_penalty(subject[one], object[one]), penalty[one], atol=1e-12)


def test_scale_and_offset_of_the_maps_do_not_matter():
    classifier = GeometricClassifier()
    subject, object = smooth(5), smooth(6)
    assert torch.allclose(classifier.logits(subject, object, NO_PROGRESS),
                          classifier.logits(subject / 300, 7 * object + 0.1, NO_PROGRESS), atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["zeros", "flat", "one cell", "huge", "tiny"])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.6, 0.3, 0.1])])
def test_extreme_maps_give_finite_logits_and_gradients(kind, dtype, weights):
    maps = {"zeros": torch.zeros(2, 3, SIZE, SIZE), "flat": torch.full((2, 3, SIZE, SIZE), 1 / 256),
            "one cell": block(15, 0, side=1).float().repeat(2, 1, 1, 1), "huge": smooth(7, batch=2, channels=3) * 6e4,
            "tiny": smooth(7, batch=2, channels=3) * 1e-3}[kind].to(dtype).requires_grad_()
    classifier = GeometricClassifier(GeometricSettings(pairwise=0.5), channel_weights=weights)
    logits = classifier.logits(maps, maps.detach().flip(2), torch.zeros(2))
    (torch.logsumexp(logits, 1) + compactness_penalty(maps, maps.detach(), weights)).sum().backward()
    assert logits.dtype == torch.float32 and logits.isfinite().all() and maps.grad.isfinite().all()


@pytest.mark.parametrize("weights", [None, torch.tensor([0.7, 0.0, 0.3])])
def test_gradient_of_logits_and_spread_is_the_slope(weights):
    classifier = GeometricClassifier(channel_weights=weights)
    subject, object = smooth(11, channels=3), smooth(12, channels=3)

    def total(first):
        return classifier.logits(first, object, NO_PROGRESS)[0, 2] + 6 * compactness_penalty(first, object, weights).sum()

    leaf = subject.clone().requires_grad_()
    gradient, = torch.autograd.grad(total(leaf), leaf)
    assert (gradient[:, 1] == 0).all() == (weights is not None)
    for seed in range(3):
        direction = smooth(20 + seed, channels=3) - 0.2
        size = 1e-6
        slope = (total(subject + size * direction) - total(subject - size * direction)) / (2 * size)
        assert slope.item() == pytest.approx((gradient * direction).sum().item(), rel=1e-5)


def test_weighted_channels_count_alike_however_strong_they_are():
    """Channel 0 is right; channel 1 has ten times the attention and points to the other side."""
    subject, object = (torch.cat([block(x, 7, channels=1) + 1, 10 * block(other, 7, channels=1) + 3], dim=1)
                       for x, other in ((2, 12), (12, 2)))
    left = relation_indices(GeometricClassifier(), ["to the left of"])[0]
    right = relation_indices(GeometricClassifier(), ["to the right of"])[0]
    for weights, wanted in ((None, right), ((1.0, 0.0), left), ((0.8, 0.2), left), ((0.2, 0.8), right)):
        weights = None if weights is None else torch.tensor(weights)
        assert GeometricClassifier(channel_weights=weights).logits(subject, object, NO_PROGRESS).argmax() == wanted
    flat = torch.full_like(subject, 1 / 256) * (1 + 1e-6 * torch.rand(subject.shape))  # rounding alone
    flat[:, 0] = subject[:, 0]
    mixed = GeometricClassifier(channel_weights=torch.tensor([0.5, 0.5]))
    assert mixed.logits(flat, object, NO_PROGRESS).isfinite().all()
    assert locate(flat, 2.0, torch.tensor([0.5, 0.5])).centre[0, 0] == pytest.approx(
        locate(flat[:, :1], 2.0).centre[0, 0].item(), abs=1e-2)


@pytest.mark.parametrize("weights", [torch.zeros(3), torch.tensor([1.0, -1.0]), torch.tensor([float("nan")]), torch.ones(2, 2)])
def test_impossible_channel_weights_are_refused(weights):
    with pytest.raises(ClassifierError, match="channel weights"):
        GeometricClassifier(channel_weights=weights)


def test_flat_maps_favour_no_side():
    flat = torch.full((1, 2, SIZE, SIZE), 0.5)
    probabilities = GeometricClassifier().logits(flat, flat, NO_PROGRESS).softmax(1)[0]
    assert torch.allclose(probabilities[:4], probabilities[0].expand(4)) and probabilities.max() < 0.3


def test_doubled_object_is_penalised_by_its_spread_and_by_pairs():
    """The subject appears above and below the object. The mean position hides this; the two terms do not."""
    single = block(7, 1)
    doubled = single + block(7, 13, value=0.6)
    object = block(7, 9)
    assert compactness_penalty(single, object) == 0
    assert compactness_penalty(doubled, object) > 0.1
    by_pairs = GeometricClassifier(GeometricSettings(pairwise=1.0))
    index = relation_indices(by_pairs, ["above"])[0]
    assert by_pairs.logits(single, object, NO_PROGRESS)[0, index] == pytest.approx(0, abs=1e-2)
    assert by_pairs.logits(doubled, object, NO_PROGRESS)[0, index] < -2


def test_wrong_shapes_and_settings_are_refused():
    classifier = GeometricClassifier()
    with pytest.raises(ClassifierError, match=r"\[batch, channels, 16, 16\].*\[1, 2, 8, 8\]"):
        classifier.logits(torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8), NO_PROGRESS)
    with pytest.raises(ClassifierError, match="temperature above 0"):
        GeometricSettings(temperature=0.0)
