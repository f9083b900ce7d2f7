"""Converts a published checkpoint to this project's own format, or stores a classifier in half precision.

    python dev.py run -m learn_to_steer.classifiers.convert in.pth out.safetensors
    python dev.py run -m learn_to_steer.classifiers.convert in.safetensors out.safetensors --half
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from ..files.faults import FileFault
from ..files.writing import check_new_file, write_new_file
from .base import BACKBONES, ClassifierError
from .checkpoint import classifier_bytes, load_classifier
from .geometric import GeometricClassifier


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="learn_to_steer.classifiers.convert", description=__doc__.splitlines()[0])
    parser.add_argument("source", help="published checkpoint (.pth, .pt; code inside it is never run), or a .safetensors file")
    parser.add_argument("target", help="file to write (.safetensors)")
    parser.add_argument("--backbone", choices=BACKBONES,
                        help="kind of model it was trained on, where the file does not say it: unet (Stable "
                             "Diffusion) or mmdit (FLUX)")
    parser.add_argument("--relations", nargs="+", metavar="NAME",
                        help="names of the relations in the order of the logits, in place of the file's")
    parser.add_argument("--overwrite", action="store_true", help="replace the file to write, if it is there")
    parser.add_argument("--half", action="store_true", help="store the weights in half precision: half the size")
    given = parser.parse_args(arguments)
    if not given.target.endswith(".safetensors"):
        parser.error("the file to write must end in .safetensors")
    try:
        check_new_file(Path(given.target), given.overwrite)
        classifier = load_classifier(given.source, backbone=given.backbone, relations=given.relations)
        content = classifier_bytes(classifier, torch.float16 if given.half else torch.float32)
        write_new_file(Path(given.target), content, given.overwrite)
    except (ClassifierError, FileFault, OSError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    layout = classifier.layout
    steps = "" if isinstance(classifier, GeometricClassifier) else (
        f", steps {', '.join(map(str, classifier.steps.timesteps))} of {classifier.steps.num_timesteps}")
    print(f"{given.target}: {', '.join(classifier.relations)}; backbone {layout.backbone or 'any'}, "
          f"{layout.channels or 'any number of'} maps of {layout.size} x {layout.size}{steps}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
