"""Steering in the user's own stack: schedules that are split or changed before they reach the sampler."""
from __future__ import annotations

import comfy.samplers
import torch
from comfy_extras.nodes_custom_sampler import (
    CFGGuider,
    DisableNoise,
    Noise_RandomNoise,
    SamplerCustomAdvanced,
    SetFirstSigma,
    SplitSigmas,
)
from conftest import Scene
from learn_to_steer.host.patching import apply_steering

EULER, EMPTY = comfy.samplers.ksampler("euler"), {"samples": torch.zeros(1, 4, 16, 16)}


def advanced(scene: Scene, model, noise, sigmas: torch.Tensor, latent: dict) -> dict:
    with torch.inference_mode():
        guider = CFGGuider.execute(model, scene.positive, scene.negative, 3.0).args[0]
        return SamplerCustomAdvanced.execute(noise, guider, EULER, sigmas, latent).args[0]


def schedule(scene: Scene) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(scene.model.get_model_object("model_sampling"), "normal", 10)


def test_split_sigmas_do_what_the_whole_schedule_does(scene: Scene):
    """The second part goes on from the moved latent, and steers the steps of its own that are in the window."""
    patched, runs = apply_steering(scene.model, scene.steering(stop_probability=1.0, max_updates=1, end=0.5))
    whole = advanced(scene, patched, Noise_RandomNoise(3), schedule(scene), EMPTY)["samples"]
    assert [record.step for record in runs.last.report.records] == [0, 1, 2, 3, 4]
    high, low = SplitSigmas.execute(schedule(scene), 3).args
    first = advanced(scene, patched, Noise_RandomNoise(3), high, EMPTY)
    assert [record.step for record in runs.last.report.records] == [0, 1, 2]
    second = advanced(scene, patched, DisableNoise.execute().args[0], low, first)["samples"]
    assert {record.outcome for record in runs.last.report.records} == {"moved"}
    torch.testing.assert_close(second, whole, atol=2e-3, rtol=1e-3)
    plain = advanced(scene, scene.model, Noise_RandomNoise(3), schedule(scene), EMPTY)["samples"]
    assert (whole - plain).abs().max() > 0.1


def test_a_changed_first_sigma(scene: Scene):
    """The first noise level is not one of the model's schedule."""
    sigmas = SetFirstSigma.execute(schedule(scene), 11.0).args[0]
    plain = advanced(scene, scene.model, Noise_RandomNoise(3), sigmas, EMPTY)["samples"]
    patched, runs = apply_steering(scene.model, scene.steering(stop_probability=0.0, compactness=0.0))
    assert torch.equal(advanced(scene, patched, Noise_RandomNoise(3), sigmas, EMPTY)["samples"], plain)
    patched, runs = apply_steering(scene.model, scene.steering(stop_probability=1.0, max_updates=1))
    assert not torch.equal(advanced(scene, patched, Noise_RandomNoise(3), sigmas, EMPTY)["samples"], plain)
    records = runs.last.report.records
    assert {record.outcome for record in records} == {"moved"} and abs(records[0].sigma - 11.0) < 1e-6
