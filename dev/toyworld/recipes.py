"""Recipes: the architecture, the data and the loss of each small model. The training loop is in train.py."""
from __future__ import annotations

from dataclasses import dataclass

import comfy.ldm.flux.layers
import comfy.ldm.flux.model
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.model_management
import comfy.model_sampling
import comfy.ops
import numpy as np
import torch
from learn_to_steer.toyworld.config import (
    END,
    FLUX_CHANNELS,
    FLUX_CONFIG,
    FLUX_DEVIATION,
    FLUX_TOKENS,
    UNET_CHANNELS,
    UNET_CONFIG,
    UNET_DEVIATION,
    UNET_SAMPLING,
)
from learn_to_steer.toyworld.latent import PatchTransform
from learn_to_steer.toyworld.scenes import FLUX_LAYOUT, UNET_LAYOUT, Layout, random_scene
from learn_to_steer.toyworld.text import TextTransformer, WordTokenizer
from torch import nn

from .optimizers import split_optimizers

EMPTY_CAPTIONS = 0.1
"""Share of empty captions, for classifier-free guidance."""
DECIDING_STEPS, DECIDING_SHARE = (0.45, 0.9), 0.7
"""The part of the UNet's schedule that decides which objects appear, in fractions of it, and the share of noisy pictures drawn
from that part. The others are drawn from the whole schedule."""
FLUX_NOISE = 2.3
"""Mean of the logit of FLUX's times. The few objects are decided at high noise, so the mean is there."""


def mixed_precision() -> torch.autocast:
    """Uses bfloat16 if the CPU multiplies it in hardware. Emulated bfloat16 is far slower than fp32."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=fast_dtype() is torch.bfloat16)


def fast_dtype() -> torch.dtype:
    """The dtype in which this CPU multiplies matrices fastest."""
    able = torch.backends.cpu.get_cpu_capability().startswith(("AVX512", "AMX"))
    return torch.bfloat16 if able else torch.float32


@dataclass(frozen=True)
class Batch:
    """Latents [B, channels, 16, 16] and token rows [B, 77]."""

    latents: torch.Tensor
    rows: torch.Tensor


def draw_batch(rng: np.random.Generator, size: int, layout: Layout, transform: PatchTransform,
               tokenizer: WordTokenizer, featured: str | None = None, share: float = 0.0) -> Batch:
    """`size` random scenes. A `share` of them shows the `featured` noun; a tenth of the captions is empty."""
    scenes = []
    while len(scenes) < size:
        scene = random_scene(rng, layout=layout)
        if len(scenes) >= share * size or featured in {item.noun for item in scene.objects}:
            scenes.append(scene)
    captions = ["" if rng.random() < EMPTY_CAPTIONS else scene.caption for scene in scenes]
    pixels = torch.from_numpy(np.stack([scene.image for scene in scenes])).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return Batch(transform.encode(pixels), tokenizer.rows(captions))


def plain_attention(_func, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *_args,
                    skip_reshape: bool = False, **_kwargs) -> torch.Tensor:
    """Attention by two matrix products; on a CPU, at these sizes, twice as fast as the fused kernel in bfloat16.

    The signature is that of `transformer_options["optimized_attention_override"]`.
    """
    if not skip_reshape:
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


def initialise(module: nn.Module) -> None:
    """Applies PyTorch's initialisation, which `comfy.ops.disable_weight_init` skips, and enables gradients."""
    for layer in module.modules():
        for kind in (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm):
            if isinstance(layer, kind):
                kind.reset_parameters(layer)
    module.requires_grad_(True)


class UNetRecipe:
    """v-prediction on Stable Diffusion's noise schedule. The text transformer is trained together with the UNet."""

    name = "unet"
    layout = UNET_LAYOUT
    peak_rates = (1e-3, 1e-3)
    channels, deviation = UNET_CHANNELS, UNET_DEVIATION
    adds_in_place = False

    def __init__(self, tokenizer: WordTokenizer) -> None:
        self.network = openaimodel.UNetModel(**UNET_CONFIG, operations=comfy.ops.disable_weight_init)
        initialise(self.network)
        for layer in self.network.modules():
            if isinstance(layer, openaimodel.ResBlock):
                nn.init.zeros_(layer.out_layers[-1].weight)
        nn.init.zeros_(self.network.out[-1].weight)
        self.text = TextTransformer(len(tokenizer.ids))
        self.modules = nn.ModuleDict({"unet": self.network, "text": self.text})
        self.sigmas = comfy.model_sampling.ModelSamplingDiscrete(**UNET_SAMPLING).sigmas

    @staticmethod
    def adaptable(name: str, layer: nn.Module) -> bool:
        """Whether a LoRA adapts the layer: all but the first, the last, noise-level layers and attention output projections.

        A LoRA of the transformers' layers alone places an object but hardly learns its appearance.
        """
        outside = ("time_embed", "emb_layers", "input_blocks.0.0", "out.")  # also of "to_out.0"
        return isinstance(layer, (nn.Linear, nn.Conv2d)) and not any(part in name for part in outside)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        outside = ("embedding", "time_embed", "emb_layers", "unet.input_blocks.0.0", "unet.out.")
        return split_optimizers(self.modules, self.peak_rates, outside, fast_dtype())

    def loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        size = batch.latents.shape[0]
        strata = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        low, high = DECIDING_STEPS
        strata = torch.where(strata < DECIDING_SHARE, low + (high - low) * strata / DECIDING_SHARE,
                             (strata - DECIDING_SHARE) / (1 - DECIDING_SHARE))
        steps = (strata * len(self.sigmas)).long().clamp(max=len(self.sigmas) - 1)
        sigma = self.sigmas[steps].view(-1, 1, 1, 1)
        signal, spread = (sigma ** 2 + 1).rsqrt(), sigma * (sigma ** 2 + 1).rsqrt()
        noise = torch.randn(batch.latents.shape, generator=generator)
        noisy = signal * batch.latents + spread * noise
        velocity = signal * noise - spread * batch.latents
        with mixed_precision():
            context = self.text(batch.rows)
            options = {"optimized_attention_override": plain_attention}
            predicted = self.network(noisy, steps.float(), context=context, transformer_options=options)
        return (predicted.float() - velocity).square().mean()


class FluxRecipe:
    """Rectified flow with logit-normal times. The text transformer is that of the trained UNet model, frozen.

    Muon trains the block matrices; it needs about half as many pictures as AdamW.
    """

    name = "flux"
    layout = FLUX_LAYOUT
    peak_rates = (5e-3, 1.5e-3)
    channels, deviation = FLUX_CHANNELS, FLUX_DEVIATION
    adds_in_place = True  # the host's blocks do, on tensors that autograd keeps

    def __init__(self, tokenizer: WordTokenizer, text_weights: dict[str, torch.Tensor]) -> None:
        self.network = comfy.ldm.flux.model.Flux(**FLUX_CONFIG, operations=comfy.ops.disable_weight_init)
        initialise(self.network)
        for layer in self.network.modules():
            if isinstance(layer, comfy.ldm.flux.layers.Modulation):
                nn.init.zeros_(layer.lin.weight)
                nn.init.zeros_(layer.lin.bias)
        for layer in (self.network.final_layer.adaLN_modulation[1], self.network.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.text = TextTransformer(len(tokenizer.ids))
        self.text.load_state_dict(text_weights)
        self.text.requires_grad_(False)
        self.end = tokenizer.ids.index(END)
        self.modules = nn.ModuleDict({"flux": self.network, "text": self.text})

    @staticmethod
    def adaptable(name: str, layer: nn.Module) -> bool:
        """Whether a LoRA adapts the layer: block layers except modulation, and the text's input projection."""
        return isinstance(layer, nn.Linear) and (name == "txt_in" or "_blocks." in name and "mod" not in name)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        outside = ("mod", "img_in", "txt_in", "time_in", "vector_in", "final_layer")
        return split_optimizers(self.network, self.peak_rates, outside, fast_dtype())

    def loss(self, batch: Batch, generator: torch.Generator) -> torch.Tensor:
        size = batch.latents.shape[0]
        strata = (torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)) / size
        times = torch.sigmoid(torch.special.ndtri(strata.clamp(1e-4, 1 - 1e-4)) + FLUX_NOISE)
        share = times.view(-1, 1, 1, 1)
        noise = torch.randn(batch.latents.shape, generator=generator)
        noisy = (1 - share) * batch.latents + share * noise
        with torch.no_grad():
            hidden = self.text(batch.rows)
            first_end = (batch.rows == self.end).int().argmax(dim=1)
            pooled = hidden[torch.arange(size), first_end]
        training = comfy.model_management.in_training
        comfy.model_management.in_training = True  # the host's fast rotary embedding has no gradient
        try:
            with mixed_precision():
                predicted = self.network(noisy, times, hidden[:, :FLUX_TOKENS].clone(), y=pooled,
                                         transformer_options={"optimized_attention_override": plain_attention})
        finally:
            comfy.model_management.in_training = training
        return (predicted.float() - (noise - batch.latents)).square().mean()
