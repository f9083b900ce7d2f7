"""Splits a sentence into elements, in order: noun phrases, joining words, relations and places.

The scanner knows English by word lists; it uses no model.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .predicates import Found, Order, Place, Predicate
from .text import HIDDEN, embedding_at
from .vocabulary import (
    ADJECTIVES,
    BESIDE,
    COMMANDS,
    CONTRACTIONS,
    DENIALS,
    DETERMINERS,
    ING_ATTRIBUTES,
    ING_NOUNS,
    JOINTS,
    LATE_ADVERBS,
    LY_NOUNS,
    NEGATING_ADVERBS,
    NEGATIONS,
    NUMBERS,
    ORDINALS,
    OTHER_VERBS,
    PARTICIPLES,
    PICTURES,
    PLURAL_VERBS,
    POSITION_VERBS,
    PREDICATIVE,
    PREPOSITIONS,
    SEVERAL_WORDS,
    UNCLEAR,
    VERBS,
)


@dataclass(frozen=True)
class Noun:
    """A noun phrase: text[start:end] without its determiners.

    words: the phrase as spelt in the text.
    link: how the phrase depends on the phrase before it: "free" (it does not), "verb" (holding a ball), "preposition"
        (in a hat), "beside" (next to a tree) or "new" (directly after another phrase).
    """

    words: str
    start: int
    end: int
    determiners: tuple[str, ...] = ()
    link: str = "free"

    @property
    def last_word(self) -> str:
        return self.words.lower().split()[-1]


@dataclass(frozen=True)
class Mark:
    """A word that is no noun phrase, by kind.

    A joining word is one of: and, or, comma, newline, clause, with, verb, is, are, relative, not, never, deny, adjective,
    preposition, aside. "never" negates all of its clause, "deny" all of the sentence after it.
    A pronoun is one of: it, he, they, both, former, latter. "unclear" stands for a pronoun without a referent.
    """

    kind: str
    start: int = field(default=0, compare=False)
    end: int = field(default=0, compare=False)


Element = Noun | Mark | Predicate | Place | Order

_PUNCTUATION = r"!-/:-@\[-^`{-~\u00a1-\u00bf\u2010-\u205e\u3000-\u303f\uff01-\uff0f\uff1a-\uff20"
_WORD = rf"[^\s{HIDDEN}{_PUNCTUATION}]+"
_SEVERAL = "|".join(words.replace(" ", r"\s+") for words in SEVERAL_WORDS)
_TOKEN = re.compile(rf"\b(?:{_SEVERAL})\b|{_WORD}(?:['\u2019\-]{_WORD})*|\n+|{HIDDEN}+|[{_PUNCTUATION}]", re.IGNORECASE)
_IS_PUNCTUATION = re.compile(rf"[{_PUNCTUATION}\n]+")
_QUOTES = "\"'`\u201c\u201d\u201e\u2018\u2019\u00ab\u00bb"
_FOUND = "\ue000"  # replaces the words of a relation or place
_PRONOUNS = {"this": "it", "that": "it", "her": "he", "these": "they", "those": "they"} | {
    word: "unclear" for word in NUMBERS | ORDINALS | {"each", "some", "several", "many", "few"}}
"""Determiners that act as pronouns if no noun follows: "above her"."""


@dataclass(frozen=True)
class _Token:
    word: str
    start: int
    end: int
    found: Found | None = None


def is_plural(word: str) -> bool:
    return word.endswith("s") and not word.endswith("ss") or word in ("people", "men", "women", "children", "sheep")


def scan(text: str, start: int, end: int, found: Sequence[Found]) -> list[Element]:
    """The elements of the sentence text[start:end], in order. found: the relations and places in that sentence."""
    tokens = _tokens(text, start, end, found)
    scanner = _Scanner(text)
    for index, token in enumerate(tokens):
        scanner.read(token, tokens[index + 1].word if index + 1 < len(tokens) else "")
    scanner.close()
    return scanner.elements


def _tokens(text: str, start: int, end: int, found: Sequence[Found]) -> list[_Token]:
    tokens: list[_Token] = []
    for one in found:
        tokens += _words(text, start, one.start)
        tokens.append(_Token(_FOUND, one.start, one.end, one))
        start = one.end
    return tokens + _words(text, start, end)


def _words(text: str, start: int, end: int) -> list[_Token]:
    tokens: list[_Token] = []
    while match := _TOKEN.search(text, start, end):
        start = match.start()
        word = " ".join(match.group().lower().replace("\u2019", "'").split()) or match.group()
        stop = match.end()
        if word == "embedding" and (name_end := embedding_at(text, start)) > stop:
            word, stop = "embedding:", name_end
        for part in CONTRACTIONS.get(word, "").split() or [SEVERAL_WORDS.get(word, word)]:
            tokens.append(_Token(part, start, stop))
        start = stop
    return tokens


class _Scanner:
    """One pass over the words of a sentence. `_noun` holds the tokens of the current noun phrase."""

    def __init__(self, text: str):
        self.elements: list[Element] = []
        self._text = text
        self._keep_picture = False  # in "a cat above a painting of a dog" the painting is an object
        self._noun: list[_Token] = []
        self._determiners: list[_Token] = []
        self._link = "free"

    def _words(self) -> list[str]:
        return [token.word for token in self._noun]

    def _only_adjectives(self) -> bool:
        return bool(self._noun) and all(word in ADJECTIVES for word in self._words())

    def close(self) -> None:
        """Ends the current phrase, without trailing words that cannot end one."""
        words = self._words()
        while len(words) > 1 and (words[-1] in LATE_ADVERBS or words[-1] in DETERMINERS or words[-1] in ("of", "and")
                                  or words[-1].endswith("ly") and words[-1] not in LY_NOUNS):
            words.pop()
        tokens = self._noun[:len(words)]
        determiners = tuple(token.word for token in self._determiners)
        if tokens and not all(word.isdigit() for word in words) and (determiners or not self._only_adjectives()):
            spelling = " ".join(self._text[token.start:token.end] for token in tokens)
            self.elements.append(Noun(spelling, tokens[0].start, tokens[-1].end, determiners, self._link))
            self._link = "new"
        elif tokens and self.elements[-1:] == [Mark("not")]:
            self.elements.append(Mark("adjective", tokens[0].start, tokens[-1].end))  # "that isn't black"
        elif determiners and not tokens and determiners[-1] in _PRONOUNS:
            last = self._determiners[-1]
            self.elements.append(Mark(_PRONOUNS[last.word], last.start, last.end))
        self._noun, self._determiners = [], []

    def mark(self, token: _Token, kind: str, link: str = "free") -> None:
        self.close()
        self.elements.append(Mark(kind, token.start, token.end))
        if not (link == "preposition" and self._link == "beside"):  # "next to", "close to"
            self._link = link

    def read(self, token: _Token, following: str) -> None:
        if token.found is not None:
            self._find(token.found)
        elif token.word in ("one", "ones") and (self._only_adjectives() or self._determiners) and _ends_phrase(following):
            self._noun, self._determiners = [], []  # "the brown one"
            self.mark(token, "unclear")
        elif self._noun and self._continues(token.word, following):
            self._noun.append(token)
        elif not self._joins(token, following):
            self._starts(token)

    def _find(self, found: Found) -> None:
        if self._noun and self._noun[-1].word.endswith("'s"):  # "the dog's above the cat"
            last = self._noun[-1]
            self._noun[-1] = _Token(last.word[:-2], last.start, last.end - 2)
            self.mark(last, "is")
        self.close()
        if isinstance(found, Predicate | Place | Order):
            self.elements.append(found)
            self._keep_picture, self._link = self._keep_picture or isinstance(found, Predicate), "free"
        else:
            self.elements.append(Mark("preposition", found.start, found.end))
            self._link = "beside"

    def _continues(self, word: str, following: str) -> bool:
        """Whether a word that usually ends a phrase continues this one: "cup of a man", "black and white dog"."""
        words = self._words()
        if words[-1] == "of":
            return word in DETERMINERS
        if word == "of":
            return self._keep_picture or words[-1] not in PICTURES
        if word in ("and", "&"):
            return all(w in ADJECTIVES or w == "orange" for w in words) and following in ADJECTIVES
        if word.endswith("ing") or word in PARTICIPLES:
            return self._only_adjectives() or word in ING_ATTRIBUTES and following != _FOUND or word in ING_NOUNS
        return False

    def _joins(self, token: _Token, following: str) -> bool:
        """Handles a word between phrases. Returns False for a word that belongs to a phrase."""
        word, first = token.word, not self._noun
        if word == "of":
            if not first:  # "a photo of": the phrase names the picture, not an object in it
                self._noun, self._determiners = [], []
        elif word in _QUOTES:
            self.close()
        elif word[0] == HIDDEN:
            self.mark(token, "aside", self._link)
        elif _IS_PUNCTUATION.fullmatch(word) and word not in "&+":
            if word == "," and self._only_adjectives() and following not in DETERMINERS:
                self._noun = []  # "a big, red dog": the phrase is "red dog"
            else:
                self.mark(token, "newline" if word[0] == "\n" else "comma")
        elif word.endswith("n't") or word in NEGATIONS or word in NEGATING_ADVERBS and not (first and self._determiners):
            self.mark(token, "not", self._link)
        elif word in DENIALS or word in DENIALS.values():
            self.mark(token, DENIALS.get(word, word), self._link)
        elif word == "that" and (
                not first or self.elements and not self._determiners and not isinstance(self.elements[-1], Predicate)):
            self.mark(token, "relative")
        elif word in JOINTS:
            self.mark(token, JOINTS[word])
        elif word in ("former", "latter") and first and _ends_phrase(following):
            self._determiners = []
            self.mark(token, word)
        elif word in UNCLEAR and first and not self._determiners:
            self.mark(token, "unclear")
        elif word in BESIDE or word == "in" and following == "front":
            self.mark(token, "preposition", "beside")
        elif word in PREPOSITIONS:
            self.mark(token, "preposition", "preposition")
        else:
            return self._joins_as_verb(token, following, first)
        return True

    def _joins_as_verb(self, token: _Token, following: str, first: bool) -> bool:
        word = token.word
        bare = first and not self._determiners
        ing = word.endswith("ing") and word not in ING_NOUNS
        if word in VERBS:
            self.mark(token, VERBS[word])
        elif word in OTHER_VERBS or bare and (word in PARTICIPLES or word in PREDICATIVE) and word not in ("left", "right"):
            self.mark(token, "verb", "verb")
        elif bare and ing and (following in DETERMINERS or following in PREPOSITIONS or _ends_phrase(following)):
            self.mark(token, "verb", "verb")  # "sitting on a chair", "sitting under", but "flying bird"
        elif not first and (word in PARTICIPLES or word in PREDICATIVE or word.endswith("ing")):
            if word == "right" and following in ("", _FOUND) or word in ("left", "right") and self._words()[-1].endswith("'s"):
                return False  # "a dog right above": `close` drops the adverb; "a man's left hand"
            self.mark(token, "verb", "verb")
        elif word in PLURAL_VERBS and not first and (is_plural(self._words()[-1]) or Mark("and") in self.elements[-2:]):
            self.mark(token, "are" if word in POSITION_VERBS else "verb", "free" if word in POSITION_VERBS else "verb")
        elif bare and word in COMMANDS and (following in DETERMINERS or word in ("i", "we", "you", "here", "please", "let")):
            pass
        else:
            return False
        return True

    def _starts(self, token: _Token) -> None:
        """Begins a phrase with a determiner, or adds any other word to the current one."""
        word = token.word
        if word in DETERMINERS or word == "that" or word.isdigit() and not self._noun:
            if self._noun:
                self.close()
            self._determiners.append(token)
        elif not self._noun and (word in NEGATING_ADVERBS or not self._determiners and word.endswith("ly")
                                 and word not in LY_NOUNS):
            return  # "a dog, clearly above", "a rarely seen dog": an adverb begins nothing
        else:
            self._noun.append(token)


def _ends_phrase(following: str) -> bool:
    """Whether the next word cannot be part of a noun phrase."""
    return not following or following == _FOUND or bool(_IS_PUNCTUATION.fullmatch(following)) or following in JOINTS \
        or following in VERBS or following in PREPOSITIONS
