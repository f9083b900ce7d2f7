"""The switch "as in the paper" of the steering nodes, against the paper's table of settings."""
from __future__ import annotations

from types import SimpleNamespace

import comfy.supported_models
import pytest
import tiny
import torch
from conftest import Scene
from learn_to_steer.classifiers.geometric import GeometricClassifier
from learn_to_steer.nodes.settings import read_settings
from learn_to_steer.nodes.steering import ApplySpatialSteering, SpatialSteeringKSampler
from learn_to_steer.steering.settings import SteeringSettings
from tiny_flux import tiny_flux

OWN = {"start_percent": 0.0, "end_percent": 0.36, "step_size": 2.5, "max_updates": 3, "stop_probability": 0.99,
       "update_rule": "normalised", "relations_per_update": "all", "save_memory": False}
TABLE = {  # the paper's values: (step size, fraction of the schedule that is steered)
    "SD 1.4": (7.5, 0.5), "SD 2.1": (5.0, 0.5), "FLUX.1-dev": (5.0, 0.5), "FLUX.1-schnell": (5.0, 0.25)}
MODELS = {
    "SD 1.4": lambda: tiny.unet_patcher({"use_linear_in_transformer": False}, comfy.supported_models.SD15),
    "SD 2.1": tiny.unet_patcher,
    "FLUX.1-dev": lambda: SimpleNamespace(model=tiny_flux(guidance=True)),
    "FLUX.1-schnell": lambda: SimpleNamespace(model=tiny_flux(guidance=False)),
}


@pytest.mark.parametrize("save_memory", [False, True])
@pytest.mark.parametrize("name", TABLE)
def test_it_sets_what_the_paper_says_for_each_model(name: str, save_memory: bool):
    step_size, end = TABLE[name]
    settings = read_settings(MODELS[name](), **{**OWN, "save_memory": save_memory}, method="as in the paper")
    assert (settings.step_size, settings.start, settings.end, settings.recompute) == (step_size, 0.0, end, save_memory)
    assert (settings.update_rule, settings.relations_per_update) == ("raw gradient", "one")
    assert (settings.max_updates, settings.compactness) == (16, 0.0)
    assert settings.loss_targets == (1e-5, 3e-5, 5e-5, 7e-5)


def test_the_node_has_its_own_settings_unless_asked():
    assert read_settings(MODELS["SD 2.1"](), **OWN) == SteeringSettings()
    for node in (SpatialSteeringKSampler, ApplySpatialSteering):
        method = next(entry for entry in node.define_schema().inputs if entry.id == "method")
        assert method.optional and method.default == "settings of this node" and "as in the paper" in method.options


@pytest.mark.parametrize("off", [{"step_size": 0.0}, {"max_updates": 0}, {"end_percent": 0.0}])
def test_what_switches_steering_off_still_does(off: dict):
    assert read_settings(MODELS["SD 2.1"](), **{**OWN, **off}, method="as in the paper").is_off


def test_a_run_of_the_node(scene: Scene):
    with torch.inference_mode():
        report = SpatialSteeringKSampler.execute(
            scene.model, 1, 4, 3.0, "ddim", "ddim_uniform", scene.positive, scene.negative,
            {"samples": torch.zeros(1, 4, 16, 16)}, 1.0, scene.graph, GeometricClassifier(), **OWN,
            method="as in the paper").args[2]
    steps = [record.step for record in report.records]
    assert set(steps) == {0, 1} and max(steps.count(0), steps.count(1)) == 16
