"""The update loop of one denoising step, and when it stops (paper: "Inference", item 4). Plain tensors, no host."""
from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .objective import Judgement, total_loss
from .report import UpdateRecord
from .settings import SteeringSettings


@dataclass(frozen=True)
class StepInfo:
    """A denoising step: its index, its sigma, and the fraction of the schedule that lies behind it."""

    step: int
    sigma: float
    progress: float


@dataclass
class Evaluation:
    """One evaluation at a latent: what the classifier says, and the way back to the latent.

    gradient(loss): d loss / d latent, [B, …], in model-input space; may be called once.
    """

    judgement: Judgement
    gradient: Callable[[Tensor], Tensor]


def displacement(gradient: Tensor, settings: SteeringSettings) -> Tensor:
    """The move against the gradient, [B, …], in model-input space.

    A normalised one has its length by the cells that have a gradient: an inpainting mask or an area leaves the others be.
    """
    if settings.update_rule == "raw gradient":
        return -settings.step_size * gradient
    flat = gradient.flatten(1)
    length = settings.step_size / 100 * (flat != 0).sum(dim=1).to(flat.dtype).sqrt()
    norm = flat.norm(dim=1).clamp_min(torch.finfo(gradient.dtype).tiny)
    return -gradient * (length / norm).reshape(-1, *[1] * (gradient.ndim - 1))


def steer_step(latent: Tensor, evaluate: Callable[[Tensor], Evaluation | None], weights: tuple[float, ...],
               settings: SteeringSettings, step: StepInfo, turn: int = 0,
               on_record: Callable[[UpdateRecord], None] = lambda record: None,
               move: Callable[[Tensor, SteeringSettings], Tensor] = displacement) -> Tensor:
    """Moves `latent` [B, …] (model-input space) until every relation holds or the updates are used up.

    evaluate: of a latent; None where the host ran nothing that could be read; weights: of the relations, above 0;
    turn: updates before this step, for taking turns; on_record: called after each evaluation, may raise to interrupt;
    move: from a gradient to the displacement. Each picture of the batch stops on its own. A non-finite gradient moves
    nothing.
    """
    for update in range(settings.max_updates):
        began = time.perf_counter()
        evaluation = evaluate(latent)
        if evaluation is None:
            on_record(_record(step, update, None, None, None, None, "not recorded", began))
            return latent
        open_pictures = ~(evaluation.judgement.fulfilment >= settings.stop_probability).all(-1)
        chosen = (turn + update) % len(weights) if settings.relations_per_update == "one" else None
        loss = total_loss(evaluation.judgement, weights, chosen)
        if not open_pictures.any():
            on_record(_record(step, update, evaluation, loss, None, open_pictures, "satisfied", began))
            return latent
        gradient = evaluation.gradient(loss)
        finite = gradient.flatten(1).isfinite().all(-1)
        moved = open_pictures & finite
        mask = moved.reshape(-1, *[1] * (latent.ndim - 1))
        latent = torch.where(mask, latent + move(gradient, settings), latent)
        outcome = "moved" if finite[open_pictures].all() else "non-finite gradient"
        on_record(_record(step, update, evaluation, loss, gradient, moved, outcome, began))
    return latent


def _record(step: StepInfo, update: int, evaluation: Evaluation | None, loss: Tensor | None, gradient: Tensor | None,
            moved: Tensor | None, outcome: str, began: float) -> UpdateRecord:
    return UpdateRecord(
        step=step.step, update=update, sigma=step.sigma, progress=step.progress,
        loss=() if loss is None else tuple(loss.detach().tolist()),
        probability=() if evaluation is None else tuple(map(tuple, evaluation.judgement.probability.tolist())),
        gradient_norm=None if gradient is None else tuple(gradient.flatten(1).norm(dim=1).tolist()),
        moved=() if moved is None else tuple(moved.tolist()), outcome=outcome, seconds=time.perf_counter() - began)
