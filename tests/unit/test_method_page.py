"""docs/method.md has every section that the sources refer to, and its numbers equal the code's."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
from learn_to_steer.classifiers.network import paper_config
from learn_to_steer.classifiers.steps import PAPER_TIMESTEPS
from learn_to_steer.steering.settings import SteeringSettings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
SOURCES = [path for path in sorted(ROOT.rglob("*.py")) if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)]


def test_every_section_that_is_referred_to_exists():
    headings = set(re.findall(r"^## (.+)$", PAGE, re.MULTILINE))
    named = {heading for path in SOURCES for reference in re.findall(r"docs/method\.md,((?:\s+(?:and\s+)?\"[^\"]+\")+)",
                                                                     path.read_text(encoding="utf-8"))
             for heading in re.findall(r"\"([^\"]+)\"", reference)}
    assert len(named) >= 6 and named <= headings
    table = PAGE[PAGE.index("What earlier versions"):PAGE.index("What this pack does")]
    assert {row.split("|")[-2].strip() for row in table.splitlines() if row.startswith("| ")} - {"section"} <= headings


def test_no_source_refers_to_a_page_that_is_not_here():
    other = "paper" + ".md"
    assert not [path for path in SOURCES if other in path.read_text(encoding="utf-8")]


def row(name: str) -> list[str]:
    return [cell.strip() for cell in next(line for line in PAGE.splitlines() if line.startswith(f"| {name}")).split("|")[2:-1]]


def test_settings_on_the_page_are_those_of_the_switch():
    paper = SteeringSettings.as_in_the_paper()
    assert [float(cell) for cell in row("step size")] == [7.5, paper.step_size, paper.step_size, paper.step_size]
    assert {int(cell) for cell in row("updates per step")} == {paper.max_updates}
    targets = re.search(r"Targets by step index: (.+?)\.\n", PAGE)[1]
    assert tuple(map(float, re.findall(r"0\.0+\d", targets))) == paper.loss_targets


@pytest.mark.parametrize(("name", "backbone"), [("Stable Diffusion 1.4, 2.1", "unet"), ("FLUX.1-dev, schnell", "mmdit")])
def test_sizes_on_the_page_are_the_networks(name: str, backbone: str):
    config = paper_config(backbone)
    extractor, aggregation, head = (tuple(map(int, cell.split(","))) for cell in row(name)[:3])
    assert extractor == (config.extractor.num_layers, config.extractor.nhead, config.extractor.dim_feedforward)
    assert aggregation == (config.extractor.layer_attn_nheads,)
    assert head == (config.classifier.num_layers, config.classifier.nhead, config.classifier.dim_feedforward)
    assert "5, 10, 15, 20, 25 and 49 of 50" in PAGE and "1 and 3 of 4" in PAGE
    assert PAPER_TIMESTEPS == {50: (5, 10, 15, 20, 25, 49), 4: (1, 3)}
