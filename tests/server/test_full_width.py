"""The workflow for SD2.1 as it ships, through the real server, on a model of the real width.

The weights are random, so nothing is said about pictures; files, loaders, shapes, memory and wiring are real.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from devtools.workflow import to_prompt

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
STEPS, SIDE = 5, 256
MEMORY_GB, DISK_GB = 8, 4  # that a run takes, generously


@pytest.fixture
def models(server):
    """The files in the server's model folders, removed afterwards."""
    folder = server.base / "models"
    if psutil.virtual_memory().available < MEMORY_GB * 2**30 or shutil.disk_usage(folder).free < DISK_GB * 2**30:
        pytest.skip(f"needs {MEMORY_GB} GB of free memory and {DISK_GB} GB of disk for weights of the real width")
    before = {file for file in folder.rglob("*") if file.is_file()}
    script = Path(__file__).with_name("full_width.py")
    subprocess.run([sys.executable, str(script), str(folder)], check=True,
                   env={**os.environ, "PYTHONPATH": str(FOLDER.parent)})
    server.client.object_info("CheckpointLoaderSimple")  # has the server list the folders again
    yield
    server.client.free()
    for file in {file for file in folder.rglob("*") if file.is_file()} - before:
        file.unlink()


def test_runs_to_the_end_at_real_width(models, server, object_info: dict):
    client = server.client
    workflow = json.loads((FOLDER / "sd21_steering.json").read_text(encoding="utf-8"))
    prompt = to_prompt(workflow, client.object_info())
    for node in prompt.values():
        node["inputs"] |= {key: value for key, value in (("width", SIDE), ("height", SIDE), ("steps", STEPS),
                                                         ("max_updates", 1))
                           if isinstance(node["inputs"].get(key), int)}
    result = client.run(prompt, timeout=1200)
    made = {prompt[node_id]["class_type"]: result.images(node_id) for node_id in result.outputs
            if result.images(node_id)}
    assert set(made) == {"SaveImage", "LearnToSteerOverlay", "LearnToSteerReport"}
    assert client.image(made["SaveImage"][0]).startswith(b"\x89PNG")
    report = next(result.text(node_id) for node_id in prompt if prompt[node_id]["class_type"] == "LearnToSteerReport")
    assert "moved" in report and "gradient evaluations" in report, report
