"""Each sampler of the host responds to steering as if its own latent had been moved; masks, stages, partial schedules."""
from __future__ import annotations

import dataclasses
import inspect
import math

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_advanced_samplers import sample_euler_pp, sample_lcm_upscale
from comfy_extras.nodes_custom_sampler import SamplerSASolver, SamplerSEEDS2
from conftest import PROMPT, Scene
from learn_to_steer.host.patching import apply_steering
from learn_to_steer.host.stepping import Schedule, SteeringError
from learn_to_steer.host.tokens import encode_prompt
from learn_to_steer.prompts.graph import build_graph
from learn_to_steer.toyworld import models
from response import SIGMAS, Bench, kept_by_formula, ksampler, near, silent, with_output
from torch import Tensor

import nodes as host_nodes

FLOW_SIGMAS = (1.0, 0.93, 0.84, 0.75, 0.6, 0.47, 0.32, 0.2)
OWN_LEVELS = {"dpm_fast", "dpm_adaptive"}


@pytest.fixture(scope="module")
def bench(scene: Scene) -> Bench:
    return Bench(scene)


# --- every sampler of the host ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(comfy.samplers.KSampler.SAMPLERS) - OWN_LEVELS))
def test_every_sampler_responds_by_its_formula(bench: Bench, name: str):
    sampler = comfy.samplers.sampler_object(name)
    for step, measured in bench.responses(sampler, SIGMAS).items():
        near(measured, kept_by_formula(name, bench.sampling, SIGMAS[step:]))
        near(measured, bench.fresh(sampler, SIGMAS, step))


@pytest.mark.parametrize("name", sorted(OWN_LEVELS))
def test_samplers_with_levels_of_their_own_are_refused(scene: Scene, name: str):
    patched, _ = apply_steering(scene.model, scene.steering())
    with pytest.raises(SteeringError, match=f"^input 'sampler_name': {name} chooses its own noise levels"):
        scene.sample(patched, name, steps=6)


# --- samplers made by the host's other nodes; s_churn; flow models ----------------------------------------------


OF_NODES = {
    "SamplerEulerCFGpp, alternative": lambda model: ksampler(sample_euler_pp),
    "SamplerLCM": lambda model: comfy.samplers.ksampler("lcm", {"s_noise": 0.9, "s_noise_end": 0.5, "noise_clip_std": 2.0}),
    "SamplerEulerAncestral, eta 1.2: some steps keep nothing": lambda model: comfy.samplers.ksampler("euler_ancestral",
                                                                                                   {"eta": 1.2}),
    "SamplerSASolver": lambda model: SamplerSASolver.execute(model, 0.6, 0.1, 0.9, 1.0, 2, 3, True, False)[0],
    "SamplerSEEDS2": lambda model: SamplerSEEDS2.execute("phi_2", 0.5, 1.0, 0.7)[0],
}


@pytest.mark.parametrize("name", OF_NODES)
def test_samplers_of_the_hosts_other_nodes(bench: Bench, name: str):
    sampler = OF_NODES[name](bench.scene.model)
    lacking = set(sampler.extra_options) - set(inspect.signature(sampler.sampler_function).parameters)
    if lacking:
        pytest.skip(f"this host's {sampler.sampler_function.__name__} has no options {sorted(lacking)}")
    for step, measured in bench.responses(sampler, SIGMAS).items():
        near(measured, bench.fresh(sampler, SIGMAS, step))


def test_a_sampler_that_enlarges_the_latent(bench: Bench):
    """Like lcm, it keeps a move only through the model's response."""
    model = with_output(bench.scene.model, silent)
    patched, runs = apply_steering(model, bench.scene.steering(stop_probability=1.0, max_updates=1))
    sampler = ksampler(sample_lcm_upscale, total_upscale=2.0, upscale_steps=3)
    steered = bench.run(patched, sampler, SIGMAS)
    assert steered.shape[-2:] == (32, 32) and torch.equal(steered, bench.run(model, sampler, SIGMAS))
    assert [record.moved for record in runs.last.report.records] == [(True,)] * 4


@pytest.mark.parametrize("name", ["euler", "heun", "heunpp2", "dpm_2"])
def test_churn_moves_the_latent_with_its_added_noise(bench: Bench, name: str):
    """Step k starts at sigma_hat = (1 + gamma) sigma and keeps sigma_next / sigma_hat."""
    gamma = 2.0 / (len(SIGMAS) - 1)
    measured = bench.responses(comfy.samplers.ksampler(name, {"s_churn": 2.0}), SIGMAS, level=1 + gamma)
    for step, share in measured.items():
        near(share, SIGMAS[-1] / SIGMAS[step] / (1 + gamma) ** (len(SIGMAS) - 1 - step))


@pytest.fixture(scope="module")
def flow_bench() -> Bench:
    """A flow model: sigma is 1 at the start, where half log SNR is infinite."""
    scene = Scene()
    with torch.inference_mode():
        scene.model, clip, _ = models.LOADERS["flux"]()
        scene.positive, scene.negative = encode_prompt(clip, PROMPT), encode_prompt(clip, "")
    return Bench(scene, channels=16)


@pytest.mark.parametrize("name", ["euler", "euler_ancestral", "euler_ancestral_cfg_pp", "dpmpp_2s_ancestral", "dpmpp_2m_sde",
                                  "lcm", "er_sde", "lms", "ipndm", "deis", "gradient_estimation", "sa_solver",
                                  "sa_solver_pece", "uni_pc", "uni_pc_bh2"])
def test_flow_models(flow_bench: Bench, name: str):
    sampler = comfy.samplers.sampler_object(name)
    for step, measured in flow_bench.responses(sampler, FLOW_SIGMAS).items():
        near(measured, flow_bench.fresh(sampler, FLOW_SIGMAS, step))


@pytest.mark.parametrize("name", ["sa_solver_pece", "seeds_3"])
def test_a_first_step_that_keeps_almost_nothing(flow_bench: Bench, name: str):
    """An SDE solver's step from sigma 1 replaces the latent by noise. Later steps keep their share of a move."""
    sigmas = (1.0, 0.74, 0.65, 0.6, 0.5, 0.4, 0.35, 0.3)
    sampler = comfy.samplers.sampler_object(name)
    first = float(flow_bench.sampling.percent_to_sigma(1e-4))  # the host's own stand-in for 1
    assert sigmas[1] * (1 - first) / first * sigmas[1] / (1 - sigmas[1]) < 1e-4  # eta = 1 keeps sigma_next exp(-h)
    for step, measured in flow_bench.responses(sampler, sigmas).items():
        near(measured, flow_bench.fresh(sampler, sigmas, step))


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "lms", "ipndm", "deis", "gradient_estimation", "sa_solver",
                                  "sa_solver_pece", "uni_pc", "uni_pc_bh2"])
def test_the_model_answers_to_the_move(bench: Bench, name: str):
    """The model is the exact denoiser of normally distributed latents, whose output depends on the latent."""
    sigmas = tuple(14.6 * (0.7 / 14.6) ** (k / 24) for k in range(25))
    sampler = comfy.samplers.sampler_object(name)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    for step, measured in bench.responses(sampler, sigmas, output=denoiser, end=0.12).items():
        near(measured, bench.fresh(sampler, sigmas, step, denoiser))
        if not name.startswith("sa_solver"):  # the ODE's own solution: x grows with the root of 1 + sigma^2
            assert float(measured.mean()) == pytest.approx(math.sqrt((1 + 0.7 ** 2) / (1 + sigmas[step] ** 2)), rel=0.12)


# --- off, masks, stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "sa_solver", "lms", "dpmpp_sde", "euler_ancestral_cfg_pp", "lcm"])
def test_where_nothing_is_moved_the_result_is_bit_identical(scene: Scene, sampler: str):
    """This holds outside of the window, and inside it if every relation holds from the start."""
    plain = scene.sample(sampler=sampler, steps=4)
    for settings in ({"start": 0.9}, {"stop_probability": 0.0}):
        patched, runs = apply_steering(scene.model, scene.steering(**settings))
        assert torch.equal(scene.sample(patched, sampler, steps=4), plain)
        assert not any(any(record.moved) for record in runs.last.report.records)


def test_outside_the_window_any_sampler_runs(scene: Scene):
    patched, _ = apply_steering(scene.model, scene.steering(start=0.95))
    assert torch.equal(scene.sample(patched, "dpm_fast", steps=4), scene.sample(sampler="dpm_fast", steps=4))


@pytest.mark.parametrize("sampler", ["euler", "ddim", "uni_pc", "sa_solver", "lms"])
def test_inpainting_moves_only_what_is_masked(scene: Scene, sampler: str):
    latent = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    patched, runs = apply_steering(scene.model, scene.steering(stop_probability=1.0, max_updates=1, step_size=5.0))
    plain, steered = (comfy_sample(scene, model, sampler, latent, noise_mask=mask) for model in (scene.model, patched))
    assert any(any(record.moved) for record in runs.last.report.records)
    torch.testing.assert_close(steered[..., 8:], latent[..., 8:], atol=2e-2, rtol=0)  # uni_pc ends at sigma 0.001
    assert (steered - plain)[..., :8].abs().max() > 1e-2


def comfy_sample(scene: Scene, model, sampler: str, latent: Tensor, **options) -> Tensor:
    with torch.inference_mode():
        return comfy.sample.sample(model, comfy.sample.prepare_noise(latent, 7), 6, 3.0, sampler, "normal", scene.positive,
                                   scene.negative, latent, seed=7, disable_pbar=True, **options)


def test_two_stages_do_what_one_does(scene: Scene):
    """KSamplerAdvanced: the first stage passes on its moved, noisy latent; both stages steer."""
    patched, runs = apply_steering(scene.model, scene.steering(stop_probability=1.0, max_updates=1, end=0.5))
    advanced, empty = host_nodes.KSamplerAdvanced(), {"samples": torch.zeros(1, 4, 16, 16)}

    def stage(latent: dict, first: int, last: int) -> dict:
        with torch.inference_mode():
            return advanced.sample(patched, "disable" if first else "enable", 7, 10, 3.0, "euler", "normal", scene.positive,
                                   scene.negative, latent, first, last, "enable" if last < 10 else "disable")[0]

    once = stage(empty, 0, 10)["samples"]
    steps = [record.step for record in runs.last.report.records]
    twice = stage(stage(empty, 0, 3), 3, 10)["samples"]
    assert steps == [0, 1, 2, 3, 4] and [record.step for record in runs.last.report.records] == [0, 1]
    torch.testing.assert_close(twice, once, atol=2e-3, rtol=1e-3)
    assert (once - scene.sample(steps=10)).abs().max() > 0.1


def test_the_callback_is_shown_the_moved_latent(bench: Bench):
    """The model is evaluated at that latent too, at the step and afterwards."""
    asked, shown = [], []

    def output(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(x.clone())
        return torch.zeros_like(x)

    steering = dataclasses.replace(bench.scene.steering(stop_probability=1.0, max_updates=1, end=0.2),
                                   move=lambda gradient, settings: torch.ones_like(gradient))
    patched, _ = apply_steering(with_output(bench.scene.model, output), steering)
    bench.run(patched, comfy.samplers.ksampler("euler"), SIGMAS, callback=lambda i, x0, x, steps: shown.append(x.clone()))
    assert len(shown) == len(SIGMAS) - 1 and all(map(torch.equal, shown, asked))


# --- the small world -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_world() -> Scene:
    world = Scene()
    with torch.inference_mode():
        world.model, clip, _ = models.LOADERS["unet"]()
        world.positive, world.negative = (encode_prompt(clip, text) for text in ("a photo of a dog to the left of a cat", ""))
    world.graph = build_graph("a photo of a dog to the right of a cat")
    return world


@pytest.mark.parametrize("sampler", ["uni_pc", "sa_solver_pece", "ipndm"])
def test_steering_raises_the_probability(small_world: Scene, sampler: str):
    """Probability of the prompt's opposite at the last steered step, before its update, compared with moves of length 0."""
    probability = {}
    for step_size in (1e-9, 5.0):
        steering = small_world.steering(stop_probability=1.0, max_updates=1, end=0.45, step_size=step_size)
        patched, runs = apply_steering(small_world.model, steering)
        with torch.inference_mode():
            latent = torch.zeros(2, 24, 16, 16)
            comfy.sample.sample(patched, comfy.sample.prepare_noise(latent, 1), 10, 3.5, sampler, "normal", small_world.positive,
                                small_world.negative, latent, last_step=5, disable_pbar=True, seed=1)
        probability[step_size] = torch.tensor(runs.last.report.records[-1].probability)
    assert probability[1e-9].max() < 0.1 and probability[5.0].min() > 0.9, probability


# --- schedules -------------------------------------------------------------------------------------------------


def test_progress_at_the_paper_schedule(scene: Scene):
    sampling = scene.model.get_model_object("model_sampling")
    for name in ("normal", "ddim_uniform", "simple"):
        sigmas = comfy.samplers.calculate_sigmas(sampling, name, 50)
        schedule = Schedule.of(sampling, sigmas)
        steps = schedule.steps
        assert schedule.progress == pytest.approx([step / steps for step in range(steps)])
        assert schedule.window(0.0, 0.5) == frozenset(range((steps + 1) // 2))


def test_a_part_of_a_schedule_counts_from_where_it_begins(scene: Scene):
    sampling = scene.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 40)
    late = Schedule.of(sampling, sigmas[20:])
    assert late.progress[0] == pytest.approx(0.5, abs=0.03)
    assert late.window(0.0, 0.5) <= {0}
    early = Schedule.of(sampling, sigmas[:21])
    assert early.progress[-1] == pytest.approx(0.475, abs=0.03)


def test_image_to_image_is_steered_late_only(scene: Scene):
    patched, runs = apply_steering(scene.model, scene.steering(stop_probability=1.0, max_updates=1, end=0.6))
    scene.sample(patched, steps=10, denoise=0.5)
    progress = [record.progress for record in runs.last.report.records]
    assert progress and min(progress) >= 0.45 and max(progress) < 0.6


def test_a_run_outside_the_window_says_so(scene: Scene):
    patched, runs = apply_steering(scene.model, scene.steering())
    scene.sample(patched, steps=10, denoise=0.5)
    report = runs.last.report
    assert not report.records
    assert "end_percent 0.36" in report.to_text() and "begin at 0.5" in report.to_text()


def test_batches_stop_picture_by_picture(scene: Scene):
    patched, runs = apply_steering(scene.model, scene.steering(stop_probability=0.6, max_updates=4, compactness=0.0))
    batched = scene.sample(patched, batch=3)
    moved = torch.tensor([record.moved for record in runs.last.report.records if record.gradient_norm])
    assert moved.shape[1] == 3 and not moved.all()
    assert torch.isfinite(batched).all()
