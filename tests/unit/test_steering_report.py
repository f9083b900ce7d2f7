"""A report's effect, warnings and notes follow from its records alone."""
from __future__ import annotations

from dataclasses import replace

import pytest
from learn_to_steer.steering.report import SteeringReport, UpdateRecord


def record(step: int, outcome: str, *norms: float) -> UpdateRecord:
    """A record of one evaluation with one picture per norm; the pictures moved if the outcome is "moved"."""
    return UpdateRecord(step, 0, 1.0, 0.1, (1.0,) * len(norms), ((0.5,),) * len(norms), norms or None,
                        (outcome == "moved",) * len(norms), outcome, 0.0)


def report(*records: UpdateRecord, **more) -> SteeringReport:
    return SteeringReport(("dog above cat",), "geometric", 10, records, obstacle="Another pack is in the way", **more)


@pytest.mark.parametrize(("records", "effect"), [
    ((), "not steered"),
    ((record(0, "moved", 2.0), record(1, "satisfied")), "steered"),
    ((record(0, "satisfied"), record(1, "not recorded")), "satisfied"),
    ((record(0, "not recorded"), record(1, "not recorded")), "not recorded"),
    ((record(0, "moved", 0.0), record(1, "moved", 0.0)), "no effect"),
    ((record(0, "no gradient", 0.0),), "no effect"),
    ((record(0, "non-finite gradient", float("nan")),), "no effect"),
    ((record(0, "moved", 0.0, 1.0),), "steered"),
])
def test_effect(records, effect: str):
    assert report(*records).effect == effect == report(*records).to_dict()["effect"]


@pytest.mark.parametrize(("records", "inactive", "words"), [
    ([record(0, "not recorded"), record(1, "not recorded")], {0, 1}, "all 2 steps where steering was to work: no conditioning"),
    ([record(0, "not recorded")], (), "the one step where steering was to work: nothing was recorded. Another pack"),
    ([record(0, "no gradient", 0.0), record(1, "no gradient", 0.0)], (), "in 2 of 2 updates the gradient was 0"),
    ([record(0, "non-finite gradient", float("inf"))], (), "in 1 of 1 updates the gradient was not finite, so steering"),
], ids=["inactive", "unseen", "flat", "not finite"])
def test_all_of_a_run_is_a_warning_and_a_part_of_it_a_note(records, inactive, words: str):
    """A warning is the first line; a note does not exaggerate."""
    whole, partly = (report(*found, inactive=tuple(inactive)) for found in (records, [*records, record(7, "moved", 1.0)]))
    (warning,) = whole.warnings
    assert words in warning and not whole.remarks and whole.to_text().startswith(f"WARNING: {warning}\neffect: none")
    (note,) = partly.remarks
    assert not partly.warnings and "all" not in note and "no effect" not in note and f"note: {note}" in partly.to_text()
    assert partly.to_text().startswith("effect: 1 update in 1 of 10 steps moved the latent\n")


def test_two_reasons_share_a_run():
    """Each reason explains a part of the run, and together nothing was steered."""
    whole = report(record(0, "not recorded"), record(1, "not recorded"), inactive=(1,))
    assert len(whole.warnings) == 2 and not whole.remarks and all("in 1 of 2 steps" in warning for warning in whole.warnings)


def test_a_run_in_order_has_nothing_to_add():
    fine = report(record(0, "moved", 1.0), record(1, "satisfied"))
    assert not fine.warnings and not fine.remarks


def test_stages_become_one_report():
    first = report(record(1, "moved", 1.0), notes=("a",))
    second = report(reasons=("not steered: late",))
    whole = SteeringReport.of_stages([first, second])
    assert whole.records == first.records and whole.steps == 20 and whole.stages == (10, 10)
    assert not whole.warnings and whole.notes == ("stage 2: not steered: late", "stage 1: a")
    assert "they begin with steps 0, 10" in whole.to_text()
    both = SteeringReport.of_stages([first, replace(first, notes=())])
    assert [entry.step for entry in both.records] == [1, 11]
    neither = SteeringReport.of_stages([second, second])
    assert neither.warnings == ("stage 1: not steered: late", "stage 2: not steered: late") and neither.effect == "not steered"
