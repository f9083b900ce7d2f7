"""The shipped workflows on the real server: valid, and run to the end."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dev import demo
from dev.client import Client, ServerError
from dev.workflow import to_prompt
from dev.workflows.build import SHEETS

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
SMALL = [file for file in FILES if file.name.startswith("toyworld_")]
LARGE = [file for file in FILES if file not in SMALL and not file.name.startswith("train_")]
FLUX_FILES = {("UNETLoader", "unet_name"), ("DualCLIPLoader", "clip_name1"), ("DualCLIPLoader", "clip_name2"),
              ("VAELoader", "vae_name")}
CHECKPOINT_FILES = {("CheckpointLoaderSimple", "ckpt_name")}
MISSING = {
    "sd21_steering": CHECKPOINT_FILES, "attention_maps": CHECKPOINT_FILES, "flux_dev_steering": FLUX_FILES,
    "personalised_lora": CHECKPOINT_FILES | {("LoraLoader", "lora_name")}, "flux_schnell_steering": FLUX_FILES,
    "multi_relation": FLUX_FILES,
}
"""Workflow -> fields that name a file to be downloaded by the user."""
STAND_IN = {  # (loader, output) -> output of Load Small World
    ("CheckpointLoaderSimple", 0): 0, ("CheckpointLoaderSimple", 1): 1, ("CheckpointLoaderSimple", 2): 2,
    ("UNETLoader", 0): 0, ("DualCLIPLoader", 0): 1, ("VAELoader", 0): 2}
STEPS = 4


def read(file: Path, object_info: dict) -> dict:
    return to_prompt(json.loads(file.read_text(encoding="utf-8")), object_info)


def ids(files: list[Path]) -> list[str]:
    return [file.stem for file in files]


def test_every_workflow_is_there():
    assert {file.stem for file in FILES} >= {*MISSING, *SHEETS}
    assert {file.stem for file in LARGE} == {*MISSING}


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_thumbnail_is_there_and_small(file: Path):
    thumbnail = file.with_suffix(".jpg")
    assert thumbnail.read_bytes().startswith(b"\xff\xd8\xff")
    assert thumbnail.stat().st_size <= 60 * 1024


@pytest.mark.parametrize("file", FILES, ids=ids(FILES))
def test_every_node_says_which_pack_it_is_from(file: Path, object_info: dict):
    project = (FOLDER.parent / "pyproject.toml").read_text(encoding="utf-8")
    for node in json.loads(file.read_text(encoding="utf-8"))["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        ours = object_info[node["type"]]["python_module"].startswith("custom_nodes")
        assert node["properties"]["cnr_id"] == ("learn-to-steer" if ours else "comfy-core"), node["type"]
        assert not ours or f'\nversion = "{node["properties"]["ver"]}"\n' in project


@pytest.mark.parametrize("name", SHEETS)
def test_file_is_what_the_tool_writes(name: str, object_info: dict):
    """Also after a change of a node's fields or defaults: `python dev.py run -m dev.workflows.build` writes the files again."""
    written = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    for node in written["nodes"]:
        lacking = {output["name"] for output in node["outputs"]} - {*object_info.get(node["type"], {}).get("output_name", ())}
        if node["properties"].get("cnr_id") == "comfy-core" and lacking:
            pytest.skip(f"the files are written on a newer ComfyUI; in this one {node['type']} has no output {lacking}")
    assert written == SHEETS[name](name, object_info).document()


@pytest.mark.parametrize("file", LARGE, ids=ids(LARGE))
def test_nothing_but_model_files_is_missing(file: Path, client: Client, object_info: dict):
    with pytest.raises(ServerError) as caught:
        client.submit(read(file, object_info))
    assert caught.value.kind == "validation"
    assert {(error.node_type, error.input) for error in caught.value.errors} == MISSING[file.stem]
    assert all("not in list" in error.message.lower() for error in caught.value.errors), caught.value


@pytest.mark.parametrize("file", SMALL, ids=ids(SMALL))
def test_small_world_runs_unmodified(file: Path, server, object_info: dict, tmp_path):
    prompt = read(file, object_info)
    result = server.client.run(prompt, timeout=600)
    files = demo.save_pictures(server, result, tmp_path)
    assert {*files} == {"unsteered", "steered", "attention_unsteered", "attention_steered", "probability"}
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in files.values())
    assert files["unsteered"].read_bytes() != files["steered"].read_bytes()
    texts = {node["class_type"]: result.text(node_id) for node_id, node in prompt.items() if result.text(node_id)}
    assert {*texts} == {"LearnToSteerGraph", "LearnToSteerReport", "LearnToSteerToyJudge"}
    assert "gradient evaluations" in texts["LearnToSteerReport"]
    assert texts["LearnToSteerToyJudge"].startswith("seen: ")


def test_training_ends_in_a_file_that_the_loader_lists(server, object_info: dict):
    prompt = read(FOLDER / "train_relation_classifier.json", object_info)
    small = {"train_per_relation": 2, "validation_per_relation": 1, "test_per_relation": 1, "steps": 4, "iterations": 1,
             "epochs": 2}
    for node in prompt.values():
        node["inputs"] |= {name: value for name, value in small.items() if name in node["inputs"]}
    result = server.client.run(prompt, timeout=600)
    shown = {prompt[node_id]["_meta"]["title"] for node_id in result.outputs if result.images(node_id)}
    assert shown == {"Confusion matrix", "Loss"}
    file = server.base / "models" / "relation_classifiers" / "small_world.safetensors"
    assert file.is_file()
    listed = server.client.object_info("LearnToSteerClassifierLoader")["LearnToSteerClassifierLoader"]["input"]["required"]
    assert "small_world.safetensors" in str(listed)
    file.unlink()


def with_small_world(prompt: dict) -> dict:
    """The prompt with the small model on the same links, at its own size and with few steps."""
    loaders = {node_id: node["class_type"] for node_id, node in prompt.items()
               if (node["class_type"], 0) in STAND_IN}
    replaced = {node_id: node for node_id, node in prompt.items() if node_id not in loaders}
    for node in replaced.values():
        inputs = node["inputs"]
        for name, value in inputs.items():
            if isinstance(value, list) and value[0] in loaders:
                inputs[name] = ["small world", STAND_IN[loaders[value[0]], value[1]]]
        inputs |= {name: value for name, value in (("width", 64), ("height", 64), ("steps", STEPS))
                   if isinstance(inputs.get(name), int)}
    replaced["small world"] = {"class_type": "LearnToSteerToyLoader", "inputs": {"backbone": "unet"}}
    return replaced


@pytest.fixture
def lora(server):
    """A LoRA file with the name used in the workflow. Its one tensor fits no layer, which the host only logs."""
    file = server.base / "models" / "loras" / "my_dog_lora.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"lora_unet_nothing.alpha": torch.ones(1)}, file)
    server.client.object_info("LoraLoader")  # has the server list the folder again
    yield
    file.unlink()


@pytest.mark.parametrize("file", LARGE, ids=ids(LARGE))
def test_wiring_runs_with_the_small_world_in_place_of_the_large_model(file: Path, client: Client, object_info: dict,
                                                                      lora):
    prompt = with_small_world(read(file, object_info))
    result = client.run(prompt, timeout=600)
    made = {prompt[node_id]["class_type"] for node_id in result.outputs if result.images(node_id)}
    if file.stem == "attention_maps":
        assert made == {"SaveImage", "LearnToSteerOverlay"}
        assert sorted(len(result.images(node_id)) for node_id in prompt
                      if prompt[node_id]["class_type"] == "LearnToSteerOverlay") == [1, STEPS]
        return
    assert made == {"SaveImage", "LearnToSteerOverlay", "LearnToSteerReport"}
    report = next(result.text(node_id) for node_id in prompt if prompt[node_id]["class_type"] == "LearnToSteerReport")
    assert "gradient evaluations" in report
    assert report.count("relation:") == (3 if file.stem == "multi_relation" else 1)
