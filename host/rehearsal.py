"""Rehearsal of a sampler function: which evaluation begins each denoising step, and how much of a move each step keeps.

With the model's output held constant, a sampler's latent is linear in the starting latent. The factor per step depends on
the sampler: sigma_next / sigma for an ODE solver, less for an ancestral or SDE sampler, 0 for LCM. Steering adds a move to
the latent at one step, stores the move beside the sampler's latent, and scales it by these factors at every later
evaluation. The sampler responds as if its latent, and the latents in its history, had been moved from the start.

Writing into the sampler's tensor would not do that: uni_pc hands over a copy, sa_solver's corrector returns to the previous
latent, and lms, ipndm, deis and gradient_estimation extrapolate from derivatives at unmoved latents.
"""
from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from .stepping import RehearsedModel, SteeringError

CELLS = 8
"""Maximum height and width of the rehearsal's latent, in cells."""
SHIFT = 16.0
"""Mean shift of the second rehearsal's latent, in units of the largest sigma."""
UNEVEN = 0.25
"""Standard deviation of the shift over channels and cells, in units of its mean. Its pattern is random: no symmetry hides a
sampler that moves cells."""
BLURRED = 0.05
"""Share of a shift by which its pattern may change on the way."""
FAINT = 1e-4
"""Share of the shift below which rounding hides the response. The run is then rehearsed again from a later step."""
ROUNDING = 0.01
"""Share of a move that counts as a rounding error."""
LARGEST = 2.0
"""Largest share of a move that a sampler may keep, in units of sigma_next / sigma. ipndm_v's weights do not sum to 1."""
LAST_SIGMA = 1e-3
"""The sigma at which uni_pc ends; other samplers end at 0."""
ADVISED = ("euler", "ddim", "dpmpp_2m", "heun")


@dataclass(frozen=True)
class Rehearsal:
    """Facts about a sampler function that steering needs before the run.

    sampler: its input and name, for messages.
    begins: index of an evaluation -> the step that begins with it.
    reported: step -> number of evaluations before its callback.
    kept: step -> the share of a move made at that step that remains at each evaluation and, last, in the result.
    """

    sampler: str
    begins: dict[int, int]
    reported: dict[int, int]
    kept: dict[int, tuple[float, ...]]


@dataclass
class Trial:
    """One rehearsed run.

    levels: sigma of each evaluation.
    latents: the model's input at each evaluation and, last, the result.
    reported: step -> number of evaluations before its callback.
    named: step -> sigmas that the callback reports.
    """

    levels: list[float]
    latents: list[Tensor]
    reported: dict[int, int]
    named: dict[int, tuple[float, ...]]


@dataclass(frozen=True)
class Stage:
    """A sampler function and its arguments, except the latent's values and the sigmas."""

    function: Callable
    model: Callable
    x: Tensor
    extra_args: dict
    options: dict
    sampler: str

    def refuse(self, reason: str) -> SteeringError:
        return SteeringError(f"{self.sampler} {reason}, so it cannot be steered. {advice(self.sampler)}")

    def draw(self, seed: int) -> Tensor:
        """Standard normal numbers in the shape of the rehearsal's latent: one picture, all channels, few cells."""
        shape = [1] * (self.x.ndim - 2) + [min(CELLS, side) for side in self.x.shape[-2:]]
        if self.x.ndim > 3:
            shape[1] = self.x.shape[1]
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.x)

    def trial(self, sigmas: Tensor, shift: Tensor | float) -> Trial:
        """Runs the sampler on noise shifted by `shift`, with a model whose output is 0."""
        trial = Trial([], [], {}, {})
        most = 1000 + 100 * len(sigmas)

        def around(_, x, sigma, arguments):
            comfy.model_management.throw_exception_if_processing_interrupted()
            if len(trial.levels) == most:
                raise self.refuse(f"chooses its own noise levels: it evaluated the model {most} times")
            trial.levels.append(float(sigma.flatten()[0]))
            trial.latents.append(x.detach().clone())
            denoised = torch.zeros_like(x)
            for hook in _added_hooks(self.extra_args, arguments):
                hook({"denoised": denoised, "cond_denoised": denoised, "uncond_denoised": denoised, "input": x,
                      "sigma": sigma, "model_options": arguments["model_options"]})
            return denoised

        def callback(info: dict) -> None:
            if info["i"] not in trial.reported:
                trial.reported[info["i"]] = len(trial.levels)
                trial.named[info["i"]] = tuple(float(info[key]) for key in ("sigma", "sigma_hat") if key in info)

        extra_args = {**self.extra_args, **({"denoise_mask": None} if "denoise_mask" in self.extra_args else {})}
        with _unchanged_random_state(self.x.device):
            try:
                result = self.function(RehearsedModel(self.model, around), self.draw(0) * sigmas[0] + shift, sigmas.clone(),
                                       extra_args=extra_args, callback=callback, **{**self.options, "disable": True})
            except (SteeringError, comfy.model_management.InterruptProcessingException):
                raise
            except Exception as error:  # any pack's sampler may raise anything on so small a latent
                raise self.refuse(f"failed in a rehearsal on a latent of {CELLS} x {CELLS} cells "
                                  f"({type(error).__name__}: {error})") from error
        trial.latents.append(result)
        return trial

    def response(self, sigmas: Tensor) -> tuple[Trial, list[float]]:
        """A rehearsed run, and the share of a shift of its first latent that reaches each evaluation and, last, the result."""
        shift = SHIFT * float(sigmas.max()) * (1 + UNEVEN * self.draw(1))
        plain, shifted = self.trial(sigmas, 0.0), self.trial(sigmas, shift)
        if not _same_levels(plain.levels, shifted.levels):
            raise self.refuse("chooses its own noise levels: they depend on the latent")
        return plain, [self._share(b - a, shift) for a, b in zip(plain.latents, shifted.latents, strict=True)]

    def _share(self, difference: Tensor, shift: Tensor) -> float:
        """The factor by which `difference` is a multiple of `shift`. Of a resized latent, only the mean is compared."""
        difference, shift = difference.double(), shift.double()
        size = float(shift.mean())
        kept = float(difference.mean()) / size
        if not difference.isfinite().all():
            raise self.refuse("gives values that are not finite on this schedule")
        if difference.shape != shift.shape:
            return kept
        kept = float((difference * shift).sum() / shift.square().sum())
        rounding = 100 * torch.finfo(self.x.dtype).eps
        if float((difference - kept * shift).square().mean().sqrt()) > (BLURRED * abs(kept) + rounding) * size:
            raise self.refuse("moves the latent's cells about or mixes them: a move of some cells reaches others")
        return kept


def rehearse(function: Callable, model: Callable, x: Tensor, sigmas: Tensor, extra_args: dict, options: dict,
             window: frozenset[int]) -> Rehearsal:
    """Rehearses a sampler function for the steps in `window`, on a small latent and with a model whose output is 0.

    Raises SteeringError for a sampler that chooses its own noise levels, that passes the model an unrelated latent, that
    moves cells about, or that does not preserve the direction of a move and scale it with the noise level.
    """
    sampler = chosen_sampler(function, options)
    if not window:
        return Rehearsal(sampler, {}, {}, {})
    if not sigmas.isfinite().all():
        raise SteeringError(f"the schedule's noise levels are not all finite ({', '.join(f'{float(s):.3g}' for s in sigmas)}). "
                            "Use more steps or another scheduler.")
    stage = Stage(function, model, x, extra_args, options, sampler)
    trial, response = stage.response(sigmas)
    begins = _begins(stage, trial, sigmas)
    kept, runs = {}, functools.cache(lambda start: stage.response(sigmas[start:]))
    for step in sorted(window):
        if step not in begins:
            raise stage.refuse(f"does not evaluate the model in step {step}")
        begin = begins[step]
        for start in (step - 1, step):  # try the step before first: a sampler may do less in its own first step
            if response[begin] < FAINT and start > 0:
                response = _resumed(stage, start, trial.levels, begin, runs)
        if response[begin] < FAINT:
            raise stage.refuse("hands the model another latent than the one it was given")
        kept[step] = (0.0,) * begin + tuple(share / response[begin] for share in response[begin:])
        _check_direction_and_size(stage, step, kept[step], begins, sigmas)
    return Rehearsal(sampler, {call: step for step, call in begins.items()}, trial.reported, kept)


def _resumed(stage: Stage, start: int, levels: list[float], begin: int, runs: Callable) -> list[float]:
    """The response of a run that starts at step `start`, aligned with the whole run; 0 before evaluation `begin`.

    sa_solver_pece evaluates the model once in its first step and twice, at one level, in every other. The missing
    evaluations are filled in.
    """
    trial, response = runs(start)
    remaining = len(levels) - begin
    missing = max(0, remaining - len(trial.levels))
    if not _same_levels(trial.levels[:1] * missing + trial.levels[-remaining:], levels[begin:]):
        raise stage.refuse(f"evaluates the model at other noise levels when it starts at step {start}")
    return [0.0] * begin + response[:1] * missing + response[-remaining - 1:]


def _begins(stage: Stage, trial: Trial, sigmas: Tensor) -> dict[int, int]:
    """step -> index of the evaluation that begins it: one at the step's own level, after the previous step's callback.

    Most samplers call back right after this evaluation. Among several evaluations at that level the last one counts, since
    a second-order sampler's earlier one belongs to the previous step. A sampler that calls back after its substeps evaluates
    the model more than once before its first callback; there the first one counts.
    """
    steps = len(sigmas) - 1
    if not trial.reported:
        raise stage.refuse("never calls back, so nothing tells where a step begins")
    if sorted(trial.reported) != list(range(steps)):
        raise stage.refuse(f"chooses its own noise levels: it took {len(trial.reported)} steps where the schedule has {steps}")
    at_once = trial.reported[0] == 1
    begins, after = {}, 0
    for step in range(steps):
        own = (float(sigmas[step]), *trial.named[step])
        between = range(after, trial.reported[step])
        after = max(after, trial.reported[step])
        far = {call: min(abs(trial.levels[call] - level) for level in own) for call in between}
        near = [call for call in between if far[call] <= min(far.values()) + 1e-4 * own[0]]
        if near:
            begins[step] = near[-1] if at_once else near[0]
    return begins


def _check_direction_and_size(stage: Stage, step: int, kept: tuple[float, ...], begins: dict[int, int], sigmas: Tensor) -> None:
    """Raises SteeringError unless a move at `step` keeps its sign and shrinks about as fast as the noise level, or faster."""
    places = [(f"at step {later}", kept[begins[later]], float(sigmas[later])) for later in sorted(begins) if later > step]
    places.append(("in the result", kept[-1], max(float(sigmas[-1]), LAST_SIGMA)))
    for place, share, sigma in places:
        left = sigma / max(float(sigmas[step]), 1e-9)
        if share < -0.02 * left - ROUNDING:
            raise stage.refuse(f"reverses a move of its latent: a move by 1 at step {step} becomes one by {share:.2g} {place}")
        if share > LARGEST * left + ROUNDING:
            raise stage.refuse(f"does not treat its latent as noisy: of a move by 1 at step {step} it keeps {share:.2g} {place}, "
                               f"where the noise level leaves {left:.2g}")


def advice(sampler: str) -> str:
    """What to use in place of `sampler`, which was refused."""
    return f"Use {', '.join(name for name in ADVISED if name != sampler.rsplit(': ', 1)[-1])} or another sampler of ComfyUI."


def chosen_sampler(function: Callable, options: dict) -> str:
    """The user's choice of sampler in words: a name of the host's list, or a SAMPLER made by a node."""
    function = inspect.unwrap(function)
    if not options.keys() - {"disable"}:
        for name, listed in _listed_samplers():
            if listed is function or getattr(listed, "__code__", None) is getattr(function, "__code__", function):
                return f"input 'sampler_name': {name}"
    function = getattr(function, "func", function)  # unwrap a functools.partial
    name = getattr(function, "__name__", type(function).__name__).removeprefix("sample_").removesuffix("_function")
    return f"input 'sampler': {name}"


def _listed_samplers() -> Iterator[tuple[str, Callable]]:
    for name in comfy.samplers.KSampler.SAMPLERS:
        try:
            yield name, inspect.unwrap(comfy.samplers.sampler_object(name).sampler_function)
        except Exception:  # a name that a pack added and the host cannot make; it is only wanted for messages
            continue


@contextlib.contextmanager
def _unchanged_random_state(device: torch.device) -> Iterator[None]:
    """Restores the generators of the CPU and of `device` afterwards. Two trials thus draw the same numbers; none is seeded."""
    module = getattr(torch, device.type, None)
    where = () if device.type == "mps" else (device,)  # older releases of torch.mps take no device
    cpu, own = torch.get_rng_state(), module.get_rng_state(*where) if hasattr(module, "get_rng_state") else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if own is not None:
            module.set_rng_state(own, *where)


def _same_levels(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and all(math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-8) for a, b in zip(one, other, strict=True))


def _added_hooks(before: dict, arguments: dict) -> list[Callable]:
    """Post-CFG functions that the sampler itself added to the model's options, as the CFG++ samplers do."""
    def hooks(holder: dict) -> list[Callable]:
        return holder.get("model_options", {}).get("sampler_post_cfg_function", [])

    known = hooks(before)
    return [hook for hook in hooks(arguments) if hook not in known]
