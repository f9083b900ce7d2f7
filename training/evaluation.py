"""Accuracy of a relation network on maps of true and wrong captions, per step and relation, as numbers and charts."""
from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..files.writing import replace_file
from ..pictures.canvas import to_pillow
from ..pictures.overlays import curve_chart, matrix_chart
from ..prompts.relations import RELATIONS
from .data import Data, EpochResult, Item

BATCH = 256
CAPTIONS = ("true caption", "wrong caption")


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. Accuracies are fractions from 0 to 1.

    accuracy, loss: over all items; the loss is the mean cross-entropy.
    by_caption: accuracy by kind of caption (CAPTIONS).
    said_caption: share of wrong-caption items answered with the caption's relation (leakage); None without such items.
    by_step: kind of caption -> step index -> accuracy.
    confusion: counts, [truth, answer].
    """

    items: int
    loss: float
    accuracy: float
    by_caption: Mapping[str, float]
    said_caption: float | None
    by_step: Mapping[str, Mapping[int, float]]
    confusion: Tensor

    def summary(self) -> dict:
        said = None if self.said_caption is None else round(self.said_caption, 4)
        return {"items": self.items, "accuracy": round(self.accuracy, 4), "said_the_captions_word": said,
                **{name: round(value, 4) for name, value in self.by_caption.items()}}

    def to_dict(self) -> dict:
        """JSON values."""
        return {**self.summary(), "loss": round(self.loss, 5), "relations": list(RELATIONS),
                "confusion": self.confusion.tolist(),
                "by_step": {kind: {str(step): round(value, 4) for step, value in steps.items()}
                            for kind, steps in self.by_step.items()}}


@torch.no_grad()
def evaluate(classify: Callable[[Tensor, Tensor, Tensor], Tensor], data: Data, items: Sequence[Item],
             device: torch.device) -> Evaluation:
    """Evaluates `classify` on `items` of `data`. classify: subject maps, object maps, step indices -> logits over RELATIONS."""
    losses, answers = [], []
    for first in range(0, len(items), BATCH):
        subject_maps, object_maps, steps, truth = data.batch(items[first:first + BATCH], device)
        logits = classify(subject_maps, object_maps, steps)
        losses.append(F.cross_entropy(logits, truth, reduction="none").cpu())
        answers.append(logits.argmax(-1).cpu())
    answer, loss = torch.cat(answers), float(torch.cat(losses).double().mean())
    samples = [data.samples[item.row] for item in items]
    truth = torch.tensor([RELATIONS.index(sample.relation) for sample in samples])
    said = torch.tensor([RELATIONS.index(sample.caption_relation) for sample in samples])
    steps = torch.tensor([data.timesteps[item.step] for item in items])
    right, wrong_caption = answer == truth, said != truth
    by_kind = zip(CAPTIONS, (~wrong_caption, wrong_caption), strict=True)
    kinds = {name: chosen for name, chosen in by_kind if chosen.any()}
    confusion = torch.bincount(truth * len(RELATIONS) + answer, minlength=len(RELATIONS)**2).view(len(RELATIONS), -1)
    return Evaluation(
        items=len(items), loss=loss, accuracy=_mean(right), confusion=confusion,
        by_caption={name: _mean(right[chosen]) for name, chosen in kinds.items()},
        said_caption=_mean((answer == said)[wrong_caption]) if wrong_caption.any() else None,
        by_step={name: {step: _mean(right[chosen & (steps == step)]) for step in data.timesteps
                        if (chosen & (steps == step)).any()} for name, chosen in kinds.items()})


def _mean(right: Tensor) -> float:
    return float(right.double().mean())


def save_charts(folder: Path, history: Sequence[EpochResult], best_epoch: int,
                results: Mapping[str, Evaluation]) -> None:
    """Writes loss.png and accuracy.png over the epochs, and confusion.png and per_step.png for each result."""
    _save(loss_chart(history, best_epoch), folder / "loss.png")
    accuracy = [(epoch, result.validation_accuracy) for epoch, result in enumerate(history, 1)]
    chart = curve_chart({"validation": accuracy}, "Accuracy", "epoch", "accuracy", y_range=(0, 1))
    _save(chart, folder / "accuracy.png")
    for number, (name, result) in enumerate(results.items()):
        suffix = "" if number == 0 else "_held_out"
        _save(confusion_chart(name, result), folder / f"confusion{suffix}.png")
        lines = {kind: list(steps.items()) for kind, steps in result.by_step.items()}
        _save(curve_chart(lines, f"Accuracy by denoising step ({name})", "step index", "accuracy", y_range=(0, 1)),
                 folder / f"per_step{suffix}.png")


def _save(chart: Tensor, path: Path) -> None:
    """Writes a PNG file whole or not at all."""
    content = io.BytesIO()
    to_pillow(chart).save(content, format="PNG")
    replace_file(path, content.getvalue())


def loss_chart(history: Sequence[EpochResult], best_epoch: int) -> Tensor:
    """Training and validation loss over the epochs, [H, W, 3]."""
    lines = {"training": [(epoch, result.train_loss) for epoch, result in enumerate(history, 1)],
             "validation": [(epoch, result.validation_loss) for epoch, result in enumerate(history, 1)]}
    return curve_chart(lines, f"Loss (best epoch: {best_epoch + 1})", "epoch", "cross-entropy")


def confusion_chart(name: str, result: Evaluation) -> Tensor:
    """Confusion matrix as a picture [H, W, 3]: truth in rows, answers in columns."""
    return matrix_chart(result.confusion, RELATIONS, RELATIONS, f"Truth (rows) and answer ({name})")
