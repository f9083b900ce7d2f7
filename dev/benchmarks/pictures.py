"""Makes the pictures of README and of the small world's workflows from the current weights and seeds.

    python dev.py demo && python dev.py run -m dev.benchmarks.pictures

README's picture is composed of the demonstration's files. The workflows' thumbnails are sampled here, without and with
steering. Check them by eye afterwards.
"""
from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dev.standalone import load_pack

load_pack()

from learn_to_steer.host.steering import Steering  # noqa: E402
from learn_to_steer.prompts.graph import build_graph  # noqa: E402
from learn_to_steer.steering.settings import SteeringSettings  # noqa: E402
from learn_to_steer.toyworld import models  # noqa: E402
from learn_to_steer.toyworld.config import SAMPLING, STEERING  # noqa: E402
from PIL import Image  # noqa: E402

from dev.workflows import small_world  # noqa: E402

from .accuracy import rule, sample_prompt  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
DEMO_PARTS = ("unsteered", "steered", "attention_steered", "probability")
HEIGHT, THUMBNAIL, GAP = 300, 320, 20
"""Height of README's picture, side of a thumbnail, and gap between two pictures, in pixels."""
THUMBNAILS = {"toyworld_steering": ("unet", small_world.PROMPT, small_world.SEED),
              "toyworld_multi_relation": ("unet", small_world.MULTI_PROMPT, small_world.MULTI_SEED),
              "toyworld_flux_steering": ("flux", small_world.PROMPT, small_world.FLUX_SEED)}
"""Workflow -> backbone, prompt and seed."""


def beside(pictures: list[Image.Image], gap: int) -> Image.Image:
    """Pictures of equal height in a row, on white."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    row, left = Image.new("RGB", (width, pictures[0].height), "white"), 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width + gap
    return row


def demo_picture(folder: Path) -> Image.Image:
    """README's picture, composed of the demonstration's files."""
    opened = [Image.open(folder / f"{name}.png").convert("RGB") for name in DEMO_PARTS]
    return beside([picture.resize((round(picture.width * HEIGHT / picture.height), HEIGHT), Image.LANCZOS)
                   for picture in opened], GAP // 2)


def thumbnail(backbone: str, prompt: str, seed: int) -> Image.Image:
    """The same prompt and seed without and with steering."""
    world, pictures = models.LOADERS[backbone](), []
    settings = SteeringSettings(**STEERING[backbone])
    for steering in (None, Steering(build_graph(prompt), rule(backbone), settings)):
        image = sample_prompt(world, prompt, seed, SAMPLING[backbone], steering).images[0]
        pixels = (image.clamp(0, 1) * 255).round().byte().numpy()
        pictures.append(Image.fromarray(pixels).resize((THUMBNAIL, THUMBNAIL), Image.NEAREST))
    return beside(pictures, GAP)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py run -m dev.benchmarks.pictures", description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, default=ROOT / "demo", help="folder of the demonstration's pictures")
    arguments = parser.parse_args()
    demo_picture(arguments.demo).save(ROOT / "docs" / "demo.png", optimize=True)
    with torch.inference_mode():
        for name, chosen in THUMBNAILS.items():
            thumbnail(*chosen).save(ROOT / "workflows" / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    main()
