"""Weights that exist for comparison, in dev/benchmarks/weights: stored with 8 bits a number, or as training wrote them."""
from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from learn_to_steer.classifiers.checkpoint import load_classifier
from learn_to_steer.classifiers.learned import LearnedClassifier
from learn_to_steer.toyworld.packing import unpack
from safetensors import safe_open
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parent / "weights"


def load_compared(path: Path) -> LearnedClassifier:
    """The classifier in a file, packed or not. The pack's own loader reads an unpacked copy."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / path.name
        save_file(unpack(load_file(path)), plain, metadata)
        return load_classifier(plain)


def load_lora(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a LoRA, packed or not, as the host's LoRA loader takes them."""
    return unpack(load_file(path))
