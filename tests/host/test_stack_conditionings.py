"""Steering in the user's own stack: what stands on a CONDITIONING, and how prompts are written."""
from __future__ import annotations

from pathlib import Path

import comfy.gligen
import comfy.hooks
import comfy.sd
import comfy.sd1_clip
import comfy.utils
import pytest
import tiny
import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfy.supported_models_base import ClipTarget
from comfy_extras.nodes_hooks import ConditioningSetProperties, CreateHookKeyframe, SetHookKeyframes
from conftest import PROMPT, Scene, pack
from learn_to_steer.host.capturing import Capture
from learn_to_steer.host.patching import apply_capture
from learn_to_steer.host.tokens import encode_prompt
from learn_to_steer.prompts.graph import build_graph
from stack import STEPS, assert_steers

import nodes as host_nodes

# --- LoRA hooks ----------------------------------------------------------------------------------------------------


def lora_hook(model) -> comfy.hooks.HookGroup:
    """A LoRA of rank 2 on every second cross-attention's keys, as its file holds it."""
    generator, lora = torch.Generator().manual_seed(4), {}
    for name, value in model.model.state_dict().items():
        if name.endswith("attn2.to_k.weight"):
            layer = name.removesuffix(".weight")
            lora[f"{layer}.lora_up.weight"] = torch.randn(value.shape[0], 2, generator=generator) * 0.3
            lora[f"{layer}.lora_down.weight"] = torch.randn(2, value.shape[1], generator=generator) * 0.3
    assert lora
    return comfy.hooks.create_hook_lora(lora, 1.0, 0.0)


def with_hook(scene: Scene, hooks: comfy.hooks.HookGroup) -> list:
    return ConditioningSetProperties().set_properties(scene.positive, 1.0, "default", hooks=hooks)[0]


def scheduled(hooks: comfy.hooks.HookGroup) -> comfy.hooks.HookGroup:
    """Strength 0.2 in the first step, 1.5 from the second step on."""
    early = CreateHookKeyframe().create_hook_keyframe(0.2, 0.0)[0]
    later = CreateHookKeyframe().create_hook_keyframe(1.5, 0.2, early)[0]
    return SetHookKeyframes().set_hook_keyframes(hooks, later)[0]


@pytest.mark.parametrize("schedule", [lambda hooks: hooks, scheduled], ids=["constant", "scheduled"])
def test_a_lora_hook(schedule):
    """The host patches the weights for the hooked conditioning alone, in each step anew."""
    scene = Scene()
    with torch.inference_mode():
        positive = with_hook(scene, schedule(lora_hook(scene.model)))
        other = with_hook(scene, lora_hook(scene.model))
    latent = scene.sample(steps=STEPS, positive=positive)
    assert not torch.equal(latent, scene.sample(steps=STEPS))
    assert torch.equal(latent, scene.sample(steps=STEPS, positive=other)) == (schedule is not scheduled)
    assert_steers(scene, positive=positive)


# --- several conditionings, areas, masks -----------------------------------------------------------------------------


def second(**options) -> list:
    return tiny.conditioning(pack, "a green meadow", seed=5, **options)


@pytest.mark.parametrize("kind", ["both whole", "areas", "masks", "time ranges"])
def test_two_positive_conditionings(scene: Scene, kind: str):
    """The one that names the objects is followed, in its own area, while the other goes on shaping the picture."""
    mask = torch.zeros(1, 16, 16)
    mask[..., :10] = 1.0
    first, other = {
        "both whole": ({}, {}), "areas": ({"area": (16, 10, 0, 0), "strength": 1.0}, {"area": (16, 8, 0, 8), "strength": 0.7}),
        "masks": ({"mask": mask, "mask_strength": 1.0}, {"mask": 1 - mask, "mask_strength": 0.8}),
        "time ranges": ({"start_percent": 0.0, "end_percent": 0.6}, {"start_percent": 0.4, "end_percent": 1.0})}[kind]
    with torch.inference_mode():
        positive = second(**other) + tiny.conditioning(pack, PROMPT, **first)
    assert not torch.equal(scene.sample(steps=STEPS, positive=positive), scene.sample(steps=STEPS, positive=positive[1:]))
    assert_steers(scene, positive=positive, recompute=(kind == "areas",))


# --- GLIGEN --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gligen(scene: Scene, tmp_path: Path):
    """A GLIGEN file for the tiny UNet, read by the host."""
    widths = [part.attn1.to_q.weight.shape[1] for part in scene.model.model.diffusion_model.modules()
              if isinstance(part, BasicTransformerBlock)]
    positions = tiny.fill(comfy.gligen.PositionNet(768, 768)).state_dict()
    weights = {f"position_net.{name}": value for name, value in positions.items()}
    for number, width in enumerate(widths):
        fuser = tiny.fill(comfy.gligen.GatedSelfAttentionDense(width, 768, 8, width // 8), seed=number)
        fuser.alpha_attn.data.fill_(0.5)
        fuser.alpha_dense.data.fill_(0.5)
        weights.update({f"input_blocks.{number}.fuser.{name}": value for name, value in fuser.state_dict().items()})
    path = str(tmp_path / "gligen.safetensors")
    comfy.utils.save_torch_file({name: value.contiguous() for name, value in weights.items()}, path)
    with torch.inference_mode():
        return comfy.sd.load_gligen(path)


class Encoder:
    """Stands for a CLIP where a box's words are encoded."""

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens(self, tokens: str, return_pooled):
        return None, torch.randn(1, 768, generator=torch.Generator().manual_seed(len(tokens)))


def test_gligen_boxes(scene: Scene, gligen):
    """Another relation than the boxes say is followed; their layers are differentiated too."""
    with torch.inference_mode():
        positive = host_nodes.GLIGENTextBoxApply().append(scene.positive, Encoder(), gligen, "dog", 48, 64, 72, 32)[0]
        positive = host_nodes.GLIGENTextBoxApply().append(positive, Encoder(), gligen, "teddy bear", 48, 64, 0, 32)[0]
    assert not torch.allclose(scene.sample(steps=STEPS, positive=positive), scene.sample(steps=STEPS), atol=1e-3)
    assert_steers(scene, positive=positive)


# --- prompts -------------------------------------------------------------------------------------------------------


def tiny_clip(embeddings: Path) -> comfy.sd.CLIP:
    """The host's CLIP with its own tokenizer and a text transformer of width 32 with random weights."""
    config = {"hidden_act": "quick_gelu", "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 77,
              "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 49408, "eos_token_id": 49407,
              "layer_norm_eps": 1e-5, "projection_dim": 32}

    class Text(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 (as the host's)
            super().__init__(device=device, dtype=dtype, model_options=model_options, textmodel_json_config=dict(config),
                             return_projected_pooled=False)

    class Model(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 (as the host's)
            super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=Text)

    target = ClipTarget(comfy.sd1_clip.SD1Tokenizer, Model)
    clip = comfy.sd.CLIP(target, embedding_directory=str(embeddings), disable_dynamic=True)
    tiny.fill(clip.cond_stage_model)
    return clip


LONG = "a wide green field under a heavy grey sky in the rain, " * 7
PROMPTS = {
    # text: place of "dog" and of "teddy", counted by hand. The beginning is 0; "[" and "]" are tokens; LONG has 91 tokens, of
    # which 75 are in the first chunk, between its beginning and its end.
    "a photo of a (dog:1.3) to the left of a teddy bear": (5, 11),
    "a ((photo)) of a [dog] to the left of a (teddy bear:0.8)": (6, 13),
    "embedding:my_style, a photo of a dog to the left of a teddy bear": (9, 15),
    LONG + "a dog to the left of a teddy bear": (95, 101),
}


@pytest.mark.parametrize("text", PROMPTS, ids=["weights", "brackets", "embedding", "two chunks"])
def test_a_prompt(text: str, tmp_path: Path):
    """The word's maps are those of its own columns in the cross-attention, and steering follows them."""
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(9))
    torch.save({"string_to_param": {"*": vectors}}, tmp_path / "my_style.pt")
    scene, seen = Scene(), []
    with torch.inference_mode():
        clip = tiny_clip(tmp_path)
        scene.positive, scene.negative = (encode_prompt(clip, prompt) for prompt in (text, ""))
    scene.graph = build_graph(text, "dog | to the left of | teddy bear")

    def collect(q, k, v, extra_options):
        seen.append((q, k))
        return torch.nn.functional.scaled_dot_product_attention(*(
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))).transpose(1, 2).flatten(2)

    watched = scene.model.clone()
    watched.set_model_attn2_replace(collect, "middle", 0)
    patched, runs = apply_capture(watched, Capture(("dog", "teddy bear"), layers=("middle",), resolution=8))
    scene.sample(patched, steps=1, cfg=1.0)
    q, k = (part.unflatten(-1, (2, -1)).transpose(1, 2).double() for part in seen[0])
    shares = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)[0]
    dog, teddy = PROMPTS[text]
    words = torch.stack([shares[..., dog], shares[..., [teddy, teddy + 1]].mean(-1)])
    expected = (words / words.sum(-1, keepdim=True)).mean(1).unflatten(-1, (8, 8)).float()
    torch.testing.assert_close(runs.last.maps.steps[0].average[0], expected, rtol=1e-3, atol=1e-6)
    assert_steers(scene, recompute=(False,))
