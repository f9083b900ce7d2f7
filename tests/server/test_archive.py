"""What a user gets from the registry: small, whole, and at work on a machine whose locale is not UTF-8."""
from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev import archive, demo
from dev.environment import ROOT
from dev.server import Server

LARGEST = 16e6
LARGEST_TREE = 24e6
ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
"""Python then reads and prints ASCII where nothing says otherwise, which is stricter than Windows' cp1252."""

pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or subprocess.call(["git", "-C", str(ROOT), "rev-parse"], stderr=subprocess.DEVNULL) != 0,
    reason="the archive is made of the files that git tracks, and this is no clone (or git is missing)")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("archive") / "node.zip"
    archive.write_archive(target)
    return target


@pytest.fixture(scope="module")
def ascii_server(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A ComfyUI in the C locale, into whose custom_nodes the archive alone was unpacked."""
    base = tmp_path_factory.mktemp("base")
    with zipfile.ZipFile(published) as content:
        content.extractall(base / "custom_nodes" / "unpacked")
    host = Path(os.environ["COMFYUI_PATH"])
    with Server(Path(sys.executable), host, base=base, pack=None, variables=ASCII_LOCALE) as server:
        yield server


def test_the_archive_and_the_repository_are_small(published: Path) -> None:
    assert published.stat().st_size <= LARGEST
    tracked = subprocess.check_output(["git", "-C", str(ROOT), "ls-files", "-z"], encoding="utf-8").split("\0")
    assert sum((ROOT / name).stat().st_size for name in tracked if (ROOT / name).is_file()) <= LARGEST_TREE


def test_the_archive_holds_what_runs_and_nothing_for_developers(published: Path) -> None:
    names = zipfile.ZipFile(published).namelist()
    rooms = {name.split("/")[0] for name in names}
    assert rooms >= {"__init__.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "nodes", "host", "steering",
                     "prompts", "classifiers", "pictures", "training", "toyworld", "files", "web", "workflows"}
    assert not rooms & {"dev", "dev.py", "tests", ".ci", ".github", ".gitignore", ".comfyignore", "requirements-dev.txt"}
    assert not [name for name in names if "octopus" in name or "held_out" in name or "true_captions" in name]
    assert {name for name in names if name.startswith("workflows/toyworld_") and name.endswith(".json")}


def test_the_pack_loads_in_an_ascii_locale(ascii_server: Server) -> None:
    assert not ascii_server.failed_imports()
    ours = {name for name, node in ascii_server.client.object_info().items()
            if node["python_module"] == "custom_nodes.unpacked"}
    assert "LearnToSteerKSampler" in ours and len(ours) >= 14
    log = ascii_server.log_text()
    assert "UnicodeDecodeError" not in log and "UnicodeEncodeError" not in log, log


def test_the_first_workflow_steers_from_the_unpacked_archive(ascii_server: Server, tmp_path: Path) -> None:
    """With words that ASCII cannot hold in its prompt."""
    workflow = ascii_server.base / "custom_nodes" / "unpacked" / "workflows" / "toyworld_steering.json"
    prompt, _ = demo.read_workflow(ascii_server, workflow, "a photo of a dog to the left of a cat, caf\u00e9 \u2192 \u72ac", 7)
    result = ascii_server.client.run(prompt, timeout=600)
    pictures = demo.save_pictures(ascii_server, result, tmp_path)
    assert pictures["unsteered"].read_bytes() != pictures["steered"].read_bytes()
    report = next(result.text(node) for node in prompt if prompt[node]["class_type"] == "LearnToSteerReport")
    assert int(re.search(r"(\d+) gradient evaluations", report).group(1)) > 0
    assert "to the left of" in report
    log = ascii_server.log_text()
    assert "UnicodeDecodeError" not in log and "UnicodeEncodeError" not in log, log
