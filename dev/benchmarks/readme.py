"""Fills README.md and docs/measurements.md from dev/benchmarks/results, so that no measured number is typed by hand.

    python dev.py run -m dev.benchmarks.readme [--check]

A table stands between `<!-- accuracy_unet -->` and `<!-- /accuracy_unet -->`. A single figure stands inside a sentence, between
`<!-- accuracy_unet, learned: exact -->` and the same with a slash: result file, row and column of the table.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README, MEASUREMENTS = ROOT / "README.md", ROOT / "docs" / "measurements.md"
RESULTS = ROOT / "dev" / "benchmarks" / "results"
SHARES = {"both objects": "both_present", "clean": "clean", "relation right": "relation_correct", "exact": "exact"}
"""Columns of the accuracy tables, with their names in the result files."""
MARKED = re.compile(r"(<!-- ([^/>][^>]*) -->).*?(<!-- /\2 -->)", re.DOTALL)


def accuracy_table(content: dict, present: str = "both objects") -> str:
    """The table of an accuracy result. With several groups, each begins with a line in bold."""
    head = f"| | {present} | clean | relation right | exact | gradient evaluations | time |\n|---|---|---|---|---|---|---|\n"
    groups = list(dict.fromkeys(row["group"] for row in content["rows"]))
    most = max(row["prompts"] for row in content["rows"])
    lines = []
    for group in groups:
        lines += [f"| **{group}** | | | | | | |"] if len(groups) > 1 else []
        lines += [accuracy_line(row, most) for row in content["rows"] if row["group"] == group]
    protocol = content["protocol"]
    pictures = max(row.get("pictures", 1) for row in content["rows"])
    each = f"{pictures} pictures" if pictures > 1 else "one picture"
    said = (f"\n\n{most} prompts{' a group' if len(groups) > 1 else ''}, {protocol['steps']} steps "
            f"{protocol['sampler']} ({protocol['scheduler']}), CFG {protocol['cfg']}, {each} a prompt. "
            f"Measured on: {content['machine']}.")
    return head + "\n".join(lines) + said


def accuracy_line(row: dict, most: int) -> str:
    """One line of the table. A row with fewer prompts gives their number, and no time, because it comes from another run."""
    fewer = row["prompts"] < most
    cells = accuracy_cells(row) | ({"time": "-"} if fewer else {})
    return " | ".join([f"| {row['name']} ({row['prompts']} prompts)" if fewer else f"| {row['name']}", *cells.values()]) + " |"


def accuracy_cells(row: dict) -> dict[str, str]:
    """What a row shows, by column."""
    shares = {column: f"{100 * row[share]:.1f} %" for column, share in SHARES.items()}
    return {**shares, "gradient evaluations": f"{row['gradient_evaluations']:.1f}", "time": f"{row['seconds_ratio']:.2f} ×"}


def leakage_table(content: dict) -> str:
    """The classifiers' accuracy on maps of pictures inverted with true and with wrong captions."""
    head = ("| | objects | maps of true captions | maps of wrong captions | of the latter, said the caption's word |\n"
            "|---|---|---|---|---|\n")
    lines = [f"| {name} | {split} | {100 * result['true caption']:.1f} % | {100 * result['wrong caption']:.1f} % | "
             f"{100 * result['said_the_captions_word']:.1f} % |"
             for name, results in content["classifiers"].items() for split, result in results.items()]
    return head + "\n".join(lines)


def cost_table(content: dict) -> str:
    head = "| size | pass | time | peak memory |\n|---|---|---|---|\n"
    lines = [f"| {row['size']}, {row['dtype']} | {row['name']} | {row['seconds_ratio']:.2f} × | {row['peak_ratio']:.2f} × |"
             for row in content["rows"]]
    return head + "\n".join(lines) + f"\n\nMeasured on: {content['machine']}."


def blocks(path: Path) -> dict[str, str]:
    """The tables of one result, by the name of their markers."""
    content, kind, _, backbone = json.loads(path.read_text(encoding="utf-8")), *path.stem.rpartition("_")
    if kind == "cost":
        return {path.stem: cost_table(content)}
    found = {path.stem: accuracy_table(content, "all objects" if kind == "several" else "both objects")}
    if kind == "accuracy" and content.get("classifiers"):
        found[f"leakage_{backbone}"] = leakage_table(content)
    return found


def tables() -> dict[str, str]:
    """The tables of all results, by the name of their markers."""
    return {name: table for path in sorted(RESULTS.glob("*.json")) for name, table in blocks(path).items()}


def figures() -> dict[str, str]:
    """Single cells of the tables for one relation, by the name of their markers."""
    contents = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("accuracy_*.json"))}
    return {f"{name}, {row['name']}: {column}": cell for name, content in contents.items() for row in content["rows"]
            for column, cell in accuracy_cells(row).items()}


def filled(text: str) -> str:
    """The text with what stands between each pair of markers made anew; what has no result stays."""
    made = {**{name: f"\n{table}\n" for name, table in tables().items()}, **figures()}
    return MARKED.sub(lambda found: found[1] + made[found[2]] + found[3] if found[2] in made else found[0], text)


def main() -> int:
    found = {path: path.read_text(encoding="utf-8") for path in (README, MEASUREMENTS)}
    if "--check" in sys.argv:
        return int(any(filled(text) != text for text in found.values()))
    for path, text in found.items():
        path.write_text(filled(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
