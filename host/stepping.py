"""A run's denoising steps and how far along the schedule each is; the model as a watched sampler function sees it."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..steering.optimizer import StepInfo


class SteeringError(ValueError):
    """Steering cannot work with what was connected; the message says what, where and what to do."""


class SampledModel:
    """The model as a sampler function sees it, with `around(model, x, sigma, arguments)` for each evaluation."""

    def __init__(self, wrapped: Callable, around: Callable):
        self.wrapped, self._around = wrapped, around

    def __call__(self, x: Tensor, sigma: Tensor, **arguments):
        return self._around(self.wrapped, x, sigma, arguments)

    def __getattr__(self, name: str):
        return getattr(self.wrapped, name)


class RehearsedModel(SampledModel):
    """Stands for the model while a sampler function is only watched; sessions let it pass."""


def unwrapped(model: Callable) -> Callable:
    """The host's own model below any SampledModel."""
    while isinstance(model, SampledModel):
        model = model.wrapped
    return model


@dataclass(frozen=True)
class Schedule:
    """A run's noise levels, and for each denoising step the fraction of the whole schedule that lies behind it."""

    sigmas: tuple[float, ...]
    progress: tuple[float, ...]

    @staticmethod
    def of(model_sampling, sigmas: Tensor) -> Schedule:
        """progress of step i is i/n for a whole schedule; a part of one (img2img, split sigmas) starts and ends at
        the percent that the host gives its noise levels."""
        values = tuple(float(sigma) for sigma in sigmas)
        if len(values) < 2:
            return Schedule(values, ())
        first, last = percent_of_sigma(model_sampling, values[0]), percent_of_sigma(model_sampling, values[-1])
        first = 0.0 if first < 0.05 else first  # schedules start a little below the highest noise level
        last = 1.0 if last > 0.98 else last
        steps = len(values) - 1
        return Schedule(values, tuple(first + (last - first) * step / steps for step in range(steps)))

    @property
    def steps(self) -> int:
        return len(self.progress)

    def step_info(self, step: int) -> StepInfo:
        return StepInfo(step, self.sigmas[step], self.progress[step])

    def window(self, start: float, end: float) -> frozenset[int]:
        """Steps with start <= progress < end."""
        return frozenset(step for step, value in enumerate(self.progress) if start - 1e-6 <= value < end - 1e-6)


def percent_of_sigma(model_sampling, sigma: float) -> float:
    """The inverse of the host's `percent_to_sigma`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float(model_sampling.percent_to_sigma(middle)) > sigma else (low, middle)
    return (low + high) / 2
