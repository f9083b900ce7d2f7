"""Measures a small model with the exact detector: `python dev.py run -m dev.toyworld.evaluate --prompts 200`."""
from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dev.standalone import prepare_host

prepare_host()

from learn_to_steer.toyworld.config import SAMPLING  # noqa: E402  (the host must be on the path first)
from learn_to_steer.toyworld.detector import detect, judge  # noqa: E402
from learn_to_steer.toyworld.models import LOADERS  # noqa: E402
from learn_to_steer.toyworld.sampling import sample_pictures  # noqa: E402
from learn_to_steer.toyworld.scenes import LAYOUTS, Layout, relation_parts, two_object_prompts  # noqa: E402

BATCH = 25


def measure(world: tuple, layout: Layout, count: int, split: str, cfg: float, **options) -> tuple[dict, torch.Tensor]:
    """Accuracies (0 to 1) over `count` two-object prompts, and the pictures [B, 64, 64, 3]. Picture k has seed k."""
    prompts = two_object_prompts(count, split, layout.nouns)
    pictures = []
    started = time.monotonic()
    for first in range(0, count, BATCH):
        part = prompts[first:first + BATCH]
        pictures.append(sample_pictures(*world, [prompt.text for prompt in part],
                                        list(range(first, first + len(part))), cfg, **options))
    seconds = time.monotonic() - started
    images = torch.cat(pictures)
    verdicts = []
    for prompt, found in zip(prompts, detect(images), strict=True):
        (subject, phrase, other), = prompt.relations
        verdicts.append(judge(found, subject, relation_parts(phrase), other))
    row = {"prompts": count, "split": split, "cfg": cfg, **options,
           "both_present": float(np.mean([verdict.both_present for verdict in verdicts])),
           "clean": float(np.mean([verdict.clean for verdict in verdicts])),
           "relation_correct": float(np.mean([verdict.relation for verdict in verdicts])),
           "exact": float(np.mean([verdict.exact for verdict in verdicts])),
           "seconds_per_picture": seconds / count}
    return row, images


def sheet(images: torch.Tensor, columns: int = 10, scale: int = 2) -> Image.Image:
    """A contact sheet of the first pictures."""
    shown = images[:len(images) // columns * columns] if len(images) >= columns else images
    columns = min(columns, len(shown))
    pixels = (shown.clamp(0, 1) * 255).round().byte().numpy()
    rows = [np.concatenate(list(pixels[k:k + columns]), axis=1) for k in range(0, len(pixels), columns)]
    picture = Image.fromarray(np.concatenate(rows, axis=0))
    return picture.resize((picture.width * scale, picture.height * scale), Image.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py run -m dev.toyworld.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(LOADERS), default="unet")
    parser.add_argument("--weights", type=Path, help="a file of toyworld.train (default: the shipped one)")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--split", choices=("tune", "report"), default="report")
    usual = "default: as in the workflows"
    parser.add_argument("--cfg", type=float, nargs="+", help=usual)
    parser.add_argument("--steps", type=int, help=usual)
    parser.add_argument("--sampler", help=usual)
    parser.add_argument("--scheduler", help=usual)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--sheet", type=Path, help="write the first 50 pictures of the last row here (PNG)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    world = LOADERS[arguments.model](arguments.weights)
    usual = SAMPLING[arguments.model]
    rows = []
    for cfg in arguments.cfg or [usual.cfg]:
        row, images = measure(world, LAYOUTS[arguments.model], arguments.prompts, arguments.split, cfg,
                              steps=arguments.steps or usual.steps, sampler=arguments.sampler or usual.sampler,
                              scheduler=arguments.scheduler or usual.scheduler)
        rows.append(row)
        print(json.dumps(row))
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": arguments.model, "rows": rows}, indent=1))
    if arguments.sheet:
        sheet(images[:50]).save(arguments.sheet)


if __name__ == "__main__":
    main()
