"""The update loop of one denoising step and its stopping rules (docs/method.md, "Steering a denoising step").

Works on plain tensors; knows no host.
"""
from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .objective import Judgement, total_loss
from .report import MOVED, NO_GRADIENT, NON_FINITE, NOT_RECORDED, SATISFIED, UpdateRecord
from .settings import SteeringSettings


@dataclass(frozen=True)
class StepInfo:
    """A denoising step: its index, its sigma, and the fraction of the schedule completed before it."""

    step: int
    sigma: float
    progress: float


@dataclass
class Evaluation:
    """One evaluation of the classifier at a latent.

    gradient(loss): d loss / d latent, [B, ...], in model-input space. May be called once.
    """

    judgement: Judgement
    gradient: Callable[[Tensor], Tensor]


def displacement(gradient: Tensor, settings: SteeringSettings) -> Tensor:
    """The step against the gradient, [B, ...], in model-input space.

    The length of a normalised step counts only elements with a gradient. Cells outside a mask or an area have none.
    """
    if settings.update_rule == "raw gradient":
        return -settings.step_size * gradient
    length = settings.step_size / 100 * (gradient != 0).flatten(1).sum(dim=1).to(gradient.dtype).sqrt()
    scaled, _ = _scaled(gradient)
    return -scaled * _per_picture(length / scaled.flatten(1).norm(dim=1).clamp_min(0.5), gradient)


def steer_step(latent: Tensor, evaluate: Callable[[Tensor], Evaluation | None], weights: tuple[float, ...],
               settings: SteeringSettings, step: StepInfo, on_record: Callable[[UpdateRecord], None] = lambda record: None,
               move: Callable[[Tensor, SteeringSettings], Tensor] = displacement) -> Tensor:
    """Moves `latent` [B, ...] (model-input space) until the relations hold or the updates are used up.

    evaluate: evaluates the classifier at a latent; returns None if no attention could be recorded.
    weights: one per relation, above 0.
    on_record: called after each evaluation; may raise to interrupt.
    move: from a gradient to the displacement.
    Each picture of the batch stops on its own.
    """
    taking_turns = settings.relations_per_update == "one"
    pictures = _Pictures(latent, patience=len(weights) if taking_turns else 1)
    for update in range(settings.max_updates):
        began = time.perf_counter()
        evaluation = evaluate(pictures.latent)
        if evaluation is None:
            on_record(_record(step, update, None, None, None, None, NOT_RECORDED, began))
            break
        chosen = update % len(weights) if taking_turns else None
        loss = total_loss(evaluation.judgement, weights, chosen)
        pictures.close(_reached(evaluation.judgement, settings, step.step, chosen))
        if not pictures.open.any():
            on_record(_record(step, update, evaluation, loss, None, pictures.open, SATISFIED, began))
            break
        gradient = evaluation.gradient(loss)
        outcome, moved = pictures.advance(gradient, move(gradient, settings))
        on_record(_record(step, update, evaluation, loss, gradient, moved, outcome, began))
        if not pictures.open.any():
            break
    return pictures.latent


class _Pictures:
    """The pictures of a batch within one denoising step; each has its own state.

    latent: [B, ...]; open: [B], True for pictures that may still move.
    patience: number of consecutive zero gradients after which a picture is closed, since the next ones would be the same.
    """

    def __init__(self, latent: Tensor, patience: int):
        self.latent, self._before, self._patience = latent, latent, patience
        self.open = torch.ones(len(latent), dtype=torch.bool, device=latent.device)
        self._has_moved, self._halved = torch.zeros_like(self.open), torch.zeros_like(self.open)
        self._idle = torch.zeros_like(self.open, dtype=torch.int)

    def close(self, pictures: Tensor) -> None:
        self.open = self.open & ~pictures

    def advance(self, gradient: Tensor, displacement: Tensor) -> tuple[str, Tensor]:
        """Moves the open pictures. Returns the outcome and a mask, [B], of the pictures that followed their gradient.

        A picture whose gradient is not finite has its last move halved, once per denoising step. If the gradient is still
        not finite, or if nothing has moved yet, the picture returns to its last good latent and is closed.
        """
        ahead = self.latent + displacement
        finite = _all_finite(gradient) & _all_finite(ahead)
        flat = (gradient == 0).flatten(1).all(dim=1)
        moved, broken = self.open & finite & ~flat, self.open & ~finite
        halved = broken & self._has_moved & ~self._halved
        given_up = broken & ~halved
        halfway = (self._before + self.latent) / 2
        before = torch.where(_per_picture(moved, ahead), self.latent, self._before)
        for pictures, place in ((moved, ahead), (halved, halfway), (given_up, self._before)):
            self.latent = torch.where(_per_picture(pictures, place), place, self.latent)
        self._before, self._has_moved, self._halved = before, self._has_moved | moved, self._halved | halved
        self._idle = torch.where(flat, self._idle + 1, 0)
        outcome = NON_FINITE if broken.any() else MOVED if moved.any() else NO_GRADIENT
        self.close(given_up | (self._idle >= self._patience))
        return outcome, moved


def _reached(judgement: Judgement, settings: SteeringSettings, step: int, chosen: int | None) -> Tensor:
    """Which pictures, [B], have reached the target of every relation, or of relation `chosen` alone."""
    targets = settings.loss_targets
    if targets:
        holds = judgement.loss <= targets[min(step, len(targets) - 1)]
    else:
        holds = judgement.fulfilment >= settings.stop_probability
    return holds.all(-1) if chosen is None else holds[:, chosen]


def _per_picture(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...], to be broadcast against `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _all_finite(values: Tensor) -> Tensor:
    return values.flatten(1).isfinite().all(dim=1)


def _scaled(values: Tensor) -> tuple[Tensor, Tensor]:
    """`values` divided by a power of two per picture, and those powers, [B]. The largest element becomes about 1.

    The squares of very small or large gradients would underflow or overflow. Dividing by a power of two rounds nothing.
    """
    smallest = math.log2(torch.finfo(values.dtype).tiny)
    power = 2.0 ** values.flatten(1).abs().amax(dim=1).log2().floor().clamp_min(smallest)
    return values / _per_picture(power, values), power


def _norm(values: Tensor) -> Tensor:
    """Euclidean norm of each picture, [B]."""
    scaled, power = _scaled(values)
    return power * scaled.flatten(1).norm(dim=1)


def _record(step: StepInfo, update: int, evaluation: Evaluation | None, loss: Tensor | None, gradient: Tensor | None,
            moved: Tensor | None, outcome: str, began: float) -> UpdateRecord:
    return UpdateRecord(
        step=step.step, update=update, sigma=step.sigma, progress=step.progress,
        loss=() if loss is None else tuple(loss.detach().tolist()),
        probability=() if evaluation is None else tuple(map(tuple, evaluation.judgement.probability.tolist())),
        gradient_norm=None if gradient is None else tuple(_norm(gradient).tolist()),
        moved=() if moved is None else tuple(moved.tolist()), outcome=outcome, seconds=time.perf_counter() - began)
