"""The command line of `python -m training`."""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..classifiers.base import ClassifierError
from ..classifiers.checkpoint import classifier_bytes
from ..files.names import fault_of_name
from ..files.writing import check_new_file, write_new_file
from ..host.backbones import UnsupportedModel, find_backbone
from ..host.tokens import TokenError
from .calibration import calibrate
from .dataset import BuildProgress, RelationDataset, build_dataset
from .gqa import read_gqa
from .inversion import InversionSettings, Inverter
from .models import load_models
from .small_world import small_world_source
from .sources import SPLITS, Quota, Source, read_folder
from .storage import TrainingError
from .trainer import CLASSIFIER_FILE, TrainingProgress, TrainingRun, TrainingSettings

SOURCES = ("drawn", "generated", "folder", "gqa")
BAR = 30


def main(arguments: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    try:
        given.run(given)
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes from here")
        return 130
    except (TrainingError, TokenError, UnsupportedModel, ClassifierError, OSError, ValueError) as error:
        print(f"\npython -m training: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description="Makes a relation classifier for a model.")
    commands = parser.add_subparsers(required=True, metavar="build | train | calibrate")
    _add_build(commands.add_parser("build", help="labelled pictures -> dataset of attention maps"))
    _add_train(commands.add_parser("train", help="datasets -> classifier"))
    _add_calibrate(commands.add_parser("calibrate", help="datasets -> geometric classifier for their model"))
    return parser


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=build)
    parser.add_argument("dataset", type=Path, help="folder to write; the same command resumes it")
    parser.add_argument("--source", choices=SOURCES, required=True,
                        help="drawn, generated: small world; folder: pictures and a table; gqa: GQA scene graphs")
    parser.add_argument("--per-relation", type=int, nargs=3, metavar=("TRAIN", "VALIDATION", "TEST"),
                        help="most pictures per relation; the paper: 800 200 100 (SD), 2000 400 200 (FLUX)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="pictures inverted together and stored in one file (default 16)")
    parser.add_argument("--threads", type=int, help="of the CPU")
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="small-world", metavar="FILE",
                       help="small-world (default), small-world:flux, small-world:FILE, a checkpoint file, or a diffusion "
                            "model file")
    model.add_argument("--clip", nargs="+", type=Path, help="text encoder files of a diffusion model file")
    model.add_argument("--clip-type", default="flux", help="kind of text encoder, as in the host's Load CLIP")
    model.add_argument("--vae", type=Path, help="VAE file of a diffusion model file")
    pictures = parser.add_argument_group("folder and gqa")
    pictures.add_argument("--pictures", type=Path, help="folder of the picture files")
    pictures.add_argument("--table", type=Path, help="CSV or JSON with file, subject, relation, object (and split)")
    pictures.add_argument("--scene-graphs", type=Path, help="GQA's train_sceneGraphs.json")
    pictures.add_argument("--is-a", type=Path, help="word list of GQA names, one \"kind, broader kind\" per line")
    pictures.add_argument("--size", type=int, default=512, help="side of the pictures in pixels (default 512)")
    pictures.add_argument("--licence", default="not stated", help="licence of the pictures, for the manifest")
    inversion = parser.add_argument_group("inversion (defaults are the paper's)")
    inversion.add_argument("--steps", type=int, default=50, help="denoising steps (default 50)")
    inversion.add_argument("--timesteps", type=int, nargs="+", help="step indices at which maps are recorded")
    inversion.add_argument("--iterations", type=int, default=5, help="fixed-point iterations per step, for UNets (default 5)")
    inversion.add_argument("--gamma", type=float, default=1.0, help="strength of the rectified flow's inversion (default 1)")
    inversion.add_argument("--eta", type=float, default=1.0, help="strength of the rectified flow's reconstruction (default 1)")
    inversion.add_argument("--scheduler", help="the host's scheduler (default: ddim_uniform for UNets, simple for FLUX)")
    inversion.add_argument("--least-psnr", type=float,
                           help="least PSNR of a sample in dB; others are dropped (default: 19.5 for UNets, 20 for FLUX)")
    inversion.add_argument("--map-size", type=int, default=16, help="side of the recorded maps (default 16)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=train)
    parser.add_argument("run_folder", type=Path, help="folder for state, charts and classifier")
    parser.add_argument("--data", type=Path, nargs="+", required=True, help="dataset folders")
    parser.add_argument("--save", type=_classifier_file, help="copy the finished classifier to this .safetensors file, whose "
                                                                "name is the classifier's")
    parser.add_argument("--overwrite", action="store_true", help="replace the file named by --save, if it exists")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-wrong-captions", action="store_true",
                        help="train on true captions only (shows how much the caption leaks)")
    parser.add_argument("--without-nouns", default="", help="objects left out of training, separated by commas")
    parser.add_argument("--mirror", action="store_true",
                        help="flip the maps at random, with their labels (not in the paper)")
    settings = parser.add_argument_group("optimisation (defaults are the paper's for the datasets' kind of model)")
    for name, kind in (("learning-rate", float), ("weight-decay", float), ("epochs", int), ("batch-size", int),
                       ("patience", int), ("stop-after", int)):
        settings.add_argument(f"--{name}", type=kind)
    settings.add_argument("--d-model", type=int, help="width of the network (default 256)")


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=calibrate_rule)
    parser.add_argument("data", type=Path, nargs="+", help="dataset folders")
    parser.add_argument("--save", type=_classifier_file, required=True, help="the .safetensors file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace that file, if it exists")
    parser.add_argument("--threads", type=int, help="of the CPU")


def _classifier_file(text: str) -> Path:
    if not text.endswith(".safetensors"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .safetensors, or Relation Classifier Loader does not list it")
    path = Path(text)
    if fault := fault_of_name(path.stem, path.suffix):
        raise argparse.ArgumentTypeError(f"{path.stem[:60]!r} {fault}")
    return path


def build(given: argparse.Namespace) -> None:
    models = load_models(given.model, given.clip, given.clip_type, given.vae)
    backbone = find_backbone(models[0].model.diffusion_model).name
    chosen = {"scheduler": given.scheduler, "least_psnr": given.least_psnr,
              "timesteps": tuple(given.timesteps) if given.timesteps else None}
    settings = InversionSettings.for_backbone(
        backbone, given.steps, iterations=given.iterations, gamma=given.gamma, eta=given.eta, size=given.map_size,
        **{name: value for name, value in chosen.items() if value is not None})
    started = time.monotonic()
    already: list[int] = []

    def show(progress: BuildProgress) -> None:
        already.append(progress.done)
        fresh, seconds = progress.done - already[0], time.monotonic() - started
        minutes = (progress.total - progress.done) * seconds / max(fresh, 1) / 60
        left = f", {minutes:.0f} min left" if fresh else ""
        _bar(progress.done / progress.total, f"{progress.done}/{progress.total} pictures, {progress.samples} samples, "
                                             f"{progress.dropped} dropped{left}")

    manifest = build_dataset(given.dataset, _source(given, models), Inverter(*models, settings), given.batch,
                             given.seed, show)
    print(f"\n{given.dataset}: {manifest['channels']} maps per word")
    for split, counts in manifest["splits"].items():
        print(f"  {split}: {counts['samples']} samples of {counts['pictures']} pictures, "
              f"PSNR {counts['psnr_mean']} dB, dropped {counts['dropped'] or 'none'}")
    if names := manifest.get("unreadable"):
        print(f"  {len(names)} picture files could not be read: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''} "
              "(all: manifest.json)")


def _source(given: argparse.Namespace, models: tuple) -> Source:
    per_relation = dict(zip(SPLITS, given.per_relation or (None,) * 3, strict=True))
    if given.source in ("drawn", "generated"):
        if given.per_relation is None:
            raise TrainingError(f"--source {given.source} needs --per-relation TRAIN VALIDATION TEST.")
        return small_world_source(models, given.source == "generated", per_relation, given.seed)
    quota = Quota(per_relation, tuple(given.per_relation or (0.8, 0.1, 0.1)), given.seed)
    if given.pictures is None or not given.pictures.is_dir():
        raise TrainingError(f"--source {given.source} needs --pictures with the folder of the picture files.")
    if given.source == "folder":
        table = given.table or given.pictures / "labels.csv"
        return read_folder(given.pictures, table, given.size, quota, given.licence)
    if given.scene_graphs is None:
        raise TrainingError("--source gqa needs --scene-graphs with GQA's train_sceneGraphs.json.")
    source, skipped = read_gqa(given.scene_graphs, given.pictures, given.size, quota, given.is_a)
    print(f"{len(source.labels)} usable relations; left out: {dict(skipped)}")
    return source


def train(given: argparse.Namespace) -> None:
    finished = given.run_folder / CLASSIFIER_FILE
    if given.save:  # checked before hours of work; a file saved by this run earlier is allowed
        check_new_file(given.save, given.overwrite, finished.read_bytes() if finished.is_file() else None)
    datasets = [RelationDataset(folder) for folder in given.data]
    backbone = datasets[0].manifest["maps"]["backbone"]
    changes = {"learning_rate": given.learning_rate, "weight_decay": given.weight_decay, "epochs": given.epochs,
               "batch": given.batch_size, "patience": given.patience, "stop_after": given.stop_after}
    nouns = tuple(noun.strip() for noun in given.without_nouns.split(",") if noun.strip())
    settings = TrainingSettings.for_backbone(
        backbone, seed=given.seed, wrong_captions=not given.without_wrong_captions, without_nouns=nouns,
        mirror=given.mirror, **{name: value for name, value in changes.items() if value is not None})
    run = TrainingRun(given.run_folder, datasets, settings, given.d_model, given.device)
    print(f"{len(run.chosen['train'])} training items, {len(run.chosen['validation'])} validation items, "
          f"{run.layout.channels} maps per word; {len(run.history)} epochs done before")
    classifier = run.run(_show_training)
    print(f"\nbest epoch {run.best_epoch + 1} of {len(run.history)}; results in {given.run_folder}")
    _print_results(classifier.training)
    if given.save:
        write_new_file(given.save, finished.read_bytes(), given.overwrite)
        print(f"saved {given.save}")


def calibrate_rule(given: argparse.Namespace) -> None:
    check_new_file(given.save, given.overwrite)
    classifier = calibrate([RelationDataset(folder) for folder in given.data], given.save.stem)
    write_new_file(given.save, classifier_bytes(classifier), given.overwrite)
    _print_results(classifier.training)
    print(f"{classifier.training['channels_used']} of {len(classifier.channel_weights)} channels used; saved {given.save}")


def _print_results(training: Mapping) -> None:
    for name, result in training["results"].items():
        print(f"  {name}: " + ", ".join(f"{key} {value}" for key, value in result.items()))


def _show_training(progress: TrainingProgress) -> None:
    if progress.batch % 10 and progress.batch != progress.batches:
        return
    text = f"epoch {progress.epoch + 1} of at most {progress.epochs}"
    if progress.history:
        last = progress.history[-1]
        text += (f", last: loss {last.train_loss:.3f}, validation {last.validation_loss:.3f}, "
                 f"accuracy {last.validation_accuracy:.1%}")
    _bar(progress.batch / progress.batches, text)


def _bar(share: float, text: str) -> None:
    filled = int(BAR * share)
    sys.stdout.write(f"\r[{'#' * filled}{'.' * (BAR - filled)}] {text}   ")
    sys.stdout.flush()


