"""dev.py's command line and environment, as far as they go without building one."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dev import cli, environment
from dev.environment import Failure, existing_environment, folder_lock, open_environment, step
from dev.server import prepare_base, unlink_pack, write_model_paths


def test_words_for_other_programs_pass_unchanged():
    assert cli.parse(["test", "-k", "name", "-x", "tests/unit"]).rest == ["-k", "name", "-x", "tests/unit"]
    bench = cli.parse(["bench", "accuracy", "--backbone", "unet", "--json", "file", "--help"])
    assert bench.what == "accuracy" and bench.rest == ["--backbone", "unet", "--json", "file", "--help"]
    words = ["-m", "dev.toyworld.train", "unet", "--seed", "3"]
    assert cli.parse(["run", *words]).rest == words


@pytest.mark.parametrize("words", [["demo", "--sed", "3"], ["serve", "extra"], [],
                                   ["test", "--fresh", "--comfyui", "x"]])
def test_wrong_words_are_refused(words):
    with pytest.raises(SystemExit) as caught:
        cli.parse(words)
    assert caught.value.code == 2


def test_folder_that_is_no_comfyui(tmp_path):
    with pytest.raises(Failure, match="not a ComfyUI folder"):
        existing_environment(tmp_path, None)


def test_existing_installation_brings_its_python():
    host = Path(os.environ["COMFYUI_PATH"])
    found = existing_environment(host, sys.executable)
    assert found.host == host.resolve() and found.python == Path(sys.executable) and not found.pinned
    with pytest.raises(Failure, match="no_such_module"):
        found.need("json", "no_such_module")


def test_relative_paths_are_the_users(tmp_path):
    (tmp_path / "words.txt").write_text("a dog beside a cat\n")
    (tmp_path / "steering").mkdir()  # not the repository's, nor is ComfyUI's `nodes` where somebody starts in its folder
    words = ["bench", "geneval", "--server", "http://127.0.0.1:9", "--workflow", "none.json", "--prompts", "words.txt",
             "--out", "x"]
    run = subprocess.run([sys.executable, str(environment.ROOT / "dev.py"), *words, "--comfyui", os.environ["COMFYUI_PATH"],
                          "--python", sys.executable], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 1 and "words.txt, line 1: no relation was found" in run.stdout, run.stdout + run.stderr


def test_failing_step_shows_its_output(tmp_path):
    with pytest.raises(Failure, match="(?s)a step: failed. A hint..*out of luck"):
        step("a step", [sys.executable, "-c", "import sys; sys.exit('out of luck')"], tmp_path / "log", tmp_path,
             "A hint.")


def test_half_made_environment_is_made_anew_and_then_kept(tmp_path, monkeypatch):
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if len(built) > 1:
            (folder / "complete").touch()
        else:
            raise Failure("no network")

    monkeypatch.setenv("LEARN_TO_STEER_CACHE", str(tmp_path))
    monkeypatch.setattr(environment, "build_environment", build)
    with pytest.raises(Failure, match="no network"), open_environment(None, None):
        pass
    for _ in range(2):
        with open_environment(None, None) as opened:
            assert opened.host == built[0] / "ComfyUI"
    assert len(built) == 2
    with open_environment(None, None, fresh=True):
        assert built[2] != built[0] and built[2].exists()
    assert not built[2].exists() and built[0].exists()


def test_lock_is_held_and_freed_even_by_a_killed_process(tmp_path):
    script = ("import sys, time; sys.path.insert(0, sys.argv[1])\n"
              "from pathlib import Path; from dev.environment import folder_lock\n"
              "with folder_lock(Path(sys.argv[2])): print('held', flush=True); time.sleep(60)")
    words = [sys.executable, "-c", script, str(environment.ROOT), str(tmp_path / "env")]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline().strip() == b"held"
        with (tmp_path / "env.lock").open("w") as handle:
            assert not environment.try_lock(handle.fileno())
        holder.kill()
    with folder_lock(tmp_path / "env"):
        pass


def test_base_folder_links_the_pack_and_unlinks_only_the_link(tmp_path):
    pack, base = tmp_path / "pack", tmp_path / "base"
    pack.mkdir()
    (pack / "file").touch()
    for _ in range(2):  # a second start finds the first one's link
        prepare_base(base, pack)
    assert (base / "custom_nodes" / "learn-to-steer" / "file").exists()
    unlink_pack(base)
    assert (pack / "file").exists() and not list((base / "custom_nodes").iterdir())


def test_models_of_an_installation_are_offered(tmp_path):
    for name in ("checkpoints", "relation_classifiers", "configs"):
        (tmp_path / "models" / name).mkdir(parents=True)
    text = write_model_paths(tmp_path, tmp_path).read_text(encoding="utf-8")
    assert 'checkpoints: "checkpoints"' in text and "relation_classifiers" in text and "configs" not in text
