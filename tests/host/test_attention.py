"""Recorded maps equal those of a plain, slow computation; their order and number; words among real tokens."""
from __future__ import annotations

import comfy.ops
import comfy.supported_models
import pytest
import tiny
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from conftest import Scene, pack
from learn_to_steer.host.backbones import UnsupportedModel, find_backbone
from learn_to_steer.host.capturing import Capture
from learn_to_steer.host.gradient import differentiable_attention
from learn_to_steer.host.patching import apply_capture
from learn_to_steer.host.tokens import TokenError, TokenisedPrompt
from learn_to_steer.steering.attention import AttentionMaps, LayerMaps, MapRecorder, WordColumns, word_maps

from dev.benchmarks.passes import SD21

SD15 = {**SD21, "num_heads": 8, "num_head_channels": -1, "context_dim": 768, "use_linear_in_transformer": False}


def slow_maps(q: torch.Tensor, k: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Attention maps, computed one row and one head at a time in float64."""
    batch, heads, rows, width = q.shape
    out = torch.zeros(batch, heads, len(weights), rows, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for r in range(rows):
                logits = torch.stack([(q[b, h, r].double() * key.double()).sum() / width**0.5 for key in k[b, h]])
                share = logits.exp() / logits.exp().sum()
                for w, row in enumerate(weights):
                    out[b, h, w, r] = sum(share[t] * row[t] for t in range(len(row)) if row[t])
    return out


def test_word_maps_equal_the_slow_computation(monkeypatch):
    q, k = torch.randn(2, 3, 12, 8), torch.randn(2, 3, 9, 8)
    weights = WordColumns.build({"dog": (2,), "teddy bear": (5, 6)}, 9).weights
    assert torch.allclose(word_maps(q, k, weights).double(), slow_maps(q, k, weights), atol=1e-5)
    monkeypatch.setattr(pack.steering.attention, "ROWS_TIMES_TOKENS", 100)  # in many pieces
    assert torch.allclose(word_maps(q, k, weights).double(), slow_maps(q, k, weights), atol=1e-5)


@pytest.mark.parametrize("piece", [2**24, 60])
def test_word_maps_gradient(monkeypatch, piece: int):
    monkeypatch.setattr(pack.steering.attention, "ROWS_TIMES_TOKENS", piece)
    q, k = (torch.randn(2, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (6, 5))
    weights = WordColumns.build({"a": (0,), "b": (2, 3)}, 5).weights.double()
    assert torch.autograd.gradcheck(lambda q, k: word_maps(q, k, weights), (q, k))


def test_captured_maps_are_those_of_the_attention_itself():
    """A host hook collects every q and k of the cross-attention; the maps are then computed slowly."""
    scene, seen = Scene(), []
    model = scene.model.clone()

    def collect(func, q, k, v, heads, **rest):
        if k.shape[1] == 77 and rest["transformer_options"]["cond_or_uncond"] == [0]:
            seen.append((q.clone(), k.clone(), heads))
        return func(q, k, v, heads, **rest)

    model.model_options["transformer_options"]["optimized_attention_override"] = collect
    patched, runs = apply_capture(model, Capture(("dog", "teddy bear"), resolution=16, every=True))
    scene.sample(patched, steps=1, cfg=1.0)
    step = runs.runs[0].maps.steps[0]
    prompt = scene.positive[0][1]["learn_to_steer_prompt"]
    weights = prompt.columns(("dog", "teddy bear"), ("l",), 77).weights
    layers = []
    for order, (q, k, heads) in enumerate(seen):
        maps = slow_maps(*(x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k)), weights)
        side = int(maps.shape[-1] ** 0.5)
        layers.append(LayerMaps(str(order), order, maps.reshape(*maps.shape[:3], side, side)))
    expected = AttentionMaps.collect(("dog", "teddy bear"), layers).stack(16, "always")
    assert step.every.shape == expected.shape
    assert torch.allclose(step.every.double(), expected, atol=1e-5)


@pytest.mark.parametrize(("settings", "config", "channels", "by_side"), [
    (SD21, comfy.supported_models.SD20, 195, {8: 20, 16: 100, 32: 50, 64: 25}),
    (SD15, comfy.supported_models.SD15, 128, {8: 8, 16: 40, 32: 40, 64: 40}),
], ids=["sd21", "sd15"])
def test_number_and_order_of_channels_at_real_width(settings, config, channels, by_side):
    """Only shapes matter, so the network runs on torch's meta device."""
    model_config = config({**settings, "dtype": torch.float32})
    model_config.unet_config.update(settings)
    with torch.device("meta"):

        network = UNetModel(**model_config.unet_config, operations=comfy.ops.disable_weight_init)
        backbone = find_backbone(network)
        columns = WordColumns(("dog",), torch.zeros(1, 77))
        recorder = MapRecorder({"id": columns})
        options = backbone.instrument(network, {
            "uuids": ["id"], "cond_or_uncond": [0], "optimized_attention_override": differentiable_attention}, recorder, False)
        with torch.no_grad():
            network(torch.zeros(1, 4, 64, 64), torch.zeros(1), context=torch.zeros(1, 77, settings["context_dim"]),
                    transformer_options=options)
        maps = recorder.take()
    assert maps.channels == channels
    assert backbone.layers(network) == len(maps.layers) == 16
    sides = [layer.maps.shape[-1] for layer in maps.layers]
    assert sides == sorted(sides)
    assert {side: sum(layer.maps.shape[1] for layer in maps.layers if layer.maps.shape[-1] == side) for side in set(sides)
            } == by_side
    for side in set(sides):
        orders = [layer.order for layer in maps.layers if layer.maps.shape[-1] == side]
        assert orders == sorted(orders)



def test_conditioning_repeated_by_the_host_gives_the_same_maps():
    """The host repeats the conditioning of a short prompt to the length of a longer negative prompt."""
    scene = Scene()
    with torch.inference_mode():
        scene.negative = tiny.conditioning(pack, "ugly, blurry, " * 20, seed=2)
    patched, runs = apply_capture(scene.model, Capture(("dog",)))
    scene.sample(patched, steps=1, cfg=3.0)
    both = runs.last.maps.steps[0].average
    scene.sample(patched, steps=1, cfg=1.0)
    assert torch.allclose(both, runs.last.maps.steps[0].average, atol=1e-5)


def test_maps_of_an_area_stand_where_the_area_is():
    scene = Scene()
    with torch.inference_mode():
        areas = [*tiny.conditioning(pack, "a photo of a dog", area=(8, 8, 8, 0)),
                 *tiny.conditioning(pack, "a photo of a dog", area=(8, 8, 0, 8))]
        plain = tiny.conditioning(pack, "a photo of a dog")
    patched, runs = apply_capture(scene.model, Capture(("dog",), every=True))
    scene.sample(patched, steps=1, positive=plain)
    whole = runs.last.maps
    scene.sample(patched, steps=1, positive=areas)  # the first area's: one conditioning is recorded
    record = runs.last.maps
    assert record.layers == whole.layers and record.steps[0].every.shape == whole.steps[0].every.shape
    maps = record.steps[0].average[0, 0]
    assert maps[8:, :8].sum() > 0.9 and maps[:7].sum() == 0 and maps[:, 9:].sum() == 0


def test_layers_and_windows_are_chosen():
    scene = Scene()
    patched, runs = apply_capture(scene.model, Capture(("dog",), start=0.4, end=0.8, layers=("middle",), resolution=8))
    scene.sample(patched, steps=5, size=(16, 24))
    record = runs.last.maps
    assert record.layers == ("middle.0.0",)
    assert [step.step for step in record.steps] == [2, 3]
    assert record.average().shape == (1, 1, 5, 8)


def test_an_unsupported_network_is_named():
    with pytest.raises(UnsupportedModel, match="input 'model'.*Linear.*supported: unet"):
        find_backbone(torch.nn.Linear(2, 2))


def clip_prompt(text: str) -> TokenisedPrompt:
    from comfy.sd1_clip import SD1Tokenizer
    return TokenisedPrompt.read(text, SD1Tokenizer())


def test_words_among_clip_tokens():
    prompt = clip_prompt("a (photo:1.2) of a Dog left of a teddy bear, a dog and a brontosaurus")
    assert prompt.find("dog", "l") == (5,)
    assert prompt.find("dog#2", "l") == (13,)
    assert prompt.find("teddy bear", "l") == (9, 10)
    assert len(prompt.find("brontosaurus", "l")) > 1
    weights = prompt.columns(("teddy bear",), ("l",), 77).weights
    assert weights[0, 9] == weights[0, 10] == 0.5 and weights.sum() == 1
    for phrase in ("cat", "dog#3", "bear teddy"):
        with pytest.raises(TokenError, match="input 'positive': the prompt .* does not contain"):
            prompt.find(phrase, "l")


def test_words_among_t5_tokens_end_where_a_word_ends():
    from comfy.text_encoders.flux import FluxTokenizer
    prompt = TokenisedPrompt.read("a dogfish above a dog, left of a Teddy Bear", FluxTokenizer())
    (place,) = prompt.find("dog", "t5xxl")
    assert place > prompt.find("above", "t5xxl")[0]
    assert prompt.find("teddy bear", "t5xxl")[0] > place


def test_words_in_the_second_chunk_and_in_sdxl_streams():
    from comfy.sdxl_clip import SDXLTokenizer
    long = "a green field, " * 30 + "a dog left of a cat"
    assert clip_prompt(long).find("dog", "l")[0] > 77
    prompt = TokenisedPrompt.read(long, SDXLTokenizer())
    assert prompt.find("dog", "g") == prompt.find("dog", "l")
