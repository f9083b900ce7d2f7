"""The schedule of a sampler run, and the wrapper around the model that a sampler function is called with."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..steering.optimizer import StepInfo


class SteeringError(ValueError):
    """Steering is not possible with these inputs; the message says what is wrong, where, and what to do."""


class SampledModel:
    """A wrapper around the model that calls `around(model, x, sigma, arguments)` for each evaluation."""

    def __init__(self, wrapped: Callable, around: Callable):
        self.wrapped, self._around = wrapped, around

    def __call__(self, x: Tensor, sigma: Tensor, **arguments):
        return self._around(self.wrapped, x, sigma, arguments)

    def __getattr__(self, name: str):
        return getattr(self.wrapped, name)


class RehearsedModel(SampledModel):
    """Replaces the model during a rehearsal. Sessions do not intercept it."""


def unwrapped(model: Callable) -> Callable:
    """The host's own model, without any SampledModel around it."""
    while isinstance(model, SampledModel):
        model = model.wrapped
    return model


@dataclass(frozen=True)
class Schedule:
    """The schedule of a run.

    sigmas: noise levels; len(sigmas) == steps + 1.
    progress: for each denoising step, the fraction of the whole noise schedule completed before it.
    """

    sigmas: tuple[float, ...]
    progress: tuple[float, ...]

    @staticmethod
    def of(model_sampling, sigmas: Tensor) -> Schedule:
        """The schedule of a run over `sigmas`.

        In a whole schedule of n steps, step i has progress i/n. A part of a schedule (img2img, split sigmas) starts and ends
        at the percent that the host assigns to its noise levels.
        """
        values = tuple(float(sigma) for sigma in sigmas)
        if len(values) < 2:
            return Schedule(values, ())
        first, last = percent_of_sigma(model_sampling, values[0]), percent_of_sigma(model_sampling, values[-1])
        first = 0.0 if first < 0.05 else first  # a whole schedule may start slightly below the highest noise level
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
