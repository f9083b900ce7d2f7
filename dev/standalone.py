"""The pack outside a ComfyUI server: for tests, benchmarks, training and command lines.

The repository is the package `learn_to_steer`, whatever its folder is called. `register_pack()` makes its rooms importable;
`load_pack()` also prepares the host and registers the nodes, the way the host loads a pack.
"""
from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "learn_to_steer"


def register_pack() -> ModuleType:
    """The package `learn_to_steer`. Its `__init__.py`, which needs a host, is not run here."""
    if PACKAGE not in sys.modules:
        spec = importlib.util.spec_from_file_location(PACKAGE, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    return sys.modules[PACKAGE]


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
    """`learn_to_steer` with its nodes; the host is prepared first."""
    prepare_host()
    pack = register_pack()
    if not hasattr(pack, "comfy_entrypoint"):
        pack.__spec__.loader.exec_module(pack)
    return pack
