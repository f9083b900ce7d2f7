"""Sources of labelled pictures: the interface, the splits, and folders of pictures with a table."""
from __future__ import annotations

import csv
import hashlib
import logging
import random
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..files.faults import shown
from ..files.reading import iterate_json, read_text
from ..prompts.predicates import parse_predicate
from ..prompts.relations import OPPOSITE, RELATIONS, RelationError
from .storage import TrainingError, faults_of

LOGGER = logging.getLogger("learn_to_steer")
SPLITS = ("train", "validation", "test")
UNREADABLE = "picture file cannot be read"
COLUMNS = ("file", "subject", "relation", "object")
LARGEST_TABLE = 2 ** 28
_SEPARATORS = (",", ";", "\t")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Candidate:
    """A picture that may become two samples, one per caption.

    picture: its name, which alone decides the split; number: the source's number of the candidate.
    """

    picture: str
    split: str
    number: int


@dataclass(frozen=True)
class Example:
    """A labelled picture. image: [size, size, 3] from 0 to 1; relation: the one of the four that holds."""

    picture: str
    image: Tensor
    subject: str
    relation: str
    object: str


@dataclass(frozen=True)
class Drop:
    """A candidate, or one of its captions, that is left out. reason: a short phrase, used to count drops."""

    picture: str
    reason: str


class Source(Protocol):
    """A source of labelled pictures. licence: the pictures' licence in words, for the manifest."""

    licence: str

    def describe(self) -> dict:
        """Everything that determines the examples, as JSON values. A resumed run must match it."""

    def candidates(self) -> list[Candidate]:
        """All candidates; every call returns the same list."""

    def open(self, candidates: Sequence[Candidate]) -> list[Example | Drop]:
        """One result per candidate. It depends on that candidate alone."""


@dataclass(frozen=True)
class Quota:
    """Size of the splits, and the assignment of pictures to them.

    per_relation: split -> most examples of each relation, None for all. The paper uses 800, 200, 100 for Stable Diffusion, and
        2000, 400, 200 for FLUX, from GQA.
    shares: fractions of the pictures for training, validation and test.
    """

    per_relation: Mapping[str, int | None] = field(default_factory=lambda: dict.fromkeys(SPLITS))
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    seed: int = 0

    def split_of(self, picture: str) -> str:
        """The split of a picture. It depends on the picture's name and the seed alone."""
        digest = hashlib.sha256(f"{self.seed}:{picture}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64 * sum(self.shares)
        if place < self.shares[0]:
            return SPLITS[0]
        return SPLITS[1] if place < self.shares[0] + self.shares[1] else SPLITS[2]

    def choose(self, labels: Sequence[Label], available: Container[str]) -> list[Candidate]:
        """Candidates for labels whose picture is in `available`. The seed fixes choice and order.

        A candidate's number is the index of its label.
        """
        order = list(range(len(labels)))
        random.Random(f"{self.seed}:order").shuffle(order)
        taken = dict.fromkeys(((split, relation) for split in SPLITS for relation in RELATIONS), 0)
        chosen = []
        for number in order:
            label = labels[number]
            if label.picture not in available:
                continue
            split = label.split or self.split_of(label.picture)
            limit = self.per_relation.get(split)
            if limit is None or taken[split, label.relation] < limit:
                taken[split, label.relation] += 1
                chosen.append(Candidate(label.picture, split, number))
        return chosen


@dataclass(frozen=True)
class Label:
    """A row of a table: a picture and its relation. boxes: of subject and object, in pixels, or None."""

    picture: str
    subject: str
    relation: str
    object: str
    split: str | None = None
    boxes: tuple[Box, Box] | None = None


class LabelledPictures:
    """Picture files with labels.

    paths: file by picture name; size: side of the square examples, in pixels.
    """

    def __init__(self, labels: Sequence[Label], paths: Mapping[str, Path], size: int, quota: Quota, kind: str,
                 licence: str) -> None:
        self.labels, self.paths, self.size, self.quota, self.kind = labels, paths, size, quota, kind
        self.licence = licence
        _check_splits(labels)
        pictures = {label.picture for label in labels}
        if missing := len(pictures - paths.keys()):
            LOGGER.warning("%s: %d of %d labelled pictures are not in the folder, and are left out.", kind, missing,
                           len(pictures))

    def describe(self) -> dict:
        digest = hashlib.sha256(repr(list(self.labels)).encode()).hexdigest()
        return {"kind": self.kind, "labels": len(self.labels), "labels_sha256": digest, "size": self.size,
                "per_relation": dict(self.quota.per_relation), "shares": list(self.quota.shares),
                "seed": self.quota.seed}

    def candidates(self) -> list[Candidate]:
        return self.quota.choose(self.labels, self.paths)

    def open(self, candidates: Sequence[Candidate]) -> list[Example | Drop]:
        return [self._open(self.labels[candidate.number]) for candidate in candidates]

    def _open(self, label: Label) -> Example | Drop:
        if overlapping(label.subject, label.object):
            return Drop(label.picture, "subject and object share their words")
        try:
            with Image.open(self.paths[label.picture]) as file:
                image = ImageOps.exif_transpose(file).convert("RGB")
        except Exception:  # Pillow's readers document no list of what they raise on damaged bytes
            return Drop(label.picture, UNREADABLE)
        square = square_around(image.size, label.boxes)
        if square is None:
            return Drop(label.picture, "objects do not fit into a square")
        pixels = np.asarray(image.crop(square).resize((self.size, self.size), Image.LANCZOS), dtype=np.float32) / 255
        return Example(label.picture, torch.from_numpy(pixels), label.subject, label.relation, label.object)


def overlapping(first: str, second: str) -> bool:
    """Whether one name contains the other ("bear", "teddy bear"), so that their tokens cannot be told apart."""
    a, b = f" {first.lower()} ", f" {second.lower()} "
    return a in b or b in a


def square_around(size: tuple[int, int], boxes: tuple[Box, Box] | None) -> tuple[int, int, int, int] | None:
    """The largest square of a picture that holds both boxes, as near to the middle as possible; None if they do not fit.

    size: (width, height) of the picture. Returns (left, top, right, bottom) in pixels. Without boxes, the middle square.
    """
    side = min(size)
    corner = [(length - side) // 2 for length in size]
    if boxes is not None:
        for axis in (0, 1):
            low = min(max(0.0, box[axis]) for box in boxes)
            high = max(min(size[axis], box[axis + 2]) for box in boxes)
            if high - low > side:
                return None
            corner[axis] = int(min(max(corner[axis], np.ceil(high - side)), np.floor(low)))
    return corner[0], corner[1], corner[0] + side, corner[1] + side


def read_folder(folder: Path, table: Path, size: int, quota: Quota, licence: str) -> LabelledPictures:
    """Reads a folder of pictures with a CSV or JSON table. Columns: file, subject, relation, object and, optionally, split.

    file: relative to the folder. A repeated row counts once. A pair of objects with several relations is left out.
    Raises TrainingError naming the invalid row.
    """
    root = folder.resolve()
    labels: dict[Label, None] = {}
    paths = {}
    for number, row in _read_table(table):
        place = f"{table.name}, row {number}"
        label, path = _read_row(row, place, root)
        labels[label] = None
        if path is not None:
            paths[label.picture] = path
    if not labels:
        raise TrainingError(f"{table} has no rows.")
    return LabelledPictures(_single(labels, table), paths, size, quota, "folder", licence)


def _read_row(row: Mapping, place: str, root: Path) -> tuple[Label, Path | None]:
    """The label, and its picture's file where that is there."""
    for name in (*COLUMNS, "split"):
        if not isinstance(row.get(name), (str, type(None))):
            raise TrainingError(f"{place}: {name} is {shown(row[name])}, but must be a text.")
    values = {name: (row.get(name) or "").strip() for name in (*COLUMNS, "split")}
    missing = [name for name in COLUMNS if not values[name]]
    if missing:
        raise TrainingError(f"{place}: {', '.join(missing)} is missing. Each row needs file, subject, relation and object.")
    if values["split"] and values["split"] not in SPLITS:
        raise TrainingError(f"{place}: split is {shown(values['split'])}, but must be one of {', '.join(SPLITS)}, or empty.")
    try:
        path = (root / values["file"]).resolve()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError):
        raise TrainingError(f"{place}: {shown(values['file'])} is not the name of a file.") from None
    if not path.is_relative_to(root):
        raise TrainingError(f"{place}: {shown(values['file'])} lies outside the folder {root}.")
    if numbered := next((words for words in (values["subject"], values["object"]) if "#" in words), None):
        raise TrainingError(f"{place}: {shown(numbered)} cannot be found in a caption. Name the object in words alone.")
    picture = path.relative_to(root).as_posix()  # one name per file, however the table spells it
    return Label(picture, values["subject"], _one_relation(values["relation"], place), values["object"],
                 values["split"] or None), path if there else None


def _single(labels: Iterable[Label], table: Path) -> list[Label]:
    """The labels without pairs of objects for which several relations are stated, in either order."""
    stated = defaultdict(set)
    for label in labels:
        turned = label.subject.lower() > label.object.lower()
        stated[_pair(label)].add(OPPOSITE[label.relation] if turned else label.relation)
    kept = [label for label in labels if len(stated[_pair(label)]) == 1]
    if several := sum(len(relations) > 1 for relations in stated.values()):
        LOGGER.warning("%s: %d pairs of objects are left out, since several relations are stated of them.", table.name, several)
    return kept


def _pair(label: Label) -> tuple[str, ...]:
    return label.picture, *sorted((label.subject.lower(), label.object.lower()))


def _read_table(table: Path) -> Iterator[tuple[int, Mapping]]:
    """Rows with their numbers: line numbers for CSV, positions from 1 for JSON."""
    if table.suffix.lower() == ".json":
        with faults_of(table, "The table must be a list of objects with file, subject, relation, object."):
            yield from iterate_json(table, list)
        return
    with faults_of(table, "Save the table as CSV in UTF-8 (in Excel: \"CSV UTF-8\")."):
        text = read_text(table, LARGEST_TABLE)
    header = text.partition("\n")[0]
    separator = next((mark for mark in _SEPARATORS if set(COLUMNS) <= {
        name.strip().strip('"') for name in header.rstrip("\r").split(mark)}), None)
    if separator is None:
        raise TrainingError(f"{table}: the first line must name the columns {', '.join(COLUMNS)} (and split, if you like), with "
                            "commas, semicolons or tabs between them.")
    try:
        lines = (match[0] for match in re.finditer(r"[^\n]*\n|[^\n]+", text))  # lazily, to save memory
        rows = csv.DictReader(lines, delimiter=separator, skipinitialspace=True)
        rows.fieldnames = [name.strip() for name in rows.fieldnames or ()]
        yield from enumerate(rows, 2)
    except csv.Error:
        raise TrainingError(f"{table}, line {rows.line_num}: it cannot be read as CSV. Look for a quotation mark that is not "
                            "closed.") from None


def _one_relation(words: str, place: str) -> str:
    try:
        names = parse_predicate(words)
    except RelationError as error:
        raise TrainingError(f"{place}: {error}") from error
    if len(names) != 1:
        raise TrainingError(f"{place}: {shown(words)} is a diagonal; a classifier is trained on {', '.join(RELATIONS)}.")
    return names[0]


def _check_splits(labels: Sequence[Label]) -> None:
    known: dict[str, str | None] = {}
    for label in labels:
        if known.setdefault(label.picture, label.split) != label.split:
            raise TrainingError(f"Picture {label.picture!r} is given to two splits. Give all its rows the same one.")
