"""Builds the graph of relations from a prompt or from explicit lines."""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from .predicates import parse_predicate, speaks_of_places
from .reading import read_triples
from .relations import RELATIONS, Relation, RelationError, RelationGraph, phrase_key, split_occurrence
from .text import first_alone, occurrences, plain_phrase, plain_text, set_apart

_ARTICLE = re.compile(r"(?:a|an|the)\s+(?=\S)", re.IGNORECASE)
_AN = re.compile(r"(?!uni|use|eu|one\b)[aeiou]|hour|honest", re.IGNORECASE)


def understand(prompt: str) -> RelationGraph:
    """The relations of a natural prompt, and the words that were not understood.

    Only above, below, left and right are read, with their synonyms and diagonals. "next to" and "behind" are reported as not
    understood. Never raises; contradictions are left in.
    """
    triples, not_understood = read_triples(prompt)
    return RelationGraph(tuple(Relation(*triple) for triple in triples), prompt, tuple(not_understood))


def read_prompt(text: str) -> tuple[Relation, ...]:
    """The relations of a natural prompt, possibly none. Never raises."""
    return understand(text).relations


def read_lines(text: str) -> tuple[Relation, ...]:
    """Relations from lines `subject | relation | object` or `subject | relation | object | weight`.

    Empty lines and lines that start with "#" are skipped. A "=" before the relation's name marks a relation that only some
    classifier knows: `dog | =is | red`. Raises RelationError naming the line.
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
    subject, words, object_phrase = (" ".join(field.split()) for field in fields[:3])
    try:
        predicates = (words[1:].strip(),) if words.startswith("=") else parse_predicate(words)
    except RelationError as error:
        raise RelationError(f"{error} A relation that only your classifier knows is given with \"=\" before it: "
                            f"\"={words}\".") from None
    try:
        weight = float(fields[3]) if len(fields) == 4 else 1.0
    except ValueError:
        raise RelationError(f"the weight {fields[3]!r} is not a number. Write for example 0.5.") from None
    return Relation(_bare_phrase(subject), predicates, _bare_phrase(object_phrase), weight)


def _bare_phrase(phrase: str) -> str:
    words, number = split_occurrence(plain_phrase(phrase))
    words = _ARTICLE.sub("", words, count=1) if _ARTICLE.match(words) else words
    return words if number == 1 else f"{words}#{number}"


def _bare(relation: Relation) -> Relation:
    return replace(relation, subject=_bare_phrase(relation.subject), object=_bare_phrase(relation.object))


def build_graph(prompt: str, lines: str = "", extra: Sequence[Relation] = ()) -> RelationGraph:
    """The checked graph of the explicit relations (`lines`, `extra`) or, without any, of the relations in the prompt.

    For explicit relations and an empty prompt, a prompt is written; phrases such as "dog#2" are then numbered by their
    occurrences in that prompt. In a given prompt that also contains "hot dog", "dog" means the first dog outside of that
    phrase and outside of quotations. Raises RelationError for an unreadable line and for contradictions.
    """
    explicit = _same_spelling((*read_lines(lines), *map(_bare, extra)))
    if explicit and not prompt.strip():
        graph = _write_prompt(explicit)
    elif explicit:
        graph = RelationGraph(_number_in(prompt, explicit), prompt)
    else:
        graph = understand(prompt)
    graph.check()
    return graph


def _same_spelling(relations: Sequence[Relation]) -> tuple[Relation, ...]:
    """The relations with each phrase spelt as in its first mention ("Dog" and "dog" are one phrase)."""
    spelling: dict[tuple[str, int], str] = {}
    return tuple(replace(relation, subject=spelling.setdefault(phrase_key(relation.subject), relation.subject),
                         object=spelling.setdefault(phrase_key(relation.object), relation.object)) for relation in relations)


def _number_in(prompt: str, relations: Sequence[Relation]) -> tuple[Relation, ...]:
    """The relations, with "#n" added to each phrase whose first occurrence in the prompt is part of a longer phrase."""
    text = plain_text(prompt)
    phrases = RelationGraph(tuple(relations)).phrases
    spans = [span for phrase in phrases for span in occurrences(split_occurrence(phrase)[0], text)]
    spans += set_apart(prompt, speaks_of_places)
    names = {}
    for phrase in phrases:
        number = first_alone(phrase, text, spans)
        names[phrase] = phrase if number <= 1 or f"{phrase}#{number}" in phrases else f"{phrase}#{number}"
    return tuple(replace(relation, subject=names[relation.subject], object=names[relation.object])
                 for relation in relations)


def _write_prompt(relations: Sequence[Relation]) -> RelationGraph:
    """A graph whose prompt states the relations and whose phrases are numbered by their occurrences in that prompt."""
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
    """The text with the phrase appended. The first mention of a phrase adds its numbered name to `names`."""
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
