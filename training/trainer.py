"""Trains the relation network on a dataset of maps, with the paper's optimiser, schedule and early stopping. Resumable.

The state is saved after each epoch. All randomness of an epoch derives from the seed and the epoch's number. A run that was
killed and resumed on the same machine, with the same number of threads, therefore ends with the same bits.
"""
from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..classifiers.checkpoint import save_classifier
from ..classifiers.learned import LearnedClassifier
from ..classifiers.network import RelationNetwork, paper_config
from ..files.writing import remove_partial_files, replace_file, write_json
from ..prompts.relations import RELATIONS, VERTICAL
from .data import Data, EpochResult, Item, check_splits, common_layout, read_split
from .dataset import RelationDataset
from .evaluation import Evaluation, evaluate, save_charts
from .shards import Sample
from .sources import SPLITS
from .storage import TrainingError, alone_in, read_json

CLASSIFIER_FILE = "classifier.safetensors"


@dataclass(frozen=True)
class TrainingSettings:
    """Training settings. The defaults are the paper's for Stable Diffusion.

    patience, factor, least_rate: of ReduceLROnPlateau.
    stop_after: training stops after this many epochs without a better validation loss.
    wrong_captions: also train on maps of wrong captions. Switched off, the evaluation shows how much the caption leaks.
    without_nouns: objects held out of training.
    mirror: flips each pair of maps at random, with its label. Augments small datasets; not in the paper.
    Raises TrainingError for values out of range.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    epochs: int = 150
    batch: int = 64
    patience: int = 5
    factor: float = 0.5
    least_rate: float = 1e-6
    stop_after: int = 10
    seed: int = 0
    wrong_captions: bool = True
    without_nouns: tuple[str, ...] = ()
    mirror: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name}: {getattr(self, name)} leaves nothing to train. Give 1 or more.")
        for name, least in (("learning_rate", "above 0"), ("weight_decay", "of 0 or more"), ("factor", "above 0"),
                            ("least_rate", "of 0 or more")):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and least == "above 0"):
                raise TrainingError(f"{name}: {value} is not usable. Give a number {least}.")

    @staticmethod
    def for_backbone(backbone: str, **changes) -> TrainingSettings:
        family = {"learning_rate": 5e-5, "epochs": 200} if backbone == "mmdit" else {}
        return TrainingSettings(**{**family, **changes})


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a run. epoch, batch: the current ones; history: results of the finished epochs."""

    epoch: int
    epochs: int
    batch: int
    batches: int
    history: Sequence[EpochResult]


def mirrored(subject_maps: Tensor, object_maps: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flips each pair of maps left to right and upside down and exchanges subject and object, each at random.

    subject_maps, object_maps: [B, channels, size, size]; truth: [B], indices into RELATIONS. Returns the same three, with the
    relations that hold after the flips.
    A model prefers certain positions for certain objects. Flipped maps lack that bias, so the classifier does not rely on it.
    """
    across, upright, exchanged = (torch.rand(3, len(truth)) < 0.5).to(truth.device).unbind()
    first, second = subject_maps, object_maps
    for flipped, axis in ((across, -1), (upright, -2)):
        where = flipped.view(-1, 1, 1, 1)
        first, second = (torch.where(where, maps.flip(axis), maps) for maps in (first, second))
    where = exchanged.view(-1, 1, 1, 1)
    first, second = torch.where(where, second, first), torch.where(where, first, second)
    sideways = truth >= len(VERTICAL)
    opposite = torch.where(sideways, across, upright) ^ exchanged
    return first, second, torch.where(opposite, truth ^ 1, truth)  # opposites are neighbours in RELATIONS


class TrainingRun:
    """A training run in a folder: plan.json, state.pt after each epoch and, at the end, classifier, charts, training.json."""

    def __init__(self, folder: Path, datasets: Sequence[RelationDataset], settings: TrainingSettings,
                 width: int | None = None, device: torch.device | str = "cpu", name: str = "") -> None:
        """width: width of the network (d_model), None for the paper's; name: the classifier's, default the folder's.

        Raises TrainingError where the datasets do not fit together or the folder holds another run.
        """
        self.folder, self.settings, self.device = folder, settings, torch.device(device)
        self.layout, self.steps, self.licence = common_layout(datasets)
        changes = {"d_model": width} if width else {}
        self.config = paper_config(self.layout.backbone, num_timesteps=self.steps.num_timesteps,
                                   map_size=self.layout.size, **changes)
        self.name = name or folder.name
        check_splits(datasets)
        self.data = {split: read_split(datasets, split, self.steps.timesteps) for split in SPLITS}
        nouns = {noun for data in self.data.values() for sample in data.samples for noun in (sample.subject, sample.object)}
        if unknown := set(settings.without_nouns) - nouns:
            raise TrainingError(f"Objects to hold out that no picture shows: {', '.join(sorted(unknown))}. The dataset has "
                                f"{', '.join(sorted(nouns)[:20])}{', and more' if len(nouns) > 20 else ''}.")
        self.chosen = {split: self._choose(self.data[split]) for split in ("train", "validation")}
        for split, items in self.chosen.items():
            if not items:
                raise TrainingError(f"The dataset has no samples to use in its {split} split. Build it with pictures "
                                    "for training and validation, or hold out fewer objects.")
        self.plan = json.loads(json.dumps({
            "datasets": [data.sha256 for data in datasets],
            "settings": asdict(settings), "network": self.config.to_dict()}))
        self.results: dict[str, Evaluation] = {}
        with torch.inference_mode(False):  # the host runs nodes in inference mode
            self.folder.mkdir(parents=True, exist_ok=True)
            with alone_in(self.folder):
                self._begin()

    def _choose(self, data: Data) -> list[Item]:
        def wanted(sample: Sample) -> bool:
            held_out = {sample.subject, sample.object} & set(self.settings.without_nouns)
            return not held_out and (self.settings.wrong_captions or not sample.is_wrong_caption)

        return [item for item in data.items() if wanted(data.samples[item.row])]

    def _begin(self) -> None:
        remove_partial_files(self.folder)
        plan = self.folder / "plan.json"
        if plan.exists() and read_json(plan) != self.plan:
            raise TrainingError(f"{self.folder} holds a training run with other data or settings. Choose another "
                                "folder, or delete this one.")
        write_json(plan, self.plan)
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            self.network = RelationNetwork(self.config, self.layout.channels, len(RELATIONS)).to(self.device)
        self._fit_first_layer()
        settings = self.settings
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=settings.learning_rate,
                                           weight_decay=settings.weight_decay)
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=settings.factor, patience=settings.patience, min_lr=settings.least_rate)
        self.history: list[EpochResult] = []
        self.best: dict[str, Tensor] = {}
        if (self.folder / "state.pt").exists():
            self._load()

    @torch.no_grad()
    def _fit_first_layer(self) -> None:
        """Scales the initial weights of the first layer so that its output on the data has deviation 1.

        Maps sum to 1, so a cell is about 1/256. With the usual initial weights the position codes would dominate, and the
        network would learn nothing for many epochs.
        """
        items = self.chosen["train"][::max(1, len(self.chosen["train"]) // 256)][:256]
        maps = torch.cat(self.data["train"].batch(items, self.device)[:2]).flatten(2)
        extractor = self.network.object_extractor
        layer = self.network.relation_classifier.projection if extractor is None else extractor.input_projection
        spread = (maps - maps.mean(dim=(0, 1))) @ (layer.weight.T if extractor is not None else
                                                   layer.weight[:, :maps.shape[2]].T)
        layer.weight.div_(spread.std().clamp_min(1e-8))

    @property
    def best_epoch(self) -> int:
        losses = [result.validation_loss for result in self.history]
        return losses.index(min(losses))

    @property
    def is_over(self) -> bool:
        return len(self.history) >= self.settings.epochs or (
            bool(self.history) and len(self.history) - 1 - self.best_epoch >= self.settings.stop_after)

    def run(self, on_progress: Callable[[TrainingProgress], None] = lambda progress: None) -> LearnedClassifier:
        """Trains to the end and writes the results.

        on_progress: called after each batch. An exception from it stops the run, which resumes from its last epoch.
        """
        with torch.inference_mode(False), torch.enable_grad(), alone_in(self.folder):
            while not self.is_over:
                self._epoch(on_progress)
                self._save()
            self.network.load_state_dict(self.best)
            return self._finish()

    def _epoch(self, on_progress: Callable[[TrainingProgress], None]) -> None:
        epoch, settings = len(self.history), self.settings
        items = self.chosen["train"]
        rate, losses = self.optimizer.param_groups[0]["lr"], []
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed * 1_000_003 + epoch + 1)
            order = torch.randperm(len(items)).split(settings.batch)
            self.network.train()
            for number, rows in enumerate(order, 1):
                first, second, steps, truth = self.data["train"].batch([items[row] for row in rows], self.device)
                if settings.mirror:
                    first, second, truth = mirrored(first, second, truth)
                loss = F.cross_entropy(self.network(first, second, steps), truth)
                if not loss.isfinite():
                    raise TrainingError(f"The loss is not finite in epoch {epoch + 1}, batch {number}. Train with a "
                                        "lower learning rate.")
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                losses.append(float(loss.detach()) * len(rows))
                on_progress(TrainingProgress(epoch, settings.epochs, number, len(order), self.history))
        self.network.eval()
        validation = evaluate(self.network, self.data["validation"], self.chosen["validation"], self.device)
        self.schedule.step(validation.loss)
        self.history.append(EpochResult(sum(losses) / len(items), validation.loss, validation.accuracy, rate))
        if self.best_epoch == epoch:
            self.best = {name: value.detach().clone() for name, value in self.network.state_dict().items()}

    def _save(self) -> None:
        state = {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict(), "best": self.best,
                 "schedule": self.schedule.state_dict(), "history": [asdict(result) for result in self.history]}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        replace_file(self.folder / "state.pt", buffer.getvalue())

    def _load(self) -> None:
        path = self.folder / "state.pt"
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.best = state["best"]
            self.history = [EpochResult(**result) for result in state["history"]]
        except Exception as error:  # torch documents no list of what it raises on damaged bytes
            raise TrainingError(f"{path} is damaged or cut off, so that the run cannot go on. Delete it, and the run begins "
                                "anew.") from error

    def _finish(self) -> LearnedClassifier:
        results = self.results = self._evaluate()
        best = self.history[self.best_epoch]
        summary = {"settings": asdict(self.settings), "epochs_trained": len(self.history),
                   "best_epoch": self.best_epoch + 1, "validation_loss": round(best.validation_loss, 5),
                   "samples": len({item.row for item in self.chosen["train"]}),
                   "results": {name: result.summary() for name, result in results.items()}}
        classifier = LearnedClassifier(self.network, RELATIONS, self.layout, self.steps, name=self.name,
                                       training=json.loads(json.dumps(summary)), licence=self.licence)
        save_charts(self.folder, self.history, self.best_epoch, results)
        write_json(self.folder / "training.json", {
            **self.plan, **summary, "history": [asdict(result) for result in self.history],
            "results": {name: result.to_dict() for name, result in results.items()}})
        save_classifier(self.folder / CLASSIFIER_FILE, classifier)
        return classifier

    def _evaluate(self) -> dict[str, Evaluation]:
        """Evaluates the best network on the test split (the validation split if there is no test split), on all captions.

        Items with held-out objects are evaluated separately.
        """
        self.network.eval()
        split = "test" if self.data["test"].samples else "validation"
        data, held_out = self.data[split], set(self.settings.without_nouns)
        groups: dict[str, list[Item]] = {split: [], f"{split}, held-out objects": []}
        for item in data.items():
            sample = data.samples[item.row]
            unknown = bool({sample.subject, sample.object} & held_out)
            groups[f"{split}, held-out objects" if unknown else split].append(item)
        return {name: evaluate(self.network, data, items, self.device) for name, items in groups.items() if items}
