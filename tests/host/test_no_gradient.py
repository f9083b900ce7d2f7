"""A run whose gradient is 0 reports it: a zeroed conditioning, a mask that allows no change."""
from __future__ import annotations

import comfy.sample
import pytest
import torch
from conftest import Scene
from learn_to_steer.host.patching import apply_steering
from learn_to_steer.host.tokens import encode_prompt
from learn_to_steer.toyworld.models import LOADERS


def small_world() -> Scene:
    scene = Scene()
    with torch.inference_mode():
        scene.model, clip, _ = LOADERS["unet"]()
        scene.positive, scene.negative = encode_prompt(clip, scene.graph.prompt), encode_prompt(clip, "")
    return scene


def sample(scene: Scene, model, positive: list, **options) -> torch.Tensor:
    with torch.inference_mode():
        latent = torch.zeros(1, scene.model.get_model_object("latent_format").latent_channels, 16, 16)
        noise = comfy.sample.prepare_noise(latent, 7)
        return comfy.sample.sample(model, noise, 4, 3.0, "euler", "normal", positive, scene.negative, latent, seed=7,
                                   disable_pbar=True, **options)


@pytest.mark.parametrize("build", [Scene, small_world])
@pytest.mark.parametrize("case", ["zeroed conditioning", "empty mask"])
def test_a_run_without_a_gradient_says_so(build, case: str):
    scene, options = build(), {}
    positive = scene.positive
    if case == "empty mask":
        options["noise_mask"] = torch.zeros(1, 1, 16, 16)
    else:
        positive = [[torch.zeros_like(embedding), details] for embedding, details in positive]  # the host's ConditioningZeroOut
    patched, runs = apply_steering(scene.model, scene.steering(stop_probability=1.0, max_updates=4, end=0.5))
    assert torch.equal(sample(scene, patched, positive, **options), sample(scene, scene.model, positive, **options))
    report = runs.last.report
    assert [record.outcome for record in report.records] == ["no gradient"] * 2  # one evaluation in each of two steps
    assert not any(any(record.moved) for record in report.records)
    assert "the gradient was 0, so steering had no effect" in report.to_text()
