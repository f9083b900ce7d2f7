"""Types shared by training and evaluation: samples with their maps, batches, and the result of an epoch."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..classifiers.base import MapLayout
from ..classifiers.steps import StepMapping
from ..prompts.relations import RELATIONS
from .dataset import RelationDataset
from .shards import Sample
from .sources import SPLITS
from .storage import TrainingError


@dataclass(frozen=True)
class Item:
    """A sample at one of its recorded steps. row: index of the sample in its split; step: index into `timesteps`."""

    row: int
    step: int


@dataclass(frozen=True)
class Data:
    """The samples of one split and, per sample, its maps [steps, 2, channels, size, size]."""

    samples: list[Sample]
    maps: list[Tensor]
    timesteps: tuple[int, ...]

    def items(self) -> list[Item]:
        return [Item(row, step) for row in range(len(self.samples)) for step in range(len(self.timesteps))]

    def batch(self, items: Sequence[Item], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Subject maps, object maps [B, channels, size, size] fp32, step indices [B], relations [B]."""
        maps = torch.stack([self.maps[item.row][item.step] for item in items]).to(device).float()
        steps = torch.tensor([self.timesteps[item.step] for item in items], device=device)
        truth = torch.tensor([RELATIONS.index(self.samples[item.row].relation) for item in items], device=device)
        return maps[:, 0], maps[:, 1], steps, truth


@dataclass(frozen=True)
class EpochResult:
    """The result of one epoch. Losses are mean cross-entropies; rate: the epoch's learning rate."""

    train_loss: float
    validation_loss: float
    validation_accuracy: float
    rate: float


def common_layout(datasets: Sequence[RelationDataset]) -> tuple[MapLayout, StepMapping, str]:
    """Layout, steps and licences of datasets that are trained on together.

    Raises TrainingError where the datasets have no samples, or hold maps of different models, sizes or steps.
    """
    def kind(dataset: RelationDataset) -> tuple:
        maps = dataset.manifest["maps"]
        return (dataset.channels, maps["size"], maps["normalise"], maps["backbone"], tuple(maps["timesteps"]),
                maps["steps"])

    filled = [dataset for dataset in datasets if dataset.channels]
    if not filled:
        raise TrainingError("The dataset has no samples: all its pictures were dropped. Its manifest.json says why.")
    if len({kind(dataset) for dataset in filled}) > 1:
        raise TrainingError("These datasets hold maps of different models, sizes or steps: "
                            + ", ".join(str(dataset.folder) for dataset in filled) + ". Train on one kind.")
    channels, size, normalise, backbone, timesteps, steps = kind(filled[0])
    licences = dict.fromkeys(dataset.manifest["licence"] for dataset in filled)
    return MapLayout(size, normalise, channels, backbone), StepMapping(timesteps, steps), "; ".join(licences)


def check_splits(datasets: Sequence[RelationDataset]) -> None:
    """Raises TrainingError where a picture belongs to different splits in different datasets.

    The same name means the same picture in all datasets of one kind; for tables, only if the tables are equal. Within one
    dataset, its source keeps the splits apart.
    """
    if len(datasets) == 1:
        return
    known: dict[tuple, tuple[str, Path]] = {}
    for dataset in datasets:
        source = dataset.manifest["source"]
        table = source.get("labels_sha256", "") if source["kind"] == "folder" else ""
        for split in SPLITS:
            for picture in dataset.pictures(split):
                known_split, folder = known.setdefault((source["kind"], table, picture), (split, dataset.folder))
                if known_split != split:
                    raise TrainingError(f"Picture {picture!r} is for {known_split} in {folder} and for {split} in "
                                        f"{dataset.folder}. Build both with the same seed and with numbers per relation in the "
                                        "same proportion, or train on one of them.")


def read_split(datasets: Sequence[RelationDataset], split: str, timesteps: tuple[int, ...]) -> Data:
    samples: list[Sample] = []
    maps: list[Tensor] = []
    for dataset in datasets:
        more_samples, more_maps = dataset.read(split)
        samples += more_samples
        maps += more_maps
    return Data(samples, maps, timesteps)
