"""Reads relations from a natural prompt: what stands before and after each predicate, and how phrases join.

How prompts are read where English leaves a choice:
- "A r1 B r2 C" is a chain: B is the subject of r2. So is "A r1 B, which is r2 C".
- "A r1 B and r2 C", "A r1 B, r2 C" and "... and it is r2 C" speak of A again.
- "A is r1 B and C" places A against both; without a verb ("A r1 B and C") only against B, C merely being there.
- "A and B are r C" places both; "A and B r C" only B.
- The same noun is the same thing, unless the prompt says "another dog" or "the second dog".
"""
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from .noun_phrases import Element, Mark, Noun, plain_text, scan
from .predicates import find_predicates

Triple = tuple[str, tuple[str, ...], str]

_BOUNDARIES = ("and", "or", "comma", "newline", "clause", "with")
_SENTENCE_END = re.compile(r"(?<=[.!?;。！？])(?=\s|$)")
_FRAME = frozenset("image picture photo photograph frame scene canvas page shot composition viewer camera foreground "
                   "background".split())
_AMBIENT = frozenset("sea ocean water sun moon moonlight starlight sunlight sunshine sky skies rain snow stars light "
                     "lights lighting night clouds".split())
_WORN = frozenset("hat cap beard moustache mustache glasses sunglasses scarf crown helmet hair fur eyes ears tail "
                  "horns wings collar tie bow ribbon shirt dress jacket coat shoes boots backpack smile stripes "
                  "spots".split())
_UNDER = re.compile(r"under|beneath|below", re.IGNORECASE)


@dataclass(frozen=True)
class _Predicate:
    start: int
    end: int
    names: tuple[str, ...]
    words: str


@dataclass
class _Reader:
    """What was said so far: `subjects` and `objects` of the last predicate, and the relations found."""

    text: str
    subjects: list[Noun] = field(default_factory=list)
    objects: list[Noun] = field(default_factory=list)
    found: list[tuple[Noun, tuple[str, ...], Noun]] = field(default_factory=list)

    def read_sentence(self, start: int, end: int, predicates: list[_Predicate]) -> None:
        before = scan(self.text, start, predicates[0].start if predicates else end, keep_picture=False)
        if not predicates:
            self.subjects = _main_noun(before) or self.subjects
        self.objects = []
        waiting: list[_Predicate] = []  # "above and below a cat": predicates that share subject and object
        opening = True
        for index, predicate in enumerate(predicates):
            is_last = index + 1 == len(predicates)
            stop = end if is_last else predicates[index + 1].start
            after = scan(self.text, predicate.end, stop, keep_picture=True)
            waiting.append(predicate)
            if not is_last and [element.kind for element in after if isinstance(element, Mark)] == ["and"] \
                    and len(after) == 1:
                continue
            after = self._relate(waiting, before, after, opening, is_last)
            waiting, before, opening = [], after, False

    def _relate(self, predicates: list[_Predicate], before: list[Element], after: list[Element], opening: bool,
                is_last: bool) -> list[Element]:
        """Records one group of predicates; returns what stands before the next one."""
        inverted = _inverted_subject(before, after) if opening else None
        if inverted is not None:
            subjects, objects, after = [after[inverted]], [after[0]], after[inverted:]
        else:
            subjects = self._subjects(before, opening)
            objects = _objects(after, _has_verb(before), is_last)
        self.subjects, self.objects = subjects or [], objects
        if subjects:
            self.found += [(subject, predicate.names, thing) for predicate in predicates for subject in subjects
                           for thing in objects if not _is_setting(predicate, thing)]
        return after

    def _subjects(self, before: list[Element], opening: bool) -> list[Noun]:
        """The phrases that a predicate is said of, given what stands before it; none where that is unclear."""
        while before and before[-1] == Mark("newline"):
            before = before[:-1]  # a line broken before the predicate
        cut = _last_boundary(before)
        clause = before[cut + 1:]
        nouns = _nouns(clause)
        kinds = _kinds(clause)
        if "not" in kinds or not nouns and kinds & {"unclear", "both"}:
            return []
        if not nouns and "it" in kinds:
            return (_main_noun(before) if opening else []) or self.subjects
        if not nouns and (cut < 0 or before[cut] == Mark("or")):
            return []
        if not nouns and "relative" in kinds:
            return self.objects[-1:] or _main_noun(before)
        if not nouns:
            return _main_noun(before) if opening else self.subjects
        chosen = _subject_of_clause(clause)
        if chosen is None:
            return []
        if not opening and any(_same_place(chosen, thing) for thing in self.objects) and _is_frame(chosen):
            return self.subjects  # "a dog on the left of the picture above a cat"
        if "are" in kinds or "both" in _kinds(before):
            return _joined_before(before, cut, opening) + [chosen]
        return [chosen]


def _nouns(elements: list[Element]) -> list[Noun]:
    return [element for element in elements if isinstance(element, Noun)]


def _kinds(elements: list[Element]) -> set[str]:
    return {element.kind for element in elements if isinstance(element, Mark)}


def _same_place(one: Noun, other: Noun) -> bool:
    return one.start == other.start


def _boundaries(elements: list[Element]) -> list[int]:
    """Indices of the marks that separate two phrases."""
    return [index for index, element in enumerate(elements) if isinstance(element, Mark)
            and element.kind in _BOUNDARIES and not _describes(elements[index:index + 2])]


def _last_boundary(elements: list[Element]) -> int:
    """Index of the last mark that separates two phrases; -1 without any."""
    return max(_boundaries(elements), default=-1)


def _describes(pair: list[Element]) -> bool:
    """True for "with a hat": it tells more of a thing, while "with a dog" brings another one."""
    return pair[0] == Mark("with") and isinstance(pair[-1], Noun) and pair[-1].words.lower().split()[-1] in _WORN


def _has_verb(before: list[Element]) -> bool:
    return bool(_kinds(before[_last_boundary(before) + 1:]) & {"is", "are"})


def _subject_of_clause(clause: list[Element]) -> Noun | None:
    """The nearest of several independent phrases ("a garden a dog", "next to a tree"), else the first free one."""
    nouns = _nouns(clause)
    independent = [noun for noun in nouns if noun.link in ("beside", "new")]
    free = [noun for noun in nouns if noun.link == "free" or noun.link == "verb" and noun is nouns[0]]
    return (independent[-1:] or free[:1] or nouns[:1] or [None])[0]


def _main_noun(elements: list[Element]) -> list[Noun]:
    """The first free phrase of the last clause that has one: what "it" or a new predicate would speak of."""
    stop = len(elements)
    for cut in reversed([-1, *_boundaries(elements)]):
        nouns = _nouns(elements[cut + 1:stop])
        if nouns:
            return [next((noun for noun in nouns if noun.link in ("free", "new", "verb")), nouns[0])]
        stop = cut
    return []


def _joined_before(before: list[Element], cut: int, opening: bool) -> list[Noun]:
    """The phrases joined by "and" or commas to the last one: A and B of "A, B and C are"."""
    joined: list[Noun] = []
    index = cut
    while index > 0 and before[index] in (Mark("and"), Mark("comma")):
        index -= 1
        if isinstance(before[index], Noun):
            if index == 0 and not opening:
                break  # the object of the predicate before
            joined.insert(0, before[index])
            index -= 1
    has_and = any(element == Mark("and") for element in before[index + 1:cut + 1])
    return joined if has_and else []


def _objects(after: list[Element], has_verb: bool, is_last: bool) -> list[Noun]:
    """The phrases right after a predicate: one, or several where a verb or "both" says that all are meant."""
    while after and after[0] in (Mark("newline"), Mark("both")):
        has_verb = has_verb or after[0] == Mark("both")
        after = after[1:]
    if not after or not isinstance(after[0], Noun):
        return []
    first = after[0]
    objects, index, has_and = [first], 1, False
    while has_verb:
        joints = index
        while joints < len(after) and after[joints] in (Mark("and"), Mark("comma")):
            joints += 1
        if joints == index or joints == len(after) or not isinstance(after[joints], Noun) \
                or bool(after[joints].determiners) != bool(first.determiners):
            break
        follows = after[joints + 1] if joints + 1 < len(after) else None
        ends = is_last if follows is None else isinstance(follows, Mark) and follows.kind in _BOUNDARIES
        if not ends or has_and:
            break
        has_and = Mark("and") in after[index:joints]
        objects.append(after[joints])
        index = joints + 1
    return objects if has_and else [first]


def _inverted_subject(before: list[Element], after: list[Element]) -> int | None:
    """Index in `after` of the subject in "Above a table is a lamp" or "To the left of a dog, a cat"; else None."""
    if before or not after or not isinstance(after[0], Noun):
        return None
    index = 1
    while index < len(after) and after[index] in (Mark("comma"), Mark("is"), Mark("are")):
        index += 1
    if index == 1 or index == len(after) or not isinstance(after[index], Noun):
        return None
    noun = after[index]
    return index if noun.determiners or Mark("is") in after[1:index] or Mark("are") in after[1:index] else None


def _is_frame(noun: Noun) -> bool:
    return noun.words.lower().split()[-1] in _FRAME and not {"a", "an", "another"} & set(noun.determiners)


def _is_setting(predicate: _Predicate, thing: Noun) -> bool:
    """True for what is no object in the picture: "the left of the image", "under the sea", "beneath a starry sky"."""
    if _is_frame(thing):
        return True
    last = thing.words.lower().split()[-1]
    definite = not {"a", "an"} & set(thing.determiners)
    return bool(_UNDER.fullmatch(predicate.words)) and last in _AMBIENT and (definite or last in ("sky", "skies"))


def occurrences(words: str, text: str) -> list[tuple[int, int]]:
    """(start, end) of each place where `words` stand in the text as whole words, whatever the case."""
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    return [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)]


def first_alone(words: str, text: str, longer: Iterable[tuple[int, int]]) -> int:
    """Number (from 1) of the first occurrence that is not inside a longer phrase ("dog" in "hot dog"); 0 for none.

    longer: (start, end) of the phrases in the text.
    """
    spans = list(longer)
    for number, (start, end) in enumerate(occurrences(words, text), 1):
        if not any(first <= start and end <= last and last - first > end - start for first, last in spans):
            return number
    return 0


class _Names:
    """Gives each thing one name: its phrase, with "#n" where the phrase's first occurrence is another thing."""

    def __init__(self, text: str, nouns: list[Noun]):
        self._text = text
        self._spans = [(noun.start, noun.end) for noun in nouns]
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


def read_triples(prompt: str) -> list[Triple]:
    """(subject, canonical predicates, object) of each relation in the prompt, in order, without repetition."""
    text = plain_text(prompt)
    predicates = [_Predicate(start, end, names, text[start:end]) for start, end, names in find_predicates(text)]
    reader = _Reader(text)
    start = 0
    for end in [match.start() for match in _SENTENCE_END.finditer(text)] + [len(text)]:
        reader.read_sentence(start, end, [p for p in predicates if start <= p.start < end])
        start = end
    names = _Names(text, [noun for subject, _, thing in reader.found for noun in (subject, thing)])
    triples = [(names.name(subject), predicate, names.name(thing)) for subject, predicate, thing in reader.found]
    return list(dict.fromkeys(triples))
