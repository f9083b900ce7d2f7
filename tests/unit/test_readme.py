"""The documents show what was measured: every number comes from the JSON files, and both commands exist."""
from __future__ import annotations

import json
import re

import pytest

from dev.benchmarks.readme import MEASUREMENTS, README, RESULTS, figures, filled, tables

MARKER = re.compile(r"<!-- (/?)(.+?) -->")
FIRST_SCREEN = 1800


def marked(text: str) -> list[str]:
    """Names between markers, in order. Every marker is closed before the next one opens."""
    found = MARKER.findall(text)
    assert len(found) % 2 == 0
    for (slash, name), (closing, closed) in zip(found[::2], found[1::2], strict=True):
        assert (slash, name, closing) == ("", closed, "/")
    return [name for _, name in found[::2]]


@pytest.mark.parametrize("document", [README, MEASUREMENTS], ids=lambda path: path.name)
def test_numbers_are_the_measured_ones(document):
    text = document.read_text(encoding="utf-8")
    assert marked(text) and set(marked(text)) <= {*tables(), *figures()} and filled(text) == text


def test_every_table_is_shown_and_every_shown_one_was_measured():
    text = MEASUREMENTS.read_text(encoding="utf-8")
    shown = {line.strip("<!->/ ") for line in text.splitlines() if line.startswith("<!-- ")}
    assert shown == set(tables()) and set(marked(text)) == shown
    assert "<!-- accuracy_unet -->" in text


def test_the_readme_has_no_number_typed_by_hand():
    text = README.read_text(encoding="utf-8")
    by_hand = re.sub(r"<!-- (?P<name>[^/].*?) -->.*?<!-- /(?P=name) -->", "", text, flags=re.DOTALL)
    assert not re.findall(r"\d\s*(?:%|×|percent|times)", by_hand)
    assert len(marked(text)) <= 8  # a few: the tables are in docs/measurements.md


def test_a_figure_is_the_number_of_its_row():
    rows = {row["name"]: row for row in json.loads((RESULTS / "accuracy_flux.json").read_text(encoding="utf-8"))["rows"]}
    expected = f"{rows['geometric, calibrated']['exact']:.1%}".replace("%", " %")
    name = "accuracy_flux, geometric, calibrated: exact"
    assert filled(f"in <!-- {name} -->0.0 %<!-- /{name} --> of them") == f"in <!-- {name} -->{expected}<!-- /{name} --> of them"


def test_a_table_typed_over_is_written_anew():
    text = MEASUREMENTS.read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("| learned |"))
    assert filled(text.replace(line, "| learned | 100.0 % |")) == text


def test_first_screen_has_the_picture_the_commands_and_the_installation():
    first = README.read_text(encoding="utf-8")[:FIRST_SCREEN]
    assert "python dev.py demo" in first and "python dev.py test" in first and "docs/demo.png" in first
    assert "git clone --depth 1" in first and "Manager" in first and "Learn to Steer" in first
    assert (README.parent / "docs" / "demo.png").is_file()


def test_the_readme_says_first_that_no_large_model_was_measured():
    rows = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    heading = next(number for number, line in enumerate(rows) if line.startswith("| your model | workflow | what to expect"))
    first = rows[heading + 1]
    assert "All figures come from the small world" in first and "Nothing was measured on Stable Diffusion, SDXL or FLUX" in first


@pytest.mark.parametrize("document", [README, *sorted((README.parent / "docs").glob("*.md"))], ids=lambda path: path.name)
def test_links_lead_to_files_of_the_repository(document):
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
    here = [link for link in links if not link.startswith("https://")]
    assert here and all((document.parent / link).exists() for link in here)


def test_the_readme_leads_to_every_document():
    text = README.read_text(encoding="utf-8")
    assert all(f"](docs/{path.name})" in text for path in (README.parent / "docs").glob("*.md"))


@pytest.mark.parametrize("document", [README, MEASUREMENTS], ids=lambda path: path.name)
def test_no_document_grades_itself(document):
    assert not re.search(r"\bgoals?\b|\breached\b|\bmissed\b", document.read_text(encoding="utf-8"), re.IGNORECASE)
