"""Nodes that make a relation classifier for one model: dataset, training, saving."""
from __future__ import annotations

import os
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io, ui

from ..classifiers.checkpoint import load_classifier, save_classifier
from ..files.faults import shown
from ..files.names import fault_of_name
from ..host.backbones import find_backbone
from ..training.dataset import BuildProgress, RelationDataset, build_dataset
from ..training.evaluation import confusion_chart, loss_chart
from ..training.gqa import read_gqa
from ..training.inversion import InversionSettings, Inverter
from ..training.small_world import small_world_source
from ..training.sources import SPLITS, Quota, Source, read_folder
from ..training.trainer import TrainingProgress, TrainingRun, TrainingSettings
from .classifiers import FOLDER
from .types import CATEGORY, Classifier, check_numbers

TRAINING = f"{CATEGORY}/training"
Dataset = io.Custom("LTS_DATASET")
SOURCES = ("small world, drawn", "small world, generated", "folder with table", "GQA scene graphs")
check_interrupt = comfy.model_management.throw_exception_if_processing_interrupted


def _name(text: str, input_name: str, ending: str = "") -> str:
    """A plain file name. Raises ValueError where it would lead anywhere else, or where some system cannot have it."""
    if fault := fault_of_name(text, ending):
        raise ValueError(f"input '{input_name}': {shown(text)} {fault}.")
    return text


def _path(text: str, input_name: str) -> Path:
    """A path that the user typed; relative ones are in the host's input folder."""
    if not text.strip():
        raise ValueError(f"input '{input_name}': this source needs a path. Give one, absolute or relative to ComfyUI's "
                         "input folder.")
    path = Path(folder_paths.get_input_directory(), text.strip())
    try:
        there = path.exists()
    except (OSError, ValueError):  # no permission, a name that is too long, a character that no name has
        there = False
    if not there:
        raise ValueError(f"input '{input_name}': there is no {shown(str(path))}, or it cannot be read.")
    return path


def _output_folder(kind: str, name: str) -> Path:
    return Path(folder_paths.get_output_directory(), kind, name)


class RelationDatasetBuilder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def pictures(name: str, default: int, use: str) -> io.Input:
            return io.Int.Input(name, default=default, min=1, max=100000,
                                tooltip=f"Pictures per relation {use}, at most.")

        return io.Schema(
            node_id="LearnToSteerDatasetBuilder",
            display_name="Relation Dataset Builder",
            category=TRAINING,
            description="Makes the training data of a relation classifier: inverts labelled pictures with this model, each with "
                        "its true caption and with a wrong relation word, and keeps the attention maps of both objects. Takes "
                        "long; an interrupted run resumes when queued again.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the classifier is for."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Its VAE."),
                io.String.Input("name", default="relations", tooltip="Folder under output/relation_datasets."),
                io.Combo.Input("source", options=list(SOURCES), tooltip="Where the pictures come from. Those of the small world "
                               "need no files and are for the models of \"Load Small World\" only."),
                pictures("train_per_relation", 800, "for training"),
                pictures("validation_per_relation", 200, "to tell when to stop"),
                pictures("test_per_relation", 100, "to measure the result"),
                io.Int.Input("steps", default=50, min=2, max=1000, tooltip="Denoising steps of the inversion."),
                io.Int.Input("iterations", default=5, min=1, max=50, tooltip="Fixed-point iterations per step (UNets). Fewer are "
                             "faster and invert less exactly."),
                io.Int.Input("batch", default=4, min=1, max=64, tooltip="Pictures inverted together."),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, tooltip="Decides pictures, splits and wrong words."),
                io.String.Input("pictures", default="", tooltip="Folder of the picture files (folder, GQA)."),
                io.String.Input("table", default="", tooltip="CSV or JSON with file, subject, relation, object (folder), or the "
                                "scene graph file (GQA)."),
                io.String.Input("is_a_list", default="", advanced=True, tooltip="GQA: word list with one \"kind, broader kind\" "
                                "per line. Pictures that show both are left out. May be empty."),
                io.Int.Input("size", default=512, min=64, max=2048, step=8, advanced=True,
                             tooltip="Side of the pictures in pixels (folder, GQA)."),
                io.String.Input("licence", default="not stated", advanced=True,
                                tooltip="Terms of a folder's pictures. They are stored in the dataset and the classifier. GQA "
                                        "and the small world bring their own."),
            ],
            outputs=[Dataset.Output("dataset", display_name="dataset", tooltip="For \"Train Relation Classifier\"."),
                     io.String.Output("summary", display_name="summary",
                                      tooltip="Samples, mean PSNR and dropped pictures, per split.")],
        )

    @classmethod
    def execute(cls, model, clip, vae, name: str, steps: int, iterations: int, batch: int, seed: int, **pictures
                ) -> io.NodeOutput:
        folder = _output_folder("relation_datasets", _name(name, "name"))
        backbone = find_backbone(model.model.diffusion_model).name
        settings = InversionSettings.for_backbone(backbone, steps, iterations=iterations)
        bar = comfy.utils.ProgressBar(1)

        def show(progress: BuildProgress) -> None:
            check_interrupt()
            bar.update_absolute(progress.done, progress.total)

        manifest = build_dataset(folder, _source((model, clip, vae), seed, **pictures),
                                 Inverter(model, clip, vae, settings, check_interrupt), batch, seed, show)
        text = _summary(folder, manifest)
        return io.NodeOutput(RelationDataset(folder), text, ui=ui.PreviewText(text))


def _source(models: tuple, seed: int, source: str, train_per_relation: int, validation_per_relation: int,
            test_per_relation: int, pictures: str, table: str, is_a_list: str, size: int, licence: str) -> Source:
    counts = (train_per_relation, validation_per_relation, test_per_relation)
    per_relation = dict(zip(SPLITS, counts, strict=True))
    if source in SOURCES[:2]:
        return small_world_source(models, source == SOURCES[1], per_relation, seed)
    quota = Quota(per_relation, counts, seed)
    folder, listing = _path(pictures, "pictures"), _path(table, "table")
    if source == SOURCES[2]:
        return read_folder(folder, listing, size, quota, licence)
    return read_gqa(listing, folder, size, quota, _path(is_a_list, "is_a_list") if is_a_list.strip() else None)[0]


def _summary(folder: Path, manifest: dict) -> str:
    lines = [f"{folder}: {manifest['channels']} maps a word, licence: {manifest['licence']}"]
    for split, counts in manifest["splits"].items():
        dropped = ", ".join(f"{count} {reason}" for reason, count in counts["dropped"].items()) or "none"
        lines.append(f"{split}: {counts['samples']} samples of {counts['pictures']} pictures, PSNR "
                     f"{counts['psnr_mean']} dB; dropped: {dropped}")
    if names := manifest.get("unreadable"):
        lines.append(f"{len(names)} picture files could not be read: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''} "
                     "(manifest.json lists them)")
    return "\n".join(lines)


class TrainRelationClassifier(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        defaults = TrainingSettings()
        return io.Schema(
            node_id="LearnToSteerTrain",
            display_name="Train Relation Classifier",
            category=TRAINING,
            description="Trains the relation network on a dataset of attention maps. An interrupted run resumes from its last "
                        "epoch when queued again.",
            inputs=[
                Dataset.Input("dataset", tooltip="From \"Relation Dataset Builder\"."),
                io.String.Input("name", default="my_classifier", tooltip="Name of the classifier, and of the run's folder under "
                                "output/relation_training."),
                io.Float.Input("learning_rate", default=defaults.learning_rate, min=1e-7, max=0.1, step=1e-6,
                               round=False, tooltip="The paper: 0.0001 for Stable Diffusion, 0.00005 for FLUX."),
                io.Int.Input("epochs", default=defaults.epochs, min=1, max=10000, tooltip="At most; training stops earlier once "
                             "the validation loss no longer falls. The paper: 150 for SD1.4, 100 for SD2.1, 200 for FLUX."),
                io.Int.Input("batch", default=defaults.batch, min=1, max=4096, tooltip="Samples per step of the optimizer."),
                io.Int.Input("seed", default=0, min=0, max=2**31 - 1, tooltip="The same seed gives the same classifier."),
                io.Boolean.Input("wrong_captions", default=True, tooltip="Also train on wrong captions. Off: the classifier may "
                                 "learn to read the relation word instead of the layout; only for comparison."),
                io.String.Input("without_objects", default="", advanced=True, tooltip="Objects left out of training, separated "
                                "by commas. They are measured separately."),
                io.Int.Input("width", default=256, min=32, max=2048, step=32, advanced=True,
                             tooltip="Width of the network. The paper: 256."),
                io.Boolean.Input("mirror", default=False, advanced=True, optional=True,
                                 tooltip="Augments small datasets: flips maps and exchanges subject and object at random, "
                                         "with their labels. Not in the paper."),
            ],
            outputs=[
                Classifier.Output("classifier", display_name="classifier",
                                  tooltip="For the steering nodes and \"Save Relation Classifier\"."),
                io.Image.Output("loss", display_name="loss", tooltip="Training and validation loss over the epochs."),
                io.Image.Output("confusion", display_name="confusion", tooltip="Confusion matrix of the test split."),
                io.String.Output("summary", display_name="summary",
                                 tooltip="Accuracy on maps of true and of wrong captions."),
            ],
        )

    @classmethod
    def execute(cls, dataset: RelationDataset, name: str, learning_rate: float, epochs: int, batch: int, seed: int,
                wrong_captions: bool, without_objects: str, width: int, mirror: bool = False) -> io.NodeOutput:
        check_numbers(learning_rate=learning_rate)
        settings = TrainingSettings(
            learning_rate=learning_rate, epochs=epochs, batch=batch, seed=seed, wrong_captions=wrong_captions, mirror=mirror,
            without_nouns=tuple(noun.strip() for noun in without_objects.split(",") if noun.strip()))
        bar = comfy.utils.ProgressBar(1)

        def show(progress: TrainingProgress) -> None:
            check_interrupt()
            bar.update_absolute(progress.epoch * progress.batches + progress.batch, progress.epochs * progress.batches)

        run = TrainingRun(_output_folder("relation_training", _name(name, "name")), [dataset], settings, width,
                          comfy.model_management.get_torch_device(), name)
        classifier = run.run(show)
        title, result = next(iter(run.results.items()))
        loss, confusion = loss_chart(run.history, run.best_epoch), confusion_chart(title, result)
        text = "\n".join([f"best epoch {run.best_epoch + 1} of {len(run.history)}; curves and numbers in {run.folder}",
                          *(f"{key}: {', '.join(f'{k} {v}' for k, v in value.items())}"
                            for key, value in classifier.training["results"].items())])
        return io.NodeOutput(classifier, loss[None], confusion[None], text, ui=ui.PreviewText(text))


class SaveRelationClassifier(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerSaveClassifier",
            display_name="Save Relation Classifier",
            category=TRAINING,
            description="Writes a trained classifier to models/relation_classifiers, where \"Relation Classifier "
                        "Loader\" finds it.",
            inputs=[
                Classifier.Input("classifier", tooltip="From \"Train Relation Classifier\"."),
                io.String.Input("name", default="my_classifier", tooltip="File name without extension."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace an existing file."),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="The file that was written.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, classifier, name: str, overwrite: bool) -> io.NodeOutput:
        if not hasattr(classifier, "network") and classifier.channel_weights is None:
            raise ValueError(f"input 'classifier': {classifier.name} has no weights to save. Connect \"Train Relation "
                             "Classifier\".")
        folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
        path = folder / f"{_name(name, 'name', '.safetensors')}.safetensors"
        if path.exists() and not overwrite:
            raise ValueError(f"input 'name': {path} is there already. Choose another name, or switch 'overwrite' on.")
        os.makedirs(folder, exist_ok=True)
        save_classifier(path, classifier)
        load_classifier(path)  # what was written must be readable
        return io.NodeOutput(str(path), ui=ui.PreviewText(f"saved {path}"))


NODES = [RelationDatasetBuilder, TrainRelationClassifier, SaveRelationClassifier]
