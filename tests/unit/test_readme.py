"""README shows what was measured: its tables are those of the JSON files, and both commands exist."""
from __future__ import annotations

from benchmarks.readme import README, RESULTS, filled


def test_tables_are_the_measured_ones():
    text = README.read_text(encoding="utf-8")
    assert list(RESULTS.glob("*.json")) and filled(text) == text


def test_first_screen_has_the_picture_and_the_commands():
    first = README.read_text(encoding="utf-8")[:1800]
    assert "python dev.py demo" in first and "python dev.py test" in first and "docs/demo.png" in first
    assert (README.parent / "docs" / "demo.png").is_file()
