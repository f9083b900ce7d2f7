"""What the registry reads of the pack, by its rules: https://docs.comfy.org/registry/specifications"""
from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python before 3.11 cannot read TOML")

ROOT = Path(__file__).resolve().parents[2]
PLACEHOLDER = "PUBLISHER"
ACCELERATORS = {"GPU :: NVIDIA CUDA", "GPU :: AMD ROCm", "GPU :: Intel Arc", "NPU :: Huawei Ascend", "GPU :: Apple Metal"}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def size_of(png: Path) -> tuple[int, int]:
    """Width and height from the file's header."""
    content = png.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[12:16] == b"IHDR"
    return struct.unpack(">II", content[16:24])


def test_what_the_registry_requires_is_there(project: dict) -> None:
    main, comfy = project["project"], project["tool"]["comfy"]
    assert re.fullmatch(r"[a-z](?:[a-z0-9]|[-_.](?![-_.]))*[a-z0-9]", main["name"]) and "comfyui" not in main["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", main["version"])
    assert comfy["PublisherId"] and comfy["DisplayName"] == "Learn to Steer"
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    assert {"Repository", "Documentation", "Bug Tracker", "Issues"} <= set(main["urls"])
    assert main["description"] and main["license"] and (ROOT / main["readme"]).is_file()


def test_classifiers_are_ones_that_the_registry_knows(project: dict) -> None:
    classifiers = project["project"]["classifiers"]
    assert "Operating System :: OS Independent" in classifiers
    found = {item.removeprefix("Environment :: ") for item in classifiers if item.startswith("Environment :: ")}
    assert found <= ACCELERATORS  # none is named before the pack ran on it


def test_every_address_is_of_one_repository_and_every_picture_is_there(project: dict) -> None:
    urls, comfy = project["project"]["urls"], project["tool"]["comfy"]
    repository = urls["Repository"]
    assert re.fullmatch(r"https://github\.com/[\w.-]+/learn-to-steer", repository)
    assert all(url.startswith(repository) for url in urls.values())
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main/"
    sizes = {name: size_of(ROOT / comfy[name].removeprefix(raw)) for name in ("Icon", "Banner") if comfy[name].startswith(raw)}
    assert sizes["Icon"] == (400, 400)
    width, height = sizes["Banner"]
    assert width * 9 == height * 21 and width >= 1050


def test_whoever_publishes_has_one_word_to_replace_in_one_file() -> None:
    """Until then the workflow refuses to publish."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if PLACEHOLDER not in text:
        return
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert f"grep -n {PLACEHOLDER}" in workflow
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("workflows/*.json")):
        assert PLACEHOLDER not in path.read_text(encoding="utf-8"), path.name


def test_the_changelog_tells_of_this_version(project: dict) -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert re.fullmatch(re.escape(project["project"]["version"]) + r" - \d{4}-\d\d-\d\d", headings[1])
