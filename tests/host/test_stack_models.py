"""Steering in the user's own stack: what other nodes do to a MODEL, above and below "Apply Spatial Steering"."""
from __future__ import annotations

import pytest
import torch
from comfy_extras.nodes_attention_multiply import UNetCrossAttentionMultiply
from comfy_extras.nodes_cfg import CFGNorm, CFGZeroStar
from comfy_extras.nodes_freelunch import FreeU, FreeU_V2
from comfy_extras.nodes_model_advanced import RescaleCFG
from comfy_extras.nodes_model_merging import ModelMergeSimple
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from conftest import Scene
from stack import STEPS, assert_steers, same
from test_gradient import ImagePrompt
from test_kontext import FluxScene

FLUX_SIZE = (8, 8)


@pytest.fixture(scope="module")
def flux() -> FluxScene:
    return FluxScene(references=())


def node(kind, *values):
    """From MODEL to MODEL, as the host's node makes it."""
    return lambda model: kind.execute(model, *values).args[0]


NODES = {
    "FreeU": node(FreeU, 1.1, 1.2, 0.9, 0.2), "FreeU_V2": node(FreeU_V2, 1.3, 1.4, 0.9, 0.2),
    "PAG": node(PerturbedAttentionGuidance, 3.0), "SAG": node(SelfAttentionGuidance, 0.5, 2.0),
    "NAG": node(NAGuidance, 5.0, 0.5, 1.5), "CFGNorm": node(CFGNorm, 0.7), "CFGZeroStar": node(CFGZeroStar),
    "cross-attention multiplied": node(UNetCrossAttentionMultiply, 1.2, 0.9, 1.1, 0.8),
    "RescaleCFG": lambda model: RescaleCFG().patch(model, 0.7)[0],
}


@pytest.mark.parametrize("name", NODES)
def test_a_node_of_the_host(scene: Scene, name: str):
    """Every second one stands below "Apply Spatial Steering"; recomputation takes turns with the place."""
    assert not torch.equal(scene.sample(NODES[name](scene.model), steps=STEPS), scene.sample(steps=STEPS))
    number = list(NODES).index(name)
    before, after = (same, NODES[name]) if number % 2 else (NODES[name], same)
    assert_steers(scene, before, after, recompute=(number % 4 < 2,))


def image_prompt(adapter: ImagePrompt):
    def patch(model):
        model = model.clone()
        for block in (("input", 1), ("middle", 0), ("output", 1)):
            model.set_model_attn2_replace(adapter, *block)
        return model
    return patch


@pytest.mark.parametrize("below", [False, True], ids=["above", "below"])
def test_an_image_prompt_adapter(scene: Scene, below: bool):
    """Its replacement of the cross-attention is called in a pass of steering as in one of sampling, and is differentiated."""
    with torch.inference_mode():
        adapter = ImagePrompt()
    assert not torch.equal(scene.sample(image_prompt(adapter)(scene.model), steps=STEPS), scene.sample(steps=STEPS))
    before, after = (same, image_prompt(adapter)) if below else (image_prompt(adapter), same)
    assert_steers(scene, before, after, recompute=(below,))


def test_merged_models():
    """The merge is patched into the weights when the model is loaded, and what is steered is the merged model."""
    scene, other = Scene(), Scene(seed=3)
    merged = lambda model: ModelMergeSimple().merge(model, other.model, 0.6)[0]  # noqa: E731
    with torch.inference_mode():
        latent = scene.sample(merged(scene.model), steps=STEPS)
    assert not torch.equal(latent, scene.sample(steps=STEPS)) and not torch.equal(latent, other.sample(steps=STEPS))
    before = {name: value.clone() for name, value in other.model.model.state_dict().items()}
    assert_steers(scene, merged)
    assert all(torch.equal(value, before[name]) for name, value in other.model.model.state_dict().items())


def test_normalised_attention_guidance_on_flux(flux: FluxScene):
    """The node reads the negative's rows, which a pass of steering does not have; it edits the attention's output in place."""
    assert_steers(flux, NODES["NAG"], recompute=(True,), size=FLUX_SIZE)
