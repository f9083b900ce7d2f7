"""The updates of one denoising step on plain tensors: targets, turns, gradients that are 0 or not finite."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from learn_to_steer.steering.objective import Judgement
from learn_to_steer.steering.optimizer import Evaluation, StepInfo, displacement, steer_step
from learn_to_steer.steering.report import SteeringReport, UpdateRecord
from learn_to_steer.steering.settings import SteeringSettings
from torch import Tensor

PAPER = SteeringSettings.as_in_the_paper()
ALL = SteeringSettings(update_rule="raw gradient", step_size=1.0, max_updates=8, stop_probability=1.1, compactness=0.0)


def steer(loss_of: Callable[[Tensor], Tensor], start: Tensor, settings: SteeringSettings, step: int = 0,
          gradient_of: Callable[[Tensor, Tensor], Tensor] | None = None) -> tuple[Tensor, list[UpdateRecord], list[Tensor]]:
    """loss_of: latent [B, ...] -> losses [B, relations]. Returns the moved latent, the records, and the latents evaluated."""
    records, places = [], []

    def evaluate(latent: Tensor) -> Evaluation:
        places.append(latent.clone())
        leaf = latent.detach().requires_grad_()
        losses = loss_of(leaf)

        def gradient(loss: Tensor) -> Tensor:
            found, = torch.autograd.grad(loss.sum(), leaf)
            return found if gradient_of is None else gradient_of(leaf.detach(), found)

        return Evaluation(Judgement(losses, (-losses.detach()).exp(), torch.zeros_like(losses.detach())), gradient)

    relations = loss_of(start).shape[1]
    moved = steer_step(start, evaluate, (1.0,) * relations, settings, StepInfo(step, 1.0, 0.0), records.append)
    return moved, records, places


def constant(*losses: float) -> Callable[[Tensor], Tensor]:
    """Constant losses, each with a gradient of 1 in its own cell."""
    values = torch.tensor(losses, dtype=torch.float64)
    return lambda latent: values + (latent - latent.detach())[:, :len(losses)]


def outcomes(records: list[UpdateRecord]) -> list[str]:
    return [record.outcome for record in records]


def test_the_papers_setting_of_15_is_16_updates():
    moved, records, _ = steer(constant(1.0), torch.zeros(1, 1, dtype=torch.float64), PAPER)
    assert outcomes(records) == ["moved"] * 16
    assert moved.tolist() == [[-16 * 5.0]]


@pytest.mark.parametrize(("step", "target"), [(0, 1e-5), (1, 3e-5), (2, 5e-5), (3, 7e-5), (4, 7e-5), (24, 7e-5)])
def test_the_papers_loss_targets_by_step_index(step: int, target: float):
    start = torch.zeros(1, 1, dtype=torch.float64)
    assert outcomes(steer(constant(target * 0.999), start, PAPER, step)[1]) == ["satisfied"]
    assert outcomes(steer(constant(target * 1.001), start, PAPER, step)[1]) == ["moved"] * 16


def test_turns_begin_with_the_first_relation_in_each_step():
    """Relation k moves cell k alone: of 16 updates, three relations get 6, 5 and 5, in every step."""
    for step in (0, 1, 7):
        moved, _, _ = steer(constant(1.0, 1.0, 1.0), torch.zeros(1, 3, dtype=torch.float64), PAPER, step)
        assert (moved / -5).tolist() == [[6, 5, 5]]


@pytest.mark.parametrize(("losses", "updates"), [((0.0, 1.0, 1.0), 0), ((1.0, 0.0, 1.0), 1), ((1.0, 1.0, 0.0), 2)])
def test_a_step_ends_when_the_relation_whose_turn_it_is_is_satisfied(losses: tuple, updates: int):
    moved, records, _ = steer(constant(*losses), torch.zeros(1, 3, dtype=torch.float64), PAPER)
    assert outcomes(records) == ["moved"] * updates + ["satisfied"]
    assert (moved / -5).tolist() == [[float(index < updates) for index in range(3)]]
    again = replace(PAPER, loss_targets=(), stop_probability=0.99)  # the same with a probability as the target
    assert outcomes(steer(constant(*losses), torch.zeros(1, 3, dtype=torch.float64), again)[1]) == outcomes(records)


def test_all_relations_at_once_are_stopped_by_all_of_them():
    start = torch.zeros(1, 2, dtype=torch.float64)
    settings = replace(ALL, stop_probability=0.99, max_updates=3)
    assert outcomes(steer(constant(0.0, 1.0), start, settings)[1]) == ["moved"] * 3
    assert outcomes(steer(constant(0.0, 1e-3), start, settings)[1]) == ["satisfied"]
    targets = replace(settings, loss_targets=(1e-2,))
    assert outcomes(steer(constant(0.0, 1.0), start, targets)[1]) == ["moved"] * 3
    assert outcomes(steer(constant(0.0, 1e-3), start, targets)[1]) == ["satisfied"]


def test_a_picture_that_ended_its_step_stays_as_it_is():
    """The first picture ends at relation 1's turn, although relation 0 is far from its target at its next turn."""
    def losses(latent: Tensor) -> Tensor:
        values = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
        return values + (latent - latent.detach())[:, :2]

    moved, records, _ = steer(losses, torch.zeros(2, 2, dtype=torch.float64), replace(PAPER, max_updates=4))
    assert (moved / -5).tolist() == [[1, 0], [2, 2]]
    assert [record.moved for record in records] == [(True, True), (False, True), (False, True), (False, True)]


def test_a_gradient_of_0_is_not_a_move():
    moved, records, _ = steer(lambda latent: 1 + 0 * latent[:, :1], torch.ones(1, 4), ALL)
    assert outcomes(records) == ["no gradient"] and records[0].moved == (False,) and records[0].gradient_norm == (0.0,)
    assert torch.equal(moved, torch.ones(1, 4))
    text = SteeringReport(("dog above cat",), "any", 10, tuple(records)).to_text()
    assert "1 no gradient" in text and "the gradient was 0, so steering had no effect" in text and "mask" in text


def test_a_relation_without_a_gradient_leaves_its_turn_to_the_others():
    def losses(latent: Tensor) -> Tensor:
        return torch.cat([1 + 0 * latent[:, :1], 9 + latent[:, 1:2]], dim=1)

    turns = replace(ALL, relations_per_update="one", max_updates=4)
    moved, records, _ = steer(losses, torch.zeros(1, 2), turns)
    assert outcomes(records) == ["no gradient", "moved"] * 2 and moved.tolist() == [[0, -2]]
    neither = steer(lambda latent: 1 + 0 * latent[:, :2], torch.zeros(1, 2), turns)[1]
    assert outcomes(neither) == ["no gradient"] * 2


def test_pictures_without_a_gradient_do_not_hold_up_the_others():
    moved, records, _ = steer(lambda latent: 9 + latent[:, :1] * torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1), ALL)
    assert outcomes(records) == ["moved"] * 8 and {record.moved for record in records} == {(False, True)}
    assert moved.tolist() == [[0], [-8]]


def bowl(latent: Tensor) -> Tensor:
    return 9 + latent[:, :1]


def not_finite_below(limit: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda latent, gradient: torch.where(latent < limit, torch.nan, gradient)


def test_a_gradient_that_is_not_finite_is_tried_again_after_half_the_move():
    """0 -> -1 -> -2 (not finite) -> -1.5 -> -2.5 (not finite again): back to the last good latent, and the step ends."""
    moved, records, places = steer(bowl, torch.zeros(1, 1), ALL, gradient_of=not_finite_below(-1.7))
    assert [float(place) for place in places] == [0, -1, -2, -1.5, -2.5]
    assert outcomes(records) == ["moved", "moved", "non-finite gradient", "moved", "non-finite gradient"]
    assert [record.moved[0] for record in records] == [True, True, False, True, False]
    assert float(moved) == -1.5


def test_half_a_move_that_is_no_better_is_taken_back():
    moved, records, places = steer(bowl, torch.zeros(1, 1), ALL, gradient_of=not_finite_below(-0.2))
    assert [float(place) for place in places] == [0, -1, -0.5]
    assert outcomes(records) == ["moved"] + ["non-finite gradient"] * 2 and float(moved) == 0


def test_without_a_move_there_is_nothing_to_halve():
    for bad in (torch.nan, torch.inf):
        moved, records, places = steer(bowl, torch.zeros(1, 1), ALL, gradient_of=lambda latent, gradient, bad=bad: gradient * bad)
        assert outcomes(records) == ["non-finite gradient"] and len(places) == 1 and float(moved) == 0


def test_a_move_out_of_the_range_of_numbers_counts_as_not_finite():
    huge = torch.finfo(torch.float32).max
    moved, records, _ = steer(bowl, torch.zeros(1, 1), replace(ALL, step_size=5.0), gradient_of=lambda x, g: g * huge)
    assert outcomes(records) == ["non-finite gradient"] and float(moved) == 0


def test_a_picture_that_is_not_finite_leaves_the_others_alone():
    def gradient(latent: Tensor, found: Tensor) -> Tensor:
        return torch.where(torch.tensor([[True], [False]]) & (latent < -1.7), torch.nan, found)

    moved, records, _ = steer(bowl, torch.zeros(2, 1), ALL, gradient_of=gradient)
    assert moved.tolist() == [[-1.5], [-8]] and len(records) == 8
    assert [record.moved for record in records[2:]] == [(False, True), (True, True)] + [(False, True)] * 4


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_the_length_of_a_normalised_move_does_not_depend_on_the_gradients(size: float):
    """The squares of 1e-30 and 1e30 underflow and overflow in single precision."""
    gradient = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8) * size
    move = displacement(gradient, SteeringSettings(step_size=2.5))
    assert move.square().mean().sqrt() == pytest.approx(0.025, rel=1e-3)
    assert (move * gradient <= 0).all()
    record = steer(bowl, torch.zeros(1, 4, 8, 8)[:, 0, 0], ALL, gradient_of=lambda latent, found: found * size)[1][0]
    assert record.gradient_norm[0] == pytest.approx(size, rel=1e-3)


def test_a_normalised_move_is_the_formula():
    gradient = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([-one * 0.03 * 256 ** 0.5 / one.norm() for one in gradient])
    torch.testing.assert_close(displacement(gradient, SteeringSettings(step_size=3.0)), expected, rtol=1e-6, atol=0)
