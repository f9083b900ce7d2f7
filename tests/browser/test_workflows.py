"""The shipped workflows on the real page, dropped on the canvas like by a user."""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
DROP = """async ([name, text]) => {
    const carrier = new DataTransfer();
    carrier.items.add(new File([text], name, {type: "application/json"}));
    const options = {bubbles: true, cancelable: true, dataTransfer: carrier, clientX: 800, clientY: 500};
    const canvas = document.querySelector("#graph-canvas");
    for (const kind of ["dragenter", "dragover", "drop"]) canvas.dispatchEvent(new DragEvent(kind, options));
}"""
FIT = """bounds => {
    const scale = Math.min((innerWidth - 90) / bounds[2], (innerHeight - 140) / bounds[3]);
    const view = app.canvas.ds;
    view.scale = scale;
    view.offset = [75 / scale - bounds[0], 90 / scale - bounds[1]];
    app.canvas.setDirty(true, true);
}"""
LOADED = "number => app.rootGraph.nodes.length === number && app.rootGraph.nodes[0].type !== undefined"


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("LTS_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def drop(browser_page, file: Path) -> dict:
    """Drops a workflow file on the canvas. Returns its content."""
    text = file.read_text(encoding="utf-8")
    workflow = json.loads(text)
    browser_page.page.evaluate(DROP, [file.name, text])
    browser_page.page.wait_for_function(LOADED, arg=len(workflow["nodes"]))
    return workflow


def bounds(workflow: dict) -> list[float]:
    boxes = [group["bounding"] for group in workflow["groups"]]
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    return [left, top, max(box[0] + box[2] for box in boxes) - left, max(box[1] + box[3] for box in boxes) - top]


def overlaps(workflow: dict) -> list[tuple[int, int]]:
    """Pairs of overlapping nodes, including title bars."""
    boxes = [(node["id"], node["pos"][0], node["pos"][1] - 30, node["size"][0],
              30 + (0 if node["flags"].get("collapsed") else node["size"][1])) for node in workflow["nodes"]]
    return [(a[0], b[0]) for index, a in enumerate(boxes) for b in boxes[:index]
            if a[1] < b[1] + b[3] and b[1] < a[1] + a[3] and a[2] < b[2] + b[4] and b[2] < a[2] + a[4]]


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_dropped_on_the_canvas(browser_page, screenshots: Path, file: Path):
    browser_page.open()
    workflow = drop(browser_page, file)
    browser_page.page.wait_for_timeout(2000)  # dialogs and errors that come late
    assert browser_page.errors == []
    types = {node["type"] for node in workflow["nodes"]}
    registered = browser_page.page.evaluate("types => types.filter(type => type in LiteGraph.registered_node_types)",
                                            sorted(types))
    assert {*registered} == types
    assert not browser_page.page.get_by_text("Missing Node", exact=False).count()
    on_page = browser_page.page.evaluate("() => app.rootGraph.serialize()")
    browser_page.page.set_viewport_size({"width": 2400, "height": 1350})  # at which the fields can be read
    browser_page.page.evaluate(FIT, bounds(workflow))
    browser_page.page.wait_for_timeout(1000)
    browser_page.page.screenshot(path=screenshots / f"{file.stem}.png")
    assert_same(workflow, on_page)
    assert overlaps(on_page) == []


def assert_same(workflow: dict, on_page: dict) -> None:
    """Asserts that the page keeps every node's size, fields and links."""
    found = {int(node["id"]): node for node in on_page["nodes"]}
    for node in workflow["nodes"]:
        there = found[node["id"]]
        assert list(there["size"]) == node["size"], node["type"]
        assert there["widgets_values"] == node["widgets_values"], node["type"]
        assert ([(entry["name"], entry["link"]) for entry in there["inputs"]]
                == [(entry["name"], entry["link"]) for entry in node["inputs"]]), node["type"]
    assert len(on_page["links"]) == len(workflow["links"])


def test_text_of_a_run_is_shown_and_not_saved(browser_page):
    browser_page.open()
    drop(browser_page, FOLDER / "toyworld_steering.json")
    shown = """() => app.rootGraph.nodes.flatMap(node => (node.widgets ?? [])
        .filter(widget => widget.name === "learn_to_steer_text").map(widget => [node.type, widget.value]))"""
    assert {value for _, value in browser_page.page.evaluate(shown)} == {""}
    before = browser_page.prompt()
    browser_page.page.evaluate("() => app.queuePrompt(0)")
    everything = ("() => app.rootGraph.nodes.flatMap(node => node.widgets ?? [])"
                  ".filter(widget => widget.name === 'learn_to_steer_text').every(widget => widget.value !== '')")
    browser_page.page.wait_for_function(everything, timeout=300_000)
    texts = browser_page.page.evaluate(shown)
    assert sorted(kind for kind, _ in texts) == ["LearnToSteerGraph", "LearnToSteerReport", "LearnToSteerToyJudge",
                                                 "LearnToSteerToyJudge"]
    assert any("gradient evaluations" in text for _, text in texts)
    assert browser_page.prompt() == before
    saved = json.dumps(browser_page.page.evaluate("() => app.rootGraph.serialize()"))
    assert "gradient evaluations" not in saved
    assert browser_page.errors == []


@pytest.mark.parametrize("node_type", ["LearnToSteerGraph", "LearnToSteerKSampler"])
def test_help_page_is_served(browser_page, node_type: str):
    browser_page.open()
    status = browser_page.page.evaluate(
        "async type => (await fetch(`/extensions/learn-to-steer/docs/${type}.md`)).status", node_type)
    assert status == 200
