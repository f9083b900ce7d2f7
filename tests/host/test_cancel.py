"""After an interrupt or an out-of-memory error during a gradient, no memory of the pass is held."""
from __future__ import annotations

import contextlib
import gc

import comfy.model_management
import pytest
import torch
from conftest import Scene
from learn_to_steer.host.capturing import Capture
from learn_to_steer.host.patching import apply_capture, apply_steering
from test_mmdit_gradient import gradient_of, loaded
from torch.multiprocessing.reductions import StorageWeakRef
from watched import Watched

Cancelled = comfy.model_management.InterruptProcessingException
OutOfMemory = torch.OutOfMemoryError


@contextlib.contextmanager
def without_collector():
    """Runs without the garbage collector, which cannot find cycles through C++. Reference counts must suffice."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class Stopped(Watched):
    """Stops a run at the n-th layer of its passes with a gradient, and tracks all memory of these passes.

    The host calls `throw_exception_if_processing_interrupted` before every layer, in forward and in a recomputed backward.
    """

    def __init__(self, monkeypatch, layer: int, kind: type[BaseException]):
        super().__init__()
        self.layer, self.kind, self.seen = layer, kind, 0
        self._host = comfy.model_management.throw_exception_if_processing_interrupted
        monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", self._before_a_layer)

    def _before_a_layer(self):
        if not torch.is_inference_mode_enabled():
            self.seen += 1
            if self.seen == self.layer and self.kind is Cancelled:
                comfy.model_management.interrupt_current_processing()
            elif self.seen == self.layer:
                raise self.kind("simulated")
        self._host()

    def run(self, update) -> bool:
        """Runs the sampler. Returns whether the run was stopped."""
        try:
            with self:
                update()
        except self.kind:
            return True
        return False


def layers_of_an_update(monkeypatch, update) -> int:
    update()  # from here on the weights are normal tensors
    with monkeypatch.context() as patch:
        whole = Stopped(patch, 0, Cancelled)
        assert not whole.run(update)
        assert whole.memory and whole.held() == 0
    return whole.seen


def unet_update(scene: Scene, recompute: bool, model=None):
    steering = scene.steering(stop_probability=1.0, max_updates=1, recompute=recompute)
    patched, _ = apply_steering(model or scene.model, steering)
    return lambda: scene.sample(patched, steps=1, size=(8, 8))


def flux_update(scene: Scene, recompute: bool):
    base, inputs = loaded(size=(4, 4))
    return lambda: gradient_of(base, inputs, recompute)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("kind", "stride"), [(Cancelled, 13), (OutOfMemory, 29)], ids=["cancel", "out of memory"])
@pytest.mark.parametrize("prepare", [unet_update, flux_update], ids=["unet", "flux"])
def test_nothing_of_a_stopped_update_is_held(scene: Scene, monkeypatch, prepare, recompute: bool, kind, stride: int):
    update = prepare(scene, recompute)
    with without_collector():
        layers = layers_of_an_update(monkeypatch, update)
        for layer in range(1, layers, stride):
            with monkeypatch.context() as patch:
                stopped = Stopped(patch, layer, kind)
                assert stopped.run(update), layer
            assert stopped.held() == 0, f"stopped at layer {layer} of {layers}: {stopped.held()} of {len(stopped.memory)} held"


def test_memory_is_flat_over_twenty_cancels(scene: Scene, monkeypatch):
    update, counts = unet_update(scene, recompute=True), []
    layers = layers_of_an_update(monkeypatch, update)
    for number in range(20):
        with monkeypatch.context() as patch:
            assert Stopped(patch, 1 + number * layers // 20, Cancelled).run(update)
        if number in (4, 19):
            gc.collect()
            counts.append(sum(torch.Tensor in type(item).__mro__ for item in gc.get_objects()))
    assert counts[0] == counts[1]


def test_a_pack_that_keeps_a_hidden_state_in_the_hosts_options_makes_no_leak(scene: Scene, monkeypatch):
    """Reference-attention packs do so. The options then hold a block's outputs, and the block's recomputation the options."""
    model = scene.model.clone()

    def remember(h, transformer_options):
        transformer_options["a bank of hidden states"].append(h)
        return h

    model.set_model_input_block_patch(remember)
    model.model_options["transformer_options"]["a bank of hidden states"] = []
    with without_collector():
        assert layers_of_an_update(monkeypatch, unet_update(scene, True, model))


def test_nothing_of_a_stopped_capture_is_held(scene: Scene, monkeypatch):
    patched, _ = apply_capture(scene.model, Capture(("dog",)))
    broken, calls = patched.clone(), []

    def fail(h, transformer_options):
        calls.append(StorageWeakRef(h.untyped_storage()))
        if len(calls) == 3:
            raise OutOfMemory("simulated")
        return h

    broken.set_model_output_block_patch(lambda h, skipped, options: (fail(h, options), skipped))
    with without_collector():
        with contextlib.suppress(OutOfMemory):
            scene.sample(broken, steps=1)
        assert len(calls) == 3 and all(storage.expired() for storage in calls)
