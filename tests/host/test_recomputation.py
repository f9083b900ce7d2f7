"""With `save_memory` the UNet's layers run again for the gradient, whichever hook the host offers."""
from __future__ import annotations

from collections import Counter

import pytest
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
from conftest import Scene
from learn_to_steer.host.backbones import unet
from learn_to_steer.host.patching import apply_steering
from test_gradient import assert_agree, check

PATHS = [pytest.param(True, id="layer patch"), pytest.param(False, id="wrapper")]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch) -> bool:
    if request.param and not unet.LAYER_PATCH_REACHES_ALL:
        pytest.skip("this host calls its layer patch neither for residual blocks nor for transformers")
    monkeypatch.setattr(unet, "LAYER_PATCH_REACHES_ALL", request.param)
    return request.param


def layers(model) -> list[torch.nn.Module]:
    return [layer for layer in model.model.diffusion_model.modules() if isinstance(layer, (ResBlock, SpatialTransformer))]


def inner_calls(scene: Scene, recompute: bool) -> Counter:
    """Number of calls of a module inside each layer, in one steered evaluation and the step's own passes."""
    counted, handles = Counter(), []
    for number, layer in enumerate(layers(scene.model)):
        part = layer.in_layers[0] if isinstance(layer, ResBlock) else layer.norm
        handles.append(part.register_forward_pre_hook(lambda *_, number=number: counted.update([number])))
    try:
        steering = scene.steering(start=0.0, end=0.1, max_updates=1, stop_probability=1.0, recompute=recompute)
        scene.sample(apply_steering(scene.model, steering)[0], steps=2, cfg=1.0)
    finally:
        for handle in handles:
            handle.remove()
    return counted


def test_each_layer_runs_again_for_the_gradient(scene: Scene, path: bool):
    plain, recomputed = inner_calls(scene, False), inner_calls(scene, True)
    assert len(plain) == len(layers(scene.model)) > 10
    more = {number: recomputed[number] - plain[number] for number in plain}
    behind_the_last_map = {number for number, times in more.items() if times == 0}  # no gradient passes through these
    last_transformer = max(number for number, layer in enumerate(layers(scene.model)) if isinstance(layer, SpatialTransformer))
    assert all(number > last_transformer for number in behind_the_last_map), more
    assert {more[number] for number in plain if number <= last_transformer} == {1}, more


def test_gradient_agrees_with_finite_differences(scene: Scene, path: bool):
    assert_agree(check(scene, True)[0], 1e-3)
    for plain, recomputed in zip(check(scene, False)[1], check(scene, True)[1], strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-6 * plain.abs().max())


def test_another_packs_forward_is_called_and_put_back(scene: Scene, path: bool):
    layer, calls = next(layer for layer in layers(scene.model) if isinstance(layer, ResBlock)), []
    original = layer.forward

    def theirs(x, emb):
        calls.append(torch.is_grad_enabled())
        return original(x, emb)

    layer.forward = theirs
    try:
        check(scene, True)
        assert True in calls and vars(layer)["forward"] is theirs
    finally:
        del layer.forward


def test_layers_are_as_before_after_a_failure(scene: Scene, path: bool):
    model = scene.model.clone()

    def fails(q, k, v, options):
        if torch.is_grad_enabled():
            raise OSError("in the middle of the network")
        return v.new_zeros(q.shape)

    model.set_model_attn2_replace(fails, "middle", 0)
    with pytest.raises(OSError, match="in the middle"):
        scene.sample(apply_steering(model, scene.steering(stop_probability=1.0, recompute=True))[0])
    assert not any("forward" in vars(layer) for layer in layers(scene.model))
