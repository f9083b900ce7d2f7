"""Learn to Steer: put things where the prompt says. Collects the nodes into one ComfyUI extension, nothing else."""
from __future__ import annotations

import logging
import os

if __package__:  # tools that import this folder as a plain module (pytest, linters) find nothing to register
    from .host.requirement import unmet_requirement

    complaint = unmet_requirement()
    if complaint:
        logging.getLogger("learn_to_steer").error(complaint)
        NODE_CLASS_MAPPINGS = {}  # with an empty list of nodes the host adds no message or stack trace of its own
    else:
        from comfy_api.latest import ComfyExtension, io

        from .nodes import NODES, register_model_folders

        WEB_DIRECTORY = os.path.join(os.path.dirname(__file__), "web")

        class LearnToSteerExtension(ComfyExtension):
            async def on_load(self) -> None:
                register_model_folders()

            async def get_node_list(self) -> list[type[io.ComfyNode]]:
                return NODES

        async def comfy_entrypoint() -> LearnToSteerExtension:
            return LearnToSteerExtension()
