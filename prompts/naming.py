"""Gives each object of a prompt one name."""
from __future__ import annotations

from collections.abc import Sequence

from .elements import Noun
from .text import first_alone, occurrences


class Names:
    """Gives each object one name: its phrase, with "#n" if the phrase's first occurrence is another object.

    text: the prompt; occurrences are counted in it.
    nouns: all noun phrases that will be named.
    quoted: (start, end) of each quotation and aside; these name no object.
    """

    def __init__(self, text: str, nouns: Sequence[Noun], quoted: Sequence[tuple[int, int]]):
        self._text = text
        self._spans = [*dict.fromkeys((noun.start, noun.end) for noun in nouns), *quoted]
        self._names: dict[str, list[str]] = {}

    def name(self, noun: Noun) -> str:
        words = " ".join(noun.words.split())
        known = self._names.setdefault(words.lower(), [])
        ordinals = {"another", "other", "second", "third"} & set(noun.determiners)
        again = known[0] if known else ""
        if ordinals:
            again = known[-1] if "the" in noun.determiners and len(known) > 1 else ""
        if not again:
            if ordinals:
                number = sum(1 for _, end in occurrences(words, self._text) if end <= noun.end)
            else:
                number = first_alone(words, self._text, self._spans)
            again = words if number <= 1 else f"{words}#{number}"
            known.append(again)
        return again
