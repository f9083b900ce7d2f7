"""A sampler's denoising steps: which evaluation of the model begins each, and how far along the schedule it is."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
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


def first_evaluations(function: Callable, model: Callable, x: Tensor, sigmas: Tensor, extra_args: dict,
                      options: dict) -> dict[int, int]:
    """For a sampler function: the number of each evaluation that begins a denoising step → that step.

    Second-order samplers evaluate more than once a step, some of them at the next step's noise level, so the noise
    level alone does not tell. The sampler is rehearsed on a latent of one cell with a model that costs nothing; a
    second rehearsal, in which the last step's latent is moved, shows whether the sampler takes such a move.
    Raises SteeringError for a sampler that chooses its own noise levels or works on a latent of its own.
    """
    def rehearse(nudged: int | None) -> tuple[list[float], dict[int, int], Tensor]:
        levels: list[float] = []
        begins: dict[int, int] = {}

        def around(_, x, sigma, arguments):
            if len(levels) == nudged:
                x += 1.0
            levels.append(float(sigma.flatten()[0]))
            denoised = x * 0.5
            for hook in _added_hooks(extra_args, arguments):
                hook({"denoised": denoised, "cond_denoised": denoised, "uncond_denoised": denoised, "input": x,
                      "sigma": sigma, "model_options": arguments["model_options"]})
            return denoised

        def callback(info: dict) -> None:
            begins[len(levels) - 1] = info["i"]

        with torch.random.fork_rng():
            torch.manual_seed(0)
            result = function(RehearsedModel(model, around), x.new_ones([1] * x.ndim), sigmas, extra_args=dict(extra_args),
                              callback=callback, **{**options, "disable": True})
        return levels, begins, result

    name = getattr(function, "__name__", "this sampler").removeprefix("sample_").removesuffix("_function")
    levels, begins, plain = rehearse(None)
    steps = len(sigmas) - 1
    at_their_level = all(math.isclose(levels[call], float(sigmas[step]), rel_tol=1e-4) for call, step in begins.items())
    if sorted(begins.values()) != list(range(steps)) or not at_their_level:
        raise SteeringError(f"input 'sampler_name': {name} chooses its own noise levels, so its latent cannot be "
                            "steered. Use euler, ddim, dpmpp_2m, heun or another sampler.")
    if torch.equal(plain, rehearse(max(begins))[2]):
        raise SteeringError(f"input 'sampler_name': {name} works on a copy of the latent, so steering cannot reach it. "
                            "Use euler, ddim, dpmpp_2m, heun or another sampler.")
    return begins


def _added_hooks(before: dict, arguments: dict) -> list[Callable]:
    """Post-CFG functions that the sampler itself put into the model's options (the CFG++ samplers do)."""
    def hooks(holder: dict) -> list[Callable]:
        return holder.get("model_options", {}).get("sampler_post_cfg_function", [])

    known = hooks(before)
    return [hook for hook in hooks(arguments) if hook not in known]
