"""Writes the measured tables of README.md from the JSON files in benchmarks/results: no figure there is typed by hand.

    python dev.py run -m benchmarks.readme [--check]
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
SHARES = ("both_present", "clean", "relation_correct", "exact")


def accuracy_table(content: dict) -> str:
    head = "| | both objects | clean | relation right | exact | gradient evaluations | time |\n|---|---|---|---|---|---|---|\n"
    lines = [f"| {row['name']} | " + " | ".join(f"{100 * row[share]:.1f} %" for share in SHARES)
             + f" | {row['gradient_evaluations']:.1f} | {row['seconds_ratio']:.2f} × |" for row in content["rows"]]
    protocol = content["protocol"]
    said = (f"\n\n{content['rows'][0]['prompts']} prompts, {protocol['steps']} steps {protocol['sampler']} "
            f"({protocol['scheduler']}), CFG {protocol['cfg']}, one picture a prompt. Measured on: {content['machine']}.")
    return head + "\n".join(lines) + said


def cost_table(content: dict) -> str:
    head = "| size | pass | time | peak memory |\n|---|---|---|---|\n"
    lines = [f"| {row['size']} | {row['name']} | {row['seconds_ratio']:.2f} × | {row['peak_ratio']:.2f} × |"
             for row in content["rows"]]
    return head + "\n".join(lines) + f"\n\nMeasured on: {content['machine']}."


def filled(text: str) -> str:
    """README's text with the block between each pair of markers made anew; a block without a result stays."""
    for path in sorted(RESULTS.glob("*.json")):
        begin, end = f"<!-- {path.stem} -->", f"<!-- /{path.stem} -->"
        if begin in text:
            content = json.loads(path.read_text(encoding="utf-8"))
            table = accuracy_table(content) if path.stem.startswith("accuracy") else cost_table(content)
            text = text[:text.index(begin) + len(begin)] + "\n" + table + "\n" + text[text.index(end):]
    return text


def main() -> int:
    now = README.read_text(encoding="utf-8")
    if "--check" in sys.argv:
        return int(filled(now) != now)
    README.write_text(filled(now), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
