"""Conversion of saved workflows to prompts, on small handmade graphs and `/object_info`."""
from __future__ import annotations

import pytest

from dev.workflow import WorkflowError, get_text, set_seeds, set_text, to_prompt, types_fit

SAMPLERS = ["euler", "ddim"]
OBJECT_INFO = {
    "Loader": {"input": {"required": {"name": [["a.safetensors", "b.safetensors"]]}}, "display_name": "Load"},
    "Encode": {"input": {"required": {"clip": ["CLIP"], "text": ["STRING", {"multiline": True}]}}},
    "Sample": {"input": {"required": {"model": ["MODEL", {}], "seed": ["INT", {"default": 7}],
                                      "steps": ["INT", {"default": 20}], "sampler": [SAMPLERS, {}]},
                         "optional": {"mask": ["MASK"], "strength": ["FLOAT", {"default": 0.5}]}},
               "input_order": {"required": ["model", "seed", "steps", "sampler"], "optional": ["mask", "strength"]}},
    "Modern": {"input": {"required": {
        "mode": ["COMFY_DYNAMICCOMBO_V3", {"options": [
            {"key": "box", "inputs": {"required": {"width": ["INT", {"default": 8}], "seed": ["INT", {}]}}},
            {"key": "none", "inputs": {"required": {}}}]}],
        "images": ["COMFY_AUTOGROW_V3", {"template": {"input": {"required": {"image": ["IMAGE", {}]}},
                                                      "prefix": "image", "min": 1, "max": 3}}],
        "choice": ["COMBO", {"options": ["x", "y"], "control_after_generate": True}],
        "forced": ["STRING", {"forceInput": True}],
        "curve": ["CURVE", {"default": []}], "flag": ["BOOLEAN", {"default": True}]}}},
    "Pass": {"input": {"required": {"a": ["IMAGE", {}], "amount": ["FLOAT", {"default": 1.0}], "b": ["IMAGE", {}]}}},
    "Show": {"input": {"required": {"image": ["IMAGE", {}]}}},
}


def node(number: int, kind: str, values=(), inputs=(), outputs=("MODEL",), **more) -> dict:
    """`inputs`: (name, type, link) or (name, type, link, widget name)."""
    sockets = [{"name": name, "type": socket, "link": link, **({"widget": {"name": widget[0]}} if widget else {})}
               for name, socket, link, *widget in inputs]
    return {"id": number, "type": kind, "widgets_values": values, "inputs": sockets,
            "outputs": [{"name": kind, "type": kind} for kind in outputs], "mode": 0, **more}


def workflow(*nodes: dict, links=()) -> dict:
    return {"version": 0.4, "nodes": list(nodes), "links": list(links)}


def inputs_of(document: dict, number: int) -> dict:
    return to_prompt(document, OBJECT_INFO)[str(number)]["inputs"]


def test_values_links_and_the_seed_control():
    document = workflow(node(1, "Loader", ["b.safetensors"]),
                        node(2, "Sample", [5, "randomize", 30, "ddim", 0.25], [("model", "MODEL", 9)],
                             title="My sampler"),
                        links=[[9, 1, 0, 2, 0, "MODEL"]])
    assert to_prompt(document, OBJECT_INFO) == {
        "1": {"class_type": "Loader", "inputs": {"name": "b.safetensors"}, "_meta": {"title": "Load"}},
        "2": {"class_type": "Sample", "_meta": {"title": "My sampler"}, "inputs": {
            "seed": 5, "steps": 30, "sampler": "ddim", "strength": 0.25, "model": ["1", 0]}}}


def test_links_written_as_objects():
    link = {"id": 9, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "MODEL"}
    document = workflow(node(1, "Loader"), node(2, "Sample", [], [("model", "MODEL", 9)]), links=[link])
    assert inputs_of(document, 2)["model"] == ["1", 0]


def test_missing_values_get_their_defaults_and_surplus_is_ignored():
    assert inputs_of(workflow(node(1, "Sample", [5, "fixed"])), 1) == {
        "seed": 5, "steps": 20, "sampler": "euler", "strength": 0.5}
    assert inputs_of(workflow(node(1, "Loader", ["a.safetensors", "image", None])), 1) == {"name": "a.safetensors"}
    assert inputs_of(workflow(node(1, "Loader", None)), 1) == {"name": "a.safetensors"}


def test_values_by_name():
    assert inputs_of(workflow(node(1, "Sample", {"steps": 3, "seed": 1})), 1) == {
        "seed": 1, "steps": 3, "sampler": "euler", "strength": 0.5}


def test_widget_with_a_link_takes_the_link():
    document = workflow(node(1, "Loader"), node(2, "Sample", [5, "fixed", 30, "ddim", 1.0],
                                                [("steps", "INT", 4, "steps")]), links=[[4, 1, 0, 2, 0, "INT"]])
    assert inputs_of(document, 2)["steps"] == ["1", 0]


def test_dynamic_inputs():
    document = workflow(node(1, "Show", outputs=("IMAGE",)), node(2, "Show", outputs=("IMAGE",)), node(
        3, "Modern", ["box", 16, 99, "y", "randomize", [[0, 0], [1, 1]], False],
        [("images.image0", "IMAGE", 1), ("images.image1", "IMAGE", 2), ("images.image2", "IMAGE", None)]),
        links=[[1, 1, 0, 3, 0, "IMAGE"], [2, 2, 0, 3, 1, "IMAGE"]])
    assert inputs_of(document, 3) == {
        "mode": "box", "mode.width": 16, "mode.seed": 99, "choice": "y", "flag": False,
        "curve": {"__type__": "CURVE", "__value__": [[0, 0], [1, 1]]},
        "images.image0": ["1", 0], "images.image1": ["2", 0]}
    assert inputs_of(workflow(node(3, "Modern", ["none", "x"])), 3)["choice"] == "x"


def test_forced_socket_of_an_old_file_is_dropped():
    info = {"Old": {"input": {"required": {"text": ["STRING", {"forceInput": True}], "count": ["INT", {}]}}}}
    for saved in (["typed", 3], [3]):
        assert to_prompt(workflow(node(1, "Old", saved)), info)["1"]["inputs"] == {"count": 3}


def test_notes_reroutes_and_primitives_are_not_run():
    document = workflow(
        node(1, "Loader"), node(2, "Reroute", None, [("", "*", 1)]), node(3, "Reroute", None, [("", "*", 2)]),
        node(4, "PrimitiveNode", [12, "fixed"]), node(5, "Note", ["words"]), node(6, "MarkdownNote", ["words"]),
        node(7, "Sample", [5, "fixed", 30, "ddim", 1.0], [("model", "MODEL", 3), ("steps", "INT", 4, "steps")]),
        links=[[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "*"], [3, 3, 0, 7, 0, "MODEL"], [4, 4, 0, 7, 1, "INT"]])
    prompt = to_prompt(document, OBJECT_INFO)
    assert set(prompt) == {"1", "7"}
    assert prompt["7"]["inputs"]["model"] == ["1", 0] and prompt["7"]["inputs"]["steps"] == 12


def test_muted_node_and_its_links_vanish():
    document = workflow(node(1, "Loader", mode=2), node(2, "Sample", [1], [("model", "MODEL", 1), ("mask", "MASK", 8)]),
                        links=[[1, 1, 0, 2, 0, "MODEL"]])
    prompt = to_prompt(document, OBJECT_INFO)
    assert set(prompt) == {"2"} and "model" not in prompt["2"]["inputs"] and "mask" not in prompt["2"]["inputs"]


def test_bypassed_node_passes_the_input_of_the_fitting_type():
    passing = node(3, "Pass", [0.3], [("a", "IMAGE", 1), ("amount", "FLOAT", None, "amount"), ("b", "IMAGE", 2)],
                   ("FLOAT", "IMAGE"), mode=4)
    document = workflow(node(1, "Show", outputs=("IMAGE",)), node(2, "Show", outputs=("IMAGE",)), passing,
                        node(4, "Show", [], [("image", "IMAGE", 3)]),
                        node(5, "Sample", [], [("strength", "FLOAT", 4, "strength")]),
                        links=[[1, 1, 0, 3, 0, "IMAGE"], [2, 2, 0, 3, 2, "IMAGE"], [3, 3, 1, 4, 0, "IMAGE"],
                               [4, 3, 0, 5, 0, "FLOAT"]])
    prompt = to_prompt(document, OBJECT_INFO)
    assert set(prompt) == {"1", "2", "4", "5"}
    assert prompt["4"]["inputs"]["image"] == ["1", 0]
    assert prompt["5"]["inputs"]["strength"] == 0.3


def test_circle_of_reroutes():
    document = workflow(node(1, "Reroute", None, [("", "*", 1)]), node(2, "Reroute", None, [("", "*", 2)]),
                        node(3, "Show", [], [("image", "IMAGE", 3)]),
                        links=[[1, 2, 0, 1, 0, "*"], [2, 1, 0, 2, 0, "*"], [3, 1, 0, 3, 0, "*"]])
    with pytest.raises(WorkflowError, match="circle"):
        to_prompt(document, OBJECT_INFO)


def test_unknown_node_is_named():
    with pytest.raises(WorkflowError, match=r"node 4 \(Odd\) of type 'Nowhere'"):
        to_prompt(workflow(node(4, "Nowhere", title="Odd")), OBJECT_INFO)


def test_subgraph_is_refused():
    document = workflow(node(1, "1234-5678")) | {"definitions": {"subgraphs": [{"id": "1234-5678"}]}}
    with pytest.raises(WorkflowError, match="node 1 is a subgraph; unpack"):
        to_prompt(document, OBJECT_INFO)


def test_prompt_comes_back_as_a_copy():
    prompt = {"1": {"class_type": "Loader", "inputs": {"name": "a"}}}
    copy = to_prompt(prompt, OBJECT_INFO)
    copy["1"]["inputs"]["name"] = "b"
    assert prompt["1"]["inputs"]["name"] == "a"


@pytest.mark.parametrize("document", [{}, {"nodes": 3}, {"last_node_id": 1}])
def test_other_json_is_refused(document):
    with pytest.raises(WorkflowError, match="neither"):
        to_prompt(document, OBJECT_INFO)


def test_text_and_seeds_are_set():
    document = workflow(node(1, "Encode", ["old"], title="Prompt"), node(2, "Encode", ["bad"], title="Negative"),
                        node(3, "Sample", [5, "fixed", 9], title="Seeded"),
                        node(4, "Sample", [6], [("seed", "INT", 1, "seed")]), links=[[1, 1, 0, 4, 0, "INT"]])
    prompt = to_prompt(document, OBJECT_INFO)
    assert get_text(prompt, OBJECT_INFO, "Prompt") == "old"
    set_text(prompt, OBJECT_INFO, "Prompt", "new")
    set_seeds(prompt, 42)
    assert prompt["1"]["inputs"]["text"] == "new" and prompt["2"]["inputs"]["text"] == "bad"
    assert prompt["3"]["inputs"]["seed"] == 42 and prompt["3"]["inputs"]["steps"] == 9
    assert prompt["4"]["inputs"]["seed"] == ["1", 0]
    with pytest.raises(WorkflowError, match="'Caption'"):
        set_text(prompt, OBJECT_INFO, "Caption", "new")


def test_a_seed_behind_a_link_is_set():
    prompt = {"1": {"class_type": "PrimitiveInt", "inputs": {"value": 5}},
              "2": {"class_type": "Sample", "inputs": {"seed": ["1", 0], "steps": 9}}}
    set_seeds(prompt, 42)
    assert prompt["1"]["inputs"] == {"value": 42} and prompt["2"]["inputs"] == {"seed": ["1", 0], "steps": 9}
    with pytest.raises(WorkflowError, match="no seed field"):
        set_seeds({"1": {"class_type": "Encode", "inputs": {"text": "a"}}}, 1)


@pytest.mark.parametrize("first, second, fit", [("A", "A", True), ("A", "B", False), ("*", "B", True),
                                                ("A,B", "B,C", True), ("A,B", "C", False), ("a", "A", True)])
def test_types_fit(first, second, fit):
    assert types_fit(first, second) is fit
