"""Exports a trained small model to one safetensors file: weights in half precision, the training summary as metadata."""
from __future__ import annotations

import json
from pathlib import Path

import comfy.latent_formats
import torch
from learn_to_steer.files.writing import replace_file
from learn_to_steer.toyworld.config import FLUX_PREFIX, FORMAT, TEXT_CONFIG
from learn_to_steer.toyworld.latent import PatchTransform
from learn_to_steer.toyworld.text import WordTokenizer
from safetensors.torch import save


def export(name: str, weights: dict[str, torch.Tensor], transform: PatchTransform, tokenizer: WordTokenizer, path: Path,
           summary: dict) -> None:
    """Writes `weights`, whose names begin with `unet.` or `flux.` and `text.`, and the patch transform as `vae.`.

    FLUX weights get the prefix expected by the host's "Load Diffusion Model"; their latents get the host's scale and shift.
    """
    if name == "flux":
        weights = {FLUX_PREFIX + key[len("flux."):] if key.startswith("flux.") else key: value
                   for key, value in weights.items()}
        host = comfy.latent_formats.Flux()
        transform = transform.rescaled(host.scale_factor, host.shift_factor)
    tensors = {key: value.to(torch.float16).contiguous() for key, value in weights.items()}
    tensors |= {f"vae.{key}": value.float().contiguous() for key, value in transform.state_dict().items()}
    tensors["token_ids"] = torch.tensor(tokenizer.ids, dtype=torch.int32)
    metadata = {"format": FORMAT, "model": name, "text_config": json.dumps(TEXT_CONFIG),
                "training": json.dumps(summary)}
    replace_file(path, save(tensors, metadata))
