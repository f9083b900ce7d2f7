"""Off means off, and after a run the model is as it was."""
from __future__ import annotations

import contextlib
import gc

import comfy.model_management
import comfy.model_patcher
import comfy_aimdo.host_buffer
import psutil
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from conftest import Scene
from learn_to_steer.classifiers.geometric import GeometricClassifier
from learn_to_steer.host.capturing import Capture
from learn_to_steer.host.patching import apply_capture, apply_steering
from learn_to_steer.host.records import ARCHIVE
from learn_to_steer.host.stepping import SteeringError
from learn_to_steer.nodes.steering import SpatialSteeringKSampler
from learn_to_steer.prompts.graph import build_graph
from learn_to_steer.prompts.relations import Relation, RelationGraph
from learn_to_steer.steering.objective import Judgement
from learn_to_steer.steering.optimizer import Evaluation, StepInfo, steer_step
from learn_to_steer.steering.settings import SteeringSettings

SAMPLERS = ["euler", "ddim", "dpmpp_2m", "dpmpp_2m_sde", "heun", "euler_ancestral"]
WEIGHTLESS = RelationGraph((Relation("dog", ("above",), "teddy bear", 0.0),))


def state(model) -> dict:
    """The state that must not change: weights, hooks, global flags."""
    base = model.model
    return {
        "weights": {name: value.clone() for name, value in base.state_dict().items()},
        "hooks": [len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks)
                  for part in base.modules()],
        "own": [sorted(vars(part)) for part in base.modules()],
        "requires_grad": [parameter.requires_grad for parameter in base.parameters()],
        "training": (comfy.model_management.in_training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "options": str(model.model_options), "wrappers": str(model.wrappers), "patches": str(model.patches),
    }


def assert_same(before: dict, after: dict) -> None:
    assert before["weights"].keys() == after["weights"].keys()
    assert all(torch.equal(value, after["weights"][name]) for name, value in before["weights"].items())
    assert {name: value for name, value in before.items() if name != "weights"} == \
           {name: value for name, value in after.items() if name != "weights"}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_to_steer_is_bit_identical(scene: Scene, sampler: str):
    plain = scene.sample(sampler=sampler)
    for steering in (scene.steering(graph=RelationGraph()), scene.steering(graph=WEIGHTLESS), scene.steering(step_size=0.0),
                     scene.steering(start=0.5, end=0.5), scene.steering(max_updates=0)):
        patched, runs = apply_steering(scene.model, steering)
        assert torch.equal(scene.sample(patched, sampler), plain)
        assert runs.last.report.notes


def test_a_relation_of_weight_0_plays_no_part(scene: Scene):
    """Its object need not be in the prompt, and the classifier need not know its name."""
    graph = RelationGraph((*scene.graph.relations, Relation("zebra", ("riding",), "dog", 0.0)))
    with_it, without = (apply_steering(scene.model, scene.steering(graph=g))[0] for g in (graph, scene.graph))
    assert torch.equal(scene.sample(with_it), scene.sample(without))


def test_the_sampler_node_without_a_step_to_sample(scene: Scene):
    with torch.inference_mode():
        latent, _, report = SpatialSteeringKSampler.execute(
            scene.model, 1, 4, 3.0, "euler", "normal", scene.positive, scene.negative, {"samples": torch.ones(1, 4, 16, 16)},
            0.0, scene.graph, GeometricClassifier(), start_percent=0.0, end_percent=0.5, step_size=2.5, max_updates=1,
            stop_probability=0.99, update_rule="normalised", relations_per_update="all", save_memory=False).args
    assert torch.equal(latent["samples"], torch.ones(1, 4, 16, 16)) and "denoise" in report.notes[0]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_window_without_a_step_is_bit_identical(scene: Scene, sampler: str):
    patched, runs = apply_steering(scene.model, scene.steering(start=0.01, end=0.02))
    assert torch.equal(scene.sample(patched, sampler), scene.sample(sampler=sampler))
    assert runs.last.report.records == ()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_relation_that_already_holds_moves_nothing(scene: Scene, sampler: str):
    patched, runs = apply_steering(scene.model, scene.steering(stop_probability=0.0))
    assert torch.equal(scene.sample(patched, sampler), scene.sample(sampler=sampler))
    assert {record.outcome for record in runs.last.report.records} == {"satisfied"}


def test_a_step_goes_on_while_an_object_is_spread():
    """It is not enough that the relation holds: an object attended to in two places would be drawn twice."""
    spreads, records = iter((0.2, 0.2, 0.0)), []

    def look(latent: torch.Tensor) -> Evaluation:
        judgement = Judgement(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([[next(spreads)]]))
        return Evaluation(judgement, lambda loss: torch.ones_like(latent))

    moved = steer_step(torch.zeros(1, 4, 8, 8), look, (1.0,), SteeringSettings(stop_probability=0.99, max_updates=5),
                       StepInfo(0, 1.0, 0.0), on_record=records.append)
    assert [record.outcome for record in records] == ["moved", "moved", "satisfied"]
    assert (moved != 0).all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_capture_changes_no_bit(scene: Scene, sampler: str):
    patched, runs = apply_capture(scene.model, Capture(("dog", "teddy bear"), every=True))
    out = scene.sample(patched, sampler)
    assert torch.equal(out, scene.sample(sampler=sampler))
    assert len(runs.find(out).maps.steps) == 5


def test_steering_changes_the_result_and_repeats_to_the_bit(scene: Scene):
    patched, _ = apply_steering(scene.model, scene.steering(stop_probability=1.0))
    first = scene.sample(patched)
    assert not torch.equal(first, scene.sample())
    assert torch.equal(first, scene.sample(patched))


class Failing(GeometricClassifier):
    def logits(self, subject, object, progress):
        raise RuntimeError("the classifier fails")


def test_after_success_the_model_is_as_it_was(scene: Scene):
    plain, before = scene.sample(), state(scene.model)  # the first load adds attributes of the host's own
    for recompute in (False, True):
        scene.sample(apply_steering(scene.model, scene.steering(stop_probability=1.0, recompute=recompute))[0])
    assert_same(before, state(scene.model))
    assert torch.equal(scene.sample(), plain)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_weights_that_require_a_gradient_do_so_again_afterwards(recompute: bool, fails: bool):
    """As other packs and older hosts load them. No gradient for them is prepared meanwhile."""
    scene, required = Scene(), []
    with torch.inference_mode():
        scene.model.model.diffusion_model.requires_grad_(True)
    model = scene.model.clone()

    def watch(q, k, v, options):
        if not torch.is_inference_mode_enabled():
            required.append(any(parameter.requires_grad for parameter in scene.model.model.parameters()))
        return attention_pytorch(q, k, v, options["n_heads"])

    model.set_model_attn2_replace(watch, "middle", 0)
    plain, before = scene.sample(model), state(scene.model)
    assert True in before["requires_grad"]
    classifier = Failing() if fails else None
    patched, _ = apply_steering(model, scene.steering(classifier, stop_probability=1.0, recompute=recompute))
    with pytest.raises(RuntimeError, match="the classifier fails") if fails else contextlib.nullcontext():
        scene.sample(patched)
    assert required and True not in required
    assert_same(before, state(scene.model))
    assert torch.equal(scene.sample(model), plain)


def test_after_an_exception_in_the_classifier(scene: Scene):
    plain, before = scene.sample(), state(scene.model)  # the first load adds attributes of the host's own
    patched, runs = apply_steering(scene.model, scene.steering(Failing()))
    with pytest.raises(RuntimeError, match="the classifier fails"):
        scene.sample(patched)
    assert_same(before, state(scene.model))
    assert torch.equal(scene.sample(), plain) and not runs.runs


@pytest.mark.parametrize("recompute", [False, True])
def test_after_an_exception_in_the_model(scene: Scene, recompute: bool):
    plain, before = scene.sample(), state(scene.model)  # the first load adds attributes of the host's own
    broken = scene.model.clone()

    def fail(n, context, value, options):
        if torch.is_grad_enabled():
            raise RuntimeError("the model fails")
        return n, context, value

    broken.set_model_attn2_patch(fail)
    with pytest.raises(RuntimeError, match="the model fails"):
        scene.sample(apply_steering(broken, scene.steering(recompute=recompute))[0])
    assert_same(before, state(scene.model))
    assert torch.equal(scene.sample(), plain)


def test_an_interrupt_is_honoured_between_updates(scene: Scene):
    plain, before, seen = scene.sample(), state(scene.model), []

    def interrupt(record):
        seen.append(record)
        comfy.model_management.interrupt_current_processing()

    steering = scene.steering(stop_probability=1.0, max_updates=10)
    patched, _ = apply_steering(scene.model, type(steering)(steering.graph, steering.classifier, steering.settings, interrupt))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        scene.sample(patched)
    assert len(seen) == 1
    assert_same(before, state(scene.model))
    assert torch.equal(scene.sample(), plain)


class NotFinite(GeometricClassifier):
    def logits(self, subject, object, progress):
        return super().logits(subject, object, progress) * (subject.sum() - subject.sum()).sqrt()


def test_a_gradient_that_is_not_finite_is_left_out(scene: Scene, caplog):
    patched, runs = apply_steering(scene.model, scene.steering(NotFinite(), max_updates=2))
    assert torch.equal(scene.sample(patched), scene.sample())
    report = runs.last.report
    assert report.skipped == len(report.records) > 0
    assert "not finite" in caplog.text and "non-finite" in report.to_text()


def test_memory_does_not_grow(scene: Scene, monkeypatch):
    monkeypatch.setattr(ARCHIVE, "limit", 2**14)
    patched, _ = apply_steering(scene.model, scene.steering(stop_probability=1.0))
    tensors, sizes = [], []
    for number in range(20):
        scene.sample(patched, steps=4, size=(8, 8))
        if number in (9, 19):  # the archive is full by then
            gc.collect()
            tensors.append(sum(torch.Tensor in type(item).__mro__ for item in gc.get_objects()))
            sizes.append(psutil.Process().memory_info().rss)
    assert tensors[1] <= tensors[0]
    assert sizes[1] - sizes[0] < 20 * 2**20


def test_runs_never_mix(scene: Scene):
    patched, runs = apply_capture(scene.model, Capture(("dog",)))
    first, second = scene.sample(patched, seed=1), scene.sample(patched, seed=2)
    assert runs.find(first) is runs.runs[0] and runs.find(second) is runs.runs[1]
    assert not torch.equal(runs.find(first).maps.average(), runs.find(second).maps.average())
    with pytest.raises(LookupError, match="no run of this model gave this latent"):
        runs.find(first + 1)


def dynamic(scene: Scene, monkeypatch, loader) -> comfy.model_patcher.ModelPatcherDynamic:
    """The scene's model under dynamic VRAM, the host's default on an NVIDIA GPU, without the GPU library's buffers."""
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", lambda *sizes: None)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcherDynamic, "__del__", lambda self: None)
    model = comfy.model_patcher.ModelPatcherDynamic(scene.model.model, torch.device("cuda:0"), torch.device("cpu"))
    model.cached_patcher_init = loader
    return model


def test_dynamic_vram_is_not_used_for_steering(scene: Scene, monkeypatch):
    """Dynamic VRAM frees weights that backward needs. The host's delegate is loaded once, and only for steering."""
    loaded = []

    def load(*, disable_dynamic):
        assert disable_dynamic
        loaded.append(Scene().model)
        return loaded[-1]

    model = dynamic(scene, monkeypatch, (load, ()))
    assert apply_steering(model, scene.steering(step_size=0.0))[0].is_dynamic() and not loaded
    first, second = (apply_steering(model, scene.steering())[0] for _ in range(2))
    assert not first.is_dynamic() and not second.is_dynamic()
    assert len(loaded) == 1 and first.model is second.model is loaded[0].model


def test_dynamic_vram_without_a_loader_is_an_error(scene: Scene, monkeypatch):
    with pytest.raises(SteeringError, match="input 'model': ComfyUI's dynamic VRAM.*--disable-dynamic-vram"):
        apply_steering(dynamic(scene, monkeypatch, None), scene.steering())


def test_a_second_pass_at_the_same_point_is_not_captured(scene: Scene):
    """Perturbed-attention guidance evaluates the positive conditioning a second time, with perturbed attention."""
    patched, runs = apply_capture(scene.model, Capture(("dog",)))
    scene.sample(patched, steps=1)
    plain = runs.last.maps
    guided, runs = apply_capture(PerturbedAttentionGuidance.execute(scene.model, 3.0).args[0], Capture(("dog",)))
    scene.sample(guided, steps=1)
    assert runs.last.maps.layers == plain.layers
    assert torch.allclose(runs.last.maps.average(), plain.average(), atol=1e-6)


@pytest.mark.parametrize("node", [EasyCacheNode, LazyCacheNode])
def test_evaluations_for_steering_pass_by_the_hosts_step_caches(scene: Scene, node):
    """Without moves the result equals that of the cache alone; with moves every evaluation is recorded."""
    cached = node.execute(scene.model, 3.0, 0.0, 1.0, False).args[0]
    alone = scene.sample(cached, steps=8)
    assert not torch.equal(alone, scene.sample(steps=8))  # it did skip steps
    looking, runs = apply_steering(cached, scene.steering(stop_probability=0.0, compactness=0.0, end=0.9))
    assert torch.equal(scene.sample(looking, steps=8), alone)
    assert {record.outcome for record in runs.last.report.records} == {"satisfied"}
    moving, runs = apply_steering(cached, scene.steering(stop_probability=1.0, end=0.9))
    assert not torch.equal(scene.sample(moving, steps=8), alone)
    assert {record.outcome for record in runs.last.report.records} == {"moved"}


def test_a_run_is_found_by_a_latent_in_half_precision(scene: Scene):
    """The host's --fp16-intermediates casts a sampler's output."""
    patched, runs = apply_steering(scene.model, scene.steering())
    samples = scene.sample(patched)
    assert runs.find(samples.half()) is runs.last
    with pytest.raises(LookupError, match="'samples'"):
        runs.find(samples.half() + 1)


def test_several_relations_take_turns(scene: Scene):
    graph = build_graph(scene.graph.prompt, "dog | to the left of | teddy bear\ndog | above | photo")
    one, runs = apply_steering(scene.model, scene.steering(graph=graph, relations_per_update="one", stop_probability=1.0,
                                                           max_updates=1))
    together, _ = apply_steering(scene.model, scene.steering(graph=graph, stop_probability=1.0, max_updates=1))
    assert not torch.equal(scene.sample(one), scene.sample(together))
    assert all(len(record.probability[0]) == 2 for record in runs.last.report.records)


@pytest.mark.parametrize(("recompute", "times"), [(False, 6), (True, 2)])
def test_the_host_is_asked_to_keep_the_gradients_memory_free(scene: Scene, monkeypatch, recompute: bool, times: int):
    """The host reserves memory by batch size. It must assume a larger batch while steering, and only then."""
    asked: list[float] = []
    load = comfy.model_management.load_models_gpu

    def note(models, memory_required=0, **options):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
    scene.sample()
    patched, _ = apply_steering(scene.model, scene.steering(recompute=recompute))
    scene.sample(patched)
    plain, steered = (value for value in asked if value)
    assert steered == pytest.approx(times * plain, rel=1e-6)
