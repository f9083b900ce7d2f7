"""Sources can be read on a machine whose encoding is Windows' western one (cp1252): scanners read them so."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = sorted(path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")
                 and path.name not in ("tests", "docs", "demo", "runs"))  # tests need other characters; docs are for people
SUFFIXES = (".py", ".js", ".json", ".toml", ".md", ".txt")


def sources(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in SUFFIXES and "__pycache__" not in path.parts)


def outside_cp1252(text: str) -> list[str]:
    """Each such character with its line number."""
    return [f"line {number}: {character!r} (U+{ord(character):04X})" for number, line in enumerate(text.splitlines(), 1)
            for character in line if not character.encode("cp1252", errors="ignore")]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_no_source_has_characters_outside_cp1252(folder: Path) -> None:
    found = {path.relative_to(ROOT).as_posix(): outside_cp1252(path.read_text(encoding="utf-8")) for path in sources(folder)}
    assert not {name: where for name, where in found.items() if where}


def test_neither_has_the_root() -> None:
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml", ROOT / "CHANGELOG.md"):
        assert not outside_cp1252(path.read_text(encoding="utf-8")), path.name


def test_every_text_file_is_opened_with_its_encoding() -> None:
    """Python's default is the machine's: a file that is UTF-8 here would be read as something else there."""
    pytest.importorskip("ruff", reason="ruff, which finds such calls, is not installed here")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--preview", "--select", "PLW1514", str(ROOT)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stdout + result.stderr


def test_page_extensions_stand_under_the_packs_name() -> None:
    for path in (ROOT / "web").glob("*.js"):
        text = path.read_text(encoding="utf-8")
        names = re.findall(r"registerExtension\(\s*\{\s*name:\s*\"([^\"]+)\"", text)
        assert len(names) == text.count("registerExtension(") and all(name.startswith("learntosteer.") for name in names), names
