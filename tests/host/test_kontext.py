"""FLUX with reference latents, pictures that are not square, and long T5 prompts.

The text encoder classes, nodes and sampler are the host's; the networks are tiny.
"""
from __future__ import annotations

import comfy.model_patcher
import comfy.sd
import node_helpers
import pytest
import torch
from comfy.supported_models_base import ClipTarget
from comfy.text_encoders.flux import FluxTokenizer, flux_clip
from comfy_extras.nodes_cond import T5TokenizerOptions
from comfy_extras.nodes_edit_model import ReferenceLatent
from conftest import PROMPT, Scene
from learn_to_steer.host.capturing import Capture
from learn_to_steer.host.patching import apply_capture
from learn_to_steer.host.tokens import CONDITIONING_KEY, encode_prompt
from test_gradient import assert_agree, check
from tiny import fill
from tiny_flux import tiny_flux

SIZE, REFERENCES = (12, 8), ((6, 10), (8, 4))
ENCODERS = {"t5xxl_model_config": {"num_layers": 1, "d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2},
            "clip_l_model_config": {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}}


def tiny_clip(tokens: int = 256) -> comfy.sd.CLIP:
    """The host's CLIP for FLUX with two small encoders. Prompts are padded to at least `tokens` tokens."""
    clip = comfy.sd.CLIP(ClipTarget(FluxTokenizer, flux_clip()), model_options=ENCODERS)
    fill(clip.cond_stage_model)
    return T5TokenizerOptions.execute(clip, 0, tokens).args[0]


class FluxScene(Scene):
    def __init__(self, prompt: str = PROMPT, tokens: int = 256, references=REFERENCES, method: str | None = None):
        super().__init__(prompt)
        with torch.inference_mode():
            cpu, clip = torch.device("cpu"), tiny_clip(tokens)
            self.model = comfy.model_patcher.ModelPatcher(tiny_flux(), load_device=cpu, offload_device=cpu)
            self.positive, self.negative = (
                node_helpers.conditioning_set_values(encode_prompt(clip, text), {"guidance": 3.5}) for text in (prompt, ""))
            for side in references:
                self.positive = ReferenceLatent.execute(self.positive, {"samples": torch.randn(1, 4, *side)}).args[0]
            if method is not None:
                self.positive = node_helpers.conditioning_set_values(self.positive, {"reference_latents_method": method})


def test_maps_are_those_of_the_attention_itself():
    """A host hook collects every q and k of the attention; full logits are then computed in float64."""
    scene, places = FluxScene(tokens=512), []
    prompt = scene.positive[0][1][CONDITIONING_KEY]
    assert scene.positive[0][0].shape[1] == 512
    words = [list(prompt.find(phrase, "t5xxl")) for phrase in ("dog", "teddy bear")]

    def collect(func, q, k, v, heads, *args, **rest):
        rows = SIZE[0] * SIZE[1] // 4
        assert q.shape[2] == 512 + rows + sum(h * w // 4 for h, w in REFERENCES)
        logits = q[:, :, 512:512 + rows].double() @ k[:, :, :512].double().transpose(2, 3) / q.shape[-1] ** 0.5
        places.append(torch.stack([logits.softmax(-1)[..., word].mean(-1) for word in words], dim=1).unflatten(-1, (6, 4)))
        return func(q, k, v, heads, *args, **rest)

    model = scene.model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = collect
    patched, runs = apply_capture(model, Capture(("dog", "teddy bear"), resolution=6, every=True))
    scene.sample(patched, steps=1, cfg=1.0, size=SIZE)
    expected = torch.cat(places, dim=2)  # blocks × heads
    every = runs.runs[0].maps.steps[0].every
    assert every.shape == expected.shape == (1, 2, 8, 6, 4)
    torch.testing.assert_close(every.double(), expected / expected.sum((-2, -1), keepdim=True), rtol=0, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("method", [None, "uxo"], ids=["offset", "uxo"])
def test_gradient_with_reference_latents(method: str | None, recompute: bool):
    assert_agree(check(FluxScene(method=method), recompute, size=SIZE)[0], 1e-3)


@pytest.mark.parametrize("tokens", [256, 512])
def test_words_of_a_t5_prompt(tokens: int):
    """A word of several tokens is averaged. A repeated word means its first occurrence unless "#2" follows."""
    text = "a photo of a brontosaurus above a dog, left of a dogfish and a dog"
    clip = tiny_clip(tokens)
    conditioning = encode_prompt(clip, text)
    prompt = conditioning[0][1][CONDITIONING_KEY]
    assert conditioning[0][0].shape[1] == len(prompt.streams["t5xxl"]) == tokens
    pieces = clip.tokenizer.t5xxl.tokenizer.convert_ids_to_tokens(prompt.streams["t5xxl"])
    dogs = [place for place, piece in enumerate(pieces) if piece == "▁dog"]
    assert len(dogs) == 3  # the middle one begins "dogfish"

    weights = prompt.columns(("brontosaurus", "dog", "dog#2"), ("t5xxl",), tokens).weights
    long, first, second = (row.nonzero().flatten().tolist() for row in weights)
    assert "".join(pieces[place] for place in long) == "brontosaurus" and len(long) > 1
    torch.testing.assert_close(weights[0, long], torch.full((len(long),), 1 / len(long)))
    assert (first, second) == ([dogs[0]], [dogs[2]]) and weights[1:].sum(1).tolist() == [1.0, 1.0]
