"""Handwritten prompts, each with a careful reader's relations and the words reported as not understood."""
from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
from learn_to_steer.prompts.graph import understand

CASES = Path(__file__).with_name("prompt_cases.txt")
CODES = {("above",): "A", ("below",): "B", ("to the left of",): "L", ("to the right of",): "R"}
CODES |= {vertical + side: CODES[vertical] + CODES[side] for vertical in list(CODES)[:2] for side in list(CODES)[2:]}


@dataclass
class Case:
    prompt: str
    relations: list[str] = field(default_factory=list)
    not_understood: list[tuple[str, str]] = field(default_factory=list)


def read_cases() -> list[Case]:
    cases: list[Case] = []
    for line in CASES.read_text(encoding="utf-8").splitlines():
        if line.startswith("    ? "):
            words, reason = line[6:].split(" | ")
            cases[-1].not_understood.append((words.strip(), reason.strip()))
        elif line.startswith("    "):
            cases[-1].relations.append(line.strip())
        elif line.strip() and not line.startswith("#"):
            cases.append(Case(line.replace("\\n", "\n")))
    return cases


@pytest.mark.parametrize("case", read_cases(), ids=lambda case: case.prompt)
def test_what_a_careful_reader_means(case: Case):
    graph = understand(case.prompt)
    assert sorted(f"{r.subject} {CODES[r.predicates]} {r.object}" for r in graph.relations) == sorted(case.relations)
    told = [(one.words, one.reason) for one in graph.not_understood]
    assert len(told) == len(case.not_understood), told
    for words, reason in case.not_understood:
        assert any(words in shown and reason in why for shown, why in told), (words, reason, told)


def test_the_cases_are_many_and_differ():
    cases = read_cases()
    assert len({case.prompt for case in cases}) == len(cases) >= 150
