"""The three training nodes, called in inference mode, as by the host."""
from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from dev.standalone import load_pack

load_pack()

import comfy.model_management  # noqa: E402  (the host must be on the path first)
import comfy.utils  # noqa: E402
import folder_paths  # noqa: E402
import tiny  # noqa: E402

nodes = importlib.import_module("learn_to_steer.nodes.training")
classifiers = importlib.import_module("learn_to_steer.nodes.classifiers")
geometric = importlib.import_module("learn_to_steer.classifiers.geometric")
models = importlib.import_module("learn_to_steer.toyworld.models")


@pytest.fixture(scope="module")
def world() -> tuple:
    with torch.inference_mode():
        return models.load_unet_world()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Redirects the host's output, input and classifier folders to a temporary folder."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, classifiers.FOLDER,
                        ([str(tmp_path / "classifiers")], {".safetensors"}))
    return tmp_path


def build(world: tuple, **changes):
    settings = {"name": "tiny", "source": nodes.SOURCES[0], "train_per_relation": 1, "validation_per_relation": 1,
                "test_per_relation": 1, "steps": 4, "iterations": 1, "batch": 4, "seed": 0, "pictures": "", "table": "",
                "is_a_list": "", "size": 64, "licence": ""}
    with torch.inference_mode():
        return nodes.RelationDatasetBuilder.execute(*world, **{**settings, **changes})


def train(dataset, **changes):
    settings = {"name": "learned", "learning_rate": 1e-3, "epochs": 2, "batch": 8, "seed": 0, "wrong_captions": True,
                "without_objects": "", "width": 32, "mirror": True}
    with torch.inference_mode():
        return nodes.TrainRelationClassifier.execute(dataset, **{**settings, **changes})


def test_dataset_training_and_file(world: tuple, folders: Path) -> None:
    dataset, summary = build(world).args
    assert "train: 8 samples of 4 pictures" in summary
    classifier, loss, confusion, text = train(dataset).args
    assert loss.ndim == confusion.ndim == 4 and "true caption" in text
    with torch.inference_mode():
        path, = nodes.SaveRelationClassifier.execute(classifier, "mine", False).args
        assert Path(path) == folders / "classifiers" / "mine.safetensors"
        with pytest.raises(ValueError, match="is there already"):
            nodes.SaveRelationClassifier.execute(classifier, "mine", False)
        loaded, = classifiers.RelationClassifierLoader.execute("mine.safetensors").args
    assert loaded.relations == classifier.relations
    maps = torch.rand(1, 22, 16, 16, requires_grad=True)
    loaded.logits(maps, torch.rand(1, 22, 16, 16), torch.tensor([0.1])).sum().backward()
    assert maps.grad.abs().sum() > 0


def test_queued_again_it_goes_on(world: tuple, folders: Path) -> None:
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        build(world)
    assert not (folders / "output" / "relation_datasets" / "tiny" / "manifest.json").exists()
    assert build(world).args[0].channels == 22


class Bar:
    """Replaces the host's progress bar: keeps the reports, and interrupts after some of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.reports: list[tuple[int, int]] = []
        self.stop_after = stop_after

    def __call__(self, total: int):
        return self

    def update_absolute(self, value: int, total: int) -> None:
        self.reports.append((value, total))
        if len(self.reports) == self.stop_after:
            comfy.model_management.interrupt_current_processing(True)


def test_progress_and_an_interrupt_in_the_midst_of_training(world: tuple, folders: Path, monkeypatch) -> None:
    building = Bar()
    monkeypatch.setattr(comfy.utils, "ProgressBar", building)
    dataset, _ = build(world).args
    assert building.reports == [(4, 12), (8, 12), (12, 12)]
    undisturbed = train(dataset, name="undisturbed", epochs=3, batch=8).args[0]
    per_epoch = 8 * 2 // 8  # 8 samples at 2 steps, 8 maps a batch
    monkeypatch.setattr(comfy.utils, "ProgressBar", Bar(stop_after=per_epoch + 1))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(dataset, epochs=3, batch=8)
    again = Bar()
    monkeypatch.setattr(comfy.utils, "ProgressBar", again)
    trained = train(dataset, epochs=3, batch=8).args[0]
    assert again.reports == [(number, 3 * per_epoch) for number in range(per_epoch + 1, 3 * per_epoch + 1)]
    for name, weight in undisturbed.network.state_dict().items():
        assert torch.equal(weight, trained.network.state_dict()[name]), name


@pytest.mark.parametrize(("changes", "message"), [
    ({"name": "../elsewhere"}, "input 'name'.*no plain name"),
    ({"name": "con"}, "input 'name'.*Windows keeps for itself"), ({"name": "x" * 256}, "input 'name'.*is too long"),
    ({"source": nodes.SOURCES[3], "pictures": "x" * 5000}, "input 'pictures': there is no"),
    ({"source": nodes.SOURCES[3], "pictures": "a\0b"}, "input 'pictures': there is no"),
    ({"source": nodes.SOURCES[2]}, "input 'pictures'.*needs a path"),
    ({"source": nodes.SOURCES[3], "pictures": "nowhere"}, "input 'pictures': there is no"),
])
def test_wrong_inputs_are_named(world: tuple, folders: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(world, **changes)


def test_the_small_worlds_pictures_are_for_its_own_models(world: tuple, folders: Path) -> None:
    with torch.inference_mode():
        another = tiny.unet_patcher()
    for source in nodes.SOURCES[:2]:
        with pytest.raises(ValueError, match="source: the small world's pictures are for its own models"):
            build((another, *world[1:]), source=source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_named_by_its_input(value: float) -> None:
    """JSON lets NaN pass, and so does the host's check of a widget's limits."""
    with pytest.raises(ValueError, match="input 'learning_rate': (nan|inf) is not a number"):
        train(None, learning_rate=value)
    steering, attention = (importlib.import_module(f"learn_to_steer.nodes.{name}") for name in ("steering", "attention"))
    settings = {"start_percent": 0.0, "end_percent": 0.5, "step_size": 2.5, "max_updates": 3, "stop_probability": 0.9,
                "update_rule": "normalised", "relations_per_update": "all", "save_memory": False, "compactness": 6.0}
    for name in [name for name, default in settings.items() if isinstance(default, float)]:
        with pytest.raises(ValueError, match=f"input '{name}': (nan|inf) is not a number"):
            steering.ApplySpatialSteering.execute(None, None, None, **{**settings, name: value})
    with pytest.raises(ValueError, match="input 'strength'"):
        attention.AttentionOverlay.execute(None, "", value)
    with pytest.raises(ValueError, match="input 'end_percent'"):
        attention.AttentionCapture.execute(None, "dog", 0.0, value, 16, "", False)
    relations = importlib.import_module("learn_to_steer.nodes.relations")
    with pytest.raises(ValueError, match="has the weight (nan|inf)"):
        relations.SpatialRelationNode.execute("dog", "above", "cat", value)


def test_the_only_relation_with_weight_0_is_said_to_steer_nothing(world: tuple) -> None:
    graph = importlib.import_module("learn_to_steer.nodes.relations").MultiRelationGraph
    with pytest.raises(ValueError, match="input 'relations': every relation has the weight 0, so nothing would be steered"):
        graph.execute(world[1], "a dog above a cat", "dog | above | cat | 0")
    for lines, allowed in (("dog | above | cat | 0", True), ("dog | above | cat | 0\ncat | below | dog", False)):
        assert graph.execute(world[1], "a dog above a cat", lines, allow_no_relation=allowed).args[0].relations


def test_no_epoch_is_an_error(world: tuple, folders: Path) -> None:
    with pytest.raises(ValueError, match="epochs: 0 leaves nothing to train"):
        train(build(world).args[0], epochs=0)


def test_a_classifier_without_weights_cannot_be_saved(folders: Path) -> None:
    with pytest.raises(ValueError, match="no weights to save"):
        nodes.SaveRelationClassifier.execute(geometric.GeometricClassifier(), "mine", False)
