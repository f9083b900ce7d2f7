"""Accuracy of steering on the small world, with fixed prompts and seeds and the exact detector.

    python dev.py bench accuracy --backbone unet --prompts 200 --json FILE

Suites:
    main          one relation per prompt
    several       three to five objects
    held-out      objects that the classifier never saw in training
    personalised  an object that the model never saw, taught by a LoRA

Rows of "main": unsteered; geometric; geometric, calibrated (with channel weights for this model, if such a file is shipped);
random direction (moves of the same length, a control for the gradient); learned; learned, its loss alone (without the
compactness term, if the model's settings use it); learned, true captions only (shows the leakage).

Rows in the JSON file that were measured with the same weights and settings are kept. The benchmark resumes from them after
an interruption, with more prompts, or with other rows.

--grid compares settings instead, on the prompts for tuning, which share no ordered pair of objects with the reported ones.
--plot draws accuracy against gradient evaluations:

    python dev.py bench accuracy --prompts 200 --learned classifiers/weights/toyworld_unet.safetensors
        --one-by-one --grid max_updates=1,2,3,5 end=0.12,0.24,0.36,0.48
        step_size=1.25,2.5,5 --plot docs/trade_off_unet.png
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dev.standalone import load_pack

load_pack()

import comfy.sample  # noqa: E402
import comfy.sd  # noqa: E402
from learn_to_steer.classifiers.base import RelationClassifier  # noqa: E402
from learn_to_steer.classifiers.checkpoint import load_classifier  # noqa: E402
from learn_to_steer.classifiers.geometric import GeometricClassifier, GeometricSettings  # noqa: E402
from learn_to_steer.classifiers.learned import LearnedClassifier  # noqa: E402
from learn_to_steer.host.patching import apply_steering  # noqa: E402
from learn_to_steer.host.steering import Steering  # noqa: E402
from learn_to_steer.host.tokens import encode_prompt  # noqa: E402
from learn_to_steer.pictures.overlays import curve_chart, save_png  # noqa: E402
from learn_to_steer.prompts.graph import build_graph  # noqa: E402
from learn_to_steer.steering.optimizer import displacement  # noqa: E402
from learn_to_steer.steering.settings import SteeringSettings  # noqa: E402
from learn_to_steer.toyworld import models, scenes  # noqa: E402
from learn_to_steer.toyworld.config import RULE, SAMPLING, STEERING, STEERING_LEARNED, Sampling  # noqa: E402
from learn_to_steer.toyworld.detector import detect, judge_relations  # noqa: E402

from . import compared  # noqa: E402
from .table import machine, print_table, write_json  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "classifiers" / "weights"


def random_move(gradient: torch.Tensor, settings: SteeringSettings) -> torch.Tensor:
    """A move of the usual length in a random direction, different in every update and the same in every run."""
    seed = int(gradient.abs().sum().item() * 1e6) % 2**31
    noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(seed))
    return displacement(noise.to(gradient), settings)


@dataclass(frozen=True)
class SteeringMethod:
    """A method of steering: makes a Steering for any graph."""

    classifier: RelationClassifier
    settings: SteeringSettings
    move: Callable[[torch.Tensor, SteeringSettings], torch.Tensor] = displacement

    def __call__(self, graph) -> Steering:
        return Steering(graph, self.classifier, self.settings, move=self.move)


@dataclass(frozen=True)
class Row:
    """A row of the table. steering: None for unsteered; pictures: number per prompt."""

    name: str
    steering: SteeringMethod | None
    prompts: list
    group: str = "one relation"
    lora: Path | None = None
    pictures: int = 1


def classifier_files(backbone: str) -> dict[str, Path]:
    """Files of the learned classifiers by row name: the shipped one and those for comparison."""
    return {"learned": SHIPPED / f"toyworld_{backbone}.safetensors",
            "learned, true captions only": compared.FOLDER / f"{backbone}_true_captions.safetensors",
            "learned without these objects": compared.FOLDER / f"{backbone}_without_held_out.safetensors"}


@functools.cache
def classifiers(backbone: str) -> dict[str, LearnedClassifier]:
    """The classifiers of the existing files in `classifier_files`."""
    return {name: compared.load_compared(path) for name, path in classifier_files(backbone).items() if path.is_file()}


def rule(backbone: str) -> GeometricClassifier:
    """The geometric classifier of the examples: the one calibrated to this model, if such a file is shipped."""
    return load_classifier(SHIPPED / f"{RULE[backbone]}.safetensors") if RULE[backbone] else GeometricClassifier()


def steering_methods(backbone: str) -> dict[str, SteeringMethod | None]:
    """Available methods by row name; None for unsteered."""
    settings = SteeringSettings(**STEERING[backbone])
    found = {"unsteered": None,
             "geometric": SteeringMethod(GeometricClassifier(), settings),
             "random direction": SteeringMethod(GeometricClassifier(), settings, random_move)}
    if RULE[backbone]:
        found["geometric, calibrated"] = SteeringMethod(rule(backbone), settings)
    trained = dataclasses.replace(settings, **STEERING_LEARNED[backbone])
    found |= {name: SteeringMethod(classifier, trained) for name, classifier in classifiers(backbone).items()}
    if "learned" in found and trained.compactness:
        alone = dataclasses.replace(trained, compactness=0.0)
        found["learned, its loss alone"] = SteeringMethod(found["learned"].classifier, alone)
    return found


SUITES = ("main", "several", "held-out", "personalised")
LORA_NOUN = "octopus"


def suite(name: str, backbone: str, count: int) -> list[Row]:
    """The rows of one suite, on `count` prompts each."""
    known, nouns = steering_methods(backbone), scenes.LAYOUTS[backbone].nouns

    def rows(names: Iterable[str], prompts: list, group: str, lora: Path | None = None) -> list[Row]:
        return [Row(method, known[method], prompts, group, lora) for method in names if method in known]

    three = ("unsteered", "geometric", "geometric, calibrated", "learned")
    if name == "main":
        return rows(("unsteered", "geometric", "geometric, calibrated", "random direction", "learned",
                     "learned, its loss alone", "learned, true captions only"),
                    scenes.two_object_prompts(count, nouns=nouns), "one relation")
    if name == "several":
        return [row for objects, relations in sorted(scenes.MULTI_FORMS) for row in
                rows(three, scenes.multi_relation_prompts(count, objects, relations, nouns=nouns),
                     f"{objects} objects, {relations} relations")]
    if name == "held-out":
        prompts = scenes.two_object_prompts(count, nouns=nouns, featured=scenes.HELD_OUT_NOUNS)
        return rows(("unsteered", "learned", "learned without these objects"), prompts,
                    f"with {', '.join(scenes.HELD_OUT_NOUNS)}")
    lora = compared.FOLDER / f"{backbone}_{LORA_NOUN}_lora.safetensors"
    prompts = scenes.two_object_prompts(count, nouns=(*nouns, LORA_NOUN), featured=(LORA_NOUN,))
    return rows(three, prompts, f"{LORA_NOUN}, by LoRA", lora) + rows(("unsteered",), prompts, f"{LORA_NOUN}, no LoRA")


def grid_rows(specifications: list[str], prompts: list, usual: SteeringSettings, learned: RelationClassifier | None,
              group: str) -> list[Row]:
    """One row per combination of `name=value,value` specifications.

    name: a field of SteeringSettings, or geometric.NAME for a field of GeometricSettings.
    """
    axes = [[(name, value) for value in values.split(",")] for name, _, values in
            (item.partition("=") for item in specifications)]
    rows = []
    for combination in itertools.product(*axes):
        steering = {n: _parsed(v, usual, n) for n, v in combination if not n.startswith("geometric.")}
        geometry = {n.split(".")[1]: _parsed(v, GeometricSettings(), n.split(".")[1]) for n, v in combination
                    if n.startswith("geometric.")}
        method = SteeringMethod(learned or GeometricClassifier(GeometricSettings(**geometry)),
                                dataclasses.replace(usual, **steering))
        rows.append(Row(" ".join(f"{n.split('.')[-1]}={v}" for n, v in combination), method, prompts, group))
    return rows


def _parsed(text: str, settings: SteeringSettings | GeometricSettings, name: str) -> float | int | bool | str:
    """The text converted to the type of the setting `name`."""
    kind = type(getattr(settings, name))
    return text == "True" if kind is bool else kind(text)


@dataclass(frozen=True)
class Sampled:
    """The pictures of one prompt.

    images: float [B, H, W, 3] from 0 to 1; gradients: gradient evaluations per picture; seconds: sampling time per picture.
    """

    images: torch.Tensor
    gradients: list[int]
    seconds: float


def sample_prompt(world: tuple, prompt: str, seed: int, protocol: Sampling, steering: Steering | None,
                  pictures: int = 1) -> Sampled:
    """Samples the prompt as one batch through the host, with an empty negative prompt, steered or not."""
    model, clip, vae = world
    channels = model.get_model_object("latent_format").latent_channels
    latent = torch.zeros(pictures, channels, 16, 16)
    positive, negative = encode_prompt(clip, prompt), encode_prompt(clip, "")
    patched, runs = (model, None) if steering is None else apply_steering(model, steering)
    began = time.perf_counter()
    samples = comfy.sample.sample(patched, comfy.sample.prepare_noise(latent, seed), protocol.steps, protocol.cfg,
                                  protocol.sampler, protocol.scheduler, positive, negative, latent, seed=seed,
                                  disable_pbar=True)
    seconds = (time.perf_counter() - began) / pictures
    records = [] if runs is None else [r for r in runs.last.report.records if r.gradient_norm is not None]
    # In a batch, a finished picture waits for the others. Only evaluations that move a picture are counted for it.
    gradients = [len(records) if pictures == 1 else sum(r.moved[picture] for r in records) for picture in range(pictures)]
    return Sampled(vae.decode(samples), gradients, seconds)


AVERAGES = ("both_present", "clean", "relation_correct", "exact", "gradient_evaluations", "seconds")
EVERY = 10
"""Number of prompts between two saves."""


def measure(world: tuple, row: Row, protocol: Sampling, before: dict | None = None) -> Iterator[dict]:
    """Measures one row. Yields its figures every few prompts and, last, for all prompts. Prompt k has seed k.

    before: figures that this function yielded for the row's first prompts in an earlier run.
    """
    (model, clip, vae), first = world, before["prompts"] if before else 0
    if row.lora is not None:
        model, clip = comfy.sd.load_lora_for_models(model, clip, compared.load_lora(row.lora), 1.0, 0.0)
    sums = np.array([before[name] for name in AVERAGES]) * first if before else np.zeros(len(AVERAGES))
    for seed, prompt in enumerate(row.prompts[first:], first):
        graph = build_graph(prompt.text)
        wanted = [(r.subject, " and ".join(r.predicates), r.object) for r in graph.relations]
        assert sorted(wanted) == sorted(prompt.relations), (wanted, prompt.relations)
        steering = None if row.steering is None else row.steering(graph)
        sampled = sample_prompt((model, clip, vae), prompt.text, seed, protocol, steering, row.pictures)
        verdicts = [judge_relations(found, wanted) for found in detect(sampled.images)]
        sums += np.mean([[verdict.all_present, verdict.clean, np.mean(verdict.relations), verdict.exact, gradients,
                          sampled.seconds] for verdict, gradients in zip(verdicts, sampled.gradients, strict=True)], axis=0)
        if (seed + 1) % EVERY == 0 or seed + 1 == len(row.prompts):
            yield {"name": row.name, "group": row.group, "prompts": seed + 1, "pictures": row.pictures,
                   **dict(zip(AVERAGES, (sums / (seed + 1)).tolist(), strict=True))}


def fingerprint(row: Row, backbone: str, protocol: Sampling) -> str:
    """Hash of everything that a row's figures depend on, except the code and the number of prompts."""
    found = hashlib.sha256((models.WEIGHTS / f"{backbone}.safetensors").read_bytes())
    found.update(repr((protocol, row.prompts[0])).encode())
    if row.lora is not None:
        found.update(row.lora.read_bytes())
    if row.pictures > 1:
        found.update(repr(row.pictures).encode())
    if row.steering is not None:
        classifier = row.steering.classifier
        found.update(repr((row.steering.settings, row.steering.move.__name__, classifier.name)).encode())
        if isinstance(classifier, GeometricClassifier):
            found.update(repr(classifier.settings).encode())
        else:
            for name, weight in sorted(classifier.network.state_dict().items()):
                found.update(name.encode() + weight.numpy().tobytes())
        if classifier.channel_weights is not None:
            found.update(classifier.channel_weights.numpy().tobytes())
    return found.hexdigest()[:16]


def leakage(backbone: str) -> dict:
    """Accuracy of the classifiers on maps of true and of wrong captions, from their files."""
    return {name: classifier.training["results"] for name, classifier in classifiers(backbone).items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench accuracy", description=__doc__.split("\n\n")[0])
    parser.add_argument("--backbone", choices=sorted(SAMPLING), default="unet")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--suites", nargs="+", choices=SUITES, help="default: main")
    parser.add_argument("--pictures", type=int, default=1, help="pictures per prompt, sampled as one batch (faster)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these rows")
    parser.add_argument("--cfg", type=float, help="guidance scale, instead of the protocol's")
    parser.add_argument("--grid", nargs="+", metavar="NAME=V,V", help="compare settings on the prompts for tuning")
    parser.add_argument("--one-by-one", action="store_true", help="with --grid: each setting alone, not every combination")
    parser.add_argument("--learned", type=Path, help="with --grid: this classifier instead of the geometric one")
    parser.add_argument("--plot", type=Path, help="with --grid: draw the trade-off here (PNG)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.grid and (arguments.suites or arguments.rows):
        parser.error("--grid has its own rows and prompts: leave --suites and --rows out")
    if not arguments.grid and (arguments.learned or arguments.one_by_one or arguments.plot):
        parser.error("--learned, --one-by-one and --plot belong to --grid")
    if arguments.learned and any(item.startswith("geometric.") for item in arguments.grid):
        parser.error("geometric.... settings have no effect on the classifier of --learned: leave one of them out")
    suites = arguments.suites or ["main"]
    torch.set_num_threads(arguments.threads)
    protocol = SAMPLING[arguments.backbone]
    if arguments.cfg is not None:
        protocol = dataclasses.replace(protocol, cfg=arguments.cfg)
    usual = SteeringSettings(**STEERING[arguments.backbone])
    if arguments.grid:
        prompts = scenes.two_object_prompts(arguments.prompts, "tune", scenes.LAYOUTS[arguments.backbone].nouns)
        learned = None
        if arguments.learned:
            learned = load_classifier(arguments.learned)
            usual = dataclasses.replace(usual, **STEERING_LEARNED[arguments.backbone])
        grids = ([(item.partition("=")[0], [item]) for item in arguments.grid] if arguments.one_by_one
                 else [("settings", arguments.grid)])
        rows = [Row("unsteered", None, prompts, "unsteered" if arguments.one_by_one else "settings")]
        rows += [row for group, grid in grids for row in grid_rows(grid, prompts, usual, learned, group)]
    else:
        rows = [row for name in suites for row in suite(name, arguments.backbone, arguments.prompts)]
        if unknown := set(arguments.rows or ()) - {row.name for row in rows}:
            parser.error(f"--rows: there is no {', '.join(sorted(unknown))}; known: {', '.join(sorted({r.name for r in rows}))}")
        rows = [row for row in rows if not arguments.rows or row.name in arguments.rows]
    rows = [dataclasses.replace(row, pictures=arguments.pictures) for row in rows]
    result = begin(arguments.json, {
        "machine": machine(), "backbone": arguments.backbone, "split": "tune" if arguments.grid else "report",
        "protocol": dataclasses.asdict(protocol), "settings": dataclasses.asdict(usual), "rows": []})
    if not arguments.grid and "main" in suites:
        result["classifiers"] = leakage(arguments.backbone)
    print(result["machine"])
    with torch.inference_mode():
        world = models.LOADERS[arguments.backbone]()
        for row in rows:
            mark = fingerprint(row, arguments.backbone, protocol)
            for measured in measure_once(world, row, protocol, mark, result["rows"]):
                place({**measured, "fingerprint": mark}, result["rows"], alone=not arguments.grid)
                write_json(arguments.json, result)
                print(f"{row.group}, {row.name}: {measured['prompts']} of {len(row.prompts)}, relation "
                      f"{measured['relation_correct']:.3f}, exact {measured['exact']:.3f}", end="\r", flush=True)
            print()
    print_table([{name: value for name, value in row.items() if name != "fingerprint"} for row in result["rows"]])
    if arguments.plot:
        save_png(trade_off(result["rows"]), arguments.plot)


def begin(path: Path | None, new: dict) -> dict:
    """The result of an earlier run in `path`, to be continued, or `new`. Raises SystemExit for another protocol."""
    if path is None or not path.is_file():
        return new
    found = json.loads(path.read_text(encoding="utf-8"))
    for name in ("backbone", "split", "protocol"):
        if found[name] != new[name]:
            raise SystemExit(f"{path} was measured with {name} {found[name]}, this would be {new[name]}: name another file")
    if new["machine"] not in found["machine"]:
        found["machine"] += f"; further prompts or rows on {new['machine']}"
    return {**found, "settings": new["settings"]}


def measure_once(world: tuple, row: Row, protocol: Sampling, mark: str, known: list[dict]) -> Iterator[dict]:
    """Like `measure`, but reuses the figures of `known` rows with the same fingerprint."""
    alike = [done for done in known if done.get("fingerprint") == mark and done["prompts"] <= len(row.prompts)]
    before = max(alike, key=lambda done: done["prompts"], default=None)
    if before is not None and before["prompts"] == len(row.prompts):
        yield {**before, "name": row.name, "group": row.group}
    else:
        yield from measure(world, row, protocol, before)


def place(measured: dict, rows: list[dict], alone: bool) -> None:
    """Replaces the row with the same name and group, or appends the row.

    Times are then relative to the first row or, with `alone`, to the first row of the same group.
    """
    key = (measured["group"], measured["name"])
    at = next((index for index, row in enumerate(rows) if (row["group"], row["name"]) == key), len(rows))
    rows[at:at + 1] = [measured]
    first: dict[str | None, dict] = {}
    for row in rows:
        plain = first.setdefault(row["group"] if alone else None, row)
        row["seconds_ratio"] = row["seconds"] / plain["seconds"]


def trade_off(rows: list[dict]) -> torch.Tensor:
    """Chart [H, W, 3] of the share of exact pictures against gradient evaluations per picture; one line per group."""
    lines = {}
    for row in sorted(rows, key=lambda row: row["gradient_evaluations"]):
        lines.setdefault(row["group"], []).append((row["gradient_evaluations"], row["exact"]))
    return curve_chart(lines, "Accuracy against effort", "gradient evaluations per picture", "share of prompts exactly right",
                       y_range=(0, 1))


if __name__ == "__main__":
    main()
