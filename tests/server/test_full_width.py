"""The shipped workflows for real models on the real server, with models of real width.

The weights are random, so pictures are not checked. Files, loaders, shapes, memory and wiring are real.
"""
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from dev.workflow import to_prompt

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
SMALL = {"width": 192, "height": 128, "steps": 3, "max_updates": 1}


def workflows_with(loader: str) -> list:
    """The shipped workflows with this loader node. The small world's and the training workflow have none."""
    return [pytest.param(file, id=file.stem) for file in sorted(FOLDER.glob("*.json"))
            if any(node["type"] == loader for node in json.loads(file.read_text(encoding="utf-8"))["nodes"])]


@contextmanager
def model_files(server, family: str, memory: int, disk: int) -> Iterator[None]:
    """The family's files in the server's model folders, removed afterwards; needs `memory` and `disk` in GB."""
    server.client.free()
    folder = server.base / "models"
    if psutil.virtual_memory().available < memory * 2**30 or shutil.disk_usage(folder).free < disk * 2**30:
        pytest.skip(f"needs {memory} GB of free memory and {disk} GB of disk for weights of the real width")
    before = {file for file in folder.rglob("*") if file.is_file()}
    script = Path(__file__).with_name("full_width.py")
    subprocess.run([sys.executable, str(script), family, str(folder)], check=True,
                   env={**os.environ, "PYTHONPATH": str(FOLDER.parent)})
    made = {file for file in folder.rglob("*") if file.is_file()} - before
    yield
    server.client.free()
    for file in made:
        file.unlink()


@pytest.fixture(scope="module")
def sd21(server):
    with model_files(server, "sd21", memory=8, disk=4):
        yield


@pytest.fixture(scope="module")
def flux(server):
    with model_files(server, "flux", memory=13, disk=5):
        yield


@pytest.mark.parametrize("file", workflows_with("CheckpointLoaderSimple"))
def test_sd21_runs_to_the_end_at_real_width(sd21, server, file: Path):
    run(server, file)


@pytest.mark.parametrize("file", workflows_with("UNETLoader"))
def test_flux_runs_to_the_end_at_real_width(flux, server, file: Path):
    """The server caches T5 and the encoded prompt between prompts, as for a user."""
    run(server, file)


def run(server, file: Path) -> None:
    client = server.client
    prompt = to_prompt(json.loads(file.read_text(encoding="utf-8")), client.object_info())
    for node in prompt.values():
        node["inputs"] |= {key: min(value, node["inputs"][key]) for key, value in SMALL.items()
                           if isinstance(node["inputs"].get(key), int)}
    log = len(server.log_text())
    result = client.run(prompt)
    made = {prompt[node_id]["class_type"] for node_id in result.outputs if result.images(node_id)}
    steered = file.stem != "attention_maps"
    assert made == {"SaveImage", "LearnToSteerOverlay"} | ({"LearnToSteerReport"} if steered else set())
    pictures = [client.image(result.images(node_id)[0]) for node_id in prompt if prompt[node_id]["class_type"] == "SaveImage"]
    assert len({*pictures}) == len(pictures)  # without and with steering, where the workflow has both
    for picture in pictures:
        assert picture.startswith(b"\x89PNG")
        assert [int.from_bytes(picture[place:place + 4], "big") for place in (16, 20)] == [SMALL["width"], SMALL["height"]]
    if steered:
        report = next(result.text(node_id) for node_id in prompt if prompt[node_id]["class_type"] == "LearnToSteerReport")
        assert re.search(r"[1-9]\d* gradient evaluations in .*[1-9]\d* moved", report), report
        assert report.count("relation:") == (3 if file.stem == "multi_relation" else 1)
    logged = server.log_text()[log:]
    assert not re.search("key not loaded|missing|unexpected", logged), logged  # each file is all that its loader wants
