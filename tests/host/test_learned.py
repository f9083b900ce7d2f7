"""The learned classifier with the host's UNet: its gradient, and a file in the published format."""
from __future__ import annotations

from pathlib import Path

import published_files
import pytest
import torch
from conftest import Scene
from learn_to_steer.classifiers.base import ClassifierError
from learn_to_steer.classifiers.checkpoint import load_classifier, save_classifier
from learn_to_steer.host.patching import apply_steering
from learn_to_steer.steering.settings import SteeringSettings
from test_gradient import assert_agree, build, check

PAPER = vars(SteeringSettings.as_in_the_paper())


def published(folder: Path, name: str, backbone: str = "unet") -> Path:
    """A published checkpoint with random weights and a measurable gradient."""
    shape = published_files.SHAPES[backbone]
    weights = published_files.random_weights(shape, 1368, contrast=100)
    torch.save(published_files.checkpoint(shape, weights=weights), folder / name)
    return folder / name


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
def test_its_gradient_agrees_with_finite_differences(tmp_path: Path, recompute: bool):
    classifier = load_classifier(published(tmp_path, "any.pth"))
    classifier.network.double()
    results, gradients = check(build("sd2", torch.float64), recompute, classifier=classifier, compactness=0.0)
    assert_agree(results, 1e-5)
    assert min(gradient.norm() for gradient in gradients) > 1e-3


def test_a_published_file_steers_and_does_so_alike_when_converted(tmp_path: Path):
    scene = Scene()
    with torch.inference_mode():  # as the host's nodes load it
        source = load_classifier(published(tmp_path, "any.pth"))
        save_classifier(tmp_path / "converted.safetensors", source)
        converted = load_classifier(tmp_path / "converted.safetensors")
    plain, made = scene.sample(), []
    for classifier in (source, converted):
        patched, runs = apply_steering(scene.model, scene.steering(classifier=classifier, **PAPER))
        made.append(scene.sample(patched))
        records = runs.last.report.records
        assert {record.outcome for record in records} <= {"moved", "satisfied"}
        losses = [record.loss[0] for record in records if record.step == 0]
        assert losses[-1] < losses[0]
    assert not torch.equal(made[0], plain)
    assert torch.equal(made[0], made[1])


@pytest.mark.parametrize(("name", "backbone", "message"), [
    ("sd2.pth", "unet", "195 maps.*this model gives 14"), ("flux_dev.pth", "mmdit", "1368 maps of a FLUX model"),
])
def test_a_published_file_of_another_model_is_refused(tmp_path: Path, name: str, backbone: str, message: str):
    scene = Scene()
    steering = scene.steering(classifier=load_classifier(published(tmp_path, name, backbone)), **PAPER)
    with pytest.raises(ClassifierError, match=message):
        scene.sample(apply_steering(scene.model, steering)[0])
