"""Samples pictures from prompts with the host's sampler, without nodes or a server."""
from __future__ import annotations

from collections.abc import Sequence

import comfy.model_patcher
import comfy.sample
import comfy.sd
import torch

from .latent import LATENT_SIZE


def sample_latents(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, prompts: Sequence[str],
                   seeds: Sequence[int], cfg: float, steps: int = 25, sampler: str = "ddim",
                   scheduler: str = "ddim_uniform") -> torch.Tensor:
    """Latents [B, channels, 16, 16], one per prompt and seed, sampled as one batch.

    The noise of a picture equals that of the stock KSampler with the same seed and a batch of one.
    """
    channels = model.get_model_object("latent_format").latent_channels
    noise = torch.cat([comfy.sample.prepare_noise(torch.zeros(1, channels, LATENT_SIZE, LATENT_SIZE), seed)
                       for seed in seeds])
    positive, negative = _encode(clip, prompts), _encode(clip, [""])
    return comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive, negative,
                               torch.zeros_like(noise), disable_pbar=True, seed=seeds[0])


def _encode(clip: comfy.sd.CLIP, texts: Sequence[str]) -> list:
    """One CONDITIONING entry for the whole batch."""
    encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text))[0] for text in texts]
    pooled = torch.cat([details["pooled_output"] for _, details in encoded])
    return [[torch.cat([hidden for hidden, _ in encoded]), {"pooled_output": pooled}]]


def sample_pictures(model: comfy.model_patcher.ModelPatcher, clip: comfy.sd.CLIP, vae: comfy.sd.VAE,
                    prompts: Sequence[str], seeds: Sequence[int], cfg: float, **options) -> torch.Tensor:
    """Decoded `sample_latents`: pictures [B, 64, 64, 3] from 0 to 1."""
    with torch.inference_mode():
        return vae.decode(sample_latents(model, clip, prompts, seeds, cfg, **options)).clone()
