"""The workflow templates that come with ComfyUI, as input for tests."""
from __future__ import annotations

import importlib.util
import json
from pathlib import Path


def plain_templates() -> list[Path]:
    """The template files of the installed packages whose workflow has no subgraphs."""
    found = []
    for package in ("json", "media_api", "media_image", "media_other", "media_video"):
        spec = importlib.util.find_spec(f"comfyui_workflow_templates_{package}")
        if spec is None:
            continue
        for file in sorted((Path(spec.origin).parent / "templates").glob("*.json")):
            workflow = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(workflow, dict) and workflow.get("nodes") and not (workflow.get("definitions") or {}).get(
                    "subgraphs"):
                found.append(file)
    return found
