"""Relation Classifier Loader: the user overrides a wrong guess of the file's backbone."""
from __future__ import annotations

from pathlib import Path

import published_files
import pytest
import torch
from conftest import Scene
from learn_to_steer.classifiers.base import ClassifierError
from learn_to_steer.classifiers.checkpoint import save_classifier
from learn_to_steer.classifiers.geometric import GeometricClassifier
from learn_to_steer.host.patching import apply_steering
from learn_to_steer.nodes import classifiers
from learn_to_steer.nodes.classifiers import RelationClassifierLoader


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(classifiers, "path_of", lambda name: tmp_path / name)
    return tmp_path


def load(*arguments: str):
    with torch.inference_mode():
        return RelationClassifierLoader.execute(*arguments).args[0]


def test_a_wrong_guess_names_the_input_that_puts_it_right(folder: Path, scene: Scene):
    torch.save(published_files.checkpoint(published_files.FLUX), folder / "mine.pth")  # as deep as FLUX's, trained on a UNet
    hint = "'mine'.*a FLUX model is a guess. If it is wrong, choose 'unet' as 'backbone' in Relation Classifier Loader"
    with pytest.raises(ClassifierError, match=hint):
        scene.sample(apply_steering(scene.model, scene.steering(load("mine.pth")))[0], steps=2)
    patched, runs = apply_steering(scene.model, scene.steering(load("mine.pth", "unet"), stop_probability=1.0, max_updates=1))
    scene.sample(patched, steps=2)
    assert [record.outcome for record in runs.last.report.records] == ["moved"]


def test_the_input_is_optional_and_does_not_touch_the_geometric_rule(folder: Path):
    entry = next(entry for entry in RelationClassifierLoader.define_schema().inputs if entry.id == "backbone")
    assert entry.optional and entry.advanced and entry.default == "from the file" and entry.options[1:] == ["unet", "mmdit"]
    for backbone in ("from the file", "unet", "mmdit"):
        assert load(classifiers.GEOMETRIC, backbone).layout.backbone is None
    save_classifier(folder / "rule.safetensors", GeometricClassifier(channel_weights=torch.ones(3), backbone="unet"))
    assert load("rule.safetensors").layout.backbone == "unet"
    with pytest.raises(ClassifierError, match="rule.safetensors: .*fixed. Leave them out .input 'backbone': \"from the file\""):
        load("rule.safetensors", "mmdit")
