"""The detector finds exactly the drawn objects, and judges relations by GenEval's rule."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from learn_to_steer.toyworld.detector import THRESHOLD, Detection, detect, fit_background, judge, judge_relations
from learn_to_steer.toyworld.scenes import (
    EXTRA_NOUNS,
    NOUNS,
    UNET_LAYOUT,
    PlacedObject,
    Scene,
    background,
    random_scene,
    render,
    sprite,
)
from PIL import Image, ImageFilter


def draw(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    layout = replace(UNET_LAYOUT, nouns=NOUNS + EXTRA_NOUNS)
    return [random_scene(rng, layout=layout) for _ in range(count)]


def compare(scenes: list[Scene], images: np.ndarray, threshold: float = THRESHOLD) -> tuple[int, int, list[float]]:
    """Numbers of missed objects and of false detections, and distances between centres in pixels."""
    missed = extra = 0
    errors = []
    for scene, found in zip(scenes, detect(images, threshold), strict=True):
        left = list(found)
        for item in scene.objects:
            near = [d for d in left if d.noun == item.noun and np.hypot(*np.subtract(d.centre, item.centre)) < 5]
            if near:
                left.remove(near[0])
                errors.append(float(np.hypot(*np.subtract(near[0].centre, item.centre))))
            else:
                missed += 1
        extra += len(left)
    return missed, extra, errors


def test_every_object_is_found_and_nothing_else() -> None:
    scenes = draw(150, seed=11)
    missed, extra, errors = compare(scenes, np.stack([scene.image for scene in scenes]))
    total = sum(len(scene.objects) for scene in scenes)
    assert missed <= 0.005 * total and extra <= 0.005 * total
    assert np.mean(errors) < 0.3 and max(errors) < 5


def test_blur_and_noise_are_tolerated() -> None:
    scenes = draw(80, seed=12)
    rng = np.random.default_rng(0)
    blurred = [np.asarray(Image.fromarray(scene.image).filter(ImageFilter.GaussianBlur(0.8))) for scene in scenes]
    noisy = np.clip(np.stack(blurred) + rng.normal(0, 10, (80, 64, 64, 3)), 0, 255).astype(np.uint8)
    missed, extra, errors = compare(scenes, noisy)
    total = sum(len(scene.objects) for scene in scenes)
    assert missed <= 0.03 * total and extra <= 0.01 * total
    assert np.mean(errors) < 1


def test_neighbours_with_overlapping_boxes_are_found() -> None:
    """Boxes share a corner of a few pixels, as in a model's pictures; the shapes hardly touch."""
    rng = np.random.default_rng(8)
    images, wanted = [], []
    for _ in range(120):
        nouns = [NOUNS[k] for k in rng.permutation(len(NOUNS))[:2]]
        boxes, sizes, (x0, y0) = [], [], (4, 4)
        for noun in nouns:
            sizes.append(int(rng.choice((20, 26))))
            height, width = sprite(noun, sizes[-1])[0].shape[:2]
            boxes.append((x0, y0, x0 + width, y0 + height))
            x0, y0 = x0 + width - int(rng.integers(2, 7)), y0 + height - int(rng.integers(2, 7))
        objects = tuple(PlacedObject(noun, box) for noun, box in zip(nouns, boxes, strict=True))
        images.append(render(objects, tuple(sizes), background(rng)))
        wanted.append(sorted(nouns))
    found = [sorted(item.noun for item in items) for items in detect(np.stack(images))]
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= 117


def test_nothing_is_found_on_bare_or_noisy_backgrounds() -> None:
    rng = np.random.default_rng(4)
    images = np.stack([background(rng) + rng.normal(0, scale, (64, 64, 3)) for scale in (0, 5, 15, 30)])
    assert detect(np.clip(images, 0, 255).astype(np.uint8)) == [()] * 4


def test_the_hosts_image_format_gives_the_same_detections() -> None:
    images = np.stack([scene.image for scene in draw(4, seed=5)])
    as_float = detect(torch.from_numpy(images).float() / 255)
    assert [[d.noun for d in found] for found in as_float] == [[d.noun for d in found] for found in detect(images)]


def test_the_background_plane_is_found_under_the_objects() -> None:
    rng = np.random.default_rng(9)
    scene = random_scene(rng, 5)
    free = np.ones((64, 64), dtype=bool)
    for item in scene.objects:
        x0, y0, x1, y1 = item.box
        free[y0:y1, x0:x1] = False
    image = torch.from_numpy(scene.image).permute(2, 0, 1)[None].float() / 255
    difference = (fit_background(image) - image)[0].permute(1, 2, 0).numpy()
    assert np.abs(difference[free]).max() < 0.01


def test_a_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\], got \[3, 64, 64\]"):
        detect(np.zeros((3, 64, 64), dtype=np.uint8))


DOG_LEFT = Detection("dog", (4, 20, 20, 36), 0.9)
CAT_RIGHT = Detection("cat", (40, 20, 56, 36), 0.9)


def test_a_right_relation_is_exact_only_when_clean() -> None:
    verdict = judge([DOG_LEFT, CAT_RIGHT], "dog", ("to the left of",), "cat")
    assert (verdict.both_present, verdict.clean, verdict.relation, verdict.exact) == (True,) * 4
    extra = Detection("car", (20, 50, 36, 60), 0.7)
    verdict = judge([DOG_LEFT, CAT_RIGHT, extra], "dog", ("to the left of",), "cat")
    assert verdict.relation and not verdict.clean and not verdict.exact


def test_a_missing_object_is_a_failure() -> None:
    verdict = judge([DOG_LEFT], "dog", ("to the left of",), "cat")
    assert not (verdict.both_present or verdict.clean or verdict.relation or verdict.exact)


def test_of_two_dogs_the_surer_one_counts() -> None:
    weak = Detection("dog", (45, 45, 60, 60), 0.6)
    verdict = judge([weak, DOG_LEFT, CAT_RIGHT], "dog", ("to the left of",), "cat")
    assert verdict.both_present and verdict.relation and not verdict.clean
    strong = Detection("dog", (45, 45, 60, 60), 0.95)
    assert not judge([strong, DOG_LEFT, CAT_RIGHT], "dog", ("to the left of",), "cat").relation


def test_a_diagonal_needs_both_axes() -> None:
    low_cat = Detection("cat", (30, 44, 46, 60), 0.9)
    both = ("above", "to the left of")
    assert judge([DOG_LEFT, low_cat], "dog", both, "cat").relation
    assert not judge([DOG_LEFT, CAT_RIGHT], "dog", both, "cat").relation


def test_several_relations_are_judged_one_by_one() -> None:
    car = Detection("car", (40, 44, 56, 60), 0.8)
    asked = [("dog", "to the left of", "cat"), ("cat", "below", "car")]
    verdict = judge_relations([DOG_LEFT, CAT_RIGHT, car], asked)
    assert verdict.all_present and verdict.clean and verdict.relations == (True, False) and not verdict.exact
    asked[1] = ("cat", "above", "car")
    assert judge_relations([DOG_LEFT, CAT_RIGHT, car], asked).exact
    assert not judge_relations([DOG_LEFT, CAT_RIGHT], asked).all_present
