"""Samplers of other packs are steered correctly, or refused with the true reason."""
from __future__ import annotations

import functools

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.samplers
import other_samplers as other
import pytest
import torch
from comfy_extras.nodes_custom_sampler import SamplerDPMAdaptative
from conftest import Scene
from learn_to_steer.host.patching import apply_steering
from learn_to_steer.host.rehearsal import advice, rehearse
from learn_to_steer.host.stepping import SteeringError
from response import SIGMAS, Bench, ksampler, near, silent, with_output
from torch import Tensor


@pytest.fixture(scope="module")
def bench(scene: Scene) -> Bench:
    return Bench(scene)


@pytest.mark.parametrize(("function", "level"), [(other.sample_exponential_2s, 1.0), (other.sample_copying, 1.0),
                                                 (other.sample_with_changed_sigmas, 0.93)])
def test_samplers_of_other_packs(bench: Bench, function, level: float):
    for step, measured in bench.responses(ksampler(function), SIGMAS, level=level).items():
        near(measured, SIGMAS[-1] / SIGMAS[step])


def test_a_step_begins_at_its_own_level_where_the_callback_comes_after_the_substeps(bench: Bench):
    seen = []

    def watch(apply_model, args: dict) -> Tensor:
        seen.append(float(bench.sampling.sigma(bench.sampling.timestep(args["timestep"][0]))))
        return apply_model(args["input"], args["timestep"], **args["c"])

    model = with_output(bench.scene.model, silent)
    model.set_model_unet_function_wrapper(watch)
    patched, _ = apply_steering(model, bench.scene.steering(stop_probability=1.0, max_updates=1))
    bench.run(patched, ksampler(other.sample_exponential_2s), SIGMAS)
    assert seen == pytest.approx(SIGMAS[:len(seen)], rel=0.01) and len(seen) >= 3


@pytest.mark.parametrize("scheduler", comfy.samplers.KSampler.SCHEDULERS)
def test_rounding_refuses_no_sound_sampler(bench: Bench, scheduler: str):
    """Rehearsed on whole schedules of 20 steps, where a move decays by a factor of thousands. Nothing is moved."""
    model = with_output(bench.scene.model, silent)
    patched, _ = apply_steering(model, bench.scene.steering(stop_probability=0.0, end=0.5))
    sigmas = tuple(comfy.samplers.calculate_sigmas(bench.sampling, scheduler, 20).tolist())
    for name in ("euler", "dpmpp_sde", "dpmpp_3m_sde", "sa_solver_pece", "seeds_3", "er_sde", "uni_pc"):
        assert bench.run(patched, comfy.samplers.sampler_object(name), sigmas).isfinite().all(), name


REFUSED = {
    other.sample_turning: "reverses a move of its latent: a move by 1 at step 0 becomes one by -0.55 at step 1",
    other.sample_ignoring: "hands the model another latent than the one it was given",
    other.sample_stubborn: "does not treat its latent as noisy: of a move by 1 at step 0 it keeps 1 at step 2, where the noise "
                           "level leaves 0.34",
    other.sample_in_silence: "never calls back",
    other.sample_growing: "changes the latent's size from [1, 4, 16, 16] to [1, 4, 16, 32]",
    other.sample_broken: "failed in a rehearsal on a latent of 8 x 8 cells (RuntimeError: latent too small for tiles of 16)",
    other.sample_by_what_it_sees: "evaluates the model a different number of times than in its rehearsal",
    other.sample_rolling: "moves the latent's cells about or mixes them",
    other.sample_flipping: "moves the latent's cells about or mixes them",
    other.sample_swapping_channels: "moves the latent's cells about or mixes them",
    other.sample_smoothing: "moves the latent's cells about or mixes them",
    other.sample_until_good_enough: "evaluates the model a different number of times than in its rehearsal",
}


@pytest.mark.parametrize("function", REFUSED)
def test_what_cannot_be_steered_is_refused_with_the_reason(bench: Bench, function):
    patched, _ = apply_steering(bench.scene.model, bench.scene.steering(stop_probability=1.0, max_updates=1, end=0.5))
    with pytest.raises(SteeringError) as error:
        bench.run(patched, ksampler(function), SIGMAS)
    name = function.__name__.removeprefix("sample_")
    assert str(error.value).startswith(f"input 'sampler': {name} ") and REFUSED[function] in str(error.value)
    assert "so it cannot be steered. Use euler" in str(error.value)


def test_an_early_end_without_a_move_is_left_alone(bench: Bench):
    patched, _ = apply_steering(bench.scene.model, bench.scene.steering(stop_probability=0.0))
    sampler = ksampler(other.sample_until_good_enough)
    assert torch.equal(bench.run(patched, sampler, SIGMAS), bench.run(bench.scene.model, sampler, SIGMAS))


def test_messages_name_the_sampler_as_it_was_chosen(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """A pack's sampler in the host's list, and a sampler made with options by a host node."""
    patched, _ = apply_steering(bench.scene.model, bench.scene.steering())
    with pytest.raises(SteeringError, match="^input 'sampler': turning reverses a move"):
        bench.run(patched, ksampler(functools.partial(other.sample_turning)), SIGMAS)
    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_whirl", other.sample_turning, raising=False)
    monkeypatch.setattr(comfy.samplers.KSampler, "SAMPLERS", [*comfy.samplers.KSampler.SAMPLERS, "elsewhere", "whirl"])
    with pytest.raises(SteeringError, match="^input 'sampler_name': whirl reverses a move"):
        bench.scene.sample(patched, "whirl")
    adaptive = SamplerDPMAdaptative.execute(3, 0.05, 0.0078, 0.05, 0.0, 1.0, 0.0, 0.81, 0.0, 1.0)[0]
    with pytest.raises(SteeringError, match="^input 'sampler': dpm_adaptive chooses its own noise levels"):
        bench.run(patched, adaptive, SIGMAS)


def test_a_schedule_that_is_not_finite(bench: Bench):
    """kl_optimal with one step divides by 0: the sampler is not to blame."""
    patched, _ = apply_steering(bench.scene.model, bench.scene.steering())
    sigmas = comfy.samplers.calculate_sigmas(bench.sampling, "kl_optimal", 1)
    assert torch.isnan(sigmas).any()
    with pytest.raises(SteeringError, match="^the schedule's noise levels are not all finite .nan, 0."):
        bench.run(patched, comfy.samplers.ksampler("euler"), tuple(sigmas.tolist()))


def test_cancel_ends_a_rehearsal_at_its_next_evaluation(bench: Bench):
    calls = []

    def cancelled(model, x, sigmas, **arguments):
        def counted(*positional, **named):
            calls.append(1)
            if len(calls) == 3:
                comfy.model_management.interrupt_current_processing()
            return model(*positional, **named)

        counted.inner_model = model.inner_model
        return comfy.k_diffusion.sampling.sample_lcm(counted, x, sigmas, **arguments)

    patched, _ = apply_steering(bench.scene.model, bench.scene.steering())
    sigmas = tuple(comfy.samplers.calculate_sigmas(bench.sampling, "normal", 200).tolist())
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        bench.run(patched, ksampler(cancelled), sigmas)
    assert len(calls) == 3


def test_a_rehearsal_seeds_no_generator(monkeypatch: pytest.MonkeyPatch):
    seeded = []
    monkeypatch.setattr(torch, "manual_seed", seeded.append)
    state = torch.get_rng_state()
    drawn = []

    def sampler(model, x, sigmas, extra_args, callback, disable):
        drawn.append(torch.randn(3))
        return other.sample_copying(model, x, sigmas, extra_args, callback)

    rehearse(sampler, lambda x: x, torch.zeros(1, 4, 8, 8), torch.tensor(SIGMAS), {"model_options": {}}, {}, frozenset({0}))
    assert not seeded and torch.equal(torch.get_rng_state(), state) and torch.equal(*drawn)


def test_advice_leaves_out_the_refused_sampler():
    assert advice("input 'sampler_name': euler") == "Use ddim, dpmpp_2m, heun or another sampler of ComfyUI."
    assert advice("input 'sampler': turning") == "Use euler, ddim, dpmpp_2m, heun or another sampler of ComfyUI."
