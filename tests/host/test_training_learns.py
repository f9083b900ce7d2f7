"""Training learns the layout from maps with the scale of real ones: each sums to 1 over its cells."""
from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

captions, dataset, sources, storage, trainer = (importlib.import_module(f"learn_to_steer.training.{name}") for name in (
    "captions", "dataset", "sources", "storage", "trainer"))
SPOTS = {"above": (3, 8, 12, 8), "below": (12, 8, 3, 8), "to the left of": (8, 3, 8, 12), "to the right of": (8, 12, 8, 3)}
"""Row and column of the subject's spot, then of the object's."""


class Spots:
    """A source whose pictures encode their relation only."""

    licence = "CC0"

    def describe(self) -> dict:
        return {"kind": "spots"}

    def candidates(self) -> list:
        return [sources.Candidate(f"{split}-{number}", split, number)
                for split, count in (("train", 80), ("validation", 24), ("test", 8)) for number in range(count)]

    def open(self, wanted: list) -> list:
        return [sources.Example(item.picture, torch.full((4, 4, 3), (item.number % 4) / 4), "dog",
                                sources.RELATIONS[item.number % 4], "cat") for item in wanted]


class SpotMaps:
    """Maps with a weak spot in noise, whatever the caption says."""

    least_psnr = 20.0

    def describe(self) -> dict:
        return {"backbone": "unet", "size": 16, "normalise": "always", "steps": 10, "timesteps": [1, 4]}

    def invert(self, images: torch.Tensor, texts: list, seeds: list):
        made = []
        for image, seed in zip(images, seeds, strict=True):
            cells = torch.rand(2, 2, 6, 16, 16, generator=torch.Generator().manual_seed(seed))
            spots = SPOTS[sources.RELATIONS[round(float(image[0, 0, 0]) * 4)]]
            for word in (0, 1):
                row, column = spots[2 * word:2 * word + 2]
                cells[:, word, :, row - 1:row + 2, column - 1:column + 2] += 1.5
            made.append((cells / cells.sum((-1, -2), keepdim=True)).half())
        return captions.Inverted(torch.stack(made), torch.full((len(images),), 40.0))


@pytest.mark.parametrize("use_mean", [False, True])
def test_a_few_epochs_are_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use_mean: bool) -> None:
    network = importlib.import_module("learn_to_steer.classifiers.network")
    extractor = network.ExtractorConfig(use_mean=use_mean)
    monkeypatch.setattr(trainer, "paper_config",
                        lambda backbone, **changes: network.paper_config(backbone, extractor=extractor, **changes))
    dataset.build_dataset(tmp_path / "data", Spots(), SpotMaps(), batch=8)
    settings = trainer.TrainingSettings(epochs=6, batch=32, learning_rate=1e-3)
    run = trainer.TrainingRun(tmp_path / "run", [dataset.RelationDataset(tmp_path / "data")], settings, 64, name="spots")
    run.run()
    assert run.history[-1].validation_accuracy > 0.9


class OtherSplits(Spots):
    """The same pictures, some of them in another split."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def describe(self) -> dict:
        return {"kind": self.kind, "labels_sha256": self.kind}

    def candidates(self) -> list:
        return [sources.Candidate(f"p{number}", "test" if number % 3 == 0 else "train", number) for number in range(9)] + [
            sources.Candidate("v", "validation", 0)]


class Splits(OtherSplits):
    def candidates(self) -> list:
        return [sources.Candidate(f"p{number}", "train", number) for number in range(9)] + [
            sources.Candidate("v", "validation", 0)]


@pytest.mark.parametrize("kind", ["GQA scene graphs", "folder"])
def test_a_picture_on_two_sides_of_two_datasets_is_an_error(tmp_path: Path, kind: str) -> None:
    for name, source in (("a", Splits(kind)), ("b", OtherSplits(kind))):
        dataset.build_dataset(tmp_path / name, source, SpotMaps(), batch=8)
    pair = [dataset.RelationDataset(tmp_path / name) for name in ("a", "b")]
    with pytest.raises(storage.TrainingError, match="Picture 'p[036]' is for train in .*a and for test in .*b"):
        trainer.TrainingRun(tmp_path / "run", pair, trainer.TrainingSettings(epochs=1), 32)
    trainer.TrainingRun(tmp_path / "run", pair[:1], trainer.TrainingSettings(epochs=1), 32)


def test_tables_may_use_the_same_file_names_for_other_pictures(tmp_path: Path) -> None:
    first, second = Splits("folder"), OtherSplits("folder")
    second.describe = lambda: {"kind": "folder", "labels_sha256": "another table"}
    for name, source in (("a", first), ("b", second)):
        dataset.build_dataset(tmp_path / name, source, SpotMaps(), batch=8)
    trainer.check_splits([dataset.RelationDataset(tmp_path / name) for name in ("a", "b")])


def test_holding_out_what_no_picture_shows_is_an_error(tmp_path: Path) -> None:
    dataset.build_dataset(tmp_path / "data", Splits("folder"), SpotMaps(), batch=8)
    settings = trainer.TrainingSettings(epochs=1, without_nouns=("Dog",))
    with pytest.raises(storage.TrainingError, match="no picture shows: Dog. The dataset has cat, dog"):
        trainer.TrainingRun(tmp_path / "run", [dataset.RelationDataset(tmp_path / "data")], settings, 32)


class MixedMaps(SpotMaps):
    """Channels 0 and 3 show the spots, channel 2 shows them exchanged, the others show nothing."""

    def invert(self, images: torch.Tensor, texts: list, seeds: list):
        made = super().invert(images, texts, seeds)
        noise = torch.rand(made.maps.shape, generator=torch.Generator().manual_seed(seeds[0])) / 200
        noise[:, :, :, 2] = made.maps[:, :, [1, 0], 2].float()
        for channel in (0, 3):
            noise[:, :, :, channel] = made.maps[:, :, :, channel].float()
        return captions.Inverted((noise / noise.sum((-1, -2), keepdim=True)).half(), made.psnr)


def test_calibration_finds_the_channels_that_know_the_place(tmp_path: Path) -> None:
    dataset.build_dataset(tmp_path / "data", Spots(), MixedMaps(), batch=8)
    calibration = importlib.import_module("learn_to_steer.training.calibration")
    rule = calibration.calibrate([dataset.RelationDataset(tmp_path / "data")], "spots")
    assert (rule.channel_weights > 0.4).tolist() == [True, False, False, True, False, False]
    assert rule.channel_weights[2] == 0 and rule.channel_weights.sum() == pytest.approx(1)
    results = rule.training["results"]
    assert results["test"]["accuracy"] > 0.95 > results["test, all channels alike"]["accuracy"]
    assert rule.layout.channels == 6 and rule.layout.backbone == "unet" and rule.training["pictures"] == 80


def test_calibration_says_when_no_channel_knows() -> None:
    calibration = importlib.import_module("learn_to_steer.training.calibration")
    with pytest.raises(calibration.TrainingError, match="No channel is right more often than chance on 20 pictures"):
        calibration.channel_weights(torch.tensor([0.6, 0.5, 0.1]), 20)
