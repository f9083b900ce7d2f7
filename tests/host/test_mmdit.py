"""FLUX: recorded maps equal those of a plain, slow computation, and capture does not change the result."""
from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dev.standalone import load_pack

load_pack()

import comfy.ops  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.text_encoders.flux import FluxTokenizer  # noqa: E402
from learn_to_steer.host.backbones import UnsupportedModel, find_backbone  # noqa: E402
from learn_to_steer.host.backbones.mmdit import MMDiTBackbone  # noqa: E402
from learn_to_steer.host.tokens import TokenisedPrompt  # noqa: E402
from learn_to_steer.steering.attention import AttentionMaps, MapRecorder, WordColumns  # noqa: E402
from tiny import unet_patcher  # noqa: E402
from tiny_flux import FLUX_DEV, TINY_FLUX, Inputs, tiny_flux  # noqa: E402

WORDS = {"dog": (2,), "teddy bear": (4, 5)}
BLOCKS = ["double_block.0", "double_block.1", "single_block.0", "single_block.1"]


# --- the second computation: the whole network from its weights, in float64, full logits of every block -----------


def _linear(weights: dict, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _embed(weights: dict, name: str, value: Tensor) -> Tensor:
    return _linear(weights, f"{name}.out_layer", F.silu(_linear(weights, f"{name}.in_layer", value)))


def _waves(value: Tensor) -> Tensor:
    """Computed in float32, like the model: angles reach 3500, where rounding shifts the phase visibly."""
    angles = 1000 * value.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).double()


def _norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()


def _qkv(weights: dict, norm: str, x: Tensor) -> list[Tensor]:
    """[B, L, 3·256] → q, k, v [B, 2, L, 128]; q and k scaled to unit mean square."""
    q, k, v = x.reshape(*x.shape[:2], 3, 2, 128).permute(2, 0, 3, 1, 4)
    tiny = torch.finfo(torch.float32).eps
    q, k = (y / (y.pow(2).mean(-1, keepdim=True) + tiny).sqrt() * weights[f"{norm}.{kind}_norm.weight"]
            for y, kind in ((q, "query"), (k, "key")))
    return [q, k, v]


def _rotate(x: Tensor, ids: Tensor) -> Tensor:
    """Rotary embedding as complex numbers; ids: [L, 3]."""
    angles = torch.cat([ids[:, axis, None] / 10000 ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
                        for axis, width in enumerate((16, 56, 56))], dim=-1)
    turned = torch.view_as_complex(x.reshape(*x.shape[:-1], 64, 2)) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def _patches(x: Tensor, index: int) -> tuple[Tensor, Tensor]:
    x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="circular")
    batch, channels, h, w = x.shape
    tokens = x.reshape(batch, channels, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(batch, h * w // 4, -1)
    places = [(index, row, column) for row in range(h // 2) for column in range(w // 2)]
    return tokens, torch.tensor(places, dtype=torch.float64)


def plain_maps(network: Flux, inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """Per block the probabilities [B, heads, tokens, h, w] over the text tokens, and the velocity [B, 4, H, W]."""
    weights = {name: value.double() for name, value in network.state_dict().items()}
    pictures = [_patches(inputs.x.double(), 0)] + [_patches(r.double(), 1) for r in inputs.references or []]
    img, places = (torch.cat(parts, dim) for parts, dim in zip(zip(*pictures, strict=True), (1, 0), strict=True))
    grid, count = tuple(math.ceil(side / 2) for side in inputs.x.shape[-2:]), pictures[0][0].shape[1]
    img, txt = _linear(weights, "img_in", img), _linear(weights, "txt_in", inputs.context.double())
    text = txt.shape[1]
    ids = torch.cat([torch.zeros(text, 3, dtype=torch.float64), places])
    vec = _embed(weights, "time_in", _waves(inputs.sigma)) + _embed(weights, "vector_in", inputs.pooled.double())
    if network.params.guidance_embed:
        vec = vec + _embed(weights, "guidance_in", _waves(inputs.guidance))
    vec, maps = F.silu(vec)[:, None], []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = _rotate(q, ids) @ _rotate(k, ids).transpose(2, 3) / math.sqrt(128)
        own = logits[:, :, text:text + count, :text].softmax(-1)
        maps.append(own.transpose(2, 3).reshape(*own.shape[:2], text, *grid))
        return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)

    for block in (f"double_blocks.{i}" for i in range(network.params.depth)):
        mods = [_linear(weights, f"{block}.{s}_mod.lin", vec).chunk(6, -1) for s in ("txt", "img")]
        inner = [_norm(x) * (1 + m[1]) + m[0] for x, m in zip((txt, img), mods, strict=True)]
        parts = [_qkv(weights, f"{block}.{s}_attn.norm", _linear(weights, f"{block}.{s}_attn.qkv", x))
                 for s, x in zip(("txt", "img"), inner, strict=True)]
        out = attend(*(torch.cat(pair, dim=2) for pair in zip(*parts, strict=True)))
        streams = []
        for s, x, m, o in zip(("txt", "img"), (txt, img), mods, (out[:, :text], out[:, text:]), strict=True):
            x = x + m[2] * _linear(weights, f"{block}.{s}_attn.proj", o)
            inner = F.gelu(_linear(weights, f"{block}.{s}_mlp.0", _norm(x) * (1 + m[4]) + m[3]), approximate="tanh")
            streams.append(x + m[5] * _linear(weights, f"{block}.{s}_mlp.2", inner))
        txt, img = streams
    x = torch.cat([txt, img], dim=1)
    for block in (f"single_blocks.{i}" for i in range(network.params.depth_single_blocks)):
        shift, scale, gate = _linear(weights, f"{block}.modulation.lin", vec).chunk(3, -1)
        both = _linear(weights, f"{block}.linear1", _norm(x) * (1 + scale) + shift)
        out = attend(*_qkv(weights, f"{block}.norm", both[..., :768]))
        inner = F.gelu(both[..., 768:], approximate="tanh")
        x = x + gate * _linear(weights, f"{block}.linear2", torch.cat([out, inner], dim=-1))
    shift, scale = _linear(weights, "final_layer.adaLN_modulation.1", vec).chunk(2, -1)
    out = _linear(weights, "final_layer.linear", _norm(x[:, text:text + count]) * (1 + scale) + shift)
    out = out.reshape(len(out), *grid, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(len(out), 4, 2 * grid[0], 2 * grid[1])
    return maps, out[..., :inputs.x.shape[-2], :inputs.x.shape[-1]]


# --- tests --------------------------------------------------------------------------------------------------------


def capture(base, inputs: Inputs, words: dict = WORDS, options: dict | None = None, uuids: tuple = ("positive",),
            **extra) -> tuple[AttentionMaps, Tensor]:
    recorder = MapRecorder({"positive": WordColumns.build(words, inputs.context.shape[1])})
    options = {"uuids": list(uuids), **(options or {})}
    options = MMDiTBackbone().instrument(base.diffusion_model, options, recorder, recompute_blocks=False)
    with torch.inference_mode():
        output = inputs.run(base, options, **extra)
    return recorder.take(), output


@pytest.mark.parametrize("size, reference", [((8, 12), None), ((7, 9), None), ((1, 4), None), ((8, 6), (6, 10))])
@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_maps_equal_the_plain_computation(guidance, size, reference):
    base, inputs = tiny_flux(guidance), Inputs.random(size, batch=2, reference=reference)
    recorded, output = capture(base, inputs)
    expected, velocity = plain_maps(base.diffusion_model, inputs)
    denoised = inputs.x - 0.7 * velocity  # the plain network must be the host's, or its maps would prove nothing
    torch.testing.assert_close(output.double(), denoised, rtol=1e-4, atol=1e-4)

    assert [layer.name for layer in recorded.layers] == BLOCKS
    for layer, maps in zip(recorded.layers, expected, strict=True):
        words = torch.stack([maps[:, :, 2], (maps[:, :, 4] + maps[:, :, 5]) / 2], dim=2)
        assert layer.maps.shape == (2, 2, 2, math.ceil(size[0] / 2), math.ceil(size[1] / 2))
        torch.testing.assert_close(layer.maps.double(), words, rtol=0, atol=1e-5)


def test_channels_are_blocks_then_heads():
    recorded, _ = capture(tiny_flux(), Inputs.random((8, 8)))
    stack = recorded.stack(4)
    assert stack.shape == (1, 2, 8, 4, 4) and recorded.channels == 8
    for block, layer in enumerate(recorded.layers):
        for head in range(2):
            assert torch.equal(stack[0, 1, 2 * block + head], layer.maps[0, head, 1])


def test_flux_dev_has_1368_channels():
    network = Flux(**FLUX_DEV, device="meta", dtype=torch.bfloat16, operations=comfy.ops.disable_weight_init)
    backbone = find_backbone(network)
    assert backbone.name == "mmdit" and backbone.layers(network) == 57
    assert backbone.layers(network) * network.num_heads == 1368


@pytest.mark.parametrize("uuids", [("positive", "negative"), ("negative", "positive")])
def test_only_the_positive_half_of_a_batch_is_recorded(uuids):
    base, inputs = tiny_flux(), Inputs.random(batch=4)
    recorded, _ = capture(base, inputs, uuids=uuids)
    own = slice(2 * uuids.index("positive"), 2 * uuids.index("positive") + 2)
    for layer, maps in zip(recorded.layers, plain_maps(base.diffusion_model, inputs)[0], strict=True):
        torch.testing.assert_close(layer.maps[:, :, 0].double(), maps[own, :, 2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("tokens", [256, 512])
def test_words_are_found_among_t5_tokens(tokens):
    tokenizer = FluxTokenizer(tokenizer_data={"t5xxl_min_length": tokens})
    prompt = TokenisedPrompt.read("a photo of a dog to the right of a teddy bear", tokenizer)
    pieces = tokenizer.t5xxl.tokenizer.convert_ids_to_tokens(prompt.streams["t5xxl"])
    places = prompt.find("teddy bear", "t5xxl")
    assert len(pieces) == tokens and len(places) > 1
    assert "".join(pieces[place] for place in places) == "teddy▁bear"  # without the bare mark before it
    assert [pieces[place] for place in prompt.find("dog", "t5xxl")] == ["▁dog"]

    base, inputs = tiny_flux(), Inputs.random((6, 4), tokens=tokens)
    columns = prompt.columns(("dog", "teddy bear"), MMDiTBackbone.streams, tokens)
    words = {"dog": prompt.find("dog", "t5xxl"), "teddy bear": places}
    assert torch.equal(columns.weights, WordColumns.build(words, tokens).weights)
    recorded, _ = capture(base, inputs, words)
    for layer, maps in zip(recorded.layers, plain_maps(base.diffusion_model, inputs)[0], strict=True):
        torch.testing.assert_close(layer.maps[:, :, 1].double(), maps[:, :, list(places)].mean(2), rtol=0, atol=1e-5)


@pytest.mark.parametrize("reference", [None, (6, 10)])
def test_capture_changes_no_bit(reference):
    base, inputs = tiny_flux(), Inputs.random((7, 12), reference=reference)
    with torch.inference_mode():
        plain = inputs.run(base, {"uuids": ["positive"]})
    assert torch.equal(capture(base, inputs)[1], plain)


def test_other_packs_patches_are_called_as_before():
    calls = []

    def override(func, q, k, v, heads, *args, **kwargs):
        calls.append(("attention", kwargs["transformer_options"]["block_type"]))
        return func(q, k, v * 1.5, heads, *args, **kwargs)

    def replacement(args, extra):
        calls.append(("block", sorted(args)))
        out = extra["original_block"](args)
        return {**out, "img": out["img"] * 0.5}

    def around_network(executor, *args, **kwargs):
        calls.append(("network",))
        return executor(*args, **kwargs)

    options = {"optimized_attention_override": override, "uuids": ["positive"],
               "patches_replace": {"dit": {("double_block", 1): replacement, ("single_block", 0): replacement}},
               "wrappers": {"diffusion_model": {"other": [around_network]}}}
    base, inputs = tiny_flux(), Inputs.random()
    with torch.inference_mode():
        plain = inputs.run(base, options)
        untouched = inputs.run(base, {"uuids": ["positive"]})
    before, calls[:] = list(calls), []
    recorded, output = capture(base, inputs, options=options)
    assert calls == before and len(calls) == 4 + 2 + 1
    assert torch.equal(output, plain) and not torch.equal(output, untouched)
    assert [layer.name for layer in recorded.layers] == BLOCKS
    assert list(options["patches_replace"]["dit"]) == [("double_block", 1), ("single_block", 0)]
    assert list(options["wrappers"]["diffusion_model"]) == ["other"]


def test_two_recorders_on_one_model_both_record():
    base, inputs = tiny_flux(), Inputs.random()
    first = MapRecorder({"positive": WordColumns.build(WORDS, inputs.context.shape[1])})
    options = MMDiTBackbone().instrument(base.diffusion_model, {}, first, recompute_blocks=False)
    second, _ = capture(base, inputs, options=options)
    for one, other in zip(first.take().layers, second.layers, strict=True):
        assert one.name == other.name and torch.equal(one.maps, other.maps)


@pytest.mark.parametrize("change", [
    {"global_modulation": True, "txt_ids_dims": [3]}, {"txt_norm": True, "yak_mlp": True, "txt_ids_dims": [1, 2]},
    {"vec_in_dim": None, "txt_ids_dims": [1, 2]}], ids=["flux2", "ovis", "longcat"])
def test_relatives_of_flux_are_refused(change):
    network = Flux(**{**TINY_FLUX, **change}, device="meta", operations=comfy.ops.disable_weight_init)
    with pytest.raises(UnsupportedModel, match="Flux"):
        find_backbone(network)


def test_a_unet_is_not_taken_for_flux():
    assert not MMDiTBackbone().matches(unet_patcher().model.diffusion_model)
