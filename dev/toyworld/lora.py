"""Trains a LoRA that teaches a small model an object it never saw.

    python dev.py run -m dev.toyworld.lora unet octopus --minutes 6 --save FILE

The file is an ordinary LoRA for the host's "Load LoRA". The base weights do not change.
"""
from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from dev.standalone import prepare_host

prepare_host()

from learn_to_steer.files.writing import replace_file  # noqa: E402
from learn_to_steer.toyworld.models import WEIGHTS  # noqa: E402
from learn_to_steer.toyworld.scenes import EXTRA_NOUNS  # noqa: E402
from learn_to_steer.toyworld.text import WordTokenizer  # noqa: E402
from safetensors.torch import save  # noqa: E402  (the host must be on the path first)
from torch import nn  # noqa: E402

from .recipes import draw_batch  # noqa: E402
from .train import MODELS, build_recipe, loss_and_gradients, restore  # noqa: E402

BATCH = 64
NEW_SHARE = 0.6
"""Share of scenes with the new object. The other scenes keep the model from forgetting the old objects."""
RATE = 2e-3


class LowRank(nn.Module):
    """Up and down matrices for the layers of `network` that the recipe calls `adaptable`. Up is initialised to 0."""

    def __init__(self, network: nn.Module, adaptable: Callable[[str, nn.Module], bool], rank: int) -> None:
        super().__init__()
        self.base = {f"{name}.weight": layer.weight for name, layer in network.named_modules() if adaptable(name, layer)}
        self.up = nn.ParameterList(torch.zeros(len(weight), rank) for weight in self.base.values())
        self.down = nn.ParameterList(torch.randn(rank, weight[0].numel()) * (rank * weight[0, 0].numel()) ** -0.5
                                     for weight in self.base.values())

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameter name -> base weight + up @ down."""
        return {name: weight + (up @ down).view_as(weight) for (name, weight), up, down in
                zip(self.base.items(), self.up, self.down, strict=True)}

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the LoRA file, in half precision. Without alpha keys, strength 1 in the host equals the trained LoRA."""
        found = {}
        for (name, weight), up, down in zip(self.base.items(), self.up, self.down, strict=True):
            layer = f"diffusion_model.{name.removesuffix('.weight')}"
            found[f"{layer}.lora_up.weight"] = up.detach().half().view(*up.shape, *(1,) * (weight.ndim - 2))
            found[f"{layer}.lora_down.weight"] = down.detach().half().view(-1, *weight.shape[1:])
        return found


class Adapted(nn.Module):
    """The network with the low-rank weights added; called like the network itself."""

    def __init__(self, network: nn.Module, low_rank: LowRank) -> None:
        super().__init__()
        self.network, self.low_rank = network, low_rank

    def forward(self, *arguments, **options) -> torch.Tensor:
        return torch.func.functional_call(self.network, self.low_rank.weights(), arguments, options)


def train(model: str, noun: str, minutes: float, rank: int, seed: int, weights: Path) -> dict[str, torch.Tensor]:
    """Trains for `minutes` on scenes, most of which show `noun`. Returns the LoRA's tensors."""
    torch.manual_seed(seed)
    tokenizer = WordTokenizer()
    recipe = build_recipe(model, tokenizer)
    transform = restore(recipe, weights)
    recipe.modules.requires_grad_(False)
    low_rank = LowRank(recipe.network, recipe.adaptable, rank)
    recipe.network = Adapted(recipe.network, low_rank)
    optimizer = torch.optim.AdamW(low_rank.parameters(), lr=RATE, betas=(0.9, 0.99), weight_decay=0.0)
    layout = replace(recipe.layout, nouns=(*recipe.layout.nouns, noun))
    generator, rng = torch.Generator().manual_seed(seed + 1), np.random.default_rng(seed + 2)
    began, step = time.monotonic(), 0
    while (progress := (time.monotonic() - began) / (60 * minutes)) < 1:
        batch = draw_batch(rng, BATCH, layout, transform, tokenizer, featured=noun, share=NEW_SHARE)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_and_gradients(recipe, batch, generator)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50, (1 - progress) / 0.5)
        optimizer.step()
        step += 1
        if step % 10 == 0:
            sys.stdout.write(f"\r{step * BATCH} pictures, loss {loss:.4f}, {100 * progress:.0f} % ")
            sys.stdout.flush()
    return low_rank.tensors()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py run -m dev.toyworld.lora", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("noun", choices=EXTRA_NOUNS)
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--weights", type=Path, help="the model to adapt (default: the shipped one)")
    parser.add_argument("--save", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    weights = arguments.weights or WEIGHTS / f"{arguments.model}.safetensors"
    tensors = train(arguments.model, arguments.noun, arguments.minutes, arguments.rank, arguments.seed, weights)
    arguments.save.parent.mkdir(parents=True, exist_ok=True)
    about = {"model": arguments.model, "object": arguments.noun, "rank": str(arguments.rank),
             "minutes": str(arguments.minutes), "seed": str(arguments.seed)}
    replace_file(arguments.save, save(tensors, about))
    print(f"\nsaved {arguments.save}")


if __name__ == "__main__":
    main()
