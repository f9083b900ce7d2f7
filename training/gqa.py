"""GQA scene graphs (https://cs.stanford.edu/people/dorarad/gqa, `train_sceneGraphs.json`) as labelled pictures.

The file maps an image id to {width, height, objects: {id: {name, x, y, w, h, attributes, relations}}}, where relations
is a list of {name, object}; pictures are `<image id>.jpg` in one folder. Boxes are in pixels.
"""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..prompts.predicates import parse_predicate
from ..prompts.relations import OPPOSITE, RELATIONS, RelationError
from .sources import Box, Label, LabelledPictures, Quota, overlapping
from .storage import TrainingError, read_json

LICENCE = "annotations: GQA, CC BY 4.0; pictures: Visual Genome, each under its own terms"
SUFFIXES = (".jpg", ".jpeg", ".png")


def read_gqa(scene_graphs: Path, pictures: Path, size: int, quota: Quota, is_a: Path | None = None
             ) -> tuple[LabelledPictures, Counter[str]]:
    """The usable relations of a scene graph file, and how many were left out for which reason.

    is_a: word list, one "kind, broader kind" per line ("dog, animal"). Raises TrainingError for files of another form.
    """
    graphs = read_json(scene_graphs)
    if not isinstance(graphs, Mapping):
        raise TrainingError(f"{scene_graphs} is no GQA scene graph file: it must map image ids to scene graphs.")
    broader = read_word_list(is_a) if is_a is not None else {}
    skipped: Counter[str] = Counter()
    labels = []
    for image, graph in graphs.items():
        try:
            labels.extend(_labels(str(image), graph, broader, skipped))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TrainingError(f"{scene_graphs.name}, image {image}: not in GQA's form ({type(error).__name__}: "
                                f"{error}).") from error
    if not labels:
        raise TrainingError(f"{scene_graphs} has no usable spatial relation ({dict(skipped)}).")
    paths = {path.stem: path for path in sorted(pictures.iterdir()) if path.suffix.lower() in SUFFIXES}
    return LabelledPictures(labels, paths, size, quota, "GQA scene graphs", LICENCE), skipped


def read_word_list(path: Path) -> dict[str, frozenset[str]]:
    """All broader kinds of each word, also through a chain; lines "kind, broader kind", # begins a remark."""
    parents = defaultdict(set)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        child, comma, parent = (part.strip().lower() for part in line.partition(","))
        if not (child and comma and parent):
            raise TrainingError(f"{path.name}, line {number}: must be \"kind, broader kind\", not {line!r}.")
        parents[child].add(parent)
    return {word: frozenset(_ancestors(word, parents)) for word in list(parents)}


def _ancestors(word: str, parents: Mapping[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = [word]
    while waiting:
        for parent in parents.get(waiting.pop(), ()):
            if parent not in found:
                found.add(parent)
                waiting.append(parent)
    return found - {word}


def _labels(image: str, graph: Mapping, broader: Mapping[str, frozenset[str]],
            skipped: Counter[str]) -> Iterator[Label]:
    objects = graph["objects"]
    names = {key: value["name"].strip().lower() for key, value in objects.items()}
    counts = Counter(names.values())

    def doubtful(name: str) -> str | None:
        if counts[name] > 1:
            return "object more than once in the picture"
        others = counts.keys() - {name}
        if any(other in broader.get(name, ()) or name in broader.get(other, ()) for other in others):
            return "another object is a kind of it"
        return None

    pairs = _pairs(objects)
    held = {pair: relations | {OPPOSITE[name] for name in pairs.get(pair[::-1], ())} for pair, relations in pairs.items()}
    for pair, relations in held.items():
        subject, other = (names[key] for key in pair)
        reason = ("several relations between the same two" if len(relations) > 1 else
                  "subject and object share their words" if overlapping(subject, other) else
                  doubtful(subject) or doubtful(other))
        if reason is not None:
            skipped[reason] += 1
            continue
        boxes = _box(objects[pair[0]]), _box(objects[pair[1]])
        yield Label(image, subject, next(iter(relations)), other, boxes=boxes)


def _pairs(objects: Mapping) -> dict[tuple[str, str], set[str]]:
    """Which of the four relations the graph states of each pair of object ids."""
    pairs = defaultdict(set)
    for key, value in objects.items():
        for relation in value["relations"]:
            try:
                names = parse_predicate(relation["name"])
            except RelationError:
                continue  # "wearing", "holding": not spatial
            if relation["object"] in objects and relation["object"] != key:
                pairs[key, relation["object"]].update(name for name in names if name in RELATIONS)
    return dict(pairs)


def _box(value: Mapping) -> Box:
    x, y = float(value["x"]), float(value["y"])
    return x, y, x + float(value["w"]), y + float(value["h"])
