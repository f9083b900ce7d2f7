"""The parts of `dev.py demo`, on a workflow of stock nodes alone."""
from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from dev import demo
from dev.client import ServerError
from dev.environment import ROOT
from dev.server import Server
from dev.workflow import WorkflowError

STOCK = {
    "version": 0.4,
    "nodes": [
        {"id": 1, "type": "PrimitiveStringMultiline", "title": "Prompt", "mode": 0, "inputs": [],
         "outputs": [{"name": "STRING", "type": "STRING"}], "widgets_values": ["a dog above a cat"]},
        {"id": 2, "type": "PreviewAny", "mode": 0, "inputs": [{"name": "source", "type": "*", "link": 1}],
         "outputs": []},
        {"id": 3, "type": "RandomNoise", "title": "Noise", "mode": 0, "inputs": [],
         "outputs": [{"name": "NOISE", "type": "NOISE"}], "widgets_values": [5, "fixed"]},
        {"id": 4, "type": "EmptyImage", "mode": 0, "inputs": [], "outputs": [{"name": "IMAGE", "type": "IMAGE"}],
         "widgets_values": [32, 32, 1, 255]},
        {"id": 5, "type": "SaveImage", "mode": 0, "inputs": [{"name": "images", "type": "IMAGE", "link": 2}],
         "outputs": [], "widgets_values": ["learn_to_steer/steered"]},
        {"id": 6, "type": "SaveImage", "mode": 0, "inputs": [{"name": "images", "type": "IMAGE", "link": 3}],
         "outputs": [], "widgets_values": ["other/unwanted"]}],
    "links": [[1, 1, 0, 2, 0, "STRING"], [2, 4, 0, 5, 0, "IMAGE"], [3, 4, 0, 6, 0, "IMAGE"]],
}


@pytest.fixture
def stock_file(tmp_path):
    file = tmp_path / "stock.json"
    file.write_text(json.dumps(STOCK), encoding="utf-8")
    return file


def test_pictures_are_saved_under_their_names(server: Server, stock_file, tmp_path, capsys):
    text, files = demo.make_pictures(server, stock_file, tmp_path / "out", None, None)
    assert text == "a dog above a cat"
    assert files == {"steered": tmp_path / "out" / "steered.png"}
    assert list((tmp_path / "out").iterdir()) == [*files.values()]
    assert files["steered"].read_bytes().startswith(b"\x89PNG")
    assert "Prompt" in capsys.readouterr().out


def test_prompt_and_seed_are_set(server: Server, stock_file, tmp_path):
    text, _ = demo.make_pictures(server, stock_file, tmp_path / "out", "a car below a dog", 1234)
    assert text == "a car below a dog"
    newest = max(server.client.get("/history").values(), key=lambda entry: entry["prompt"][0])
    assert newest["prompt"][2]["3"]["inputs"]["noise_seed"] == 1234
    assert newest["outputs"]["2"]["text"] == ["a car below a dog"]


def test_workflow_without_a_prompt_node_is_told(server: Server, tmp_path):
    file = tmp_path / "none.json"
    file.write_text(json.dumps({**STOCK, "nodes": STOCK["nodes"][3:5]}), encoding="utf-8")
    with pytest.raises(WorkflowError, match="no node titled 'Prompt'"):
        demo.make_pictures(server, file, tmp_path / "out", None, None)


def test_death_of_the_server_shows_its_log(stock_file, tmp_path, server: Server):
    """Uses a separate server, because the test kills it."""
    with Server(server.python, server.host, pack=None) as other:
        other._process.kill()
        other._process.wait()
        with pytest.raises(ServerError, match="(?s)ComfyUI died.*To see the GUI go to"):
            demo.make_pictures(other, stock_file, tmp_path / "out", None, None)


def test_serve_prints_its_address_and_ends_on_a_polite_kill(server: Server, tmp_path, monkeypatch):
    monkeypatch.setenv("LEARN_TO_STEER_CACHE", str(tmp_path))
    words = ["serve", "--comfyui", str(server.host), "--python", sys.executable]
    with subprocess.Popen([sys.executable, "dev.py", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stdout if "in a browser" in line)
        address = next(word for word in line.split() if word.startswith("http"))
        serving = type(server.client)(address)
        assert "KSampler" in serving.object_info("KSampler")
        process.terminate()
        process.communicate(timeout=60)
    with pytest.raises(ServerError, match="No answer"):
        for _ in range(20):
            serving.get("/system_stats")
            time.sleep(0.5)
