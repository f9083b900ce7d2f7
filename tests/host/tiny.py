"""Small networks of the host with random weights, and conditionings with real tokens, for tests of structure."""
from __future__ import annotations

import uuid

import comfy.supported_models
import torch
from comfy.sd1_clip import SD1Tokenizer

from dev.benchmarks.passes import random_unet

TINY_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1, 2],
    "num_res_blocks": [1, 1], "transformer_depth": [1, 1], "transformer_depth_output": [1, 1, 1, 1],
    "transformer_depth_middle": 1, "num_heads": 2, "num_head_channels": -1, "context_dim": 32, "use_linear_in_transformer": True,
    "use_spatial_transformer": True, "legacy": False, "adm_in_channels": None, "use_temporal_attention": False,
}


def fill(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights: the host leaves them uninitialised."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        values = torch.randn(parameter.shape, generator=generator) * (1.2 / fan_in**0.5)
        if parameter.ndim == 1:
            values = values * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        parameter.data.copy_(values)
    return module


def unet_patcher(overrides: dict | None = None, config=comfy.supported_models.SD20, dtype=torch.float32, seed: int = 0):
    """A ModelPatcher over the host's UNet; `overrides` change TINY_UNET."""
    return random_unet({**TINY_UNET, **(overrides or {})}, config, dtype, lambda module: fill(module, seed))


def conditioning(pack, text: str, width: int = 32, batch: int = 1, seed: int = 1, **extra) -> list:
    """CONDITIONING with random embeddings of the real tokens of `text` (CLIP BPE)."""
    tokens = pack.host.tokens
    prompt = tokens.TokenisedPrompt.read(text, SD1Tokenizer())
    ids = prompt.streams["l"]
    table = torch.randn(49408, width, generator=torch.Generator().manual_seed(seed))
    embedding = table[list(ids)][None].repeat(batch, 1, 1)
    return [[embedding, {"pooled_output": None, tokens.CONDITIONING_KEY: prompt, "uuid": uuid.uuid4(), **extra}]]
