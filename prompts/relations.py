"""Spatial relations between the objects of a prompt: their names, their types, and contradictions among them."""
from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

ABOVE, BELOW, LEFT, RIGHT = "above", "below", "to the left of", "to the right of"  # names as in the paper's classifier
VERTICAL = (ABOVE, BELOW)
HORIZONTAL = (LEFT, RIGHT)
RELATIONS = (*VERTICAL, *HORIZONTAL)
OPPOSITE = {ABOVE: BELOW, BELOW: ABOVE, LEFT: RIGHT, RIGHT: LEFT}
_AXES = {"vertically": VERTICAL, "horizontally": HORIZONTAL}


class RelationError(ValueError):
    """A relation cannot be used; the message says what is wrong, where, and what to do."""


@dataclass(frozen=True)
class Relation:
    """A relation between two objects, e.g. dog, ("above", "to the left of"), teddy bear.

    subject, object: phrases as in the prompt, without article; "dog#2" is the second occurrence of "dog".
    predicates: the name of one relation of a classifier, or two names for a diagonal, the vertical one first.
    weight: weight of the relation in the loss, >= 0; 0 switches it off.
    Raises RelationError for an empty phrase, unusable predicates or a weight that is negative or not finite.
    """

    subject: str
    predicates: tuple[str, ...]
    object: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.subject.strip() or not self.object.strip():
            raise RelationError(f"The relation {str(self)!r} lacks its subject or its object. Name both.")
        diagonal = len(self.predicates) == 2 and self.predicates[0] in VERTICAL and self.predicates[1] in HORIZONTAL
        if not diagonal and (len(self.predicates) != 1 or not self.predicates[0].strip()):
            raise RelationError(f"The relation {str(self)!r} has the predicates {self.predicates!r}. Give one, or two "
                                "for a diagonal: first above or below, then to the left of or to the right of.")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise RelationError(f"The relation {str(self)!r} has the weight {self.weight}. Give a number of 0 or more.")

    def __str__(self) -> str:
        return f"{self.subject} {' and '.join(self.predicates)} {self.object}"


@dataclass(frozen=True)
class NotUnderstood:
    """Words of the prompt for a place or a relation that is not steered, and why."""

    words: str
    reason: str

    def __str__(self) -> str:
        return f"\"{self.words}\": {self.reason}"


@dataclass(frozen=True)
class RelationGraph:
    """The relations that a picture should show, the prompt with their phrases, and the words that were not understood."""

    relations: tuple[Relation, ...] = ()
    prompt: str = ""
    not_understood: tuple[NotUnderstood, ...] = ()

    @property
    def phrases(self) -> tuple[str, ...]:
        """Every distinct subject and object, in order of first mention."""
        return tuple(dict.fromkeys(phrase for relation in self.relations
                                   for phrase in (relation.subject, relation.object)))

    def counted(self) -> RelationGraph:
        """The graph without relations of weight 0."""
        return replace(self, relations=tuple(relation for relation in self.relations if relation.weight > 0))

    def check(self) -> None:
        """Raises RelationError where relations contradict each other, naming the whole cycle in order."""
        for axis, names in _AXES.items():
            cycle = _find_cycle(self.relations, names)
            if len(cycle) == 1:
                words = split_occurrence(cycle[0].object)[0]
                raise RelationError(f"A thing cannot stand in a relation to itself: {cycle[0]}. If two are meant, "
                                    f"write \"another {words}\" in the prompt, or name the second one "
                                    f"\"{words}#2\" in the relation.")
            if cycle:
                raise RelationError(f"These relations contradict each other {axis}: {'; '.join(map(str, cycle))}. "
                                    "Remove or reverse one of them, or give it the weight 0.")

    def describe(self) -> str:
        """The graph as text for the node: one relation per line, the words that were not understood, then the prompt."""
        if not self.relations:
            lines = ["No relation found."]
        else:
            lines = ["1 relation:" if len(self.relations) == 1 else f"{len(self.relations)} relations:"]
        for number, relation in enumerate(self.relations, 1):
            off = "" if relation.weight else ": off"
            weight = "" if relation.weight == 1 else f"  (weight {relation.weight:g}{off})"
            lines.append(f"{number}. {relation}{weight}")
        lines += [f"Not understood: {one}." for one in self.not_understood]
        return "\n".join(lines + ([f"Prompt: {self.prompt}"] if self.prompt else []))


def split_occurrence(phrase: str) -> tuple[str, int]:
    """"dog#2" -> ("dog", 2). A phrase without a number means its first occurrence."""
    match = re.fullmatch(r"(.*\S)\s*#\s*([1-9]\d{0,3})", phrase.strip(), re.DOTALL)
    return (match.group(1), int(match.group(2))) if match else (phrase.strip(), 1)


def phrase_key(phrase: str) -> tuple[str, int]:
    """The identity of a phrase: its words, regardless of case and spacing, and the number of the occurrence."""
    words, number = split_occurrence(phrase)
    return " ".join(words.casefold().split()), number


def _find_cycle(relations: Sequence[Relation], names: tuple[str, str]) -> list[Relation]:
    """The relations of the first cycle along one axis, in order, or none.

    names: the two relations of the axis. With names[0] the subject comes first, with names[1] the object.
    """
    edges: dict[tuple[str, int], list[tuple[tuple[str, int], Relation]]] = {}
    for relation in relations:
        name = next((predicate for predicate in relation.predicates if predicate in names), None)
        if name is None or relation.weight == 0:
            continue
        first, second = phrase_key(relation.subject), phrase_key(relation.object)
        if name == names[1]:
            first, second = second, first
        way_back = _shortest_path(edges, second, first)
        if way_back is not None:
            return [relation, *way_back]
        edges.setdefault(first, []).append((second, relation))
    return []


def _shortest_path(edges: dict, start: object, goal: object) -> list[Relation] | None:
    paths: dict[object, list[Relation]] = {start: []}
    queue = deque([start])
    while queue:
        node = queue.popleft()
        if node == goal:
            return paths[node]
        for neighbour, relation in edges.get(node, ()):
            if neighbour not in paths:
                paths[neighbour] = [*paths[node], relation]
                queue.append(neighbour)
    return None
