"""Where a sampler run starts: the tensor of a LATENT, as the host's KSampler prepares it."""
from __future__ import annotations

import inspect
from collections.abc import Mapping

import comfy.sample
import torch

EMPTY_LATENT_RATIOS = tuple(name for name in inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
                            if name.startswith("downscale_ratio"))
"""Entries of an empty LATENT that this host takes into account. Each of its versions knows a few more than the last one."""


def starting_latent(model, latent: Mapping[str, object]) -> torch.Tensor:
    """The LATENT's samples; an empty one gets the channels and the size that the MODEL expects."""
    ratios = {name: latent.get(name) for name in EMPTY_LATENT_RATIOS}
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **ratios)
