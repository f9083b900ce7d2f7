"""Weights that the host casts, moves, patches or quantises for each use; dynamic VRAM; memory requested from the host."""
from __future__ import annotations

import copy
import gc
import weakref

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.supported_models
import comfy_aimdo.host_buffer
import pytest
import tiny
import torch
from conftest import Scene
from learn_to_steer.host import memory
from learn_to_steer.host.gradient import differentiable
from learn_to_steer.host.memory import MemoryPlan, copies_for_each_use
from learn_to_steer.host.patching import apply_steering
from test_gradient import assert_agree, check
from test_off import assert_same, state

CPU = torch.device("cpu")


def cast_patcher(weights: torch.dtype, compute: torch.dtype = torch.float32) -> comfy.model_patcher.ModelPatcher:
    """The tiny UNet with the host's manual_cast layers: weights in one precision, arithmetic in another."""
    config = comfy.supported_models.SD20({**tiny.TINY_UNET, "dtype": weights})
    config.unet_config.update(tiny.TINY_UNET)
    config.manual_cast_dtype = compute
    base = comfy.model_base.BaseModel(config, model_type=config.model_type({}), device="cpu")
    source = tiny.unet_patcher().model.diffusion_model.state_dict()
    base.diffusion_model.load_state_dict({name: value.to(weights) for name, value in source.items()})
    base.manual_cast_dtype = compute
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


class PartlyLoaded(comfy.model_patcher.ModelPatcher):
    """A patcher of which only `room` bytes of weights fit on the device, as on a small GPU."""

    room = 200_000

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        self.unpatch_model(self.offload_device, unpatch_weights=True)
        self.patch_model(device_to, lowvram_model_memory=self.room)


def partly_loaded(with_lora: bool) -> Scene:
    scene = Scene()
    with torch.inference_mode():
        scene.model = PartlyLoaded(scene.model.model, CPU, CPU)
        if with_lora:
            scene.model.add_patches(lora(scene.model, seed=8), 0.7)
    return scene


def lora(model, seed: int) -> dict:
    """A LoRA patch: a full-rank difference on every second linear weight of the network."""
    generator, names = torch.Generator().manual_seed(seed), []
    names = [name for name, value in model.model.named_parameters() if value.ndim == 2 and "transformer_blocks" in name]
    return {name: ("diff", (0.05 * torch.randn(model.model.get_parameter(name).shape, generator=generator),))
            for name in names[::2]}


@pytest.fixture
def keep_nothing(monkeypatch):
    """Makes a small network count as large: no weight copies may be kept."""
    monkeypatch.setattr(memory, "COPIES_TO_KEEP", 0)


# --- the gradient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("weights", [torch.float8_e4m3fn, torch.float16, torch.bfloat16], ids=str)
def test_cast_weights(weights: torch.dtype, recompute: bool):
    scene = Scene()
    with torch.inference_mode():
        scene.model = cast_patcher(weights)
    assert_agree(check(scene, recompute)[0], 1e-3)
    assert all(value.dtype == weights for value in scene.model.model.diffusion_model.parameters())


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "lora"])
def test_partly_loaded_weights(recompute: bool, with_lora: bool):
    scene = partly_loaded(with_lora)
    assert_agree(check(scene, recompute)[0], 1e-3)
    assert scene.model.model.model_lowvram
    assert any(getattr(part, "weight_function", []) for part in scene.model.model.modules()) == with_lora


def quantised_patcher() -> comfy.model_patcher.ModelPatcher:
    """The tiny UNet with linear weights as in the host's fp8 checkpoints: values, a scale, and the format's name."""
    config = comfy.supported_models.SD20({**tiny.TINY_UNET, "dtype": torch.float32})
    config.unet_config.update(tiny.TINY_UNET)
    config.manual_cast_dtype, config.quant_config = torch.float32, {"mixed_ops": True}
    base = comfy.model_base.BaseModel(config, model_type=config.model_type({}), device="cpu")
    weights, source = {}, tiny.unet_patcher().model.diffusion_model.state_dict()
    for name, value in source.items():
        layer = name.removesuffix(".weight")
        if value.ndim == 2 and name.endswith(".weight"):
            scale = value.abs().max() / 448
            weights[name], weights[f"{layer}.weight_scale"] = (value / scale).to(torch.float8_e4m3fn), scale
            weights[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
        else:
            weights[name] = value
    base.diffusion_model.load_state_dict(weights)
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_quantised_weights(recompute: bool):
    scene = Scene()
    with torch.inference_mode():
        scene.model = quantised_patcher()
    linear = scene.model.model.diffusion_model.time_embed[0]
    assert isinstance(linear.weight, comfy.ops.QuantizedTensor) and linear.weight.is_inference()
    assert_agree(check(scene, recompute)[0], 1e-3)
    assert isinstance(linear.weight, comfy.ops.QuantizedTensor)
    assert copies_for_each_use(scene.model.model) >= 4 * linear.weight.numel()


# --- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_weights_are_moved_on_the_compute_stream_while_steering(scene: Scene, monkeypatch, fails: bool):
    monkeypatch.setattr(comfy.model_management, "NUM_STREAMS", 2)
    seen, model = set(), scene.model.clone()

    def look(h, transformer_options):
        seen.add((comfy.model_management.in_training, comfy.model_management.NUM_STREAMS))
        if fails and comfy.model_management.in_training:
            raise ZeroDivisionError
        return h

    model.set_model_input_block_patch(look)
    patched, _ = apply_steering(model, scene.steering(stop_probability=1.0, max_updates=1))
    if fails:
        with pytest.raises(ZeroDivisionError):
            scene.sample(patched, steps=2)
    else:
        scene.sample(patched, steps=2)
    assert seen == ({(True, 0)} if fails else {(True, 0), (False, 2)})
    assert comfy.model_management.NUM_STREAMS == 2 and comfy.model_management.in_training is False


# --- recomputation by itself ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cast", "partly loaded"])
def test_recomputation_switches_itself_on_and_says_so(scene: Scene, keep_nothing, caplog, kind: str):
    own = Scene()
    with torch.inference_mode():
        own.model = cast_patcher(torch.float16) if kind == "cast" else partly_loaded(True).model
    caplog.set_level("INFO", "learn_to_steer")
    own.sample(steps=1)
    before = state(own.model)
    results = {}
    for asked in (False, True):
        patched, runs = apply_steering(own.model, own.steering(stop_probability=1.0, max_updates=1, recompute=asked))
        results[asked] = own.sample(patched, steps=2)
        assert any("save_memory switched itself on" in note for note in runs.last.report.notes) is not asked
    assert torch.equal(results[False], results[True])  # the one was computed as the other
    assert "save_memory switched itself on" in caplog.text
    assert_same(before, state(own.model))


def test_it_stays_off_where_weights_are_used_as_they_are_or_the_copies_are_small(scene: Scene, monkeypatch):
    patched, runs = apply_steering(scene.model, scene.steering(stop_probability=1.0, max_updates=1))
    monkeypatch.setattr(memory, "COPIES_TO_KEEP", 0)
    scene.sample(patched, steps=1)
    assert runs.last.report.notes == () and copies_for_each_use(scene.model.model) == 0
    monkeypatch.undo()
    assert not MemoryPlan(False, 2**20).recompute and MemoryPlan(False, 2**30).recompute and MemoryPlan(True).recompute


def test_copies_are_the_weights_in_the_precision_of_the_arithmetic():
    base = cast_patcher(torch.float8_e4m3fn).model
    weights = [part.weight for part in base.diffusion_model.modules() if isinstance(getattr(part, "weight", None), torch.Tensor)]
    assert copies_for_each_use(base) == 4 * sum(weight.numel() for weight in weights)
    assert 0 < memory.largest_block_of_copies(base) < copies_for_each_use(base)


class Loader:
    """Replaces the host's preparation. The model fits beside a gradient of up to `fits` pictures' memory."""

    def __init__(self, model, fits: int):
        self.model, self.fits, self.asked = model, fits, []

    def __call__(self, model, shape, conds, *rest, **options):
        self.asked.append(shape[0])
        for part in self.model.model.modules():
            if hasattr(part, "comfy_cast_weights"):
                part.weight_function = [torch.clone] if shape[0] > self.fits else []
        return model, conds, []


@pytest.mark.parametrize(("fits", "asked", "again", "recompute"), [
    (100, [6], 6, False), (4, [6, 3], 2, True), (0, [6, 3], 3, True)],
                         ids=["all fits", "fits beside a block's gradient", "never fits"])
def test_the_host_is_asked_for_less_before_weights_are_offloaded_for_good(keep_nothing, fits, asked, again, recompute):
    """After the smaller request blocks are recomputed, even if no weights are offloaded any more.

    The third picture's memory is for the copies of one block, as long as there are copies.
    """
    model = tiny.unet_patcher()
    loader, plan, shape = Loader(model, fits), MemoryPlan(False), [1, 4, 256, 256]  # one block is far below one picture
    plan.prepare_sampling(loader, model, shape, {})
    assert loader.asked == asked and plan.recompute is recompute
    plan.prepare_sampling(loader, model, shape, {})
    assert loader.asked == [*asked, again] and plan.recompute is recompute  # the next run knows


def test_a_block_of_copies_is_announced_beside_the_gradient(keep_nothing):
    model, plan, asked = cast_patcher(torch.float16), MemoryPlan(False), []
    shape = [1, 4, 2, 2]  # so small a picture that the weights count
    plan.prepare_sampling(lambda model, shape, conds: asked.append(shape[0]), model, shape, {})
    per_picture = model.model.memory_required(shape)
    assert len(asked) == 1 and (asked[0] - 2) * per_picture >= memory.largest_block_of_copies(model.model) > 0


# --- dynamic VRAM --------------------------------------------------------------------------------------------------


class Loads:
    """A loader that counts how often the file is read."""

    def __init__(self):
        self.count = 0

    def __call__(self, *, disable_dynamic: bool):
        self.count += 1
        return Scene().model


@pytest.fixture
def dynamic(monkeypatch):
    """The tiny model under dynamic VRAM, the host's default on an NVIDIA GPU, without the GPU library's buffers."""
    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", lambda *sizes: None)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcherDynamic, "__del__", lambda self: None)
    root = comfy.model_patcher.ModelPatcherDynamic(Scene().model.model, torch.device("cuda:0"), CPU)
    root.cached_patcher_init = (Loads(), ())
    return root


def on_the_cpu(model):
    model.load_device = CPU
    return model


def test_each_lora_is_steered_with_its_own_patches_and_the_file_is_read_once(scene: Scene, dynamic):
    steering = scene.steering(stop_probability=1.0, max_updates=1)
    for seed in (1, 2, 1):
        changed = dynamic.clone()
        changed.add_patches(lora(changed, seed), 1.0)
        expected = copy.copy(Scene().model)
        expected.add_patches(lora(expected, seed), 1.0)
        steered = on_the_cpu(apply_steering(changed, steering)[0])
        assert not steered.is_dynamic() and steered.patches.keys() == changed.patches.keys()
        result = scene.sample(steered, steps=2)
        assert torch.equal(result, scene.sample(apply_steering(expected, steering)[0], steps=2))
        del changed, steered
    assert dynamic.cached_patcher_init[0].count == 1


def test_a_clone_of_a_clone_finds_the_same_weights(scene: Scene, dynamic):
    far = dynamic.clone().clone().clone()
    first, second = (apply_steering(model, scene.steering())[0] for model in (far, dynamic.clone()))
    assert dynamic.cached_patcher_init[0].count == 1 and first.model is second.model is not dynamic.model


def test_when_a_steered_model_dies_the_host_still_manages_its_weights(scene: Scene, dynamic):
    """The host continues with the parent of a freed patcher, and manages the weights through it."""
    steered = apply_steering(dynamic.clone(), scene.steering())[0]
    weights, loaded = steered.model, comfy.model_management.LoadedModel(steered)
    del steered
    gc.collect()
    assert loaded.model is not None and loaded.model.model is weights and not loaded.model.is_dynamic()


def test_the_second_load_dies_with_the_model(scene: Scene, dynamic, request):
    steered = on_the_cpu(apply_steering(dynamic.clone(), scene.steering(max_updates=1))[0])
    scene.sample(steered, steps=1)
    weights = weakref.ref(steered.model)
    del steered
    gc.collect()
    assert weights() is not None  # kept for the next change of a LoRA
    patchers = [item for item in gc.get_referrers(dynamic) if isinstance(item, comfy.model_patcher.ModelPatcher)]
    assert not patchers  # nothing that lives on points back at the model
    dynamic.attachments.clear()
    dynamic.non_dynamic_delegate_model = None
    gc.collect()
    assert weights() is None


def test_nothing_is_put_in_the_place_of_a_pinned_or_offloaded_weight():
    """Weights kept in main memory are moved for each use and may be pinned."""
    with torch.inference_mode():
        base = cast_patcher(torch.float16).model
    base.diffusion_model.device = torch.device("meta")
    before = [id(parameter) for parameter in base.diffusion_model.parameters()]
    with differentiable(base.diffusion_model):
        assert [id(parameter) for parameter in base.diffusion_model.parameters()] == before
