"""Every sampler of the host either is steered at each step of the window, or says why not; schedules in parts."""
from __future__ import annotations

import comfy.samplers
import pytest
import torch
from conftest import Scene
from learn_to_steer.host.patching import apply_steering
from learn_to_steer.host.stepping import Schedule, SteeringError

SELF_WILLED = {"dpm_fast", "dpm_adaptive"}


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_every_sampler(scene: Scene, sampler: str):
    patched, runs = apply_steering(scene.model, scene.steering(stop_probability=1.0, max_updates=1))
    if sampler in SELF_WILLED:
        with pytest.raises(SteeringError, match=f"input 'sampler_name': {sampler} chooses its own noise levels"):
            scene.sample(patched, sampler, steps=6)
        return
    out = scene.sample(patched, sampler, steps=6)
    assert [record.step for record in runs.last.report.records] == [0, 1, 2]
    assert torch.isfinite(out).all() and not torch.equal(out, scene.sample(sampler=sampler, steps=6))


def test_a_sampler_on_a_copy_is_refused(scene: Scene):
    import comfy.sample

    def copying(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for i in range(len(sigmas) - 1):
            denoised = model(x.clone(), sigmas[i] * x.new_ones([x.shape[0]]), **extra_args)
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            x = x + 0
        return x

    patched, _ = apply_steering(scene.model, scene.steering())
    with torch.inference_mode(), pytest.raises(SteeringError, match="works on a copy of the latent"):
        comfy.sample.sample_custom(patched, torch.randn(1, 4, 16, 16), 1.0, comfy.samplers.KSAMPLER(copying),
                                   torch.tensor([10.0, 5.0, 0.0]), scene.positive, scene.negative,
                                   torch.zeros(1, 4, 16, 16), disable_pbar=True, seed=0)


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
