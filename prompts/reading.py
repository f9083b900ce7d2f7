"""Reads relations from a natural prompt: text -> elements -> subjects and objects of each relation -> relations.

Words that cannot be read without guessing are reported with the reason.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from .clauses import (
    NEGATED,
    NO_OBJECT,
    NO_SUBJECT,
    Context,
    find_objects,
    find_subjects,
    has_verb,
    inverted_subject,
)
from .elements import Element, Mark, Noun, scan
from .naming import Names
from .places import NO_OBJECT as NO_REFERENCE
from .places import NOT_STEERED, FoundRelation, Placed, find_placed, in_order, is_ordinary, relate
from .predicates import Order, Place, Predicate, Unsteered, find_all, speaks_of_places
from .pronouns import PRONOUNS, Unclear, belongs_to_owner, leading_pronoun, listed, referents
from .relations import NotUnderstood
from .segments import head, is_frame, main_nouns, nouns_of, split
from .text import hide, plain_text, sentences, set_apart, without_embeddings
from .vocabulary import AMBIENT, BODY, LY_NOUNS

Triple = tuple[str, tuple[str, ...], str]

_UNDER = re.compile(r"under|beneath|below", re.IGNORECASE)
_COVERS = re.compile(r"over|under", re.IGNORECASE)
_IDLE = frozenset("scenes camera viewer wheel bars".split())  # "behind the scenes"
_LONGEST = 100  # characters of a quoted fragment


@dataclass
class _Reader:
    """The state of reading a prompt sentence by sentence, and the relations found so far."""

    prompt: str
    found: list[FoundRelation] = field(default_factory=list)
    placed: list[Placed] = field(default_factory=list)
    not_understood: list[tuple[int, NotUnderstood]] = field(default_factory=list)
    subjects: list[Noun] = field(default_factory=list)
    objects: list[Noun] = field(default_factory=list)
    awaiting: list[Noun] = field(default_factory=list)  # subjects without a verb yet
    said: list[Noun] = field(default_factory=list)  # main nouns of the sentence so far
    before: list[Noun] = field(default_factory=list)  # main nouns of the previous sentence
    meant: list[Noun] = field(default_factory=list)  # referents of the last "it" in the sentence
    remark: str = ""  # how the last relation was said of its object: "" (it was not), "enclosed" or "loose"
    denied: bool = False  # whether "avoid:" or "it is false that" precedes in the sentence

    def read_sentence(self, elements: Sequence[Element]) -> None:
        self.denied = False
        kept = elements[:elements.index(Mark("deny"))] if Mark("deny") in elements else elements
        self.placed += find_placed(kept, Context(True, self.subjects, (), self.before))
        self.found += in_order(kept)
        elements = [element for element in elements if not isinstance(element, Place | Order)]
        cuts = [index for index, element in enumerate(elements) if isinstance(element, Predicate)]
        parts = [list(elements[start + 1:end]) for start, end in zip([-1, *cuts], [*cuts, len(elements)], strict=True)]
        self.objects, self.awaiting, self.said, self.meant, self.remark, before = [], [], [], [], "", parts[0]
        waiting: list[Predicate] = []  # "above and below a cat": predicates that share subject and object
        opening = True
        for number, cut in enumerate(cuts, 1):
            is_last = number == len(cuts)
            waiting.append(elements[cut])
            if not is_last and parts[number] == [Mark("and")]:
                continue
            before = self._read(waiting, before, parts[number], opening, is_last)
            waiting, opening = [], False
        if opening and (named := main_nouns(split(before))):
            self.subjects = named
        self.said += main_nouns(split(before))
        self.before = [*self.said, *self.meant] or self.before

    def _read(self, predicates: list[Predicate], before: list[Element], after: list[Element], opening: bool,
              is_last: bool) -> list[Element]:
        """Records a group of predicates that share subjects and objects. Returns the elements before the next group."""
        self.said += main_nouns(split(before))
        self.denied = self.denied or Mark("deny") in before
        try:
            subjects, objects, rest = self._sides(predicates[-1], before, after, opening, is_last)
        except Unclear as unclear:
            named = [noun for noun in [head(split(before)[-1]), *main_nouns(split(before))[-1:]] if noun is not None]
            self.subjects = named[:1] if str(unclear) == NEGATED else []
            self.objects = [noun for noun in after[:1] if isinstance(noun, Noun)]
            self.remark = ""
            self._note(predicates, before, after, str(unclear))
            return after
        clause = split(before)[-1]
        if has_verb(clause):
            self.awaiting = []
        elif opening or clause.joint and "relative" not in clause.kinds:
            self.awaiting = subjects
        self.subjects, self.objects, self.remark = subjects, objects, self._kind_of_remark(before, rest)
        different = {predicate.names: predicate for predicate in predicates}.values()
        self.found += [(subject, predicate.names, noun) for predicate in different for subject in subjects
                       for noun in objects if not _is_setting(predicate, noun)]
        return rest

    def _sides(self, predicate: Predicate, before: list[Element], after: list[Element], opening: bool, is_last: bool
               ) -> tuple[list[Noun], list[Noun], list[Element]]:
        """Subjects and objects of a relation, and the elements before the next one. Raises Unclear."""
        clause = split(before)[-1]
        if self.denied:
            raise Unclear(NEGATED)
        if predicate.to_pronoun:
            after = [Mark("they" if "their" in predicate.words.lower() else "it"), *after]
        if after and after[0] == Mark("relative"):  # "a table above which a lamp hangs"
            return [_without_verb(after, self.prompt)], self._antecedent(before), after
        pronoun = leading_pronoun(after)
        inverted = inverted_subject(clause, after, opening)
        resumed = [] if inverted is not None or opening else self._resumed(before)
        if resumed:
            subjects, rest = resumed, after
        elif inverted is not None:
            subjects, rest = [after[inverted]], after[inverted:]
        else:
            context = Context(opening, self.subjects, self.objects, self.before, self.awaiting)
            subjects, rest = find_subjects(before, context, bool(pronoun) or belongs_to_owner(after)), after
        if not pronoun:
            several = bool(clause.kinds & {"is", "are"})
            return subjects, after[:1] if inverted is not None else find_objects(after, several, is_last), rest
        may_be_owner = inverted is None and clause.joint == "with" and pronoun in ("it", "he")
        owner = main_nouns(split(before)[-2:-1]) if may_be_owner else []
        if pronoun == "it" and not owner:  # "a table with a cat below it and a lamp above it"
            owner = [noun for noun in self.meant if noun not in subjects]
        self.meant = owner or referents(pronoun, self._named(subjects), subjects)
        return subjects, self.meant, rest

    def _antecedent(self, before: Sequence[Element]) -> list[Noun]:
        """The noun before "above which". In "above which a lamp hangs and below which a cat sleeps" both mean one noun."""
        if before[:1] != [Mark("relative")]:
            return nouns_of(before)[-1:] or _fail(NO_OBJECT)
        return self.objects if split(before)[-1].joint == "and" else _fail(f"it may be said of {listed(self.said)}")

    def _kind_of_remark(self, before: Sequence[Element], after: Sequence[Element]) -> str:
        """Whether the relation is a remark on its object, named earlier in the sentence: "a dog, with a cat above it"."""
        segments = split(before)
        clause = segments[-1]
        if after and after[0] == Mark("relative"):
            return "enclosed" if clause.joint == "comma" else "loose"
        if clause.joint == "and" and leading_pronoun(after) == "it":
            return self.remark  # "with a bird above it and a cat below it"
        if leading_pronoun(after) not in ("it", "he", "they") or clause.joint not in ("with", "comma") or has_verb(clause) \
                or not all(noun in self.said for noun in self.objects):
            return ""
        after_comma = clause.joint == "with" and segments[-2].joint == "comma" and not segments[-2].elements
        return "enclosed" if after_comma else "loose"

    def _resumed(self, before: Sequence[Element]) -> list[Noun]:
        """The subject that a sentence returns to after a remark on it: "a dog, with a cat above it, to the left of"."""
        clause = split(before)[-1]
        verbs = [element for element in clause.elements if element in (Mark("is"), Mark("are"), Mark("verb"))]
        if not self.remark or "relative" in clause.kinds and (len(verbs) < 2 or clause.elements[-1] != verbs[-1]):
            return []
        if "relative" not in clause.kinds and nouns_of(clause.elements):
            return []
        if self.remark == "enclosed" and clause.joint == "comma" or len(verbs) > bool("relative" in clause.kinds) \
                and clause.joint != "and":
            return self.objects
        return _fail(f"it may be said of {listed([*self.objects, *self.subjects])}")

    def _named(self, subjects: Sequence[Noun]) -> list[Noun]:
        """Candidates for a pronoun: nouns of this sentence or, without any, of the previous one."""
        known = {subject.words.lower() for subject in subjects}
        here = [*self.said, *self.objects]
        return here if any(noun.words.lower() not in known for noun in here) else self.before

    def _note(self, predicates: Sequence[Predicate], before: Sequence[Element], after: Sequence[Element], reason: str) -> None:
        clause = split(before)[-1].elements
        start = min([element.start for element in clause if element.end] + [predicates[0].start])
        names_one = after and (isinstance(after[0], Noun) or after[0].kind in (*PRONOUNS, "unclear"))
        end = max(predicates[-1].end, after[0].end if names_one else 0)
        setting = after and isinstance(after[0], Noun) and _is_setting(predicates[-1], after[0])
        idle = reason == NO_SUBJECT and _COVERS.fullmatch(predicates[-1].words) and not (
            after and isinstance(after[0], Noun) and (after[0].determiners or after[0].words.startswith("embedding:")))
        if not setting and not idle and not (reason == NO_OBJECT and _COVERS.fullmatch(predicates[-1].words)):
            self.note(start, end, reason)

    def note(self, start: int, end: int, reason: str) -> None:
        words = " ".join(self.prompt[start:end].split())
        words = words if len(words) <= _LONGEST else f"{words[:_LONGEST]}..."
        self.not_understood.append((start, NotUnderstood(words, reason)))

    def note_unsteered(self, one: Unsteered, elements: Sequence[Element]) -> None:
        """Reports a relation that cannot be steered, such as "next to a tree", if it names an object."""
        if one.complete:
            self.note(one.start, one.end, one.reason)
            return
        noun = next((element for element in elements if isinstance(element, Noun) and element.start >= one.end), None)
        if noun is not None and not is_frame(noun) and noun.last_word not in _IDLE | BODY \
                and _only_determiners(self.prompt[one.end:noun.start]):
            self.note(one.start, noun.end, one.reason)

    def relate_places(self) -> None:
        relations, rest = relate(self.placed)
        self.found += relations
        for one in rest:
            if not is_ordinary(one):
                near = [noun.start for noun in one.nouns if 0 <= one.place.start - noun.start <= _LONGEST]
                self.note(min(near, default=one.place.start), one.place.end, NO_REFERENCE if one.place.bare else NOT_STEERED)


def _fail(reason: str) -> list[Noun]:
    raise Unclear(reason)


def _without_verb(after: Sequence[Element], prompt: str) -> Noun:
    """The subject of "above which a lamp hangs". Where no verb is known, the last word of the phrase is the verb."""
    clause = split(after)[0]
    noun = (nouns_of(clause.elements) or _fail(NO_SUBJECT))[0]
    words = prompt[noun.start:noun.end].split()
    if clause.kinds & {"is", "are", "verb"}:
        return noun
    words.pop()
    while len(words) > 1 and words[-1].endswith("ly") and words[-1].lower() not in LY_NOUNS:
        words.pop()
    if not words:
        return _fail(NO_SUBJECT)[0]
    phrase = re.compile(r"\s+".join(map(re.escape, words))).match(prompt, noun.start)
    return replace(noun, words=" ".join(words), end=phrase.end())


def _only_determiners(text: str) -> bool:
    return len(text.split()) <= 2 and not re.search(r"[,.;:!?]", text)


def _is_setting(predicate: Predicate, noun: Noun) -> bool:
    """Whether the noun names no object in the picture: "the left of the image", "under the sea", "beneath a starry sky"."""
    if is_frame(noun):
        return True
    if noun.last_word in BODY and (_COVERS.fullmatch(predicate.words) or "side" in predicate.words.lower()):
        return True  # "hair over one eye", "a scar on the left side of his face"
    definite = not {"a", "an"} & set(noun.determiners)
    return bool(_UNDER.fullmatch(predicate.words)) and noun.last_word in AMBIENT and (
        definite or noun.last_word in ("sky", "skies"))


def read_triples(prompt: str) -> tuple[list[Triple], list[NotUnderstood]]:
    """(subject, canonical predicates, object) of each relation, in order, and the words that were not understood."""
    plain, apart = plain_text(prompt), set_apart(prompt, speaks_of_places)
    text = hide(plain, apart)
    found = find_all(without_embeddings(text))
    reader = _Reader(prompt)
    for start, end in sentences(text):
        here = [one for one in found if start <= one.start < end]
        elements = scan(text, start, end, here)
        reader.read_sentence(elements)
        for one in here:
            if isinstance(one, Unsteered):
                reader.note_unsteered(one, elements)
    reader.relate_places()
    names = Names(plain, [noun for subject, _, target in reader.found for noun in (subject, target)], apart)
    triples = [(names.name(subject), predicate, names.name(target)) for subject, predicate, target in reader.found]
    notes = [note for _, note in sorted(reader.not_understood, key=lambda note: note[0])]
    return list(dict.fromkeys(triples)), list(dict.fromkeys(notes))
