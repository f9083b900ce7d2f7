"""Prints, in one line, the relation that each picture of the small world shows, by the exact detector.

    python dev.py run -m dev.benchmarks.verdict --prompt "a dog above a cat" unsteered=a.png steered=b.png
"""
from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from learn_to_steer.prompts.graph import build_graph
from learn_to_steer.prompts.relations import Relation, split_occurrence
from learn_to_steer.toyworld.detector import Detection, detect, judge
from learn_to_steer.toyworld.scenes import EXTRA_NOUNS, IMAGE_SIZE, NOUNS, true_relations, with_article
from PIL import Image

ORDER = ("above", "below", "to the left of", "to the right of")


def world_noun(phrase: str) -> str:
    """The small world's noun in a phrase ("small red cat" -> "cat"). Raises ValueError without one."""
    words = split_occurrence(phrase)[0].casefold()
    for noun in sorted(NOUNS + EXTRA_NOUNS, key=len, reverse=True):
        if words == noun or words.endswith(" " + noun):
            return noun
    raise ValueError(f"{phrase!r} is none of the small world's nouns: {', '.join(NOUNS)}")


def shown_relation(found: Sequence[Detection], subject: str, other: str) -> str:
    """The relation between the best detections of both nouns, or the missing nouns, in words. found: best first."""
    best = {item.noun: item for item in reversed(found)}
    missing = [noun for noun in dict.fromkeys((subject, other)) if noun not in best]
    if missing:
        return " and ".join(f"no {noun}" for noun in missing)
    held = true_relations(best[subject].box, best[other].box)
    relation = " and ".join(name for name in ORDER if name in held) or "too close to"
    return f"{subject} {relation} {other}"


def surplus(found: Sequence[Detection], wanted: set[str]) -> str:
    """Detections beyond one of each wanted noun, e.g. " (also 1 dog too many, a car)"; empty without any."""
    counts = Counter(item.noun for item in found)
    parts = [f"{count - 1} {noun} too many" for noun, count in counts.items() if noun in wanted and count > 1]
    parts += [with_article(noun) for noun in counts if noun not in wanted]
    return f" (also {', '.join(parts)})" if parts else ""


def verdict(found: Sequence[Detection], relations: Sequence[Relation]) -> str:
    """The shown relations in words, and whether they are the requested ones."""
    named = [(world_noun(relation.subject), relation, world_noun(relation.object)) for relation in relations]
    shown = "; ".join(shown_relation(found, subject, other) for subject, _, other in named)
    right = [judge(found, subject, relation.predicates, other).relation for subject, relation, other in named]
    score = "right" if all(right) else "wrong" if len(right) == 1 else f"{sum(right)} of {len(right)} right"
    return f"{shown}{surplus(found, {noun for subject, _, other in named for noun in (subject, other)})}: {score}"


def load(file: Path) -> np.ndarray:
    """A picture as uint8 [64, 64, 3]. A picture enlarged for viewing is reduced."""
    return np.asarray(Image.open(file).convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("pictures", nargs="+", metavar="NAME=FILE")
    arguments = parser.parse_args()
    relations = build_graph(arguments.prompt).relations
    if not relations:
        raise SystemExit(f"The pictures cannot be judged: no spatial relation in the prompt {arguments.prompt!r}")
    try:
        asked = "; ".join(f"{world_noun(relation.subject)} {' and '.join(relation.predicates)} "
                          f"{world_noun(relation.object)}" for relation in relations)
    except ValueError as error:
        raise SystemExit(f"The pictures cannot be judged: {error}") from None
    pictures = dict(word.split("=", 1) for word in arguments.pictures)
    found = detect(np.stack([load(Path(file)) for file in pictures.values()]))
    shown = " | ".join(f"{name}: {verdict(items, relations)}" for name, items in zip(pictures, found, strict=True))
    print(f"asked: {asked} | {shown}")


if __name__ == "__main__":
    main()
