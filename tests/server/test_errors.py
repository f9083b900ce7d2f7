"""Invalid input on the real server: the error names the node, the input and what to do; nothing else breaks."""
from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from dev.client import Client, ServerError


def small_world(prompt: str = "a dog above a cat", words: str = "", relations: str = "", classifier: str = "geometric (built in)",
                **graph) -> dict:
    """Captured and steered sampling of the small world, two steps."""
    return {
        "world": {"class_type": "LearnToSteerToyLoader", "inputs": {"backbone": "unet"}},
        "graph": {"class_type": "LearnToSteerGraph", "inputs": {"clip": ["world", 1], "prompt": prompt,
                                                                  "relations": relations, **graph}},
        "classifier": {"class_type": "LearnToSteerClassifierLoader", "inputs": {"classifier_name": classifier}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["world", 1], "text": ""}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
        "sampler": {"class_type": "LearnToSteerKSampler", "inputs": {
            "model": ["world", 0], "seed": 1, "steps": 2, "cfg": 2.0, "sampler_name": "ddim", "scheduler": "ddim_uniform",
            "positive": ["graph", 1], "negative": ["negative", 0], "latent_image": ["latent", 0], "denoise": 1.0,
            "graph": ["graph", 0], "classifier": ["classifier", 0], "start_percent": 0.0, "end_percent": 0.5, "step_size": 2.0,
            "max_updates": 1, "stop_probability": 0.9, "update_rule": "normalised", "relations_per_update": "all",
            "save_memory": False}},
        "report": {"class_type": "LearnToSteerReport", "inputs": {"report": ["sampler", 2]}},
    }


def failure(client: Client, prompt: dict) -> str:
    with pytest.raises(ServerError) as caught:
        client.run(prompt)
    return f"{caught.value.errors} {caught.value}"


def test_it_runs_and_reports(client: Client):
    result = client.run(small_world())
    assert "gradient evaluations" in result.text("report") and result.images("report")


@pytest.mark.parametrize(("change", "words"), [
    ({"relations": "dog | above | giraffe"}, ("LearnToSteerKSampler", "input 'positive'", "does not contain \"giraffe\"")),
    ({"prompt": "a photo of a dog"}, ("LearnToSteerGraph", "input 'prompt': no relation found", "Write one")),
    ({"relations": "dog | above | cat\ncat | above | dog"},
     ("LearnToSteerGraph", "input 'relations'", "contradict each other vertically", "Remove or reverse")),
    ({"relations": "dog | =inside | cat"}, ("LearnToSteerKSampler", "does not know the relation 'inside'", "It knows")),
    ({"relations": "dog | next to | cat"}, ("LearnToSteerGraph", "input 'relations'", "Line 1")),
], ids=["word not in the prompt", "no relation", "contradiction", "unknown relation", "bad line"])
def test_wrong_relations(client: Client, change: dict, words: tuple[str, ...]):
    text = failure(client, small_world(**change))
    assert all(word in text for word in words), text


def test_a_conditioning_without_token_positions(client: Client):
    prompt = small_world()
    prompt["sampler"]["inputs"]["positive"] = ["negative", 0]
    text = failure(client, prompt)
    assert "input 'positive'" in text and "Text Encode (Steerable)" in text


def test_a_prompt_without_a_relation_may_be_allowed(client: Client):
    result = client.run(small_world(prompt="a photo of a dog", allow_no_relation=True))
    assert "not steered: the graph has no relation" in result.text("report")


class Trap:
    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


def test_broken_classifier_files(client: Client, server):
    folder = Path(server.base) / "models" / "relation_classifiers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "broken.safetensors").write_bytes(b"x" * 400)
    torch.save({"model_state_dict": {"wrong": torch.zeros(1)}}, folder / "keys.pth")
    (folder / "code.pth").write_bytes(pickle.dumps({"model_state_dict": Trap()}))
    for name in ("empty.safetensors", "broken.safetensors", "keys.pth", "code.pth"):
        text = failure(client, small_world(classifier=name))
        assert "LearnToSteerClassifierLoader" in text and name in text, text
    assert not list(Path(server.base).rglob("sprung")) and not Path("sprung").exists()
    assert client.run(small_world()).text("report")
