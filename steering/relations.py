"""Spatial relations between the things of a prompt: their types, how they are read, and contradictions among them."""
from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .noun_phrases import plain_text
from .predicates import HORIZONTAL, RELATIONS, VERTICAL, RelationError, parse_predicate
from .prompt_reading import first_alone, occurrences, read_triples

__all__ = ["RELATIONS", "Relation", "RelationError", "RelationGraph", "build_graph", "parse_predicate", "read_lines",
           "read_prompt", "split_occurrence"]

_ARTICLE = re.compile(r"(?:a|an|the)\s+(?=\S)", re.IGNORECASE)
_AN = re.compile(r"(?!uni|use|eu|one\b)[aeiou]|hour|honest", re.IGNORECASE)
_AXES = {"vertically": VERTICAL, "horizontally": HORIZONTAL}


@dataclass(frozen=True)
class Relation:
    """`subject` stands in `predicates` to `object`, e.g. dog, ("above", "to the left of"), teddy bear.

    subject, object: phrases as they stand in the prompt, without article; "dog#2" is the second occurrence of "dog".
    predicates: one name of a classifier's relation, or two for a diagonal, the vertical one first.
    weight: how much the relation counts, >= 0; 0 switches it off.
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
class RelationGraph:
    """The relations that a picture should show, and the prompt whose words they speak of."""

    relations: tuple[Relation, ...] = ()
    prompt: str = ""

    @property
    def phrases(self) -> tuple[str, ...]:
        """Every distinct subject and object, in the order in which they are first seen."""
        return tuple(dict.fromkeys(phrase for relation in self.relations
                                   for phrase in (relation.subject, relation.object)))

    def counted(self) -> RelationGraph:
        """Without the relations that weight 0 switches off."""
        return replace(self, relations=tuple(relation for relation in self.relations if relation.weight > 0))

    def check(self) -> None:
        """Raises RelationError where relations contradict each other; names the whole cycle in order."""
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
        """What was understood, for the node: the relations one a line, then the prompt."""
        if not self.relations:
            lines = ["No relation found."]
        else:
            lines = ["1 relation:" if len(self.relations) == 1 else f"{len(self.relations)} relations:"]
        for number, relation in enumerate(self.relations, 1):
            off = "" if relation.weight else ": off"
            weight = "" if relation.weight == 1 else f"  (weight {relation.weight:g}{off})"
            lines.append(f"{number}. {relation}{weight}")
        return "\n".join(lines + ([f"Prompt: {self.prompt}"] if self.prompt else []))


def split_occurrence(phrase: str) -> tuple[str, int]:
    """"dog#2" → ("dog", 2); a phrase without a number is its first occurrence."""
    match = re.fullmatch(r"(.*\S)\s*#\s*([1-9]\d{0,3})", phrase.strip(), re.DOTALL)
    return (match.group(1), int(match.group(2))) if match else (phrase.strip(), 1)


def _key(phrase: str) -> tuple[str, int]:
    """What makes two phrases the same thing: their words whatever the case, and the number of the occurrence."""
    words, number = split_occurrence(phrase)
    return " ".join(words.casefold().split()), number


def _find_cycle(relations: Sequence[Relation], names: tuple[str, str]) -> list[Relation]:
    """Relations of the first cycle along one axis, in order, or none.

    names: the axis' relations; the subject comes first with names[0], the object with names[1].
    """
    edges: dict[tuple[str, int], list[tuple[tuple[str, int], Relation]]] = {}
    for relation in relations:
        name = next((predicate for predicate in relation.predicates if predicate in names), None)
        if name is None or relation.weight == 0:
            continue
        first, second = _key(relation.subject), _key(relation.object)
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


def read_prompt(text: str) -> tuple[Relation, ...]:
    """Relations of a natural prompt; empty where it has none. Never raises.

    Only above, below, left and right (with synonyms and diagonals) are read; "next to" or "behind" are not.
    """
    return tuple(Relation(subject, predicates, thing) for subject, predicates, thing in read_triples(text))


def read_lines(text: str) -> tuple[Relation, ...]:
    """Relations from lines `subject | relation | object` or `subject | relation | object | weight`.

    Empty lines and lines that start with "#" are skipped. A relation that only some classifier knows is given with
    "=" before its name: `dog | =is | red`. Raises RelationError that names the line.
    """
    relations = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                relations.append(_read_line(line))
            except RelationError as error:
                raise RelationError(f"Line {number} ({line.strip()!r}): {error}") from None
    return tuple(relations)


def _read_line(line: str) -> Relation:
    fields = [field.strip() for field in line.split("|")]
    if not 3 <= len(fields) <= 4 or not all(fields):
        raise RelationError("expected `subject | relation | object` or `subject | relation | object | weight`, for "
                            "example `dog | to the right of | teddy bear | 0.5`.")
    subject, words, thing = (" ".join(field.split()) for field in fields[:3])
    try:
        predicates = (words[1:].strip(),) if words.startswith("=") else parse_predicate(words)
    except RelationError as error:
        raise RelationError(f"{error} A relation that only your classifier knows is given with \"=\" before it: "
                            f"\"={words}\".") from None
    try:
        weight = float(fields[3]) if len(fields) == 4 else 1.0
    except ValueError:
        raise RelationError(f"the weight {fields[3]!r} is not a number. Write for example 0.5.") from None
    return Relation(_bare_phrase(subject), predicates, _bare_phrase(thing), weight)


def _bare_phrase(phrase: str) -> str:
    words, number = split_occurrence(" ".join(plain_text(phrase).split()))
    words = _ARTICLE.sub("", words, count=1) if _ARTICLE.match(words) else words
    return words if number == 1 else f"{words}#{number}"


def _bare(relation: Relation) -> Relation:
    return replace(relation, subject=_bare_phrase(relation.subject), object=_bare_phrase(relation.object))


def build_graph(prompt: str, lines: str = "", extra: Sequence[Relation] = ()) -> RelationGraph:
    """The checked graph of explicit relations (`lines`, `extra`) if there are any, else of those read from the prompt.

    With explicit relations and an empty prompt, a prompt is written from them; the occurrences in its text then
    number phrases such as "dog#2". In a given prompt, "dog" beside "hot dog" means the first dog that is not the hot
    one. Raises RelationError for an unreadable line and for contradictions.
    """
    explicit = _same_spelling((*read_lines(lines), *map(_bare, extra)))
    if explicit and not prompt.strip():
        graph = _write_prompt(explicit)
    elif explicit:
        graph = RelationGraph(_number_in(prompt, explicit), prompt)
    else:
        graph = RelationGraph(read_prompt(prompt), prompt)
    graph.check()
    return graph


def _same_spelling(relations: Sequence[Relation]) -> tuple[Relation, ...]:
    """The relations with each phrase spelt as where it is first seen ("Dog" and "dog" are one thing)."""
    spelling: dict[tuple[str, int], str] = {}
    return tuple(replace(relation, subject=spelling.setdefault(_key(relation.subject), relation.subject),
                         object=spelling.setdefault(_key(relation.object), relation.object)) for relation in relations)


def _number_in(prompt: str, relations: Sequence[Relation]) -> tuple[Relation, ...]:
    """The relations with phrases numbered whose first occurrence in the prompt is part of another phrase."""
    text = plain_text(prompt)
    phrases = RelationGraph(tuple(relations)).phrases
    spans = [span for phrase in phrases for span in occurrences(split_occurrence(phrase)[0], text)]
    names = {}
    for phrase in phrases:
        number = first_alone(phrase, text, spans)
        names[phrase] = phrase if number <= 1 or f"{phrase}#{number}" in phrases else f"{phrase}#{number}"
    return tuple(replace(relation, subject=names[relation.subject], object=names[relation.object])
                 for relation in relations)


def _write_prompt(relations: Sequence[Relation]) -> RelationGraph:
    """A prompt that says the relations, and the relations with their phrases numbered as in that prompt."""
    text = "a photo of"
    names: dict[str, str] = {}
    for index, relation in enumerate(relations):
        joint = "" if index == 0 else " and" if index == len(relations) - 1 else ","
        text = _mention(text + joint, relation.subject, names)
        text = f"{text} {' and '.join(relation.predicates)}"
        text = _mention(text, relation.object, names, with_article=relation.predicates[0] in RELATIONS)
    numbered = (replace(relation, subject=names[relation.subject], object=names[relation.object])
                for relation in relations)
    return RelationGraph(tuple(numbered), text)


def _mention(text: str, phrase: str, names: dict[str, str], with_article: bool = True) -> str:
    """The text with the phrase put behind it; its first mention enters `names` with its number in the text."""
    words, occurrence = split_occurrence(phrase)
    if phrase in names:
        article = "the " if occurrence == 1 else "the other "
    elif not with_article or _is_plural(words):
        article = ""
    else:
        article = "another " if occurrence > 1 else "an " if _AN.match(words) else "a "
    text = f"{text} {article}{words}"
    if phrase not in names:
        number = len(occurrences(words, text))
        names[phrase] = words if number == 1 else f"{words}#{number}"
    return text


def _is_plural(phrase: str) -> bool:
    return bool(re.search(r"(?:[^sui]s|\b(?:people|men|women|children|sheep))$", phrase, re.IGNORECASE))
