"""The client of dev.py and the server tests, with a real server."""
from __future__ import annotations

import time

import pytest

from dev.client import Client, PromptProgress, ServerError

BLUE = {"class_type": "EmptyImage", "inputs": {"width": 32, "height": 16, "batch_size": 2, "color": 255}}


def save(source: str) -> dict:
    return {"class_type": "SaveImage", "inputs": {"images": [source, 0], "filename_prefix": "client/blue"}}


def test_images_and_progress(client: Client):
    seen: list[PromptProgress] = []
    prompt = {"blue": BLUE | {"_meta": {"title": "Blue"}}, "save": save("blue")}
    result = client.run(prompt, seen.append)
    assert [(progress.node_id, progress.title) for progress in seen] == [("blue", "Blue"), ("save", "SaveImage")]
    assert [progress.finished_nodes for progress in seen] == [0, 1]
    pictures = [client.image(record) for record in result.images("save")]
    assert len(pictures) == 2 and all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert result.images("blue") == []
    again = client.run(prompt, seen.append)  # from the server's cache: nothing runs, the outputs are there all the same
    assert again.images() == result.images() and len(seen) == 2


def test_text_of_a_node(client: Client):
    result = client.run({"1": {"class_type": "PrimitiveString", "inputs": {"value": "a dog"}},
                         "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}})
    assert result.text("2") == "a dog" and result.text("1") == ""


def test_refused_prompt_names_node_and_input(client: Client):
    with pytest.raises(ServerError) as caught:
        client.run({"blue": {**BLUE, "inputs": {**BLUE["inputs"], "width": "wide"}}, "save": save("blue")})
    assert caught.value.kind == "validation"
    (error,) = caught.value.errors
    assert (error.node_id, error.node_type, error.input) == ("blue", "EmptyImage", "width")
    assert "width" in str(caught.value)


def test_partly_refused_prompt_does_not_run(client: Client):
    bad = {"class_type": "LoadImage", "inputs": {"image": "there is none.png"}}
    with pytest.raises(ServerError) as caught:
        client.run({"blue": BLUE, "good": save("blue"), "load": bad, "save": save("load")})
    assert [error.node_type for error in caught.value.errors] == ["LoadImage"]
    deadline = time.monotonic() + 20  # what had begun ends at its next node
    while client.get("/queue") != {"queue_running": [], "queue_pending": []}:
        assert time.monotonic() < deadline, "the good half was left in the queue"
        time.sleep(0.1)


def test_unknown_node_type(client: Client):
    with pytest.raises(ServerError, match="NoSuchNode"):
        client.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_failing_node_is_named(client: Client):
    prompt = {"1": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
              "2": {"class_type": "SaveLatent", "inputs": {"samples": ["1", 0], "filename_prefix": "/../../outside"}}}
    with pytest.raises(ServerError, match="outside the output folder") as caught:
        client.run(prompt)
    assert caught.value.kind == "execution"
    assert [(error.node_id, error.node_type) for error in caught.value.errors] == [("2", "SaveLatent")]
    assert "Traceback" in caught.value.traceback or "File " in caught.value.traceback


def test_interrupt(client: Client):
    prompt = {"blue": {**BLUE, "inputs": {**BLUE["inputs"], "width": 1024, "height": 1024, "batch_size": 1}}}
    source = "blue"
    for number in range(60):  # each takes a while, and the server looks at the interrupt between nodes
        prompt[f"blur{number}"] = {"class_type": "ImageBlur",
                                   "inputs": {"image": [source, 0], "blur_radius": 31, "sigma": 10.0 - number / 100}}
        source = f"blur{number}"
    prompt["save"] = {"class_type": "PreviewImage", "inputs": {"images": [source, 0]}}
    with pytest.raises(ServerError) as caught:
        client.run(prompt, lambda progress: client.interrupt() if progress.node_id == "blur1" else None)
    assert caught.value.kind == "interrupted" and caught.value.errors[0].node_id.startswith("blur")


def test_timeout_interrupts(client: Client):
    with pytest.raises(ServerError) as caught:
        client.run({"blue": BLUE, "save": save("blue")}, timeout=-1.0)
    assert caught.value.kind == "timeout"


def test_free_is_accepted(client: Client):
    client.free()


def test_missing_picture(client: Client):
    with pytest.raises(ServerError) as caught:
        client.image({"filename": "there is none.png", "subfolder": "", "type": "output"})
    assert caught.value.kind == "missing"


def test_nobody_there():
    with pytest.raises(ServerError) as caught:
        Client("http://127.0.0.1:9").run({})
    assert caught.value.kind == "connection"
