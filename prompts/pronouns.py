"""Resolves pronouns to the nouns that they refer to."""
from __future__ import annotations

from collections.abc import Sequence

from .elements import Element, Mark, Noun
from .segments import is_many, is_person
from .vocabulary import POSSESSIVES

_MOST = 4  # nouns that "them" may refer to
PRONOUNS = ("it", "he", "they", "both", "former", "latter")


class Unclear(ValueError):
    """A relation cannot be read without a guess; the message says why."""


def listed(nouns: Sequence[Noun]) -> str:
    return " or ".join(f"\"{noun.words}\"" for noun in nouns[:4])


def referents(pronoun: str, candidates: Sequence[Noun], subjects: Sequence[Noun]) -> list[Noun]:
    """The nouns that a pronoun after a relation refers to, out of `candidates`. Raises Unclear.

    subjects: the relation's subjects, which the pronoun does not refer to.
    """
    distinct = {noun.words.lower(): noun for noun in candidates
                if noun.words.lower() not in {subject.words.lower() for subject in subjects}}
    named = list(distinct.values())
    if pronoun in ("former", "latter") and len(named) == 1:
        named = list({noun.words.lower(): noun for noun in candidates}.values())  # "the former above the latter"
    if pronoun in ("both", "former", "latter"):
        if len(named) != 2:
            raise Unclear(f"\"{pronoun}\" needs two things before it")
        return named if pronoun == "both" else [named[0 if pronoun == "former" else 1]]
    if pronoun == "they":
        many = [noun for noun in named if is_many(noun)]
        if len(named) == 1 and many or 1 < len(named) <= _MOST and not many:
            return named
    else:
        people = [noun for noun in named if is_person(noun)]
        fitting = people if pronoun == "he" else [noun for noun in named if noun not in people]
        single = [noun for noun in fitting or named if not is_many(noun)]
        if len(single) == 1:
            return single
        named = single
    raise Unclear(f"the pronoun may mean {listed(named)}" if len(named) > 1 else "nothing before it is meant by the pronoun")


def leading_pronoun(elements: Sequence[Element]) -> str:
    """The pronoun at the beginning of the elements, or "". "both a cat and a dog" begins with no pronoun."""
    first = elements[0] if elements else None
    if not isinstance(first, Mark) or first.kind not in PRONOUNS:
        return ""
    return "" if first.kind == "both" and len(elements) > 1 and isinstance(elements[1], Noun) else first.kind


def belongs_to_owner(elements: Sequence[Element]) -> bool:
    """Whether the elements begin with a phrase with a possessive: "his head"."""
    return bool(elements) and isinstance(elements[0], Noun) and bool(POSSESSIVES & set(elements[0].determiners))
