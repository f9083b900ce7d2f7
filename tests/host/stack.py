"""What must hold for steering beside anything else that a user puts on a MODEL or a CONDITIONING."""
from __future__ import annotations

from collections.abc import Callable

import torch
from conftest import Scene
from learn_to_steer.host.patching import _patched, apply_steering
from learn_to_steer.host.records import RunLog
from test_gradient import Checked, assert_agree
from test_off import assert_same, state
from torch import Tensor

STEPS = 4


def same(model):
    return model


def derivatives(scene: Scene, before: Callable, after: Callable, recompute: bool, **options) -> list[tuple[float, float]]:
    """(claimed, measured) directional derivatives of the loss at each steered step; see `Checked`."""
    results, gradients = [], []

    def open_session(guider, sigmas):
        session = Checked(guider, sigmas, scene.steering(recompute=recompute))
        session.results, session.gradients = results, gradients
        return session

    with torch.inference_mode():
        model = after(_patched(before(scene.model), open_session, RunLog(), "check"))
    scene.sample(model, steps=STEPS, **options)
    return results


def run(scene: Scene, before: Callable, after: Callable, options: dict, **settings) -> tuple[Tensor, list]:
    """The latent and the records of a steered run."""
    with torch.inference_mode():
        patched, runs = apply_steering(before(scene.model), scene.steering(**settings))
        model = after(patched)
    return scene.sample(model, steps=STEPS, **options), list(runs.last.report.records)


def assert_looking_changes_nothing(scene: Scene, before: Callable, after: Callable, options: dict, plain: Tensor) -> None:
    looked, records = run(scene, before, after, options, stop_probability=0.0, compactness=0.0)
    assert {record.outcome for record in records} == {"satisfied"}
    assert torch.equal(looked, plain)


def assert_moves_lower_the_loss(scene: Scene, before: Callable, after: Callable, options: dict, plain: Tensor) -> None:
    moved, records = run(scene, before, after, options, stop_probability=1.0, max_updates=3, step_size=1.0)
    assert {record.outcome for record in records} == {"moved"} and not torch.equal(moved, plain)
    for step in {record.step for record in records}:
        losses = [record.loss[0] for record in records if record.step == step]
        assert losses[-1] < losses[0], losses


def assert_steers(scene: Scene, before: Callable = same, after: Callable = same, tolerance: float | None = 1e-3,
                  recompute: tuple[bool, ...] = (False, True), **options) -> None:
    """Steering works in the user's stack, and the stack works as without steering.

    before, after: from MODEL to MODEL, above and below "Apply Spatial Steering"; options: for `Scene.sample`; tolerance: of the
    gradient against finite differences, None where the arithmetic is too coarse for these.
    """
    with torch.inference_mode():
        stack = after(before(scene.model))
    plain = scene.sample(stack, steps=STEPS, **options)
    found = state(scene.model)
    assert_looking_changes_nothing(scene, before, after, options, plain)
    assert_moves_lower_the_loss(scene, before, after, options, plain)
    for again in recompute if tolerance is not None else ():
        results = derivatives(scene, before, after, again, **options)
        assert results
        assert_agree(results, tolerance)
    assert_same(found, state(scene.model))
    assert torch.equal(scene.sample(stack, steps=STEPS, **options), plain)
