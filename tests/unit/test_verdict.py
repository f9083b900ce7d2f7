"""The one-line verdict on the demonstration's pictures, with drawn scenes."""
from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from learn_to_steer.prompts.graph import build_graph
from learn_to_steer.toyworld.detector import detect
from learn_to_steer.toyworld.scenes import background, sprite
from PIL import Image

from dev.benchmarks.verdict import load, verdict, world_noun
from dev.environment import ROOT


def picture(**places: tuple[int, int]) -> np.ndarray:
    """A scene, uint8 [64, 64, 3], with each noun's centre at (x, y) in pixels."""
    canvas = background(np.random.default_rng(0)).astype(float)
    for name, (x, y) in places.items():
        colours, opacity = sprite(name.rstrip("0123456789").replace("_", " "), 18)
        height, width = opacity.shape[:2]
        spot = canvas[y - height // 2:y - height // 2 + height, x - width // 2:x - width // 2 + width]
        spot[:] = spot + opacity * (colours - spot)
    return canvas.round().astype(np.uint8)


def line(prompt: str, **places: tuple[int, int]) -> str:
    return verdict(detect(picture(**places)[None])[0], build_graph(prompt).relations)


def test_right_and_wrong():
    assert line("a dog above a cat", dog=(32, 14), cat=(32, 48)) == "dog above cat: right"
    assert line("a dog above a cat", cat=(32, 14), dog=(32, 48)) == "dog below cat: wrong"
    assert line("a dog above and to the left of a small teddy bear", dog=(16, 16), teddy_bear=(48, 48)) == (
        "dog above and to the left of teddy bear: right")


def test_missing_and_surplus():
    assert line("a dog above a cat", dog=(32, 14)) == "no cat: wrong"
    assert line("a dog above a cat", car=(32, 14)) == "no dog and no cat (also a car): wrong"
    assert line("a dog above a cat", dog1=(14, 14), dog2=(50, 14), cat=(32, 48)).endswith(
        "(also 1 dog too many): right")


def test_several_relations():
    told = line("a dog above a cat and a cat to the left of a car", dog=(50, 14), cat=(50, 48), car=(14, 48))
    assert told == "dog above cat; cat to the right of car: 1 of 2 right"


def test_unknown_noun():
    assert world_noun("fluffy teddy bear") == "teddy bear"
    with pytest.raises(ValueError, match="spaceship"):
        world_noun("spaceship")


def test_program_says_what_it_cannot_judge():
    for prompt in ("a spaceship above a dog", "a dog"):
        told = subprocess.run([sys.executable, "-m", "dev.benchmarks.verdict", "--prompt", prompt, "a=none.png"], cwd=ROOT,
                              capture_output=True, text=True)
        assert told.returncode == 1 and told.stderr.startswith("The pictures cannot be judged: ")


def test_program_reads_enlarged_files_and_prints_one_line(tmp_path):
    scene = picture(dog=(32, 14), cat=(32, 48))
    Image.fromarray(scene).resize((512, 512), Image.Resampling.NEAREST).save(tmp_path / "a.png")
    assert np.array_equal(load(tmp_path / "a.png"), scene)
    told = subprocess.run([sys.executable, "-m", "dev.benchmarks.verdict", "--prompt", "a cat above a dog",
                           f"steered={tmp_path / 'a.png'}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "asked: cat above dog | steered: cat below dog: wrong\n"
