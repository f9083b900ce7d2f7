"""GQA scene graphs (https://cs.stanford.edu/people/dorarad/gqa, `train_sceneGraphs.json`) as labelled pictures.

The file maps an image id to {width, height, objects: {id: {name, x, y, w, h, attributes, relations}}}, where relations
is a list of {name, object}; pictures are `<image id>.jpg` in one folder. Boxes are in pixels.
"""
from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from ..files.entries import Entries
from ..files.faults import FileFault
from ..files.reading import iterate_json, read_text
from ..prompts.predicates import parse_predicate
from ..prompts.relations import OPPOSITE, RELATIONS, RelationError
from .sources import Box, Label, LabelledPictures, Quota, overlapping
from .storage import TrainingError, faults_of

LICENCE = "annotations: GQA, CC BY 4.0; pictures: Visual Genome, each under its own terms"
SUFFIXES = (".jpg", ".jpeg", ".png")
LARGEST_WORD_LIST = 2 ** 19
MOST_BROADER = 500
"""Limit on the broader kinds of one word, counted through chains."""
Broader = Callable[[str], frozenset[str]]


def read_gqa(scene_graphs: Path, pictures: Path, size: int, quota: Quota, is_a: Path | None = None
             ) -> tuple[LabelledPictures, Counter[str]]:
    """The usable relations of a scene graph file, and the number left out by reason.

    is_a: word list, one "kind, broader kind" per line ("dog, animal").
    Raises TrainingError for a file of another form. The message does not quote the file, which may hold private data.
    """
    broader = read_word_list(is_a) if is_a is not None else lambda word: frozenset()
    skipped: Counter[str] = Counter()
    labels = []
    number = 0
    with faults_of(scene_graphs, "This is no GQA scene graph file: it must map image ids to scene graphs."):
        for number, (image, graph) in enumerate(iterate_json(scene_graphs, dict), 1):
            try:
                labels.extend(_labels(str(image), Entries(graph), broader, skipped))
            except FileFault as error:
                name = image if re.fullmatch(r"n?\d{1,12}", str(image)) else f"number {number}"
                detail = f" ({error})" if labels else ""  # with graphs in GQA's form before it, it is no other file
                raise TrainingError(f"{scene_graphs.name}, image {name}: not in GQA's form{detail}.") from error
    if not labels:
        raise TrainingError(f"{scene_graphs} has no usable spatial relation ({dict(skipped)}).")
    paths = {path.stem: path for path in sorted(pictures.iterdir()) if path.suffix.lower() in SUFFIXES}
    return LabelledPictures(labels, paths, size, quota, "GQA scene graphs", LICENCE), skipped


def read_word_list(path: Path) -> Broader:
    """All broader kinds of a word, also through a chain; lines "kind, broader kind", # begins a remark."""
    parents: dict[str, list[str]] = {}
    with faults_of(path, "The word list must be a text in UTF-8."):
        lines = read_text(path, LARGEST_WORD_LIST).splitlines()
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        child, comma, parent = (part.strip().lower() for part in line.partition(","))
        if not (child and comma and parent):
            raise TrainingError(f"{path}, line {number}: not in the form \"kind, broader kind\". Choose a word list, or mend "
                                "that line.")
        parents.setdefault(child, []).append(parent)

    @lru_cache(maxsize=4096)
    def broader(word: str) -> frozenset[str]:
        found: set[str] = set()
        waiting = [word]
        while waiting:
            for parent in parents.get(waiting.pop(), ()):
                if parent not in found:
                    found.add(parent)
                    waiting.append(parent)
            if len(found) > MOST_BROADER:
                raise TrainingError(f"{path}: a word has more than {MOST_BROADER} broader kinds. Shorten the list.")
        return frozenset(found - {word})

    return broader


def _labels(image: str, graph: Entries, broader: Broader, skipped: Counter[str]) -> Iterator[Label]:
    listed = graph.group("objects")
    objects = {key: listed.group(key) for key in listed.values}
    names = {key: value.text("name").strip().lower() for key, value in objects.items()}
    counts = Counter(names.values())
    related = {word for name in counts for kind in broader(name) if kind in counts for word in (name, kind)}
    pairs = _pairs(objects)
    held = {pair: relations | {OPPOSITE[name] for name in pairs.get(pair[::-1], ())} for pair, relations in pairs.items()}
    for pair, relations in held.items():
        subject, target = (names[key] for key in pair)
        reason = ("several relations between the same two" if len(relations) > 1 else
                  "subject and object share their words" if overlapping(subject, target) else
                  _ambiguity(subject, counts, related) or _ambiguity(target, counts, related))
        if reason is not None:
            skipped[reason] += 1
            continue
        boxes = _box(objects[pair[0]]), _box(objects[pair[1]])
        yield Label(image, subject, next(iter(relations)), target, boxes=boxes)


def _ambiguity(name: str, counts: Counter[str], related: set[str]) -> str | None:
    """Why the name may mean several objects in the picture, or None."""
    if counts[name] > 1:
        return "object more than once in the picture"
    return "another object is a kind of it" if name in related else None


def _pairs(objects: Mapping[str, Entries]) -> dict[tuple[str, str], set[str]]:
    """The relations, out of the four, that the graph states for each pair of object ids."""
    pairs = defaultdict(set)
    for key, value in objects.items():
        for item in value.items("relations"):
            relation = Entries.of(item, "a relation")
            words, target = relation.text("name"), relation.text("object")
            try:
                names = parse_predicate(words)
            except RelationError:
                continue  # "wearing", "holding": not spatial
            if target in objects and target != key:
                pairs[key, target].update(name for name in names if name in RELATIONS)
    return dict(pairs)


def _box(value: Entries) -> Box:
    x, y = value.number("x"), value.number("y")
    return x, y, x + value.number("w"), y + value.number("h")
