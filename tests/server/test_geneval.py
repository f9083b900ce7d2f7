"""`bench geneval`: folders as GenEval's evaluator reads them, through a real server, going on after a stop."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import geneval

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
    assert [folder.name for folder in out.iterdir()] == ["00000"]  # the other tag was left out
    files[1].unlink()
    files[0].write_bytes(b"made before")
    assert command(server, monkeypatch, prompts, out, "--picture-title", "Save steered picture") == 0
    assert files[0].read_bytes() == b"made before" and files[1].read_bytes().startswith(PNG)
    assert "1 pictures made" in capsys.readouterr().out


def test_says_which_pictures_there_are(server, monkeypatch, tmp_path: Path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a dog to the left of a cat\n")
    assert command(server, monkeypatch, prompts, tmp_path / "out") == 1
    assert "'Save steered picture'" in capsys.readouterr().out


def test_a_plain_prompt_gets_genevals_record():
    made = geneval.record("a photo of a dog to the left of a teddy bear")
    assert made["include"] == [{"class": "dog", "count": 1, "position": ["left of", 1]}, {"class": "teddy bear", "count": 1}]


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.jsonl", "{", "line 1: not a GenEval record"), ("a.jsonl", '{"tag": "colors", "prompt": "x"}', "no prompt with the tag"),
    ("a.txt", "\n", "no prompt"),
])
def test_bad_prompt_files(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(geneval.GenevalError, match=message):
        geneval.read_prompts(tmp_path / name, ("position",))
