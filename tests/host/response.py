"""Measures a sampler's response to a move of its latent, and computes the response that its formula gives.

The response is the share of a move, made at one step, that is left in the final latent. It is measured with a model whose
output is 0. Then an ODE solver only scales its latent by sigma_next / sigma in each step; so does a multistep solver if its
history is moved too. Histories of derivatives (lms, ipndm, deis, gradient_estimation) and of earlier latents (sa_solver, uni_pc)
must follow the move. A run that starts at that step from the moved latent has no conflicting history; it is measured as well.
"""
from __future__ import annotations

import dataclasses
import math

import comfy.sample
import comfy.samplers
import pytest
import torch
from learn_to_steer.host.patching import apply_steering
from torch import Tensor

SIGMAS = (14.6, 8.0, 5.0, 3.4, 2.2, 1.5, 1.0, 0.7)
MOVED_STEPS, SIZE = (1, 3), 8.0
STOCHASTIC = {"euler_ancestral", "euler_ancestral_cfg_pp", "exp_heun_2_x0_sde", "dpm_2_ancestral", "dpmpp_2s_ancestral",
              "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu",
              "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm",
              "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "seeds_2", "seeds_3"}


def with_output(model, output):
    """The MODEL with `output(x, sigma)` as its output. Steering still records the network's attention."""
    model = model.clone()
    model.set_model_sampler_calc_cond_batch_function(lambda args: [output(args["input"], args["sigma"])] * len(args["conds"]))
    return model


def silent(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.zeros_like(x)


def halves(size: int) -> dict[int, Tensor]:
    """Moves by step: the left half at the first of MOVED_STEPS, the right half at the second."""
    left = torch.zeros(1, 1, size, size)
    left[..., :size // 2] = SIZE
    return dict(zip(MOVED_STEPS, (left, left.flip(-1)), strict=True))


class Bench:
    """A scene's model for runs of any sampler on given sigmas."""

    def __init__(self, scene, channels: int = 4, size: int = 16):
        self.scene, self.shape = scene, (1, channels, size, size)
        self.moves = halves(size)
        ones = torch.ones(1, 1, 1, 1)
        self.sampling = scene.model.get_model_object("model_sampling")
        self.unit = float(scene.model.model.process_latent_out(ones) - scene.model.model.process_latent_out(0 * ones))

    def run(self, model, sampler, sigmas, latent: Tensor | None = None, noise: float = 1.0, **options) -> Tensor:
        latent = torch.zeros(self.shape) if latent is None else latent
        torch.manual_seed(0)  # for samplers that draw their noise from the global generator
        options.setdefault("callback", lambda *_: None)  # an older host gives the sampler none where nobody listens
        draws = noise * torch.randn(self.shape, generator=torch.Generator().manual_seed(5))
        with torch.inference_mode():
            return comfy.sample.sample_custom(model, draws, 3.0, sampler, torch.tensor(sigmas), self.scene.positive,
                                              self.scene.negative, latent, disable_pbar=True, seed=11, **options)

    def steered(self, sampler, sigmas, output=silent, end: float = 0.55, level: float = 1.0) -> tuple[Tensor, list[int]]:
        """The change of the final latent by steering, in units of the sampler's latent, and the steered steps.

        level: by how much the sampler's evaluations are above the schedule's sigmas.
        """
        calls = iter(range(len(sigmas)))

        def move(gradient: Tensor, settings) -> Tensor:
            step = next(calls)
            scale = self.sampling.calculate_input(torch.tensor([level * sigmas[step]]), torch.ones(1, 1, 1, 1))
            return self.moves.get(step, torch.zeros(())) * scale + 0 * gradient

        steering = self.scene.steering(stop_probability=1.0, max_updates=1, start=0.0, end=end)
        model = with_output(self.scene.model, output)
        patched, runs = apply_steering(model, dataclasses.replace(steering, move=move))
        change = self.run(patched, sampler, sigmas) - self.run(model, sampler, sigmas)
        return change / self.unit / self.at_the_end(sigmas), [record.step for record in runs.last.report.records]

    def responses(self, sampler, sigmas, **options) -> dict[int, Tensor]:
        """For each moved step, the change of the final latent at the moved cells, as a share of the move."""
        change, steps = self.steered(sampler, sigmas, **options)
        assert set(MOVED_STEPS) <= set(steps) and steps == list(range(len(steps)))
        return {step: side / SIZE for step, side in zip(MOVED_STEPS, change.chunk(2, dim=-1), strict=True)}

    def fresh(self, sampler, sigmas, step: int, output=silent) -> float:
        """The response of a run that starts at the step, from the moved and from the unmoved latent."""
        model = with_output(self.scene.model, output)
        moved = torch.full(self.shape, SIZE * self.unit)
        runs = [self.run(model, sampler, sigmas[step:], latent, noise=0.0) for latent in (moved, torch.zeros(self.shape))]
        given = self.sampling.noise_scaling(torch.tensor(sigmas[step]), torch.zeros(1), torch.ones(1))
        return float((runs[0] - runs[1]).mean() / (SIZE * self.unit)) / float(given) / self.at_the_end(sigmas)

    def at_the_end(self, sigmas) -> float:
        """The host's last factor on the sampler's latent (flow models that stop above sigma 0)."""
        return float(self.sampling.inverse_noise_scaling(torch.tensor(sigmas[-1]), torch.ones(1)))


def near(measured, expected: float) -> None:
    assert torch.as_tensor(measured).flatten().tolist() == pytest.approx(
        [expected] * torch.as_tensor(measured).numel(), rel=0.02, abs=1e-4)


def ksampler(function, **options) -> comfy.samplers.KSAMPLER:
    return comfy.samplers.KSAMPLER(function, extra_options=options)


def er_sde_scale(sigma: float) -> float:
    return sigma * (math.exp(sigma ** 0.3) + 10)


def sa_solver_kept(sampling, sigmas: tuple[float, ...]) -> float:
    """Paper: each step keeps sigma_next / sigma * exp(-tau^2 h), tau = 1 between 20 and 80 percent of the schedule."""
    kept = 1.0
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        tau = float(sampling.percent_to_sigma(0.2)) >= following >= float(sampling.percent_to_sigma(0.8))
        kept *= (following / sigma) ** (2 if tau else 1)
    return kept


def kept_by_formula(sampler: str, sampling, sigmas: tuple[float, ...]) -> float:
    """The share of a move at sigmas[0] that remains at sigmas[-1] (data prediction, eps model)."""
    ratio = sigmas[-1] / sigmas[0]
    if sampler in STOCHASTIC:  # eta = 1: sigma_down = sigma_next^2 / sigma
        return ratio ** 2
    if sampler == "lcm":  # each step starts from the denoised latent and new noise
        return 0.0
    if sampler == "er_sde":
        return er_sde_scale(sigmas[-1]) / er_sde_scale(sigmas[0])
    if sampler.startswith("sa_solver"):
        return sa_solver_kept(sampling, sigmas)
    return ratio
