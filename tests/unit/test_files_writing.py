"""Writing files: whole or not at all, never over another one unasked, by one process at a time, under names that can be."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from learn_to_steer.classifiers.checkpoint import load_classifier, save_classifier
from learn_to_steer.classifiers.convert import main as convert
from learn_to_steer.classifiers.geometric import GeometricClassifier
from learn_to_steer.files.faults import FileFault
from learn_to_steer.files.locks import locked
from learn_to_steer.files.names import fault_of_name
from learn_to_steer.files.writing import WriteError, replace_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def full_disk():
    """The system refuses to let any file grow beyond 10,000 bytes, as a full disk does."""
    resource = pytest.importorskip("resource", reason="Windows has no limit of a file's size")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file_and_says_which_one(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "mine.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(WriteError, match=r"mine\.safetensors cannot be written: File too large\. Free some space and try again"):
        replace_file(path, b"\0" * 20_000)
    assert os.listdir(tmp_path) == ["mine.safetensors"] and path.read_bytes() == b"old"


@pytest.mark.parametrize("place", ["no/such/folder/x", "x" * 300, "folder"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError, match=f"{place[:20]}.* cannot be written"):
        replace_file(tmp_path / place, b"")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("name", ["x" * 251, "\u00e9" * 125])
def test_the_longest_name_can_be_written(tmp_path: Path, name: str) -> None:
    assert fault_of_name(name, ".bin") is None
    replace_file(tmp_path / f"{name}.bin", b"1")
    assert (tmp_path / f"{name}.bin").read_bytes() == b"1"


@pytest.mark.parametrize(("name", "words"), [
    ("x" * 252, "too long"), ("\u00e9" * 126, "too long"), ("con", "Windows"), ("COM1", "Windows"), ("nul.small", "Windows"),
    ("LPT\u00b2", "Windows"), ("a/b", "plain name"), ("..", "plain name"), ("", "plain name"), ("a.", "plain name"),
    ("a\n", "plain name"), ("a:b", "plain name")])
def test_names_that_some_system_cannot_have(name: str, words: str) -> None:
    assert words in fault_of_name(name, ".bin")


HOLDER = """
import importlib, os, pathlib, signal, sys, time
sys.path.append(sys.argv[1])
importlib.import_module("dev")
locks = importlib.import_module("learn_to_steer.files.locks")
with locks.locked(pathlib.Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_lock_says_who_holds_it_and_ends_with_the_process(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(FileFault, match=rf"another run is at work there \(process {holder.pid}\)"), locked(tmp_path):
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        deadline = time.monotonic() + 10
        while True:
            try:
                with locked(tmp_path):
                    break
            except FileFault:
                assert time.monotonic() < deadline
        with locked(tmp_path), pytest.raises(FileFault, match=f"process {os.getpid()}"), locked(tmp_path):
            pass  # also within one process
    finally:
        holder.kill()
        holder.stdout.close()
        holder.wait()


def test_a_classifier_is_not_described_by_what_json_does_not_have(tmp_path: Path) -> None:
    rule = GeometricClassifier(channel_weights=torch.ones(2), training={"loss": float("nan")}, name="mine")
    with pytest.raises(ValueError, match="'mine': a number in its description is not finite"):
        save_classifier(tmp_path / "x.safetensors", rule)
    assert not os.listdir(tmp_path)


def test_convert_overwrites_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, target = tmp_path / "rule.safetensors", tmp_path / "out.safetensors"
    save_classifier(source, GeometricClassifier(channel_weights=torch.ones(2)))
    target.write_bytes(b"precious")
    with pytest.raises(SystemExit) as ended:
        convert([str(source), str(target)])
    assert ended.value.code == 1 and "is there already" in capsys.readouterr().err and target.read_bytes() == b"precious"
    assert convert([str(source), str(target), "--overwrite"]) == 0
    assert load_classifier(target).layout.channels == 2
    with pytest.raises(SystemExit):
        convert([str(source), str(source)])  # not over itself, either
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(SystemExit):
        convert([str(source), str(tmp_path / "folder.safetensors"), "--overwrite"])
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has other permissions")
@pytest.mark.parametrize("name", ["rule.safetensors", "rule.pth"])
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, name: str) -> None:
    """In a process without the superuser's rights, which may read everything."""
    path = tmp_path / name
    path.write_bytes(b"PK")
    path.chmod(0)
    script = ("import importlib, os, sys; sys.path.append(sys.argv[1]); importlib.import_module('dev')\n"
              "checkpoint = importlib.import_module('learn_to_steer.classifiers.checkpoint')\n"
              "os.chdir(sys.argv[2])\n"  # its parents are closed to others
              "os.geteuid() or os.seteuid(65534)\n"
              "try: checkpoint.load_classifier(sys.argv[3])\n"
              "except Exception as error: print(type(error).__name__, error)\n")
    tmp_path.chmod(0o755)
    result = subprocess.run([sys.executable, "-c", script, str(ROOT), str(tmp_path), name], capture_output=True, text=True,
                            check=False)
    assert result.stdout.startswith(f"ClassifierError {name}: ") and "cannot be read (Permission denied)" in result.stdout, result
