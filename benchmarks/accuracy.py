"""Accuracy of steering on the small world, with fixed prompts and seeds and the exact detector.

    python dev.py bench accuracy --backbone unet --prompts 200 --json FILE

Rows: unsteered; geometric (default settings); random (moves of the same length in random directions: shows that it is
the gradient); and learned, where a classifier is shipped. With --grid it compares settings instead, on the prompts for
tuning, which share no ordered pair of objects with the reported ones.
"""
from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from standalone import load_pack

load_pack()

import comfy.sample  # noqa: E402
from learn_to_steer.classifiers.checkpoint import load_classifier  # noqa: E402
from learn_to_steer.classifiers.geometric import GeometricClassifier, GeometricSettings  # noqa: E402
from learn_to_steer.steering.optimizer import SteeringSettings, displacement  # noqa: E402
from learn_to_steer.steering.relations import build_graph  # noqa: E402
from learn_to_steer.steering.sampling import Steering, apply_steering  # noqa: E402
from learn_to_steer.steering.tokens import encode_prompt  # noqa: E402
from learn_to_steer.toyworld import models, scenes  # noqa: E402
from learn_to_steer.toyworld.detector import detect, judge_relations  # noqa: E402

from .table import machine, print_table, write_json  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Protocol:
    """How the small world is sampled, by backbone; the same in the shipped workflows."""

    steps: int
    cfg: float
    sampler: str
    scheduler: str


PROTOCOLS = {"unet": Protocol(25, 2.0, "ddim", "ddim_uniform"), "flux": Protocol(25, 3.0, "euler", "simple")}


def random_move(gradient: torch.Tensor, settings: SteeringSettings) -> torch.Tensor:
    """A move of the usual length in a random direction, drawn anew each time, the same in each run."""
    seed = int(gradient.abs().sum().item() * 1e6) % 2**31
    noise = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(seed))
    return displacement(noise.to(gradient), settings)


@dataclass(frozen=True)
class Row:
    """One line of the table: how to steer (None: not at all)."""

    name: str
    steering: Callable[[object], Steering] | None


def plan(names: Iterable[str], backbone: str) -> list[Row]:
    settings = SteeringSettings()
    learned = ROOT / "classifiers" / "weights" / f"toyworld_{backbone}.safetensors"
    rows = {
        "unsteered": Row("unsteered", None),
        "geometric": Row("geometric", lambda graph: Steering(graph, GeometricClassifier(), settings)),
        "random": Row("random direction", lambda graph: Steering(graph, GeometricClassifier(), settings,
                                                                  move=random_move)),
    }
    if learned.is_file():
        classifier = load_classifier(learned)
        rows["learned"] = Row("learned", lambda graph: Steering(graph, classifier, settings))
    return [rows[name] for name in names if name in rows]


def grid_rows(specifications: list[str], learned: Path | None = None) -> list[Row]:
    """Every combination of `name=value,value` settings of SteeringSettings, or of GeometricSettings as geometric.name."""
    axes = [[(name, value) for value in values.split(",")] for name, _, values in
            (item.partition("=") for item in specifications)]
    rows = [Row("unsteered", None)]
    for combination in itertools.product(*axes):
        steering = {n: _parsed(v) for n, v in combination if not n.startswith("geometric.")}
        geometric = {n.split(".")[1]: _parsed(v) for n, v in combination if n.startswith("geometric.")}
        settings = dataclasses.replace(SteeringSettings(), **steering)
        classifier = load_classifier(learned) if learned else GeometricClassifier(GeometricSettings(**geometric))
        rows.append(Row(" ".join(f"{n.split('.')[-1]}={v}" for n, v in combination),
                        lambda graph, c=classifier, s=settings: Steering(graph, c, s)))
    return rows


def _parsed(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def measure(world, row: Row, prompts: list, protocol: Protocol, say: Callable[[str], None]) -> dict:
    """One row of the table. Picture k has seed k; seconds are those of sampling alone."""
    model, clip, vae = world
    channels = model.get_model_object("latent_format").latent_channels
    latent = torch.zeros(1, channels, 16, 16)
    negative = encode_prompt(clip, "")
    seconds, gradients, verdicts = 0.0, 0, []
    for seed, prompt in enumerate(prompts):
        graph = build_graph(prompt.text)
        wanted = [(r.subject, " and ".join(r.predicates), r.object) for r in graph.relations]
        assert sorted(wanted) == sorted(prompt.relations), (wanted, prompt.relations)
        positive = encode_prompt(clip, prompt.text)
        patched, runs = (model, None) if row.steering is None else apply_steering(model, row.steering(graph))
        began = time.perf_counter()
        samples = comfy.sample.sample(patched, comfy.sample.prepare_noise(latent, seed), protocol.steps, protocol.cfg,
                                      protocol.sampler, protocol.scheduler, positive, negative, latent, seed=seed,
                                      disable_pbar=True)
        seconds += time.perf_counter() - began
        gradients += 0 if runs is None else runs.last.report.gradient_evaluations
        verdicts.append(judge_relations(detect(vae.decode(samples))[0], wanted))
        if (seed + 1) % 20 == 0:
            say(f"{row.name}: {seed + 1}/{len(prompts)}")
    return {"name": row.name, "prompts": len(prompts),
            "both_present": float(np.mean([v.all_present for v in verdicts])),
            "clean": float(np.mean([v.clean for v in verdicts])),
            "relation_correct": float(np.mean([np.mean(v.relations) for v in verdicts])),
            "exact": float(np.mean([v.exact for v in verdicts])),
            "gradient_evaluations": gradients / len(prompts), "seconds": seconds / len(prompts), "seconds_ratio": None}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python dev.py bench accuracy", description=__doc__.split("\n\n")[0])
    parser.add_argument("--backbone", choices=sorted(PROTOCOLS), default="unet")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--rows", nargs="+", default=["unsteered", "geometric", "random", "learned"])
    parser.add_argument("--objects", type=int, default=2, help="objects of a prompt (2 to 5)")
    parser.add_argument("--relations", type=int, default=1, help="relations of a prompt")
    parser.add_argument("--cfg", type=float, help="another guidance scale than the protocol's")
    parser.add_argument("--grid", nargs="+", metavar="NAME=V,V", help="compare settings on the prompts for tuning")
    parser.add_argument("--learned", type=Path, help="with --grid: this classifier instead of the geometric one")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    protocol = PROTOCOLS[arguments.backbone]
    if arguments.cfg is not None:
        protocol = dataclasses.replace(protocol, cfg=arguments.cfg)
    split = "tune" if arguments.grid else "report"
    prompts = (scenes.two_object_prompts(arguments.prompts, split) if arguments.objects == 2 else
               scenes.multi_relation_prompts(arguments.prompts, arguments.objects, arguments.relations, split))
    result = {"machine": machine(), "backbone": arguments.backbone, "split": split, "protocol": dataclasses.asdict(protocol),
              "settings": dataclasses.asdict(SteeringSettings()), "rows": []}
    print(result["machine"])
    rows = grid_rows(arguments.grid, arguments.learned) if arguments.grid else plan(arguments.rows, arguments.backbone)
    with torch.inference_mode():
        world = models.LOADERS[arguments.backbone]()
        for row in rows:
            measured = measure(world, row, prompts, protocol, lambda text: print(text, end="\r", flush=True))
            measured["seconds_ratio"] = measured["seconds"] / (result["rows"] or [measured])[0]["seconds"]
            result["rows"].append(measured)
            write_json(arguments.json, result)
            print(f"{measured['name']}: relation {measured['relation_correct']:.3f}, exact {measured['exact']:.3f}")
    print_table(result["rows"])


if __name__ == "__main__":
    main()
