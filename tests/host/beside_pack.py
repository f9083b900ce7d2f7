"""A plugin for the host's own tests: runs them on the CPU, with this pack loaded by the host where PACK_FOLDER is set."""
from __future__ import annotations

import asyncio
import os


def pytest_configure(config) -> None:
    from comfy.cli_args import args

    args.cpu = True
    import nodes

    folder = os.environ.get("PACK_FOLDER")
    if folder:
        assert asyncio.run(nodes.load_custom_node(folder, module_parent="custom_nodes"))
        assert "LearnToSteerApply" in nodes.NODE_CLASS_MAPPINGS
