"""Trains the small models: `python dev.py run -m dev.toyworld.train unet --minutes 60`.

Progress is printed and logged as JSON lines. A state file in the cache folder lets the same command resume where it stopped. The
averaged weights are exported every few minutes and at the end.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from learn_to_steer.host.saved_tensors import mutation_of_saved_tensors

from dev.standalone import prepare_host

prepare_host()

import comfy.latent_formats  # noqa: E402  (the host must be on the path first)
from learn_to_steer.toyworld.config import FLUX_PREFIX  # noqa: E402
from learn_to_steer.toyworld.latent import PatchTransform, fit_patch_transform  # noqa: E402
from learn_to_steer.toyworld.models import WEIGHTS, build_transform, part, read_summary, read_weights  # noqa: E402
from learn_to_steer.toyworld.text import WordTokenizer  # noqa: E402

from .export import export  # noqa: E402
from .recipes import Batch, FluxRecipe, UNetRecipe, draw_batch  # noqa: E402

MODELS = ("unet", "flux")
CACHE = Path(os.environ.get("LEARN_TO_STEER_CACHE", Path.home() / ".cache" / "learn-to-steer")) / "train"
BATCH = 64
SAVE_SECONDS = 150
LOG_STEPS = 20


@dataclass
class Clock:
    """Progress of a run towards its goal, which is `minutes` or `pictures`."""

    minutes: float | None
    pictures: int | None
    rate: float = 1.0
    step: int = 0
    seconds: float = 0.0

    @property
    def progress(self) -> float:
        """0 to 1."""
        if self.pictures is not None:
            return self.step * BATCH / self.pictures
        return self.seconds / (60 * self.minutes)

    def learning_rate(self) -> float:
        """Learning rate as a fraction of the recipe's peak, times `rate`.

        Warm-up over 200 steps, constant up to 40 % of the run, then a cosine down to 2 %.
        """
        rest = min(1.0, max(0.0, (self.progress - 0.4) / 0.6))
        warm = self.rate * min(1.0, (self.step + 1) / 200)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * rest)))


def build_recipe(name: str, tokenizer: WordTokenizer) -> UNetRecipe | FluxRecipe:
    """The recipe by name. FLUX uses the text transformer of the shipped UNet model."""
    if name == "unet":
        return UNetRecipe(tokenizer)
    weights = part(read_weights(WEIGHTS / "unet.safetensors", "unet"), "text.")
    return FluxRecipe(tokenizer, {key: value.float() for key, value in weights.items()})


def restore(recipe: UNetRecipe | FluxRecipe, path: Path) -> PatchTransform:
    """Loads an exported file's weights into the recipe. Returns the transform between pictures and training latents."""
    name, tensors = recipe.name, read_weights(path, recipe.name)
    weights = {f"{name}.{key}": value for key, value in
               part(tensors, FLUX_PREFIX if name == "flux" else f"{name}.").items()}
    weights |= {f"text.{key}": value for key, value in part(tensors, "text.").items()}
    recipe.modules.load_state_dict({key: value.float() for key, value in weights.items()})
    transform = build_transform(tensors)
    if name == "flux":
        host = comfy.latent_formats.Flux()
        transform = transform.restored(host.scale_factor, host.shift_factor)
    return transform


def loss_and_gradients(recipe: UNetRecipe | FluxRecipe, batch: Batch, generator: torch.Generator) -> float:
    """The loss of one batch. The gradients are left in the parameters."""
    with mutation_of_saved_tensors() if recipe.adds_in_place else nullcontext():
        loss = recipe.loss(batch, generator)
        loss.backward()
    return float(loss.detach())


class Run:
    """A training run: recipe, optimiser, averaged weights, and state on disk."""

    def __init__(self, name: str, clock: Clock, folder: Path, seed: int) -> None:
        torch.manual_seed(seed)
        self.clock, self.folder, self.seed = clock, folder, seed
        self.tokenizer = WordTokenizer()
        self.recipe = build_recipe(name, self.tokenizer)
        self.transform = fit_patch_transform(self.recipe.channels, self.recipe.deviation)
        self.parameters = [p for p in self.recipe.modules.parameters() if p.requires_grad]
        self.optimizers = self.recipe.optimizers()
        self.average = {key: value.detach().clone() for key, value in self.recipe.modules.state_dict().items()}
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.rng = np.random.default_rng(seed + 2)
        self.origin: dict | None = None  # training summary of the file that the run started from
        self.state_file, self.export_file = folder / "state.pt", folder / f"{name}.safetensors"
        folder.mkdir(parents=True, exist_ok=True)

    def step(self) -> float:
        started = time.monotonic()
        batch = draw_batch(self.rng, BATCH, self.recipe.layout, self.transform, self.tokenizer)
        self.recipe.modules.zero_grad(set_to_none=True)
        loss = loss_and_gradients(self.recipe, batch, self.generator)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, peak in zip(self.optimizers, self.recipe.peak_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * self.clock.learning_rate()
            optimizer.step()
        self.clock.step += 1
        decay = min(0.998, (1 + self.clock.step) / (10 + self.clock.step))
        state = self.recipe.modules.state_dict()
        torch._foreach_lerp_(list(self.average.values()), [state[key] for key in self.average], 1 - decay)
        self.clock.seconds += time.monotonic() - started
        return loss

    def save(self) -> None:
        """Writes state and export. Each is written to a temporary file and renamed, so that a kill leaves the old file whole."""
        state = {"modules": self.recipe.modules.state_dict(), "average": self.average,
                 "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                 "transform": self.transform.state_dict(), "generator": self.generator.get_state(),
                 "rng": self.rng.bit_generator.state, "step": self.clock.step, "seconds": self.clock.seconds,
                 "seed": self.seed, "origin": self.origin}
        temporary = self.state_file.with_suffix(".tmp")
        torch.save(state, temporary)
        temporary.replace(self.state_file)
        summary = {"seed": self.seed, "pictures": self.clock.step * BATCH, "minutes": round(self.clock.seconds / 60, 1),
                   "batch": BATCH, "threads": torch.get_num_threads(), **({"began_with": self.origin} if self.origin else {})}
        export(self.recipe.name, self.average, self.transform, self.tokenizer, self.export_file, summary)

    def start_from(self, path: Path) -> None:
        """Starts from an exported file of the same kind instead of random weights and a new transform.

        The file's latents are scaled to the recipe's deviation.
        """
        self.origin = read_summary(path)
        transform = restore(self.recipe, path)
        self.average = {key: value.detach().clone() for key, value in self.recipe.modules.state_dict().items()}
        latents = draw_batch(np.random.default_rng(0), 512, self.recipe.layout, transform, self.tokenizer).latents
        self.transform = transform.rescaled(float(latents.std()) / self.recipe.deviation, 0.0)

    def resume(self) -> bool:
        """Resumes from the state file. Returns whether there was one."""
        if not self.state_file.is_file():
            return False
        state = torch.load(self.state_file, weights_only=True)
        self.recipe.modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average = state["average"]
        self.transform.load_state_dict(state["transform"])
        self.generator.set_state(state["generator"])
        self.rng.bit_generator.state = state["rng"]
        self.clock.step, self.clock.seconds, self.seed = state["step"], state["seconds"], state["seed"]
        self.origin = state.get("origin")
        return True


def train(run: Run) -> None:
    clock, recent = run.clock, []
    saved = started = time.monotonic()
    first = clock.step
    while clock.progress < 1:
        recent.append(run.step())
        if clock.step % LOG_STEPS == 0:
            now = time.monotonic()
            rate = (clock.step - first) * BATCH / (now - started)
            line = {"step": clock.step, "pictures": clock.step * BATCH, "loss": round(sum(recent) / len(recent), 5),
                    "rate": round(clock.learning_rate(), 4), "pictures_per_second": round(rate, 1),
                    "minutes": round(clock.seconds / 60, 2)}
            recent = []
            with open(run.folder / "log.jsonl", "a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
            left = clock.seconds / max(clock.progress, 1e-6) * (1 - clock.progress) / 60
            filled = int(30 * min(1.0, clock.progress))
            sys.stdout.write(f"\r[{'#' * filled}{'.' * (30 - filled)}] {line['pictures']} pictures, {rate:.0f}/s, "
                             f"loss {line['loss']:.4f}, {left:.0f} min left ")
            sys.stdout.flush()
            if now - saved > SAVE_SECONDS:
                run.save()
                saved = now
    run.save()
    print(f"\nexported {run.export_file}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py run -m dev.toyworld.train", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--minutes", type=float, default=60, help="train this long in all (default 60)")
    goal.add_argument("--pictures", type=int, help="train on this many pictures in all (repeatable to the bit)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where state, log and exports go (default: in the cache folder)")
    parser.add_argument("--fresh", action="store_true", help="start anew although there is a state to go on from")
    parser.add_argument("--rate", type=float, default=1.0, help="learning rate as a share of the recipe's")
    parser.add_argument("--start", type=Path, metavar="FILE", help="begin with the weights of this exported file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = Clock(None if arguments.pictures else arguments.minutes, arguments.pictures, arguments.rate)
    run = Run(arguments.model, clock, arguments.folder or CACHE / arguments.model, arguments.seed)
    if not arguments.fresh and run.resume():
        print(f"going on at {clock.step * BATCH} pictures")
    elif arguments.start:
        run.start_from(arguments.start)
    train(run)


if __name__ == "__main__":
    main()
