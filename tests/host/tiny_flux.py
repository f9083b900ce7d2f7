"""A small FLUX of the host with random weights, for tests of structure."""
from __future__ import annotations

from dataclasses import dataclass, replace

import comfy.model_base
import comfy.supported_models
import torch
from tiny import fill
from torch import Tensor

from dev.benchmarks.passes import FLUX_DEV

TINY_FLUX = {
    **FLUX_DEV, "in_channels": 4, "out_channels": 4, "hidden_size": 256, "num_heads": 2, "context_in_dim": 32,
    "vec_in_dim": 16, "depth": 2, "depth_single_blocks": 2,
}


def tiny_flux(guidance: bool = True, dtype: torch.dtype = torch.float32, channels: int = 4) -> comfy.model_base.Flux:
    """The host's BaseModel over TINY_FLUX: dev with guidance, schnell without."""
    settings = {**TINY_FLUX, "guidance_embed": guidance, "dtype": dtype, "in_channels": channels, "out_channels": channels}
    config = comfy.supported_models.Flux(settings) if guidance else comfy.supported_models.FluxSchnell(settings)
    config.manual_cast_dtype = None
    base = config.get_model({}, device="cpu")
    fill(base.diffusion_model)
    return base


@dataclass(frozen=True)
class Inputs:
    """Arguments of `BaseModel.apply_model`. x: [B, 4, H, W]; context: [B, tokens, 32]; sigma, pooled: [B, …]."""

    x: Tensor
    sigma: Tensor
    context: Tensor
    pooled: Tensor
    guidance: Tensor
    references: list[Tensor] | None = None

    @staticmethod
    def random(size: tuple[int, int] = (8, 12), tokens: int = 7, batch: int = 1,
               reference: tuple[int, int] | None = None, dtype: torch.dtype = torch.float32) -> Inputs:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        return Inputs(draw(batch, 4, *size), torch.full((batch,), 0.7, dtype=dtype), draw(batch, tokens, 32),
                      draw(batch, 16), torch.full((batch,), 3.5, dtype=dtype),
                      None if reference is None else [draw(batch, 4, *reference)])

    def at(self, x: Tensor) -> Inputs:
        return replace(self, x=x)

    def run(self, base: comfy.model_base.Flux, options: dict, **extra) -> Tensor:
        if self.references is not None:
            extra["ref_latents"] = self.references
        return base.apply_model(self.x, self.sigma, c_crossattn=self.context, y=self.pooled, guidance=self.guidance,
                                transformer_options=options, **extra)
