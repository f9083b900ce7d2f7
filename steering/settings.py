"""How to steer."""
from __future__ import annotations

from dataclasses import dataclass

UPDATE_RULES = ("normalised", "raw gradient")
RELATIONS_PER_UPDATE = ("all", "one")


@dataclass(frozen=True)
class SteeringSettings:
    """How to steer.

    start, end: window as fractions of the schedule. step_size: with "normalised", how far an update moves the latent,
    in percent of a unit-variance latent's norm (of the part that can move); with "raw gradient" (the paper's rule), the
    factor on the gradient. Both in model-input space. max_updates: per denoising step. stop_probability: a step ends
    once every relation's fulfilment (probability, less while an object's attention is spread) reached it.
    relations_per_update: "all" descends their weighted mean, "one" takes turns (the paper's rule). compactness: weight
    of the term that keeps each object in one place (0: the paper's loss).
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

    @property
    def is_off(self) -> bool:
        return self.step_size == 0 or self.max_updates == 0 or self.end <= self.start
