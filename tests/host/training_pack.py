"""The pack's modules that need no host, imported as one package (they import each other across folders)."""
from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
NAME = "learn_to_steer_without_host"


def pack(module: str) -> ModuleType:
    """`pack("training.dataset")` without running the pack's __init__.py, which registers nodes with the host."""
    if NAME not in sys.modules:
        package = ModuleType(NAME)
        package.__path__ = [str(ROOT)]
        sys.modules[NAME] = package
    return importlib.import_module(f"{NAME}.{module}")
