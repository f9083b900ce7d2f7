"""`bench geneval` on a real server: writes the folders that GenEval's evaluator reads, and resumes after a stop."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dev.benchmarks import geneval
from dev.client import Client, ServerError
from dev.workflow import set_seeds, set_text, to_prompt

WORKFLOW = Path(__file__).resolve().parents[2] / "workflows" / "toyworld_steering.json"
PNG = b"\x89PNG"


def command(server, monkeypatch, prompts: Path, out: Path, *more: str) -> int:
    words = ["geneval", "--server", server.address, "--workflow", str(WORKFLOW), "--prompts", str(prompts), "--out",
             str(out), "--samples", "2", *more]
    monkeypatch.setattr(sys, "argv", words)
    return geneval.main()


def test_writes_genevals_folders_and_goes_on(server, monkeypatch, tmp_path: Path, capsys):
    entry = {"tag": "position", "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}],
             "prompt": "a photo of a dog above a cat"}
    prompts, out = tmp_path / "evaluation_metadata.jsonl", tmp_path / "out"
    prompts.write_text(json.dumps({"tag": "colors", "prompt": "a red dog"}) + "\n" + json.dumps(entry) + "\n")
    assert command(server, monkeypatch, prompts, out, "--picture-title", "Save steered picture") == 0
    assert json.loads((out / "00000" / "metadata.jsonl").read_text()) == entry
    files = sorted((out / "00000" / "samples").iterdir())
    assert [file.name for file in files] == ["00000.png", "00001.png"]
    pictures = [file.read_bytes() for file in files]
    assert pictures[0].startswith(PNG) and pictures[0] != pictures[1]
    assert [folder.name for folder in out.iterdir() if folder.is_dir()] == ["00000"]  # the other tag was left out
    files[1].unlink()
    files[0].write_bytes(b"made before")
    assert command(server, monkeypatch, prompts, out, "--picture-title", "Save steered picture") == 0
    assert files[0].read_bytes() == b"made before" and files[1].read_bytes().startswith(PNG)
    assert "1 pictures made" in capsys.readouterr().out
    assert command(server, monkeypatch, prompts, out, "--picture-title", "Save steered picture", "--seed", "7") == 1
    assert "generation.json is of another workflow, seed or title" in capsys.readouterr().out
    (out / "00000" / "metadata.jsonl").write_text('{"tag')
    assert command(server, monkeypatch, prompts, out, "--picture-title", "Save steered picture") == 1
    assert "metadata.jsonl is damaged" in capsys.readouterr().out


def test_a_prompt_that_fails_does_not_end_the_run(server, monkeypatch, tmp_path: Path, capsys):
    run = Client.run

    def failing(self, prompt, *rest, **more):
        if "zebra" in json.dumps(prompt):
            raise ServerError("execution", "A node failed.")
        return run(self, prompt, *rest, **more)

    monkeypatch.setattr(Client, "run", failing)
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text("a zebra to the left of a cat\na dog to the left of a cat\n")
    assert command(server, monkeypatch, prompts, out, "--picture-title", "Save steered picture") == 1
    told = capsys.readouterr().out
    assert "pictures made: 2, prompts that failed: 1" in told and "00000/00000.png: a zebra" in told
    assert not list((out / "00000" / "samples").iterdir()) and len(list((out / "00001" / "samples").iterdir())) == 2


def test_says_which_pictures_there_are(server, monkeypatch, tmp_path: Path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog to the left of a cat\n")
    assert command(server, monkeypatch, prompts, tmp_path / "out") == 1
    assert "'Save steered picture'" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sd21_steering", "flux_dev_steering", "flux_schnell_steering", "personalised_lora",
                                  "toyworld_steering", "toyworld_flux_steering"])
def test_every_steering_workflow_can_be_measured(server, name: str):
    info = server.client.object_info()
    prompt = to_prompt(json.loads((WORKFLOW.parent / f"{name}.json").read_text(encoding="utf-8")), info)
    set_text(prompt, info, "Prompt", "a dog above a cat")
    set_seeds(prompt, 3)
    assert prompt[geneval.picture_node(prompt, "Save steered picture")]["class_type"] == "SaveImage"


def evaluate(include: list[dict], boxes: dict[str, tuple[float, float]], holds: dict) -> bool:
    """GenEval's loop over the clauses of a record (evaluate_images.py), with one centre for each class."""
    groups: list = []
    for clause in include:
        found = boxes.get(clause["class"])
        if found is not None and "position" in clause:
            relation, target = clause["position"]
            if groups[target] is None or not holds[relation](found, groups[target]):
                return False
        groups.append(found)
    return None not in groups


HOLDS = {"left of": lambda a, b: a[0] < b[0], "right of": lambda a, b: a[0] > b[0], "above": lambda a, b: a[1] < b[1],
         "below": lambda a, b: a[1] > b[1]}


@pytest.mark.parametrize(("prompt", "right", "wrong"), [
    ("a photo of a dog to the left of a teddy bear", {"dog": (0, 0), "teddy bear": (1, 0)},
     {"dog": (1, 0), "teddy bear": (0, 0)}),
    ("a dog above a cat to the left of a car", {"dog": (0, 0), "cat": (0, 1), "car": (1, 1)},
     {"dog": (0, 0), "cat": (2, 1), "car": (1, 1)}),
    ("a dog above a cat and a car to the left of a tree", {"dog": (0, 0), "cat": (0, 1), "car": (0, 0), "tree": (1, 0)},
     {"dog": (0, 0), "cat": (0, 1), "car": (1, 0), "tree": (0, 0)}),
    ("a dog above and to the left of a cat", {"dog": (0, 0), "cat": (1, 1)}, {"dog": (2, 0), "cat": (1, 1)}),
    ("a hot dog to the left of a dog", {"hot dog": (0, 0), "dog": (1, 0)}, {"hot dog": (0, 0)}),
])
def test_a_plain_prompt_gets_a_record_that_genevals_loop_can_follow(prompt: str, right: dict, wrong: dict):
    include = geneval.record(prompt)["include"]
    assert {clause["class"] for clause in include} == set(right)
    assert evaluate(include, right, HOLDS) and not evaluate(include, wrong, HOLDS)


def test_one_relation_gets_genevals_own_record():
    assert geneval.record("a photo of a dog to the left of a teddy bear")["include"] == [
        {"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.jsonl", "{", "line 1: not a GenEval record"), ("a.jsonl", '{"tag": "colors", "prompt": "x"}', "no prompt with the tag"),
    ("a.txt", "\n", "no prompt"), ("a.txt", "a dog above a cat\n\na dog next to a cat\n", "line 3: no relation was found"),
    ("a.txt", "a dog to the left of another dog\n", "line 1: .*does not tell apart"),
    ("a.txt", "a dog above a cat and another dog to the left of a car\n", "line 1: .*two of 'dog'"),
    ("a.txt", "a dog above a cat above a dog\n", "line 1: These relations contradict each other vertically"),
])
def test_bad_prompt_files(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(geneval.GenevalError, match=message):
        geneval.read_prompts(tmp_path / name, ("position",))
