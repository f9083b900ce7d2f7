"""Teaches the small UNet an object it never saw, by a LoRA: `python -m toyworld.lora octopus --minutes 6 --save FILE`.

The file is an ordinary LoRA in the form that the host's "Load LoRA" reads. Base weights stay as they are.
"""
from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from standalone import prepare_host

prepare_host()

from safetensors.torch import save_file  # noqa: E402  (the host must be on the path first)
from torch import nn  # noqa: E402

from .models import WEIGHTS, build_transform, part, read_weights  # noqa: E402
from .recipes import UNetRecipe, draw_batch  # noqa: E402
from .scenes import EXTRA_NOUNS  # noqa: E402
from .text import WordTokenizer  # noqa: E402

BATCH = 64
NEW_SHARE = 0.6
"""Share of scenes with the new object; the others keep the old ones from being forgotten."""
RATE = 2e-3


class LowRank(nn.Module):
    """Up and down matrices for the linear layers of `unet`'s transformers and the convolutions of its residual blocks.

    Up begins at zero. Layers in the transformers alone place an object but hardly learn what it looks like.
    """

    def __init__(self, unet: nn.Module, rank: int) -> None:
        super().__init__()
        self.base = {f"{name}.weight": layer.weight for name, layer in unet.named_modules()
                     if isinstance(layer, nn.Linear) and "transformer_blocks" in name
                     or isinstance(layer, nn.Conv2d) and name.endswith(("in_layers.2", "out_layers.3"))}
        self.up = nn.ParameterList(torch.zeros(len(weight), rank) for weight in self.base.values())
        self.down = nn.ParameterList(torch.randn(rank, weight[0].numel()) * (rank * weight[0, 0].numel()) ** -0.5
                                     for weight in self.base.values())

    def weights(self) -> dict[str, torch.Tensor]:
        """By the UNet's parameter names: base weight plus up @ down."""
        return {name: weight + (up @ down).view_as(weight) for (name, weight), up, down in
                zip(self.base.items(), self.up, self.down, strict=True)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """In the host's file form, half precision; without alpha keys the host's strength 1 means what was trained."""
        found = {}
        for (name, weight), up, down in zip(self.base.items(), self.up, self.down, strict=True):
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            found[f"{layer}.lora_up.weight"] = up.detach().half().view(*up.shape, *(1,) * (weight.ndim - 2))
            found[f"{layer}.lora_down.weight"] = down.detach().half().view(-1, *weight.shape[1:])
        return found


class Adapted(nn.Module):
    """The UNet with the low-rank weights put in, called as the UNet itself."""

    def __init__(self, unet: nn.Module, low_rank: LowRank) -> None:
        super().__init__()
        self.unet, self.low_rank = unet, low_rank

    def forward(self, *arguments, **options) -> torch.Tensor:
        return torch.func.functional_call(self.unet, self.low_rank.weights(), arguments, options)


def train(noun: str, minutes: float, rank: int, seed: int, weights: Path) -> dict[str, torch.Tensor]:
    """The LoRA's tensors after `minutes` of training on scenes of which most show `noun`."""
    torch.manual_seed(seed)
    tensors = read_weights(weights, "unet")
    tokenizer = WordTokenizer()
    recipe = UNetRecipe(tokenizer)
    recipe.unet.load_state_dict({key: value.float() for key, value in part(tensors, "unet.").items()})
    recipe.text.load_state_dict({key: value.float() for key, value in part(tensors, "text.").items()})
    recipe.modules.requires_grad_(False)
    low_rank = LowRank(recipe.unet, rank)
    recipe.unet = Adapted(recipe.unet, low_rank)
    transform = build_transform(tensors)
    optimizer = torch.optim.AdamW(low_rank.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    layout = replace(recipe.layout, nouns=(*recipe.layout.nouns, noun))
    generator, rng = torch.Generator().manual_seed(seed + 1), np.random.default_rng(seed + 2)
    began, step = time.monotonic(), 0
    while (progress := (time.monotonic() - began) / (60 * minutes)) < 1:
        batch = draw_batch(rng, BATCH, layout, transform, tokenizer, featured=noun, share=NEW_SHARE)
        loss = recipe.loss(batch, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50, (1 - progress) / 0.5)
        optimizer.step()
        step += 1
        if step % 10 == 0:
            sys.stdout.write(f"\r{step * BATCH} pictures, loss {float(loss.detach()):.4f}, {100 * progress:.0f} % ")
            sys.stdout.flush()
    return low_rank.tensors()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m toyworld.lora", description=__doc__.splitlines()[0])
    parser.add_argument("noun", choices=EXTRA_NOUNS)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--weights", type=Path, default=WEIGHTS / "unet.safetensors", help="the model to adapt")
    parser.add_argument("--save", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tensors = train(arguments.noun, arguments.minutes, arguments.rank, arguments.seed, arguments.weights)
    arguments.save.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.save, metadata={"object": arguments.noun, "rank": str(arguments.rank),
                                                 "minutes": str(arguments.minutes), "seed": str(arguments.seed)})
    print(f"\nsaved {arguments.save}")


if __name__ == "__main__":
    main()
