"""The tensor that a sampler run starts from, prepared from a LATENT as the host's KSampler does it."""
from __future__ import annotations

import inspect
from collections.abc import Mapping

import comfy.sample
import torch

EMPTY_LATENT_RATIOS = tuple(name for name in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
                            if name.startswith("downscale_ratio"))
"""Entries of an empty LATENT that this host reads. Newer hosts read more of them."""


def starting_latent(model, latent: Mapping[str, object]) -> torch.Tensor:
    """The LATENT's samples. An empty latent is resized to the channels and the size that the MODEL expects."""
    ratios = {name: latent.get(name) for name in EMPTY_LATENT_RATIOS}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
