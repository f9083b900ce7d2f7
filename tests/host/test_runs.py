"""A run is found by the latents that it returned, and its report gives the outcome."""
from __future__ import annotations

import gc
import weakref

import comfy.model_patcher
import comfy.samplers
import pytest
import tiny
import torch
from comfy.sd1_clip import SD1Tokenizer
from comfy_extras.nodes_custom_sampler import BasicGuider, Noise_RandomNoise, SamplerCustom, SamplerCustomAdvanced
from conftest import PROMPT, Scene, pack
from learn_to_steer.host.capturing import Capture
from learn_to_steer.host.patching import apply_capture, apply_steering
from learn_to_steer.host.records import AttentionRecord, Run, RunArchive, RunLog, StepMaps
from learn_to_steer.host.stepping import SteeringError
from learn_to_steer.host.tokens import encode_prompt
from learn_to_steer.nodes.attention import AttentionCapture, AttentionMapsNode, AttentionOverlay
from learn_to_steer.nodes.runs import find_run
from learn_to_steer.nodes.steering import SteeringResult
from learn_to_steer.prompts.relations import RelationGraph

import nodes as host_nodes

DOG = Capture(("dog",))
EULER = comfy.samplers.ksampler("euler")


def empty(batch: int = 1) -> dict:
    return {"samples": torch.zeros(batch, 4, 16, 16)}


def sigmas(model, steps: int = 4) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", steps)


def ksampler(scene: Scene, model, latent: dict, **options) -> dict:
    with torch.inference_mode():
        return host_nodes.common_ksampler(model, 3, 4, 2.0, "euler", "normal", scene.positive, scene.negative, latent,
                                          **options)[0]


def custom(scene: Scene, model, latent: dict, levels: int = 3) -> tuple[dict, dict]:
    with torch.inference_mode():
        return SamplerCustom.execute(model, True, 3, 2.0, scene.positive, scene.negative, EULER, sigmas(model)[:levels],
                                     latent).args


def advanced(scene: Scene, model, latent: dict) -> tuple[dict, dict]:
    with torch.inference_mode():
        guider = BasicGuider.execute(model, scene.positive).args[0]
        return SamplerCustomAdvanced.execute(Noise_RandomNoise(3), guider, EULER, sigmas(model)[:3], latent).args


@pytest.mark.parametrize("sampler", [custom, advanced])
def test_both_outputs_of_a_custom_sampler_find_the_run(scene: Scene, sampler):
    patched, runs = apply_capture(scene.model, DOG)
    output, denoised = sampler(scene, patched, empty())
    assert not torch.equal(output["samples"], denoised["samples"])
    assert runs.find(output["samples"]) is runs.find(denoised["samples"]) is runs.last
    assert runs.find(denoised["samples"].clone().half()) is runs.last  # another device and --fp16-intermediates make copies


def test_every_latent_of_a_long_list_finds_its_own_run(scene: Scene):
    patched, runs = apply_capture(scene.model, DOG)
    latents = [scene.sample(patched, seed=seed, steps=1) for seed in range(20)]
    found = [runs.find(latent.clone()) for latent in latents]
    assert len(set(map(id, found))) == 20 and found == runs.runs
    assert all(run.maps.steps for run in found)


def test_a_latent_that_is_not_finite_finds_its_run(scene: Scene):
    patched, runs = apply_capture(scene.model, DOG)
    patched.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
    first, second = scene.sample(patched, seed=1), scene.sample(patched, seed=2)
    assert first.isnan().all()
    assert runs.find(first) is runs.runs[0] and runs.find(second) is runs.runs[1]
    assert runs.find(second.clone()) is runs.runs[1]


def test_a_run_outlives_the_patched_model(scene: Scene):
    """The host may drop the patching node from its cache, keep the latent, and execute that node again."""
    for apply, request in ((apply_capture, DOG), (apply_steering, scene.steering(step_size=1.0, max_updates=1))):
        patched, runs = apply(scene.model, request)
        samples = scene.sample(patched)
        run = runs.last
        del patched, runs
        gc.collect()
        assert apply(scene.model, request)[1].find(samples) is run
    _, others = apply_capture(scene.model, Capture(("teddy bear",)))
    with pytest.raises(LookupError, match="no run of this model"):
        others.find(samples)


def test_a_sampler_without_a_step(scene: Scene):
    """A schedule of one noise level has no step; the host returns the noised latent."""
    patched, runs = apply_steering(scene.model, scene.steering())
    given, plain = (custom(scene, model, empty(), levels=1)[0] for model in (patched, scene.model))
    maps, report, _ = SteeringResult.execute(runs, given).args
    assert torch.equal(given["samples"], plain["samples"])
    assert report.effect == "not steered" and "no step to sample" in report.to_text() and not maps.steps


class Hidden:
    """The prompt as the host passes it to a node: Apply (1) -> sampler (2) -> Result (3), and another sampler (4)."""

    def __init__(self, sampler: str):
        self.unique_id = "3"
        self.prompt = {"1": {"inputs": {"model": ["0", 0], "curve": [[0, 0], [1, 1]], "points": [{"x": 1}, {"x": 2}]}},
                       "2": {"inputs": {"model": ["1", 0], "seed": 1, "sizes": [64, 64]}},
                       "3": {"inputs": {"steering": ["1", 1], "samples": [sampler, 0]}}, "4": {"inputs": {"model": ["0", 0]}}}


def test_a_latent_that_no_run_gave(scene: Scene):
    """With denoise 0 the host returns the latent and calls no wrapper. A sampler with another model is an error."""
    patched, runs = apply_steering(scene.model, scene.steering())
    latent = {"samples": torch.randn(1, 4, 16, 16)}
    out = ksampler(scene, patched, latent, denoise=0.0)
    run = find_run(runs, out, Hidden("2"), "steering")
    assert torch.equal(out["samples"], latent["samples"])
    assert run.report.effect == "not steered" and "is denoise 0?" in run.report.to_text() and "is denoise 0?" in run.maps.notes[0]
    with pytest.raises(LookupError, match="input 'samples': no run of this model"):
        find_run(runs, out, Hidden("4"), "steering")


def test_a_changed_latent_of_a_model_that_has_sampled_is_unknown(scene: Scene):
    """Apply -> sampler -> a node that flips the latent -> Result: nobody can say that nothing was steered."""
    patched, runs = apply_steering(scene.model, scene.steering())
    out = ksampler(scene, patched, empty())
    report = find_run(runs, {"samples": out["samples"].flip(-1)}, Hidden("2"), "steering").report
    assert report.effect == "unknown" and report.to_text().startswith("effect: unknown")
    assert "a node between the sampler and this one changed the latent" in report.to_text()
    hidden = Hidden("2")
    hidden.prompt["2"]["inputs"]["denoise"] = 0.0
    report = find_run(runs, {"samples": torch.zeros(1, 4, 16, 16)}, hidden, "steering").report
    assert report.effect == "not steered" and "no denoising step" in report.to_text()


def test_a_graph_without_a_relation_gives_nothing_to_watch_and_no_error(scene: Scene):
    graph = RelationGraph((), "a dog and a cat")
    patched, log = AttentionCapture.execute(scene.model, "", 0.0, 1.0, 16, "", False, graph).args
    assert torch.equal(scene.sample(patched), scene.sample(scene.model))
    assert "no words to watch" in log.find(torch.zeros(1)).maps.notes[0]
    with pytest.raises(ValueError, match="input 'words': nothing to watch"):
        AttentionCapture.execute(scene.model, "", 0.0, 1.0, 16, "", False)


def test_two_stages_are_one_report(scene: Scene):
    """KSamplerAdvanced up to step 2, then from step 2 on; the second stage has nothing to steer."""
    patched, runs = apply_steering(scene.model, scene.steering(end=0.3, stop_probability=1.0, max_updates=2))
    first = ksampler(scene, patched, empty(), last_step=2)
    second = ksampler(scene, patched, first, start_step=2, disable_noise=True)
    with torch.inference_mode():
        maps, report, _ = SteeringResult.execute(runs, second).args
        alone = SteeringResult.execute(runs, first).args[1]
    assert alone.effect == report.effect == "steered" and not report.warnings
    assert report.records == alone.records and report.steps == 4 and report.stages == (2, 2)
    assert "stage 2: not steered" in report.to_text() and maps.steps

    patched, runs = apply_capture(scene.model, DOG)
    second = ksampler(scene, patched, ksampler(scene, patched, empty(), last_step=2), start_step=2, disable_noise=True)
    with torch.inference_mode():
        assert [step.step for step in AttentionMapsNode.execute(runs, second).args[0].steps] == [0, 1, 2, 3]


def test_an_empty_latent_is_no_stage(scene: Scene):
    """A run may return zeros, for instance with a noise mask of zeros. An empty latent must not be taken for its result."""
    patched, runs = apply_capture(scene.model, DOG)
    scene.sample(patched)
    runs.last.found_by(empty()["samples"])
    ksampler(scene, patched, empty())
    assert runs.last.before is None


def test_a_second_steering_node_is_an_error(scene: Scene):
    steered, _ = apply_steering(scene.model, scene.steering())
    with pytest.raises(SteeringError, match="input 'model': this model is steered already.*Take one of the two nodes out"):
        apply_steering(steered.clone(), scene.steering())
    apply_steering(steered, scene.steering(step_size=0.0))  # one that is off stands in nobody's way
    apply_steering(apply_capture(scene.model, DOG)[0], scene.steering())


@pytest.mark.parametrize("free_memory", [2.0**50, 0.0], ids=["one batch", "one by one"])
def test_captured_maps_do_not_depend_on_how_the_host_batches(scene: Scene, monkeypatch, free_memory: float):
    """A host short of memory runs the conditionings one by one, last first. The guider's first is recorded in both cases."""
    first, second = tiny.conditioning(pack, PROMPT, seed=5), tiny.conditioning(pack, "a brown dog", seed=8)
    later = tiny.conditioning(pack, PROMPT, seed=9, start_percent=0.9)  # named first, but not active yet
    patched, runs = apply_capture(scene.model, DOG)
    scene.sample(patched, steps=1, positive=first)
    expected = runs.last.maps.average()
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda self, device: free_memory)
    passes = []
    patched.set_model_unet_function_wrapper(
        lambda run, given: passes.append(1) or run(given["input"], given["timestep"], **given["c"]))
    scene.sample(patched, steps=1, positive=later + first + second)
    assert len(passes) == (1 if free_memory else 3)
    assert torch.allclose(runs.last.maps.average(), expected, atol=1e-6)
    scene.sample(patched, steps=1, positive=second + first)
    assert not torch.allclose(runs.last.maps.average(), expected, atol=1e-4)


def test_combined_conditionings_are_told(scene: Scene):
    positive = scene.positive + tiny.conditioning(pack, "a meadow", seed=4)
    patched, runs = apply_steering(scene.model, scene.steering())
    scene.sample(patched, positive=positive)
    assert "2 positive conditionings are active together" in runs.last.report.to_text()
    scene.sample(patched)
    assert "conditionings" not in runs.last.report.to_text()


def test_a_conditioning_that_sleeps_is_a_warning(scene: Scene, caplog):
    asleep = [[scene.positive[0][0], {**scene.positive[0][1], "start_percent": 0.7, "end_percent": 1.0}]]
    other = tiny.conditioning(pack, "a meadow", seed=4, start_percent=0.0, end_percent=0.7)
    patched, runs = apply_steering(scene.model, scene.steering(end=0.4))
    scene.sample(patched, positive=asleep + other)
    report = runs.last.report
    first = report.to_text().splitlines()[0]
    assert report.effect == "not recorded" == report.to_dict()["effect"]
    assert first.startswith("WARNING: nothing was steered in all 2 steps") and "active" in first and "some" not in first
    assert report.warnings[0] in caplog.text and report.warnings == runs.last.maps.notes
    patched, runs = apply_capture(scene.model, Capture(("dog",), end=0.4))
    scene.sample(patched, positive=asleep + other)
    assert "timestep range" in runs.last.maps.notes[0] and runs.last.maps.notes[0] in caplog.text


def test_a_gradient_of_0_is_a_warning(scene: Scene, caplog):
    """With a conditioning of zeros, each word gets the same attention everywhere, whatever the latent."""
    zeroed = [[torch.zeros_like(scene.positive[0][0]), scene.positive[0][1]]]
    patched, runs = apply_steering(scene.model, scene.steering(max_updates=2))
    assert torch.equal(scene.sample(patched, positive=zeroed), scene.sample(positive=zeroed))
    report = runs.last.report
    assert report.effect == "no effect" and "the gradient was 0" in report.to_text().splitlines()[0]
    assert report.warnings[0] in caplog.text


def test_a_window_without_a_step_is_a_warning(scene: Scene, caplog):
    patched, runs = apply_steering(scene.model, scene.steering(start=0.01, end=0.02))
    scene.sample(patched)
    report = runs.last.report
    assert report.effect == "not steered" and report.to_text().startswith("WARNING: not steered: no step lies")
    assert "no step lies between" in caplog.text


def test_layers_that_are_not_there_are_told(scene: Scene):
    patched, runs = apply_capture(scene.model, Capture(("dog",), layers=("double",)))
    scene.sample(patched, steps=1)
    assert "no layer's name contains double" in runs.last.maps.notes[0] and "input." in runs.last.maps.notes[0]


def test_an_overlay_without_maps_shows_the_picture_and_says_why(scene: Scene):
    image = torch.rand(2, 64, 64, 3)
    for maps in (AttentionRecord((), (), (), ("not steered: the graph has no relation",)), AttentionRecord(("dog",), (), ())):
        with torch.inference_mode():
            shown = AttentionOverlay.execute(maps, "average", 0.6, image).args[0]
            alone = AttentionOverlay.execute(maps, "each step", 0.6).args[0]
        assert shown.shape[0] == 2 and alone.shape[0] == 1
        for picture, original in zip(shown, image, strict=True):
            enlarged = original.repeat_interleave(4, 0).repeat_interleave(4, 1)
            assert (picture[-10 - 256:-10, 10:10 + 256] - enlarged).abs().max() < 1 / 255


def filed(log: RunLog, cells: int, steps: int = 2) -> tuple[Run, torch.Tensor]:
    """A filed run with `steps` steps, each of 4 * cells bytes of averages and 16 * cells bytes of heads."""
    maps = tuple(StepMaps(step, 1.0, torch.rand(1, 1, 1, cells), torch.rand(1, 1, 4, 1, cells)) for step in range(steps))
    run, latent = Run(AttentionRecord(("dog",), (), maps), steps=steps), torch.rand(1, 4, 2, 2)
    run.found_by(latent)
    log.file(run)
    return run, latent


def test_the_memory_of_kept_runs_is_bounded():
    """A run of 1000 cells and two steps takes 40,000 bytes."""
    archive = RunArchive(100_000)
    log = RunLog(archive=archive)
    kept = [filed(log, 1000) for _ in range(12)]
    assert sum(run.maps.nbytes for run in log.runs) <= 100_000
    assert log.last is kept[-1][0] and log.last.maps.steps[0].every.dtype == torch.float32
    assert all(log.find(latent) is run for run, latent in kept)  # reports, and the reason why maps are missing
    assert not kept[0][0].maps.steps and "dropped" in kept[0][0].maps.notes[0]
    assert kept[-2][0].maps.steps
    newest, _ = filed(log, 10_000)
    assert newest.maps.nbytes == 400_000 and log.last is newest and len(newest.maps.steps) == 2


def test_older_heads_are_kept_in_half_precision():
    log = RunLog(archive=RunArchive(70_000))
    (old, _), (new, _) = filed(log, 1000), filed(log, 1000)
    before = new.maps.steps[0].every
    assert old.maps.steps[0].every.dtype == torch.float16 and old.maps.steps[0].average.dtype == torch.float32
    assert new.maps.steps[0].every is before and before.dtype == torch.float32


class Clip:
    """The part of the host's CLIP that encoding a prompt needs; `weights` stand for the text encoder."""

    def __init__(self, weights):
        self.cond_stage_model, self.tokenizer, self.tokenizer_options = weights, SD1Tokenizer(), {}

    def tokenize(self, text, **options):
        return self.tokenizer.tokenize_with_weights(text, **options)

    def encode_from_tokens_scheduled(self, tokens, add_dict):
        return [[torch.zeros(1, 77, 8), {**add_dict}]]


def test_a_conditioning_does_not_keep_the_text_encoder():
    weights = torch.nn.Linear(2, 2)
    alive = weakref.ref(weights)
    conditioning = encode_prompt(Clip(weights), PROMPT)
    del weights
    gc.collect()
    assert alive() is None
    assert conditioning[0][1][pack.host.tokens.CONDITIONING_KEY].find("teddy bear", "l")
