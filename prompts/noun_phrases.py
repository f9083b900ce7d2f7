"""Finds the things a piece of a prompt speaks of, and the words that join them. English, by word lists, no model.

A prompt is scanned between two predicates; the result is a list of `Noun`s and `Mark`s in the order of the text.
"""
from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """A noun phrase: `words` as in the text without its determiners; `start`, `end` are places in the text.

    `link` says how it hangs on what stands before it: "free", "verb" (holding a ball), "preposition" (in a hat),
    "beside" (next to a tree) or "new" (directly after another phrase).
    """

    words: str
    start: int
    end: int
    determiners: tuple[str, ...] = ()
    link: str = "free"


@dataclass(frozen=True)
class Mark:
    """A joining word: and, or, comma, newline, clause, with, verb, is, are, relative, it, unclear, not, both or
    preposition."""

    kind: str


Element = Noun | Mark


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ORDINALS = _set("another other second third")
_DETERMINERS = _ORDINALS | _set(
    "a an the some one two three four five six seven eight nine ten this these those his her its their my your our "
    "each every several many few")
_CLAUSE = _set("while where whereas when but then break showing shows show depicting depicts featuring features "
               "containing contains including")
_JOINTS = {word: kind for kind, words in {
    "and": _set("and plus & +"), "or": _set("or nor"), "with": _set("with"), "both": _set("both"), "clause": _CLAUSE,
    "relative": _set("which who whose whom"), "it": _set("it he she it's he's she's it’s he’s she’s"),
}.items() for word in words}
_NEGATIONS = _set("not no never cannot")
_BESIDE = _set("next beside besides behind near nearby inside alongside close adjacent")
_PREPOSITIONS = _set(
    "in on at by from for into onto to through across around along among between against toward towards out off upon "
    "within outside without like about during before after since as via near above below over under beneath "
    "underneath atop front")
_VERBS = {"is": "is", "are": "are", "was": "is", "were": "are", "sits": "is", "stands": "is", "lies": "is",
          "there": "is"}
_OTHER_VERBS = _set(
    "be been being has have had having can could should must will would may might do does sit lie lay lays rests "
    "hangs floats flies hovers hover stays stay remains remain appears appear seems looks goes holds wears watches "
    "sleeps eats runs walks jumps plays "
    "sat stood hung rested floated hovered flew")
_PARTICIPLES = _set(
    "placed located positioned situated seated seen shown stacked hung perched parked laid mounted set made "
    "surrounded covered painted drawn rendered photographed taken left right dressed")
_PLURAL_VERBS = _set("stand fly rest float set hang look hold wear watch eat sleep run walk jump play")
_COMMANDS = _set("draw paint generate create make put place show imagine see render add i we you here please")
_UNCLEAR = _set("they them what nothing everything something someone nobody all little much whatever who's what's")
_PICTURES = _set(
    "photo photos photograph picture pictures image images painting drawing render rendering sketch illustration shot "
    "view close-up closeup portrait watercolor watercolour cartoon depiction scene screenshot snapshot artwork art "
    "poster collage engraving etching mosaic model")
_ADJECTIVES = _set(
    "big small large little tiny huge giant tall short long old young new red green blue yellow purple pink brown "
    "black white grey gray golden silver cute fluffy happy sad beautiful pretty shiny wooden plastic metal striped "
    "spotted furry soft dark light bright colorful colourful round square very")
_ATTRIBUTIVE_ING = _set(
    "ring king string wing building painting swing ceiling earring clothing wedding thing sibling duckling pudding "
    "dumpling drawing sling railing icing awning spring dining parking swimming washing sewing rocking sleeping "
    "cutting baking frying shopping boxing vending landing ironing fishing skating wing bling herring hiking training")
_LATE_ADVERBS = _set("just far high right straight also up down there here together alone close only hand side")
_LY_NOUNS = _set("butterfly family lily jelly fly belly assembly dragonfly firefly bully trolly dolly teddy")

_PUNCTUATION = r"!-/:-@\[-^`{-~\u00a1-\u00bf\u2010-\u205e\u3000-\u303f\uff01-\uff0f\uff1a-\uff20"
_WORD = rf"[^\s{_PUNCTUATION}]+"
_TOKEN = re.compile(rf"{_WORD}(?:['’\-]{_WORD})*|\n+|[{_PUNCTUATION}]")
_QUOTES = "\"'`“”„‘’«»"


def plain_text(prompt: str) -> str:
    """The prompt with attention weights such as "(dog:1.3)" blanked out; same length, so that places stay valid."""
    def blank(match: re.Match) -> str:
        return " " * len(match.group())

    text = re.sub(r"\\[()\[\]{}]", ", ", prompt)  # an escaped bracket is a real one: a break in the text
    text = re.sub(r":\s{0,4}[-+.\d]{1,12}\s{0,4}(?=[)\]}])", blank, text)
    return re.sub(r"[()\[\]{}]", blank, text)


def _is_plural(word: str) -> bool:
    return word.endswith("s") and not word.endswith("ss") or word in ("people", "men", "women", "children", "sheep")


class _Scanner:
    """One pass over the words of a piece of text; `_noun` holds the tokens of the phrase being read."""

    def __init__(self, keep_picture: bool):
        self.elements: list[Element] = []
        self._keep_picture = keep_picture  # "a cat above a painting of a dog": here the painting is the thing
        self._noun: list[re.Match] = []
        self._determiners: list[str] = []
        self._link = "free"

    def _words(self) -> list[str]:
        return [token.group().lower() for token in self._noun]

    def _only_adjectives(self) -> bool:
        return bool(self._noun) and all(word in _ADJECTIVES for word in self._words())

    def close(self) -> None:
        """Ends the phrase being read; words that cannot end one are taken off."""
        words = self._words()
        while len(words) > 1 and (words[-1] in _LATE_ADVERBS or words[-1] in _DETERMINERS or words[-1] in ("of", "and")
                                  or words[-1].endswith("ly") and words[-1] not in _LY_NOUNS):
            words.pop()
        tokens = self._noun[:len(words)]
        if tokens and not all(word.isdigit() for word in words):
            self.elements.append(Noun(" ".join(token.group() for token in tokens), tokens[0].start(),
                                      tokens[-1].end(), tuple(self._determiners), self._link))
            self._link = "new"
        self._noun, self._determiners = [], []

    def mark(self, kind: str, link: str | None = None) -> None:
        self.close()
        self.elements.append(Mark(kind))
        if link == "preposition" and self._link == "beside":
            return  # "next to", "close to"
        self._link = link or "free"

    def read(self, token: re.Match, following: str) -> None:
        word = token.group().lower()
        if self._noun and self._continues(word, following):
            self._noun.append(token)
        elif not self._joins(word, following):
            self._starts(token, word)

    def _continues(self, word: str, following: str) -> bool:
        """Words that would end a phrase but do not here: "cup of a man", "black and white dog"."""
        words = self._words()
        if words[-1] == "of":
            return word in _DETERMINERS
        if word == "of":
            return self._keep_picture or words[-1] not in _PICTURES
        if word in ("and", "&"):
            return all(w in _ADJECTIVES or w == "orange" for w in words) and following in _ADJECTIVES
        if word.endswith("ing") or word in _PARTICIPLES:
            return self._only_adjectives() or word in _ATTRIBUTIVE_ING
        return False

    def _joins(self, word: str, following: str) -> bool:
        """Handles words that stand between phrases; False for a word that belongs to a phrase."""
        first = not self._noun
        if word == "of":
            if not first:  # "a photo of": what was read is the picture, not a thing in it
                self._noun, self._determiners = [], []
        elif word in _QUOTES:
            self.close()
        elif not word[0].isalnum() and re.fullmatch(rf"[{_PUNCTUATION}]|\n+", word) and word not in "&+":
            if word == "," and self._only_adjectives() and following not in _DETERMINERS:
                self._noun = []  # "a big, red dog": the phrase is "red dog"
            else:
                self.mark("newline" if word[0] == "\n" else "comma")
        elif word.endswith(("n't", "n’t")) or word in _NEGATIONS:
            self.mark("not", self._link)
        elif word == "that" and (not first or self.elements):
            self.mark("relative")
        elif word in _JOINTS:
            self.mark(_JOINTS[word])
        elif word in _UNCLEAR and first and not self._determiners:
            self.mark("unclear")
        elif word in _BESIDE or word == "in" and following == "front":
            self.mark("preposition", "beside")
        elif word in _PREPOSITIONS:
            self.mark("preposition", "preposition")
        else:
            return self._joins_as_verb(word, following, first)
        return True

    def _joins_as_verb(self, word: str, following: str, first: bool) -> bool:
        bare = first and not self._determiners
        if word in _VERBS:
            self.mark(_VERBS[word], "verb")
        elif word in _OTHER_VERBS or bare and word in _PARTICIPLES and word not in ("left", "right"):
            self.mark("verb", "verb")
        elif bare and word.endswith("ing") and (following in _DETERMINERS or following in _PREPOSITIONS):
            self.mark("verb", "verb")  # "sitting on a chair", but "flying bird"
        elif not first and (word in _PARTICIPLES or word.endswith("ing")):
            if word == "right" and not following:
                return False  # "a dog right above": taken off as an adverb
            self.mark("verb", "verb")
        elif word in _PLURAL_VERBS and not first and _is_plural(self._words()[-1]):
            self.mark("are" if word == "stand" else "verb", "verb")
        elif bare and word in _COMMANDS and (following in _DETERMINERS or word in ("i", "we", "you", "here", "please")):
            pass
        else:
            return False
        return True

    def _starts(self, token: re.Match, word: str) -> None:
        """A determiner begins a phrase; any other word goes on with one."""
        counts = word.isdigit() and not self._noun
        if word in _DETERMINERS or word == "that" or counts:
            if self._noun:
                self.close()
            self._determiners.append(word)
        elif not self._noun and not self._determiners and (word.endswith("ly") and word not in _LY_NOUNS):
            return  # "a dog, clearly above": an adverb begins nothing
        else:
            self._noun.append(token)


def scan(text: str, start: int, end: int, keep_picture: bool) -> list[Element]:
    """Nouns and marks of text[start:end] in order; `keep_picture` as for what follows a predicate."""
    scanner = _Scanner(keep_picture)
    tokens = list(_TOKEN.finditer(text, start, end))
    for index, token in enumerate(tokens):
        following = tokens[index + 1].group().lower() if index + 1 < len(tokens) else ""
        scanner.read(token, following)
    scanner.close()
    return scanner.elements
