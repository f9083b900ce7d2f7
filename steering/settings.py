"""The settings of steering, and the paper's values for them."""
from __future__ import annotations

from dataclasses import dataclass

UPDATE_RULES = ("normalised", "raw gradient")
RELATIONS_PER_UPDATE = ("all", "one")
PAPER_LOSS_TARGETS = (1e-5, 3e-5, 5e-5, 7e-5)
PAPER_STEP_SIZE = 5.0


@dataclass(frozen=True)
class SteeringSettings:
    """How to steer.

    start, end: the window of steered steps, as fractions of the schedule.
    step_size: in model-input space. With "normalised", the length of an update in percent of a unit-variance latent's norm,
        counting only elements that can move. With "raw gradient" (the paper's rule), the factor on the gradient.
    max_updates: per denoising step; the paper's setting of 15 means 16.
    stop_probability: a step ends once the fulfilment of every relation reaches this value. Fulfilment is the probability,
        lowered while an object's attention is spread. Not used with `loss_targets`.
    update_rule: one of UPDATE_RULES.
    relations_per_update: "all" descends the weighted mean of all relations. "one" takes turns, as in the paper: each
        denoising step begins with the first relation, and ends once the relation in turn has reached its target.
    recompute: recomputes activations for the gradient instead of keeping them in memory.
    compactness: weight of the term that keeps each object in one place; 0 gives the paper's loss.
    loss_targets: step i ends once its loss is at most loss_targets[i]; the last target holds for all later steps. If empty,
        `stop_probability` decides.
    """

    start: float = 0.0
    end: float = 0.36
    step_size: float = 2.5
    max_updates: int = 3
    stop_probability: float = 0.99
    update_rule: str = "normalised"
    relations_per_update: str = "all"
    recompute: bool = False
    compactness: float = 6.0
    loss_targets: tuple[float, ...] = ()

    @classmethod
    def as_in_the_paper(cls, step_size: float = PAPER_STEP_SIZE, end: float = 0.5, recompute: bool = False) -> SteeringSettings:
        """The paper's settings (docs/method.md, "Settings").

        The paper uses step_size 7.5 for SD 1.x and end 0.25 for FLUX.1-schnell.
        """
        return cls(start=0.0, end=end, step_size=step_size, max_updates=16, update_rule="raw gradient",
                   relations_per_update="one", recompute=recompute, compactness=0.0, loss_targets=PAPER_LOSS_TARGETS)

    @property
    def off_because(self) -> str:
        """The setting that switches steering off, in the words of the nodes' inputs; empty if none does."""
        if self.step_size == 0:
            return "step_size is 0"
        if self.max_updates == 0:
            return "max_updates is 0"
        return "" if self.start < self.end else f"end_percent {self.end:g} is not above start_percent {self.start + 0.0:g}"

    @property
    def is_off(self) -> bool:
        return bool(self.off_because)
