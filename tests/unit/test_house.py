"""The rooms of the house and the imports allowed between them. Parses the source without importing it."""
from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACK = "learn_to_steer"
BELOW = {  # each pack room, and the rooms that it may import
    "files": set(),
    "prompts": set(),
    "classifiers": {"files", "prompts"},
    "steering": {"classifiers", "prompts"},
    "pictures": {"steering"},
    "toyworld": set(),
    "host": {"classifiers", "prompts", "steering"},
    "training": {"classifiers", "files", "host", "pictures", "prompts", "steering", "toyworld"},
    "nodes": {"classifiers", "files", "host", "pictures", "prompts", "steering", "toyworld", "training"},
}
HOST_MODULES = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "execution",
                "server", "app"}
WITH_HOST = ("host/", "nodes/", "toyworld/models.py", "toyworld/sampling.py", "toyworld/text.py", "training/models.py",
             "training/inversion.py")
"""Where the host may be imported: its room, the shells, and the loading and sampling of models."""


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Absolute names of all imports of a file, also inside functions. Relative imports are resolved under learn_to_steer."""
    package = (PACK, *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[:len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            yield ".".join(base)
            yield from (".".join([*base, alias.name]) for alias in node.names)


def module_of(path: Path) -> str:
    parts = (PACK, *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_every_folder_with_code_is_a_room():
    folders = {path.relative_to(ROOT).parts[0] for path in ROOT.rglob("*.py") if len(path.relative_to(ROOT).parts) > 1
               and not path.relative_to(ROOT).parts[0].startswith(".")}
    assert folders == {*BELOW, "dev", "tests"}


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_only_rooms_below_it(room: str):
    for path in sources(room):
        used = {name.split(".")[1] for name in imported(path) if name.startswith(f"{PACK}.")} - {room}
        assert used & set(BELOW) <= BELOW[room], f"{path.relative_to(ROOT)} imports {sorted(used - BELOW[room])}"
        if path.name != "__main__.py":  # started from the repository, with dev/ beside it
            assert not any(name.split(".")[0] in ("dev", "tests") for name in imported(path)), path.relative_to(ROOT)


@pytest.mark.parametrize("room", BELOW)
def test_only_named_places_touch_the_host(room: str):
    for path in sources(room):
        place = path.relative_to(ROOT).as_posix()
        used = {name.split(".")[0] for name in imported(path)} & HOST_MODULES
        if not place.startswith(WITH_HOST):
            assert not used, f"{place} imports {sorted(used)}"


def test_prompts_do_without_torch():
    for path in sources("prompts"):
        assert not {name.split(".")[0] for name in imported(path)} & {"torch", "numpy"}, path.relative_to(ROOT)


def test_no_module_imports_itself_by_a_detour():
    files = {module_of(path): path for room in BELOW for path in sources(room)}
    edges = {name: {other for other in imported(path) if other in files and other != name} for name, path in files.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name):], name])
        if name not in done:
            for other in sorted(edges[name]):
                if not name.startswith(f"{other}."):  # a module's own package
                    visit(other, (*trail, name))
            done.add(name)

    for name in files:
        visit(name, ())


@pytest.mark.parametrize("folder", ["dev", "tests"])
def test_pack_code_has_one_name(folder: str):
    """`from classifiers...` would load a second copy of each class, which `isinstance` and `except` do not match."""
    for path in sources(folder):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                assert node.module.split(".")[0] not in BELOW, f"{path.relative_to(ROOT)}: from {node.module}"
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names} - {"nodes"}  # the host has a module `nodes`
                assert not names & set(BELOW), f"{path.relative_to(ROOT)}: import {names & set(BELOW)}"
