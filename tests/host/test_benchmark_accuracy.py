"""The accuracy benchmark resumes where it stopped, and only from rows measured with the same settings."""
from __future__ import annotations

import dataclasses

import pytest
import torch
from learn_to_steer.toyworld.config import SAMPLING

from dev.benchmarks import accuracy

QUICK = dataclasses.replace(SAMPLING["unet"], steps=3)


def figures(row: dict) -> dict:
    """The row's figures without times."""
    return {name: value for name, value in row.items() if not name.startswith("seconds")}


@pytest.fixture(scope="module")
def world():
    with torch.inference_mode():
        yield accuracy.models.LOADERS["unet"]()


def last(*arguments) -> dict:
    return list(accuracy.measure(*arguments))[-1]


def test_a_row_in_two_parts_is_the_row_in_one(world):
    parts, whole = (accuracy.suite("main", "unet", count)[1] for count in (2, 5))
    first = last(world, parts, QUICK)
    assert first["prompts"] == 2 and first["gradient_evaluations"] > 0
    assert figures(last(world, whole, QUICK, first)) == pytest.approx(figures(last(world, whole, QUICK)))


def test_a_batch_counts_each_pictures_own_gradients(world):
    row = accuracy.suite("main", "unet", 1)[1]
    early = dataclasses.replace(row.steering, settings=dataclasses.replace(
        row.steering.settings, stop_probability=0.5, compactness=0.0, end=0.9))
    sampled = accuracy.sample_prompt(world, row.prompts[0].text, 0, QUICK, early(accuracy.build_graph(row.prompts[0].text)), 6)
    assert sampled.images.shape[0] == len(sampled.gradients) == 6
    assert len(set(sampled.gradients)) > 1 and max(sampled.gradients) <= 3 * QUICK.steps


def test_only_rows_measured_in_the_same_way_go_on():
    plain, steered = accuracy.suite("main", "unet", 4)[:2]
    shorter = dataclasses.replace(steered.steering, settings=dataclasses.replace(steered.steering.settings, step_size=1.0))
    learned = next(row for row in accuracy.suite("main", "unet", 4) if row.name == "learned")
    rows = (plain, steered, learned, dataclasses.replace(steered, pictures=2), dataclasses.replace(steered, steering=shorter),
            accuracy.suite("personalised", "unet", 4)[0])
    marks = [accuracy.fingerprint(row, "unet", QUICK) for row in rows]
    marks.append(accuracy.fingerprint(plain, "unet", SAMPLING["unet"]))
    assert len(set(marks)) == len(marks)
    assert accuracy.fingerprint(accuracy.suite("main", "unet", 9)[1], "unet", QUICK) == marks[1]  # more prompts go on


def test_rows_take_their_place():
    row = {"name": "unsteered", "group": "one", "prompts": 4, "seconds": 2.0}
    rows: list[dict] = []
    for measured in (row, {**row, "name": "learned", "seconds": 3.0}, {**row, "group": "two", "seconds": 8.0},
                     {**row, "name": "learned", "prompts": 8, "seconds": 5.0}):
        accuracy.place(dict(measured), rows, alone=True)
    assert [(r["group"], r["name"], r["prompts"], r["seconds_ratio"]) for r in rows] == [
        ("one", "unsteered", 4, 1.0), ("one", "learned", 8, 2.5), ("two", "unsteered", 4, 1.0)]
    accuracy.place({**row, "prompts": 8, "seconds": 2.5}, rows, alone=True)  # its group's times follow
    assert [r["seconds_ratio"] for r in rows] == [1.0, 2.0, 1.0]


def test_another_protocol_is_refused_and_another_machine_named(tmp_path):
    new = {"machine": "this", "backbone": "unet", "split": "report", "protocol": {"steps": 3}, "settings": {}, "rows": []}
    file = tmp_path / "rows.json"
    assert accuracy.begin(file, new) == new
    accuracy.write_json(file, {**new, "machine": "that", "rows": [{"name": "kept"}]})
    found = accuracy.begin(file, new)
    assert found["rows"] == [{"name": "kept"}] and "that" in found["machine"] and "this" in found["machine"]
    with pytest.raises(SystemExit, match="protocol"):
        accuracy.begin(file, {**new, "protocol": {"steps": 4}})
