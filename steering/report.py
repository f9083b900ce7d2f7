"""The report of a steered run: one record of plain numbers per update, and the warnings that follow from them."""
from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace

MOVED, SATISFIED, NO_GRADIENT, NON_FINITE, NOT_RECORDED = OUTCOMES = (
    "moved", "satisfied", "no gradient", "non-finite gradient", "not recorded")


@dataclass(frozen=True)
class UpdateRecord:
    """One evaluation within a denoising step, and the move that followed it, if any.

    loss: the descended loss, per picture.
    probability: probability[picture][relation] of the requested relation.
    gradient_norm: per picture, in model-input space; None where no gradient was computed.
    moved: per picture, whether it followed its gradient.
    outcome: one of OUTCOMES. "moved": at least one picture moved. "satisfied": every picture has reached its target.
        "no gradient": every gradient is exactly 0. "non-finite gradient": that of at least one picture. "not recorded": the
        model's attention was not recorded.
    seconds: duration of the evaluation and the move.
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

    @property
    def has_effect(self) -> bool:
        """Whether at least one picture moved along a gradient other than 0."""
        return any(moved and norm != 0 for moved, norm in zip(self.moved, self.gradient_norm or (), strict=False))


@dataclass(frozen=True)
class SteeringReport:
    """What steering did in one sampler run, or in several runs that one latent went through.

    relations: in words.
    steps: number of denoising steps in the schedule.
    notes: remarks for the user about this run.
    reasons: why no step was steered at all; empty otherwise.
    inactive: steps in which no conditioning that names the objects was active.
    obstacle: why nothing was recorded in other steps.
    stages: number of steps of each run, where the latent went through several.
    is_known: False where no recorded run gave the latent.
    """

    relations: tuple[str, ...]
    classifier: str
    steps: int
    records: tuple[UpdateRecord, ...]
    notes: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    inactive: tuple[int, ...] = ()
    obstacle: str = ""
    stages: tuple[int, ...] = ()
    is_known: bool = True

    @staticmethod
    def of_stages(stages: Sequence[SteeringReport]) -> SteeringReport:
        """One report for the runs that a latent went through, in order. Step numbers continue from one run to the next.

        A stage that was not steered gives a note instead of a warning if another stage was steered.
        """
        records, inactive, notes, reasons, before = [], [], [], [], 0
        for number, stage in enumerate(stages, 1):
            records += [replace(record, step=record.step + before) for record in stage.records]
            inactive += [step + before for step in stage.inactive]
            notes += [f"stage {number}: {note}" for note in stage.notes]
            reasons += [f"stage {number}: {reason}" for reason in stage.reasons]
            before += stage.steps
        whole = replace(stages[-1], steps=before, records=tuple(records), inactive=tuple(inactive),
                        obstacle=next((stage.obstacle for stage in stages if stage.obstacle), ""),
                        stages=tuple(stage.steps for stage in stages))
        if records:
            return replace(whole, notes=(*reasons, *notes), reasons=())
        return replace(whole, notes=tuple(notes), reasons=tuple(reasons))

    @property
    def warnings(self) -> tuple[str, ...]:
        """Why steering did not do what it was asked to."""
        return (*self.reasons, *(text for whole_run, text in self._findings() if whole_run))

    @property
    def remarks(self) -> tuple[str, ...]:
        """The notes, and the findings that concern only a part of the run."""
        return (*self.notes, *(text for whole_run, text in self._findings() if not whole_run))

    @property
    def effect(self) -> str:
        """The outcome of the run in a word or two.

        "steered": updates moved the latent. "satisfied": every relation held already. "no effect": no update moved the
        latent. "not recorded": the model's attention was never recorded. "not steered": no update was tried.
        "unknown": no recorded run gave the latent.
        """
        if not self.is_known:
            return "unknown"
        if any(record.has_effect for record in self.records):
            return "steered"
        if self.gradient_evaluations:
            return "no effect"
        outcomes = {record.outcome for record in self.records}
        return "not steered" if not outcomes else "not recorded" if outcomes == {NOT_RECORDED} else "satisfied"

    @property
    def gradient_evaluations(self) -> int:
        return sum(record.gradient_norm is not None for record in self.records)

    @property
    def seconds(self) -> float:
        return sum(record.seconds for record in self.records)

    @property
    def skipped(self) -> int:
        """Number of updates skipped because their gradient was not finite."""
        return sum(record.outcome == NON_FINITE for record in self.records)

    @property
    def without_gradient(self) -> int:
        """Number of updates that moved nothing because the gradient was exactly 0."""
        return sum(record.outcome != NON_FINITE and record.gradient_norm is not None and not any(record.gradient_norm)
                   for record in self.records)

    def to_dict(self) -> dict:
        return {**asdict(self), "effect": self.effect, "warnings": self.warnings,
                "gradient_evaluations": self.gradient_evaluations, "seconds": self.seconds}

    def to_text(self) -> str:
        """The report for a person: warnings, the effect, a summary, then a table with one line per update."""
        lines = [f"WARNING: {warning}" for warning in self.warnings] + [f"effect: {self._effect_in_words()}"]
        lines += [f"classifier: {self.classifier}"] + [f"relation: {relation}" for relation in self.relations]
        lines += [f"note: {note}" for note in self.remarks]
        if len(self.stages) > 1:
            firsts = [sum(self.stages[:number]) for number in range(len(self.stages))]
            lines.append(f"{len(self.stages)} sampler runs led to this latent; they begin with steps "
                         + ", ".join(map(str, firsts)))
        if not self.records:
            return "\n".join(lines)
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

    def _effect_in_words(self) -> str:
        moves = [record.step for record in self.records if record.has_effect]
        plural = "" if len(moves) == 1 else "s"
        return {
            "steered": f"{len(moves)} update{plural} in {len(set(moves))} of {self.steps} steps moved the latent",
            "satisfied": "nothing had to be moved, every relation was satisfied when a step began",
            "no effect": f"none, {self.gradient_evaluations} updates moved nothing",
            "unknown": "unknown, no recorded run gave this latent",
        }.get(self.effect, "none, nothing was steered")

    def _findings(self) -> list[tuple[bool, str]]:
        """Failures of updates in words, each with whether it concerns the whole run."""
        steps = {record.step for record in self.records}
        unread = {record.step for record in self.records if record.outcome == NOT_RECORDED}
        asleep, unseen = unread & set(self.inactive), unread - set(self.inactive)
        tried, flat, broken = self.gradient_evaluations, self.without_gradient, self.skipped
        found, nothing_read = [], self.effect == "not recorded"
        if asleep:
            found.append((nothing_read, f"nothing was steered in {_all_or_some(asleep, steps)} where steering was to work: no "
                          "conditioning that names the objects is active there. Its timestep range begins later or ends earlier. "
                          "Change that range, or start_percent and end_percent"))
        if unseen:
            found.append((nothing_read, f"nothing was steered in {_all_or_some(unseen, steps)} where steering was to work: "
                          f"nothing was recorded. {self.obstacle}"))
        if flat:
            found.append((flat == tried, f"in {flat} of {tried} updates the gradient was 0, so "
                          f"{'steering had no effect' if flat == tried else 'they moved nothing'}: what the classifier sees does "
                          "not depend on the latent there. Look for a conditioning that was zeroed, a noise mask or an area that "
                          "leaves nothing to change, or another pack that replaces the cross-attention"))
        if broken:
            nothing = self.effect == "no effect" and broken + flat == tried
            found.append((nothing, f"in {broken} of {tried} updates the gradient was not finite, so "
                          + ("steering had no effect. Look at the picture without steering: where it is black or noise, the "
                             "model itself overflows in its number format" if nothing else "these were left out")))
        return found


def _all_or_some(part: Collection[int], whole: Collection[int]) -> str:
    if len(whole) == 1:
        return "the one step"
    return f"all {len(whole)} steps" if len(part) == len(whole) else f"{len(part)} of {len(whole)} steps"
