"""Splits a sentence at its joining words, and finds the main noun of each segment."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .elements import Element, Mark, Noun, is_plural
from .vocabulary import ALWAYS_FRAME, ANIMALS, ATTRIBUTES, FRAME, NUMBERS, PEOPLE, PICTURES, QUALITY, SCENES

BOUNDARIES = ("and", "or", "comma", "newline", "clause", "with")
_INSERTS = ("verb", "relative", "preposition", "not", "both")  # begin an insertion: ", wearing a hat,", ", which is red,"


@dataclass(frozen=True)
class Segment:
    """A part of a sentence between two joining words. joint: kind of the mark before it, "" for the first."""

    joint: str
    elements: tuple[Element, ...]

    @property
    def kinds(self) -> set[str]:
        return kinds_of(self.elements)


def nouns_of(elements: Sequence[Element]) -> list[Noun]:
    """The noun phrases, without negated ones ("not a cat")."""
    return [element for index, element in enumerate(elements) if isinstance(element, Noun)
            and not (index and elements[index - 1] == Mark("not"))]


def kinds_of(elements: Sequence[Element]) -> set[str]:
    return {element.kind for element in elements if isinstance(element, Mark)}


def split(elements: Sequence[Element]) -> list[Segment]:
    """The segments between joining words. "with a hat" does not split: it describes the noun before it."""
    segments, joint, start = [], "", 0
    for index, element in enumerate(elements):
        if isinstance(element, Mark) and element.kind in BOUNDARIES and not _describes(elements[index:index + 2]):
            segments.append(Segment(joint, tuple(elements[start:index])))
            joint, start = element.kind, index + 1
    return [*segments, Segment(joint, tuple(elements[start:]))]


def _describes(pair: Sequence[Element]) -> bool:
    return pair[0] == Mark("with") and isinstance(pair[-1], Noun) and pair[-1].last_word in ATTRIBUTES


def is_frame(noun: Noun) -> bool:
    """Whether the noun means the picture itself: "the image", "a white background"."""
    return noun.last_word in ALWAYS_FRAME or noun.last_word in FRAME and not {"a", "an", "another"} & set(noun.determiners)


def is_person(noun: Noun) -> bool:
    return noun.last_word.lstrip("0123456789") in PEOPLE


def is_many(noun: Noun) -> bool:
    numbers = NUMBERS - {"one"} | {"these", "those", "several", "many", "few"}
    return is_plural(noun.last_word) or bool(numbers & set(noun.determiners))


def is_alive(noun: Noun) -> bool:
    return is_person(noun) or noun.last_word in ANIMALS


def names_object(noun: Noun) -> bool:
    """Whether the noun names an object in the picture, not the picture itself, an attribute or a quality tag."""
    last = noun.last_word
    return not (is_frame(noun) or last in ATTRIBUTES or last in QUALITY or last in PICTURES and not noun.determiners)


def head(segment: Segment) -> Noun | None:
    """The subject of a relation directly after the segment. In "a garden a dog" and "a dog next to a tree" it is the last noun.

    None where every phrase depends on something before it ("sitting on a chair").
    """
    nouns = nouns_of(segment.elements)
    independent = [noun for noun in nouns if noun.link in ("beside", "new")]
    free = [noun for noun in nouns if noun.link == "free"]
    return (independent[-1:] or free[:1] or [None])[0]


def main_nouns(segments: Sequence[Segment]) -> list[Noun]:
    """The nouns that the segments are about, without the nouns that these wear, hold or stand in."""
    found: list[Noun] = []
    for index, segment in enumerate(segments):
        first = segment.elements[0] if segment.elements else None
        after_comma = index > 0 and segments[index - 1].joint == "comma" and not segments[index - 1].elements
        insert = isinstance(first, Mark) and first.kind in _INSERTS or segment.joint == "with"
        noun = next((noun for noun in nouns_of(segment.elements) if noun.link in ("free", "new")), None)
        if noun is None or not names_object(noun):
            continue
        if segment.joint == "with" and found and found[-1].last_word in SCENES:
            found[-1] = noun  # "a garden with a dog"
        elif not (insert and found) or segment.joint == "with" and is_alive(noun) and not after_comma:
            found.append(noun)
    return found
