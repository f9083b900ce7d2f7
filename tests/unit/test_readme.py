"""The tables in the documents equal those of the measured JSON files, and both commands exist."""
from __future__ import annotations

import pytest

from dev.benchmarks.readme import MEASUREMENTS, README, filled, tables


@pytest.mark.parametrize("document", [README, MEASUREMENTS], ids=lambda path: path.name)
def test_tables_are_the_measured_ones(document):
    text = document.read_text(encoding="utf-8")
    assert "<!-- accuracy_unet -->" in text and filled(text) == text


def test_every_table_is_shown_and_every_shown_one_was_measured():
    text = MEASUREMENTS.read_text(encoding="utf-8")
    shown = {line.strip("<!->/ ") for line in text.splitlines() if line.startswith("<!-- ")}
    assert shown == set(tables())


def test_first_screen_has_the_picture_and_the_commands():
    first = README.read_text(encoding="utf-8")[:1800]
    assert "python dev.py demo" in first and "python dev.py test" in first and "docs/demo.png" in first
    assert (README.parent / "docs" / "demo.png").is_file()
