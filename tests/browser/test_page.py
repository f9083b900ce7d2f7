"""The stock page, with this pack in the server."""
from __future__ import annotations

import json

from templates import plain_templates

from dev.workflow import to_prompt


def test_page_shows_the_default_graph_without_errors(browser_page):
    browser_page.open()
    assert "KSampler" in browser_page.node_types()
    browser_page.page.wait_for_timeout(2000)  # errors of scripts that load late
    assert browser_page.errors == []


def without_script_fields(prompt: dict) -> dict:
    """The prompt without titles and without nodes whose fields the page's JavaScript fills."""
    return {node_id: (node["class_type"], node["inputs"]) for node_id, node in prompt.items()
            if node["class_type"] not in ("SaveGLB", "Preview3D", "Load3D", "ImageCompare")}


def test_our_prompt_is_what_the_page_would_post(browser_page, object_info):
    """Stock templates without subgraphs, converted by the page and by us."""
    files = [file for file in plain_templates() if not file.name.startswith("api_")][::6]
    assert len(files) >= 15
    browser_page.open()
    for file in files:
        workflow = json.loads(file.read_text(encoding="utf-8"))
        browser_page.load(workflow)
        ours, theirs = to_prompt(workflow, object_info), browser_page.prompt()
        assert without_script_fields(ours) == without_script_fields(theirs), file.name


def test_the_papers_stop_probability_can_be_entered(browser_page):
    """The page rounds numbers to the field's step."""
    browser_page.open()
    browser_page.page.evaluate("""() => {
        app.rootGraph.clear();
        for (const type of ["LearnToSteerKSampler", "LearnToSteerApply"])
            app.rootGraph.add(LiteGraph.createNode(type));
    }""")
    entered = browser_page.page.evaluate("""() => app.rootGraph.nodes.map(node => {
        const field = node.widgets.find(widget => widget.name === "stop_probability");
        field.callback(0.9999);
        return [node.type, field.value];
    })""")
    assert sorted(entered) == [["LearnToSteerApply", 0.9999], ["LearnToSteerKSampler", 0.9999]]


def test_our_page_extension_is_registered_under_the_packs_name(browser_page):
    browser_page.open()
    names = browser_page.page.evaluate("() => app.extensions.map(({ name }) => name)")
    assert "learntosteer.text" in names
    assert not [name for name in names if name.startswith("learn-to-steer")]
