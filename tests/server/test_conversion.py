"""Saved workflows become prompts that a real server understands."""
from __future__ import annotations

import json

import pytest
from templates import plain_templates

from dev.client import Client, ServerError
from dev.workflow import to_prompt

NAMES = ("default", "sdxl_simple_example", "sdxlturbo_example", "sd3.5_simple_example", "flux_schnell",
         "image_chroma_text_to_image")


@pytest.mark.parametrize("name", NAMES)
def test_template_lacks_nothing_but_model_files(client: Client, object_info: dict, name: str):
    file = next(file for file in plain_templates() if file.stem == name)
    prompt = to_prompt(json.loads(file.read_text(encoding="utf-8")), object_info)
    assert {node["class_type"] for node in prompt.values()} <= set(object_info)
    with pytest.raises(ServerError) as caught:
        client.submit(prompt)
    assert caught.value.kind == "validation"
    assert caught.value.errors
    for error in caught.value.errors:
        assert error.message.startswith("Value not in list"), str(error)
        assert error.input.rstrip("123").endswith("_name"), str(error)
