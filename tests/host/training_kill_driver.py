"""Builds a dataset and trains on it, killed by SIGKILL at random moments; run by test_training_kill.py as a process.

It runs in its own process because it forks: imports take seconds, and there are many runs to kill.
"""
from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

KILLS = 10  # each of building and training


class TinySource:
    """Pictures without files; every seventh cannot be opened."""

    licence = "CC0"

    def __init__(self, sources: ModuleType) -> None:
        self._sources = sources

    def describe(self) -> dict:
        return {"kind": "tiny"}

    def candidates(self) -> list:
        return [self._sources.Candidate(f"{split}-{number}", split, number)
                for split, count in (("train", 40), ("validation", 12), ("test", 6)) for number in range(count)]

    def open(self, candidates: list) -> list:
        made = []
        for candidate in candidates:
            if candidate.number % 7 == 6:
                made.append(self._sources.Drop(candidate.picture, "cannot be opened"))
                continue
            relation = self._sources.RELATIONS[candidate.number % 4]
            image = torch.full((4, 4, 3), candidate.number / 40)
            made.append(self._sources.Example(candidate.picture, image, "dog", relation, "cat"))
        return made


class TinyMaps:
    """Maps determined by picture, caption and seed; some pictures are badly reconstructed."""

    least_psnr = 20.0

    def __init__(self, captions: ModuleType) -> None:
        self._captions = captions

    def describe(self) -> dict:
        return {"backbone": "unet", "size": 8, "normalise": "always", "steps": 10, "timesteps": [1, 4]}

    def invert(self, images: torch.Tensor, captions: list, seeds: list):
        maps = []
        for caption, seed in zip(captions, seeds, strict=True):
            noise = torch.rand(2, 2, 5, 8, 8, generator=torch.Generator().manual_seed(seed + len(caption.text)))
            time.sleep(0.002)
            maps.append(noise.half())
        return self._captions.Inverted(torch.stack(maps), 19 + 40 * images[:, 0, 0, 0])


def killed_after(work: Callable[[], None], seconds: float) -> bool:
    """Runs `work` in a child process and kills it after `seconds`. Returns whether it was still running."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def finish(work: Callable[[], None]) -> float:
    """Runs `work` in a child process to its end. Returns the seconds; raises if it fails."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise SystemExit(f"the child ended with {status}")
    return time.monotonic() - started


def main(root: Path, work: Path) -> None:
    sys.path.append(str(root))
    importlib.import_module("dev")  # registers the pack
    captions, dataset, sources, trainer = (importlib.import_module(f"learn_to_steer.training.{name}") for name in (
        "captions", "dataset", "sources", "trainer"))
    torch.set_num_threads(1)

    def build(name: str) -> None:
        dataset.build_dataset(work / name / "data", TinySource(sources), TinyMaps(captions), batch=4)

    def train(name: str) -> None:
        settings = trainer.TrainingSettings(epochs=8, batch=16, learning_rate=1e-3)
        trainer.TrainingRun(work / name / "run", [dataset.RelationDataset(work / "undisturbed" / "data")], settings, 32,
                            name="tiny").run()

    rng = random.Random(0)
    kills = dict.fromkeys(("build", "train"), 0)
    for stage, job in (("build", build), ("train", train)):
        seconds = finish(lambda job=job: job("undisturbed"))
        round_number = 0
        while kills[stage] < KILLS:
            name = f"disturbed-{round_number}"
            if killed_after(lambda job=job, name=name: job(name), rng.uniform(0, 0.7 * seconds)):
                kills[stage] += 1
            else:  # it reached the end first: its result is compared, and another one is begun
                round_number += 1
        finish(lambda job=job, name=f"disturbed-{round_number}": job(name))
    print(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
