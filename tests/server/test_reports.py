"""The report of a run, as shown to a user of the real server."""
from __future__ import annotations

import pytest
from test_errors import failure, small_world

from dev.client import Client

SAMPLING = {"steps": 4, "cfg": 2.0, "sampler_name": "euler", "scheduler": "ddim_uniform", "positive": ["graph", 1],
            "negative": ["negative", 0], "latent_image": ["latent", 0]}
SETTINGS = ("start_percent", "end_percent", "step_size", "max_updates", "stop_probability", "update_rule", "relations_per_update",
            "save_memory")


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def patched(sampler: dict, **graph) -> dict:
    """The small world with Apply, a host sampler, and Steering Result."""
    prompt = small_world(**graph)
    settings = {name: prompt["sampler"]["inputs"][name] for name in SETTINGS}
    prompt["apply"] = node("LearnToSteerApply", model=["world", 0], graph=["graph", 0], classifier=["classifier", 0],
                           **{**settings, "stop_probability": 1.0})
    return {**prompt, "sampler": sampler, "result": node("LearnToSteerResult", steering=["apply", 1], samples=["sampler", 0]),
            "report": node("LearnToSteerReport", report=["result", 1])}


def changed(inputs: dict, **nodes) -> dict:
    """The small world with changed sampler inputs and additional nodes."""
    prompt = {**small_world(), **nodes}
    prompt["sampler"]["inputs"].update(inputs)
    return prompt


def test_two_steering_nodes_in_a_row(client: Client):
    prompt = patched(node("KSampler", model=["second", 0], seed=1, denoise=1.0, **SAMPLING))
    prompt["second"] = {**prompt["apply"], "inputs": {**prompt["apply"]["inputs"], "model": ["apply", 0]}}
    for text in (failure(client, prompt), failure(client, changed({"model": ["apply", 0]}, apply=prompt["apply"]))):
        assert "input 'model': this model is steered already" in text and "Take one of the two nodes out" in text


def test_a_gradient_of_0(client: Client):
    zeroed = changed({"positive": ["zero", 0]}, zero=node("ConditioningZeroOut", conditioning=["graph", 1]))
    masked = changed({"latent_image": ["masked", 0]}, mask=node("SolidMask", value=0.0, width=64, height=64),
                     masked=node("SetLatentNoiseMask", samples=["latent", 0], mask=["mask", 0]))
    for prompt in (zeroed, masked):
        text = client.run(prompt).text("report")
        assert text.startswith("WARNING: in 1 of 1 updates the gradient was 0, so steering had no effect"), text


def test_a_conditioning_that_is_active_too_late(client: Client):
    prompt = changed({"positive": ["both", 0]},
                     late=node("ConditioningSetTimestepRange", conditioning=["graph", 1], start=0.7, end=1.0),
                     other=node("CLIPTextEncode", clip=["world", 1], text="a dog"),
                     early=node("ConditioningSetTimestepRange", conditioning=["other", 0], start=0.0, end=0.7),
                     both=node("ConditioningCombine", conditioning_1=["late", 0], conditioning_2=["early", 0]))
    assert client.run(prompt).text("report").startswith("WARNING: nothing was steered in the one step")


def test_combined_conditionings(client: Client):
    prompt = changed({"positive": ["both", 0]}, other=node("CLIPTextEncode", clip=["world", 1], text="a cat"),
                     both=node("ConditioningCombine", conditioning_1=["other", 0], conditioning_2=["graph", 1]))
    assert "2 positive conditionings are active together" in client.run(prompt).text("report")


def test_token_places_in_the_second_input_of_concat(client: Client):
    prompt = changed({"positive": ["joined", 0]}, other=node("CLIPTextEncode", clip=["world", 1], text="a photo"),
                     joined=node("ConditioningConcat", conditioning_to=["other", 0], conditioning_from=["graph", 1]))
    text = failure(client, prompt)
    assert "Conditioning (Concat)" in text and "connect it to 'conditioning_to'" in text


def test_both_stages_are_reported(client: Client):
    """Stage 1 is steered, stage 2 has no step in the window."""
    stage = {**SAMPLING, "model": ["apply", 0], "noise_seed": 1}
    prompt = patched(node("KSamplerAdvanced", **{**stage, "latent_image": ["first", 0]}, add_noise="disable", start_at_step=2,
                          end_at_step=10000, return_with_leftover_noise="disable"))
    prompt["first"] = node("KSamplerAdvanced", **stage, add_noise="enable", start_at_step=0, end_at_step=2,
                           return_with_leftover_noise="enable")
    text = client.run(prompt).text("report")
    assert text.startswith("effect: 2 updates in 2 of 4 steps moved the latent") and "stage 2: not steered" in text


def test_denoise_0(client: Client):
    text = client.run(patched(node("KSampler", model=["apply", 0], seed=1, denoise=0.0, **SAMPLING))).text("report")
    assert text.startswith("effect: none, nothing was steered") and "is denoise 0?" in text
    other = patched(node("KSampler", model=["world", 0], seed=1, denoise=0.0, **SAMPLING))
    assert "no run of this model gave this latent" in failure(client, other)


def test_a_list_of_ten_latents(client: Client):
    prompt = patched(node("KSampler", model=["apply", 0], seed=1, denoise=1.0, **{**SAMPLING, "latent_image": ["list", 0]}))
    prompt["latent"]["inputs"]["batch_size"] = 10
    prompt["list"] = node("RebatchLatents", latents=["latent", 0], batch_size=1)
    text = client.run(prompt).text("report")
    assert text.count("effect: 2 updates") == 10


@pytest.mark.parametrize("with_picture", [True, False])
def test_an_overlay_without_a_relation(client: Client, with_picture: bool):
    picture = {"image": ["decoded", 0]} if with_picture else {}
    prompt = {**small_world(prompt="a photo of a dog", allow_no_relation=True),
              "decoded": node("VAEDecode", samples=["sampler", 0], vae=["world", 2]),
              "overlay": node("LearnToSteerOverlay", maps=["sampler", 1], steps="average", strength=0.6, **picture)}
    assert client.run(prompt).images("overlay")
