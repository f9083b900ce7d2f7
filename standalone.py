"""Runs the pack's code outside a ComfyUI server: for tests, benchmarks, training and command lines.

`prepare_host()` makes the host's modules importable; `load_pack()` imports this repository under the one
name `learn_to_steer`, the way the host imports a pack (from a file location, as a package).
"""
from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
PACKAGE = "learn_to_steer"


def prepare_host() -> Path:
    """Puts ComfyUI (environment variable COMFYUI_PATH) first on `sys.path` and returns its folder.

    The host reads its command line at import; here it gets `--cpu` unless a CUDA device is there.
    Raises RuntimeError where the variable is missing or does not point at a ComfyUI folder.
    """
    host = Path(os.environ.get("COMFYUI_PATH", ""))
    if not (host / "comfy" / "options.py").is_file():
        raise RuntimeError("COMFYUI_PATH does not point at a ComfyUI folder; start this through "
                           "`python dev.py run -m ...`, which sets it.")
    if str(host) in sys.path:
        return host
    sys.path.insert(0, str(host))
    import torch

    argv = sys.argv
    sys.argv = argv[:1] + ([] if torch.cuda.is_available() else ["--cpu"])
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  (parses sys.argv now)
    finally:
        sys.argv = argv
    return host


def load_pack() -> ModuleType:
    """The repository root as the package `learn_to_steer`; the host is prepared first."""
    if PACKAGE in sys.modules:
        return sys.modules[PACKAGE]
    prepare_host()
    spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
    return module
