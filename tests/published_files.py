"""Classifier files in the format of the paper's authors, and their logits.

Files follow the documented names and shapes (docs/method.md, "Published checkpoints" and "The classifier"). Logits are computed
with PyTorch's own transformer layer and attention. Nothing of the pack is used.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

RELATIONS = ("above", "below", "to the left of", "to the right of", "is")
TABLE_ROWS = 256


@dataclass(frozen=True)
class Shape:
    """Sizes of a published network. extractor: layers, heads, feed-forward width and heads of the aggregation; head: layers,
    heads, feed-forward width; mode: how the extractor uses the step, None where it does not."""

    extractor: tuple[int, int, int, int]
    head: tuple[int, int, int]
    width: int = 32
    mode: str | None = "mid"
    steps: int = 50


SD = Shape((2, 2, 128, 2), (2, 4, 128))
FLUX = Shape((4, 4, 512, 4), (4, 8, 512))
SHAPES = {"unet": SD, "mmdit": FLUX}
CELLS, STEP_WIDTH = 256, 16


def full_width(shape: Shape) -> Shape:
    return replace(shape, width=256)


def config(shape: Shape) -> dict:
    layers, heads, forward, aggregation = shape.extractor
    own_layers, own_heads, own_forward = shape.head
    return {"num_timesteps": shape.steps, "map_size": 16, "d_model": shape.width,
            "extractor": {"nhead": heads, "num_layers": layers, "dim_feedforward": forward, "layer_attn_nheads": aggregation,
                          "dropout": 0.3, "timestep_embedding": {"enable": shape.mode is not None, "mode": shape.mode or "mid"}},
            "classifier": {"mode": "transformer", "timestep_embedding_dim": STEP_WIDTH, "nhead": own_heads,
                           "num_layers": own_layers, "dim_feedforward": own_forward, "dropout": 0.3}}


def sinusoids(length: int, width: int) -> Tensor:
    """[1, length, width]: sine and cosine in turn."""
    angles = [[place / 10000 ** (2 * (entry // 2) / width) for entry in range(width)] for place in range(length)]
    return torch.tensor([[[math.cos(angle) if entry % 2 else math.sin(angle) for entry, angle in enumerate(row)]
                          for row in angles]])


def names_and_shapes(shape: Shape, relations: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all trained parameters."""
    d = shape.width

    def attention(name: str) -> dict:
        return {f"{name}.in_proj_weight": (3 * d, d), f"{name}.in_proj_bias": (3 * d,), f"{name}.out_proj.weight": (d, d),
                f"{name}.out_proj.bias": (d,)}

    def linear(name: str, inputs: int, outputs: int) -> dict:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name: str, size: int) -> dict:
        return {f"{name}.weight": (size,), f"{name}.bias": (size,)}

    def transformer(name: str, layers: int, forward: int) -> dict:
        found = {}
        for index in range(layers):
            layer = f"{name}.transformer.layers.{index}"
            found |= {**attention(f"{layer}.self_attn"), **linear(f"{layer}.linear1", d, forward),
                      **linear(f"{layer}.linear2", forward, d), **norm(f"{layer}.norm1", d), **norm(f"{layer}.norm2", d)}
        return found

    e, h = "object_extractor", "relation_classifier"
    return {
        **linear(f"{e}.input_projection", CELLS, d), f"{e}.timestep_embedding.weight": (shape.steps, d),
        **transformer(e, shape.extractor[0], shape.extractor[2]), f"{e}.query_vector": (1, 1, d),
        **attention(f"{e}.layer_attention"), **linear(f"{e}.output_projection", d, CELLS),
        f"{h}.timestep_embedding.weight": (shape.steps, STEP_WIDTH), **linear(f"{h}.projection", 2 * CELLS, d),
        **transformer(h, shape.head[0], shape.head[2]), **linear(f"{h}.fc.0", d + STEP_WIDTH, 256), **norm(f"{h}.fc.1", 256),
        **linear(f"{h}.fc.4", 256, 128), **norm(f"{h}.fc.5", 128), **linear(f"{h}.fc.8", 128, relations)}


def random_weights(shape: Shape, channels: int, relations: int = len(RELATIONS), seed: int = 0, contrast: float = 1.0
                   ) -> dict[str, Tensor]:
    """Random parameters, norms and biases included: with initial values, a swap would go unnoticed.

    contrast: factor on the first layer, as training makes it strong enough for maps whose cells are about 1/256.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, size in names_and_shapes(shape, relations).items():
        values = torch.randn(size, generator=generator)
        spread = size[-1] ** -0.5 if len(size) > 1 else 0.3
        weights[name] = values * spread + (1.0 if len(size) == 1 and name.endswith("weight") else 0.0)
    weights["object_extractor.input_projection.weight"] *= contrast
    weights["object_extractor.positional_encoding.pe"] = sinusoids(channels, shape.width)
    weights["relation_classifier.positional_encoding.pe"] = sinusoids(TABLE_ROWS, shape.width)
    return weights


def checkpoint(shape: Shape = SD, channels: int = 1368, weights: Mapping[str, Tensor] | None = None, **entries) -> dict:
    """A published checkpoint, as bytes written by `torch.save`."""
    return {"model_state_dict": dict(weights or random_weights(shape, channels)),
            "rel_name_to_idx": {name: index for index, name in enumerate(RELATIONS)},
            "idx_to_rel_name": dict(enumerate(RELATIONS)), "input_channels": channels, "config": config(shape),
            "training_config": {"timesteps": [5, 10, 15, 20, 25, 49], "num_timesteps": 50, "orig_map_size": 32}, **entries}


# --- the logits ---------------------------------------------------------------------------------------------------


def _filled(module: nn.Module, weights: Mapping[str, Tensor], name: str) -> nn.Module:
    own = {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
    module.load_state_dict(own)
    return module.to(next(iter(own.values())).dtype).eval()


def _layers(shape: Shape, sizes: tuple[int, ...], weights: Mapping[str, Tensor], name: str) -> list[nn.Module]:
    return [_filled(nn.TransformerEncoderLayer(shape.width, sizes[1], sizes[2], batch_first=True, norm_first=True), weights,
                    f"{name}.transformer.layers.{index}") for index in range(sizes[0])]


def _linear(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    return nn.functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def aggregated(maps: Tensor, step: int, shape: Shape, weights: Mapping[str, Tensor]) -> Tensor:
    """One object's stack [channels, 16, 16] -> [256]."""
    name = "object_extractor"
    x = _linear(maps.flatten(1), weights, f"{name}.input_projection") + weights[f"{name}.positional_encoding.pe"][0, :len(maps)]
    embedding = weights[f"{name}.timestep_embedding.weight"][step]
    x = x[None] + (embedding if shape.mode == "pre" else 0)
    for layer in _layers(shape, shape.extractor, weights, name):
        x = layer(x + embedding if shape.mode == "mid" else x)
    attention = nn.MultiheadAttention(shape.width, shape.extractor[3], batch_first=True)
    attention = _filled(attention, weights, f"{name}.layer_attention")
    pooled, _ = attention(weights[f"{name}.query_vector"].reshape(1, 1, -1), x, x)
    return _linear(pooled[0, 0], weights, f"{name}.output_projection")


def logits(subject: Tensor, object: Tensor, step: int, shape: Shape, weights: Mapping[str, Tensor]) -> Tensor:
    """Two stacks [channels, 16, 16] and the step index that the classifier is asked at -> [relations]."""
    name = "relation_classifier"
    both = torch.cat([aggregated(maps, step, shape, weights) for maps in (subject, object)])
    x = _linear(both, weights, f"{name}.projection") + weights[f"{name}.positional_encoding.pe"][0, 0]
    x = x[None, None]
    for layer in _layers(shape, shape.head, weights, name):
        x = layer(x)
    x = torch.cat([x[0, 0], weights[f"{name}.timestep_embedding.weight"][step]])
    for linear, norm in ((0, 1), (4, 5)):
        x = _linear(x, weights, f"{name}.fc.{linear}")
        x = nn.functional.layer_norm(x, x.shape, weights[f"{name}.fc.{norm}.weight"], weights[f"{name}.fc.{norm}.bias"])
        x = nn.functional.leaky_relu(x, 0.1)
    return _linear(x, weights, f"{name}.fc.8")
