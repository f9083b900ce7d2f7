"""What steering did: one record an update, kept as plain numbers."""
from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

MOVED, SATISFIED, NO_GRADIENT, NON_FINITE, NOT_RECORDED = OUTCOMES = (
    "moved", "satisfied", "no gradient", "non-finite gradient", "not recorded")


@dataclass(frozen=True)
class UpdateRecord:
    """One evaluation within a denoising step, and the move that followed it, if any.

    Per picture of the batch: loss (the descended one), probability[picture][relation] of the relation asked for,
    gradient_norm (model-input space; None where no gradient was taken), moved (along its gradient). outcome, one of
    OUTCOMES: "moved": at least one picture was; "satisfied": every picture has reached the target; "no gradient": the
    gradient is exactly 0; "non-finite gradient": of at least one picture, whose last move was halved or taken back;
    "not recorded": the model's attention was not seen.
    """

    step: int
    update: int
    sigma: float
    progress: float
    loss: tuple[float, ...]
    probability: tuple[tuple[float, ...], ...]
    gradient_norm: tuple[float, ...] | None
    moved: tuple[bool, ...]
    outcome: str
    seconds: float


@dataclass(frozen=True)
class SteeringReport:
    """relations: in words; steps: length of the schedule; notes: what the user should know about this run."""

    relations: tuple[str, ...]
    classifier: str
    steps: int
    records: tuple[UpdateRecord, ...]
    notes: tuple[str, ...] = ()

    @property
    def gradient_evaluations(self) -> int:
        return sum(record.gradient_norm is not None for record in self.records)

    @property
    def seconds(self) -> float:
        return sum(record.seconds for record in self.records)

    @property
    def skipped(self) -> int:
        """Updates left out because their gradient was not finite."""
        return sum(record.outcome == NON_FINITE for record in self.records)

    @property
    def without_gradient(self) -> int:
        """Updates that moved nothing because the gradient was exactly 0."""
        return sum(record.outcome == NO_GRADIENT for record in self.records)

    def to_dict(self) -> dict:
        return {**asdict(self), "gradient_evaluations": self.gradient_evaluations, "seconds": self.seconds}

    def to_text(self) -> str:
        """A few lines for a person, then a table."""
        lines = [f"classifier: {self.classifier}"] + [f"relation: {relation}" for relation in self.relations]
        lines += [f"note: {note}" for note in self.notes]
        if not self.records:
            return "\n".join([*lines, "nothing was steered"])
        if self.without_gradient:
            moved = any(any(record.moved) for record in self.records)
            effect = "these updates moved nothing" if moved else "steering had no effect"
            lines.append(f"note: in {self.without_gradient} of {len(self.records)} updates the gradient was 0, so {effect}: "
                         "what the classifier sees does not depend on the latent there. Look for a conditioning that was "
                         "zeroed, a noise mask or an area that leaves nothing to change, or another pack that replaces the "
                         "cross-attention.")
        outcomes = Counter(record.outcome for record in self.records)
        lines.append(f"{self.gradient_evaluations} gradient evaluations in {len({r.step for r in self.records})} of "
                     f"{self.steps} steps, {self.seconds:.1f} s; "
                     + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
        if max(len(record.loss) for record in self.records) > 1:
            lines.append("numbers of the batch's first picture:")
        lines.append("step update  sigma   loss  |gradient|  probability  outcome")
        for record in self.records:
            norm = "         -" if record.gradient_norm is None else f"{record.gradient_norm[0]:10.3g}"
            shares = " ".join(f"{value:.2f}" for value in record.probability[0]) if record.probability else "-"
            loss = f"{record.loss[0]:6.3f}" if record.loss else "     -"
            lines.append(f"{record.step:4d} {record.update:6d} {record.sigma:6.2f} {loss}  {norm}  {shares:>11}  "
                         f"{record.outcome}")
        return "\n".join(lines)
