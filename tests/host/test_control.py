"""A pass with a gradient through the host's ControlNet and other code that enters inference mode."""
from __future__ import annotations

import comfy.cldm.cldm
import comfy.controlnet
import comfy.model_management
import comfy.ops
import pytest
import tiny
import torch
from conftest import PROMPT, Scene, pack
from learn_to_steer.host.patching import apply_steering
from learn_to_steer.host.steering import Steering
from test_gradient import assert_agree, check
from watched import Watched

TINY_CONTROLNET = {
    "image_size": 32, "in_channels": 4, "hint_channels": 3, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": [1, 2], "num_heads": 2, "transformer_depth": [1, 1], "transformer_depth_middle": 1, "context_dim": 32,
    "use_spatial_transformer": True, "use_linear_in_transformer": True, "legacy": False,
}


class Spy(comfy.controlnet.ControlNet):
    """The host's ControlNet; keeps its inputs and outputs."""

    def __init__(self, network):
        super().__init__(network, load_device=torch.device("cpu"))
        self.calls: list[dict] = []

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        training, inference = comfy.model_management.in_training, torch.is_inference_mode_enabled()
        found = super().get_control(x_noisy, t, cond, batched_number, transformer_options)
        self.calls.append({"x": x_noisy.detach().clone(), "training": training, "inference": inference,
                           "residuals": [part.clone() for parts in found.values() for part in parts if part is not None]})
        return found


class Held(Spy):
    """Repeats its first output at each noise level, which holds the residual constant."""

    def __init__(self, network):
        super().__init__(network)
        self.first: dict[float, dict] = {}

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        level = float(t[0])
        if level not in self.first:
            self.first[level] = super().get_control(x_noisy, t, cond, batched_number, transformer_options)
        return {name: [part if part is None else part.clone() for part in parts] for name, parts in self.first[level].items()}


def controlled(kind) -> tuple[comfy.controlnet.ControlNet, list]:
    """A ControlNet with random weights and a conditioning that carries it, both made in inference mode."""
    with torch.inference_mode():
        network = comfy.cldm.cldm.ControlNet(**TINY_CONTROLNET, operations=comfy.ops.disable_weight_init)
        tiny.fill(network, seed=4)
        control = kind(network)
        hint = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(6))
        control.set_cond_hint(hint, 0.8)
        positive = tiny.conditioning(pack, PROMPT, control=control, control_apply_to_uncond=True)
    return control, positive


def test_it_gives_what_the_host_gets_from_it(scene: Scene):
    """Without a move, the steering pass and the host's pass of a step call the ControlNet with the same latent."""
    control, positive = controlled(Spy)
    patched, runs = apply_steering(scene.model, scene.steering(stop_probability=0.0, compactness=0.0, end=1.0))
    steered = scene.sample(patched, steps=2, cfg=1.0, positive=positive)
    assert {record.outcome for record in runs.last.report.records} == {"satisfied"}
    ours, hosts = control.calls[::2], control.calls[1::2]
    assert len(ours) == len(hosts) == 2
    for our, host in zip(ours, hosts, strict=True):
        assert torch.allclose(our["x"], host["x"], rtol=1e-5) and our["inference"] and not our["training"]
        assert len(our["residuals"]) == len(host["residuals"]) > 0
        for a, b in zip(our["residuals"], host["residuals"], strict=True):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    assert torch.equal(steered, scene.sample(steps=2, cfg=1.0, positive=positive))
    assert not torch.equal(steered, scene.sample(steps=2, cfg=1.0))


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
def test_the_gradient_agrees_with_finite_differences_while_the_residual_is_held(scene: Scene, recompute: bool):
    control, positive = controlled(Held)
    results, gradients = check(scene, recompute, positive=positive, cfg=1.0)
    assert_agree(results, 1e-3)
    assert len(control.first) == len(control.calls) == 4 and len(gradients) == 2
    without = check(scene, recompute, cfg=1.0)[1]
    assert not torch.allclose(gradients[0], without[0], rtol=1e-2)  # the residual does take part


def growth(scene: Scene, model=None, positive=None) -> tuple[list[int], int]:
    """Bytes held after each of four updates of one step, and the total bytes allocated by these updates."""
    held, watched = [], Watched()
    steering = scene.steering(stop_probability=1.0, max_updates=4, end=0.4)
    steering = Steering(steering.graph, steering.classifier, steering.settings, lambda record: held.append(watched.held_bytes()))
    patched, _ = apply_steering(model or scene.model, steering)
    scene.sample(patched, steps=1, positive=positive)  # puts normal tensors in the place of the weights
    held.clear()
    with watched:
        scene.sample(patched, steps=1, positive=positive)
    return held, sum(size for _, size in watched.memory)


def test_memory_does_not_grow_with_the_evaluations(scene: Scene):
    held, everything = growth(scene, positive=controlled(Spy)[1])
    assert len(held) == 4 and everything > 4 * held[0]
    assert max(held[1:]) <= held[1] and held[3] < 1.1 * held[0]


def test_code_that_enters_inference_mode_by_itself_is_left_alone(scene: Scene):
    """Such code updates its own buffer, like a pack's cache, and adds the current content."""
    model, seen = scene.model.clone(), []
    with torch.inference_mode():
        buffer = torch.zeros(1, 1, 64, 64)

    def patch(h, transformer_options):
        with torch.inference_mode():
            for _ in range(20):  # each a new tensor of 16 KiB
                made = torch.sin(buffer) + 1
            buffer.copy_(made)
            assert made.is_inference() and made.add_(1) is made  # not allowed on a normal tensor's behalf
        seen.append(float(buffer.flatten()[0]))
        return h + buffer.mean() * 0

    model.set_model_input_block_patch(patch)
    held, _ = growth(scene, model)
    assert held[3] < 1.1 * held[0]
    values, expected = [], 0.0
    for _ in seen:
        expected = float(torch.sin(torch.tensor(expected)) + 1)
        values.append(expected)
    assert seen == pytest.approx(values, rel=1e-5)  # every change is seen, none is lost in a stale clone
