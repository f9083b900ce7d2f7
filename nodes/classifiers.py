"""The node that loads a relation classifier, and the folder that it reads."""
from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..classifiers.base import BACKBONES
from ..classifiers.checkpoint import load_classifier
from ..classifiers.geometric import GeometricClassifier
from .types import CATEGORY, Classifier

FOLDER = "relation_classifiers"
SUFFIXES = {".safetensors", ".pth", ".pt"}
GEOMETRIC = "geometric (built in)"
FROM_FILE = "from the file"
SHIPPED = Path(__file__).parent.parent / "classifiers" / "weights"


def register_model_folders() -> None:
    """Makes models/relation_classifiers known to the host, beside folders that the user configured."""
    folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER), is_default=True)
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | SUFFIXES)


def shipped() -> dict[str, Path]:
    return {f"{path.stem} (shipped)": path for path in sorted(SHIPPED.glob("*.safetensors"))}


def path_of(name: str) -> Path:
    return shipped().get(name) or Path(folder_paths.get_full_path_or_raise(FOLDER, name))


class RelationClassifierLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [name for name in folder_paths.get_filename_list(FOLDER) if Path(name).suffix.lower() in SUFFIXES]
        return io.Schema(
            node_id="LearnToSteerClassifierLoader",
            display_name="Relation Classifier Loader",
            category=CATEGORY,
            description="Loads the classifier that judges relations from attention maps: the built-in geometric one, which works "
                        "with every supported model, or one trained for one model (models/relation_classifiers).",
            inputs=[io.Combo.Input("classifier_name", options=[GEOMETRIC, *shipped(), *files], default=GEOMETRIC,
                                   tooltip="The geometric classifier needs no file. Files (.safetensors, or published .pth) "
                                           "go into models/relation_classifiers. Each fits only the model that it was "
                                           "trained on."),
                    io.Combo.Input("backbone", options=[FROM_FILE, *BACKBONES], default=FROM_FILE, optional=True, advanced=True,
                                   tooltip="The kind of model that the classifier was trained on: unet (Stable Diffusion) or "
                                           "mmdit (FLUX). Published files often do not say it; the loader then guesses. Choose "
                                           "it here if the guess is wrong. The geometric classifier works with both.")],
            outputs=[Classifier.Output("classifier", display_name="classifier", tooltip="For the steering nodes.")],
        )

    @classmethod
    def fingerprint_inputs(cls, classifier_name: str, backbone: str = FROM_FILE):
        return classifier_name if classifier_name == GEOMETRIC else path_of(classifier_name).stat().st_mtime_ns

    @classmethod
    def execute(cls, classifier_name: str, backbone: str = FROM_FILE) -> io.NodeOutput:
        if classifier_name == GEOMETRIC:
            return io.NodeOutput(GeometricClassifier())
        return io.NodeOutput(load_classifier(path_of(classifier_name), backbone=None if backbone == FROM_FILE else backbone))


NODES = [RelationClassifierLoader]
