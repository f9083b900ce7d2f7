"""`python -m training`: from the small world to a classifier file, resuming, and clear errors."""
from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from dev.standalone import load_pack

load_pack()

command = importlib.import_module("learn_to_steer.training.command")
checkpoint = importlib.import_module("learn_to_steer.classifiers.checkpoint")

BUILD = ["--source", "drawn", "--per-relation", "1", "1", "1", "--steps", "4", "--iterations", "1", "--batch", "4"]


def test_build_and_train(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, run, saved = tmp_path / "data", tmp_path / "run", tmp_path / "weights" / "mine.safetensors"
    assert command.main(["build", str(data), *BUILD]) == 0
    assert "train: 8 samples of 4 pictures" in capsys.readouterr().out
    training = ["train", str(run), "--data", str(data), "--d-model", "32", "--epochs", "2", "--save", str(saved),
                "--without-wrong-captions", "--without-nouns", "zebra"]
    assert command.main(training) == 0
    assert "said_the_captions_word" in capsys.readouterr().out
    classifier = checkpoint.load_classifier(saved)
    assert classifier.training["settings"]["wrong_captions"] is False
    assert "Noto Color Emoji" in classifier.licence
    before = saved.read_bytes()
    assert command.main(training) == 0  # there is nothing left to do
    assert saved.read_bytes() == before
    saved.write_bytes(b"precious")
    assert command.main(training) == 1  # before anything is trained
    assert "mine.safetensors is there already. Choose another name, or add --overwrite" in capsys.readouterr().err
    assert saved.read_bytes() == b"precious"
    assert command.main([*training, "--overwrite"]) == 0
    assert saved.read_bytes() == before
    assert command.main(["calibrate", str(data), "--save", str(saved)]) == 1
    assert "is there already" in capsys.readouterr().err and saved.read_bytes() == before
    assert command.main(["calibrate", str(data), "--save", str(tmp_path / "rule.safetensors")]) == 1
    assert "No channel is right more often than chance on 4 pictures" in capsys.readouterr().err
    assert command.main([*training, "--seed", "1"]) == 1
    assert "other data or settings" in capsys.readouterr().err


def test_ctrl_c_says_that_the_same_command_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    original = command._bar

    def stop(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "_bar", stop)
    assert command.main(["build", str(tmp_path), *BUILD]) == 130
    assert "the same command resumes" in capsys.readouterr().out
    assert not (tmp_path / "manifest.json").exists()
    monkeypatch.setattr(command, "_bar", original)
    assert command.main(["build", str(tmp_path), *BUILD]) == 0
    assert json.loads((tmp_path / "manifest.json").read_text())["splits"]["test"]["pictures"] == 4


def test_a_file_that_the_loader_would_not_list_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        command.main(["train", str(tmp_path), "--data", str(tmp_path), "--save", "mine.pth"])
    assert "'mine.pth' must end in .safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nul", "x" * 250])
def test_a_name_that_some_system_cannot_have_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, name: str) -> None:
    with pytest.raises(SystemExit):
        command.main(["calibrate", str(tmp_path), "--save", str(tmp_path / f"{name}.safetensors")])
    assert "too long" in (message := capsys.readouterr().err) or "Windows" in message


@pytest.mark.parametrize(("words", "message"), [
    (["build", "{}", "--source", "drawn"], "--per-relation"),
    (["build", "{}", "--source", "folder"], "--pictures"),
    (["build", "{}", *BUILD, "--model", "gone.safetensors"], "There is no file gone.safetensors"),
    (["build", "{}", *BUILD, "--timesteps", "7"], "do not lie within"),
    (["train", "{}", "--data", "{}"], "holds no dataset"),
    (["calibrate", "{}", "--save", "{}.safetensors"], "holds no dataset"),
])
def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], message: str) -> None:
    assert command.main([word.format(tmp_path / "nothing") for word in words]) == 1
    assert message in capsys.readouterr().err
