"""Each sampler responds to steering as if its own latent had been moved, or says why it cannot; schedules in parts.

A response is measured with a model whose output is 0: how much of a move of the latent at a step is in the final latent.
The right value is the sampler's formula for a moved latent. With the output at 0 an ODE solver only scales its latent by
sigma_next / sigma in each step, and so does a multistep solver whose history was moved along. Histories of derivatives
(lms, ipndm, deis, gradient_estimation) or of earlier latents (sa_solver, uni_pc) must follow the move: a run that starts
at that step from the moved latent has no history that disagrees, and it is measured beside the formula.
"""
from __future__ import annotations

import dataclasses
import functools
import math

import comfy.k_diffusion.sampling
import comfy.sample
import comfy.samplers
import other_samplers as other
import pytest
import torch
from comfy_extras.nodes_advanced_samplers import sample_euler_pp, sample_lcm_upscale
from comfy_extras.nodes_custom_sampler import SamplerDPMAdaptative, SamplerSASolver, SamplerSEEDS2
from conftest import PROMPT, Scene
from learn_to_steer.host.patching import apply_steering
from learn_to_steer.host.stepping import Schedule, SteeringError
from learn_to_steer.host.tokens import encode_prompt
from learn_to_steer.prompts.graph import build_graph
from learn_to_steer.toyworld import models
from torch import Tensor

import nodes as host_nodes

SIGMAS = (14.6, 8.0, 5.0, 3.4, 2.2, 1.5, 1.0, 0.7)
FLOW_SIGMAS = (1.0, 0.93, 0.84, 0.75, 0.6, 0.47, 0.32, 0.2)
MOVED_STEPS, SIZE = (1, 3), 8.0
STOCHASTIC = {"euler_ancestral", "euler_ancestral_cfg_pp", "exp_heun_2_x0_sde", "dpm_2_ancestral", "dpmpp_2s_ancestral",
              "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu",
              "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm",
              "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "seeds_2", "seeds_3"}
OWN_LEVELS = {"dpm_fast", "dpm_adaptive"}


# --- measuring -------------------------------------------------------------------------------------------------


def with_output(model, output):
    """The MODEL with `output(x, sigma)` instead of its network's; steering still reads the network."""
    model = model.clone()
    model.set_model_sampler_calc_cond_batch_function(lambda args: [output(args["input"], args["sigma"])] * len(args["conds"]))
    return model


def silent(x: Tensor, sigma: Tensor) -> Tensor:
    return torch.zeros_like(x)


def halves(size: int) -> dict[int, Tensor]:
    """A move of the left half at the first of MOVED_STEPS, of the right half at the second."""
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
        draws = noise * torch.randn(self.shape, generator=torch.Generator().manual_seed(5))
        with torch.inference_mode():
            return comfy.sample.sample_custom(model, draws, 3.0, sampler, torch.tensor(sigmas), self.scene.positive,
                                              self.scene.negative, latent, disable_pbar=True, seed=11, **options)

    def steered(self, sampler, sigmas, output=silent, end: float = 0.55, level: float = 1.0) -> tuple[Tensor, list[int]]:
        """What steering changed in the final latent, in units of the sampler's latent, and the steered steps.

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
        """Per moved step, the final latent's change where that step moved it, as a share of the move."""
        change, steps = self.steered(sampler, sigmas, **options)
        assert set(MOVED_STEPS) <= set(steps) and steps == list(range(len(steps)))
        return {step: side / SIZE for step, side in zip(MOVED_STEPS, change.chunk(2, dim=-1), strict=True)}

    def fresh(self, sampler, sigmas, step: int, output=silent) -> float:
        """The same for a run that starts at the step, once from the moved latent."""
        model = with_output(self.scene.model, output)
        moved = torch.full(self.shape, SIZE * self.unit)
        runs = [self.run(model, sampler, sigmas[step:], latent, noise=0.0) for latent in (moved, torch.zeros(self.shape))]
        given = self.sampling.noise_scaling(torch.tensor(sigmas[step]), torch.zeros(1), torch.ones(1))
        return float((runs[0] - runs[1]).mean() / (SIZE * self.unit)) / float(given) / self.at_the_end(sigmas)

    def at_the_end(self, sigmas) -> float:
        """The host's last factor on the sampler's latent (flow models that stop above sigma 0)."""
        return float(self.sampling.inverse_noise_scaling(torch.tensor(sigmas[-1]), torch.ones(1)))


@pytest.fixture(scope="module")
def bench(scene: Scene) -> Bench:
    return Bench(scene)


def near(measured, expected: float) -> None:
    assert torch.as_tensor(measured).flatten().tolist() == pytest.approx(
        [expected] * torch.as_tensor(measured).numel(), rel=0.02, abs=1e-4)


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
    """Share of a move at sigmas[0] that is left at sigmas[-1] (data prediction, eps model)."""
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


def ksampler(function, **options) -> comfy.samplers.KSAMPLER:
    return comfy.samplers.KSAMPLER(function, extra_options=options)


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
    for step, measured in bench.responses(sampler, SIGMAS).items():
        near(measured, bench.fresh(sampler, SIGMAS, step))


def test_a_sampler_that_enlarges_the_latent(bench: Bench):
    """Like lcm it keeps nothing of a move but what the model makes of it."""
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


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "lms", "ipndm", "deis", "gradient_estimation", "sa_solver",
                                  "sa_solver_pece", "uni_pc", "uni_pc_bh2"])
def test_the_model_answers_to_the_move(bench: Bench, name: str):
    """With the exact denoiser of normally distributed latents, whose output follows the latent."""
    sigmas = tuple(14.6 * (0.7 / 14.6) ** (k / 24) for k in range(25))
    sampler = comfy.samplers.sampler_object(name)

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    for step, measured in bench.responses(sampler, sigmas, output=denoiser, end=0.12).items():
        near(measured, bench.fresh(sampler, sigmas, step, denoiser))
        if not name.startswith("sa_solver"):  # the ODE's own solution: x grows with the root of 1 + sigma^2
            assert float(measured.mean()) == pytest.approx(math.sqrt((1 + 0.7 ** 2) / (1 + sigmas[step] ** 2)), rel=0.12)


# --- samplers of other packs -----------------------------------------------------------------------------------


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


REFUSED = {
    other.sample_turning: "turns a move of its latent around: a move by 1 at step 0 is one by -0.55 at step 1",
    other.sample_ignoring: "hands the model another latent than the one it was given",
    other.sample_stubborn: "does not treat its latent as noisy: of a move by 1 at step 0 it keeps 1 at step 2, where the noise "
                           "level leaves 0.34",
    other.sample_in_silence: "never calls back",
    other.sample_growing: "changes the latent's size from [1, 4, 16, 16] to [1, 4, 16, 32]",
    other.sample_broken: "failed in a rehearsal on a latent of 8 x 8 cells (RuntimeError: latent too small for tiles of 16)",
    other.sample_by_what_it_sees: "evaluates the model another number of times than in its rehearsal",
}


@pytest.mark.parametrize("function", REFUSED)
def test_what_cannot_be_steered_is_refused_with_the_reason(bench: Bench, function):
    patched, _ = apply_steering(bench.scene.model, bench.scene.steering(stop_probability=1.0, max_updates=1, end=0.5))
    with pytest.raises(SteeringError) as error:
        bench.run(patched, ksampler(function), SIGMAS)
    name = function.__name__.removeprefix("sample_")
    assert str(error.value).startswith(f"input 'sampler': {name} ") and REFUSED[function] in str(error.value)
    assert "so it cannot be steered. Use euler" in str(error.value)


def test_messages_name_the_sampler_as_it_was_chosen(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """A pack's sampler in the host's own list, and a sampler that a node of the host made with options."""
    patched, _ = apply_steering(bench.scene.model, bench.scene.steering())
    with pytest.raises(SteeringError, match="^input 'sampler': turning turns a move"):
        bench.run(patched, ksampler(functools.partial(other.sample_turning)), SIGMAS)
    monkeypatch.setattr(comfy.k_diffusion.sampling, "sample_whirl", other.sample_turning, raising=False)
    monkeypatch.setattr(comfy.samplers.KSampler, "SAMPLERS", [*comfy.samplers.KSampler.SAMPLERS, "elsewhere", "whirl"])
    with pytest.raises(SteeringError, match="^input 'sampler_name': whirl turns a move"):
        bench.scene.sample(patched, "whirl")
    adaptive = SamplerDPMAdaptative.execute(3, 0.05, 0.0078, 0.05, 0.0, 1.0, 0.0, 0.81, 0.0, 1.0)[0]
    with pytest.raises(SteeringError, match="^input 'sampler': dpm_adaptive chooses its own noise levels"):
        bench.run(patched, adaptive, SIGMAS)


# --- off, masks, stages ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["euler", "uni_pc", "sa_solver", "lms", "dpmpp_sde", "euler_ancestral_cfg_pp", "lcm"])
def test_where_nothing_is_moved_the_result_is_bit_identical(scene: Scene, sampler: str):
    """Outside the window, and inside it where each relation holds from the beginning."""
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
    """KSamplerAdvanced: the first stage hands over its noisy latent, moved; both stages steer."""
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
    """And the model is asked about that latent, at the step and afterwards."""
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
    """Of the opposite of the prompt, at the last steered step, before that step's own update; against moves of length 0."""
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
