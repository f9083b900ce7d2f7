"""Finds the subjects and the objects of a relation within its sentence.

Rules for prompts that English leaves ambiguous:
- "A r1 B r2 C" is a chain: B is the subject of r2. So is "A r1 B, which is r2 C".
- In "A r1 B and r2 C", "A r1 B, r2 C" and "... and it is r2 C" the subject of r2 is A.
- "A is r1 B and C" relates A to both B and C. Without a verb ("A r1 B and C") it relates A to B only.
- "A and B are r C" relates both A and B to C. "A and B r C" relates B only.
- In "A with B r C" the subject is A if A has B ("a man with a guitar"), and B if A is a scene.
- "A that is r1 B and that is r2 C" relates A to both. After a remark between commas or brackets the sentence returns to its
  subject: "A, with B r1 it, r2 C" and "A, r1 which sits B, r2 C" relate A to C.
Every other ambiguous case raises `Unclear` with the reason.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .elements import Element, Mark, Noun
from .pronouns import Unclear, is_many, leading_pronoun, listed, referents
from .segments import BOUNDARIES, Segment, head, is_alive, is_person, kinds_of, main_nouns, names_object, nouns_of, split
from .vocabulary import ATTRIBUTES, SCENES

NEGATED = "it is negated, and nothing is steered away from a relation"
CHOICE = "\"or\" leaves open what is meant"
NO_SUBJECT = "it does not say what stands there"
NO_OBJECT = "it does not say of what"


def _one_of(candidates: Sequence[Noun], joined: bool) -> list[Noun]:
    """The subjects of ", sitting under a tree" among the candidates. Raises Unclear where several could be meant."""
    people = [noun for noun in candidates if is_person(noun)]
    if len(candidates) == 1 or joined:
        return list(candidates)
    if not candidates:
        raise Unclear(NO_SUBJECT)
    if len(people) == 1 and not any(noun.determiners for noun in candidates if noun is not people[0]):
        return people  # tags: "1girl, umbrella, standing to the left of a car"
    raise Unclear(f"it may be said of {listed(candidates)}")


@dataclass(frozen=True)
class Context:
    """What precedes a relation.

    opening: whether the relation is the first of its sentence.
    subjects, objects: those of the previous relation.
    before: the main nouns of the previous sentence.
    awaiting: subjects of this sentence that have no verb yet: "the lamp above the table is ...".
    """

    opening: bool
    subjects: Sequence[Noun] = ()
    objects: Sequence[Noun] = ()
    before: Sequence[Noun] = ()
    awaiting: Sequence[Noun] = ()


def find_subjects(elements: Sequence[Element], context: Context, of_pronoun: bool = False) -> list[Noun]:
    """The subjects of a relation, given the elements before it. Raises Unclear.

    of_pronoun: the relation's object is a pronoun ("a table with a lamp above it") or has a possessive ("his head").
    """
    while elements and elements[-1] == Mark("newline"):
        elements = elements[:-1]  # a line break before the relation
    segments = split(elements)
    clause, earlier = segments[-1], segments[:-1]
    noun = head(clause)
    if Mark("never") in clause.elements or of_pronoun and clause.elements[-2:-1] == (Mark("not"),):
        raise Unclear(NEGATED)
    if Mark("not") in clause.elements and (noun is None or _is_negated(clause.elements)):
        raise Unclear(NEGATED)
    if of_pronoun and isinstance(clause.elements[-1:][0] if clause.elements else None, Noun) \
            and clause.elements[-1].link == "verb" and names_object(clause.elements[-1]):
        return [clause.elements[-1]]  # "a man holding an umbrella above his head"
    if noun is None:
        return _subjects_before(clause, earlier, context)
    if context.awaiting and noun is elements[0] and has_verb(clause) and not clause.joint:
        return list(context.awaiting)
    if clause.joint == "or" and any(nouns_of(segment.elements) for segment in earlier):
        raise Unclear(CHOICE)
    if clause.joint == "and" and _may_be_worn(noun, earlier[-1]):
        raise Unclear(f"it may be said of {listed([*nouns_of(earlier[-1].elements)[:1], noun])}")
    if clause.joint == "with" and earlier and not of_pronoun:
        noun = _owner_or_owned(noun, earlier, context.opening)
    if "are" in clause.kinds or "both" in kinds_of(elements):
        return _joined_before(elements, clause, context.opening) + [noun]
    return [noun]


def _may_be_worn(noun: Noun, before: Segment) -> bool:
    """True for the hat of "a cat with a scarf and a hat"."""
    nouns = nouns_of(before.elements)
    return noun.last_word in ATTRIBUTES and len(nouns) > 1 and nouns[-1].last_word in ATTRIBUTES and "with" in before.kinds


def has_verb(clause: Segment) -> bool:
    """Whether the clause has its own "is", "are" or "sits"; "which is" does not count."""
    return bool(clause.kinds & {"is", "are"}) and "relative" not in clause.kinds


def _is_negated(elements: Sequence[Element]) -> bool:
    """Whether "not" negates the relation. It does not where a phrase or an adjective follows it."""
    return any(element == Mark("not") and not (elements[index + 1:index + 2] and (
        isinstance(elements[index + 1], Noun) or elements[index + 1] == Mark("adjective")))
               for index, element in enumerate(elements))


def _subjects_before(clause: Segment, earlier: Sequence[Segment], context: Context) -> list[Noun]:
    """The subjects of a relation whose clause names none: "a woman, sitting under", "It is above", "and above"."""
    kinds = clause.kinds
    resumes = has_verb(clause) and clause.joint == "comma"  # "..., and a bird, which is blue, is"
    here = main_nouns(earlier if context.opening else earlier[1:] if resumes else [])
    if "unclear" in kinds:
        raise Unclear(NO_SUBJECT)
    if kinds & {"they", "both"}:
        found = here or list(context.before)
        if len(found) < 2 and not (found and is_many(found[0])):
            raise Unclear("nothing before it says who is meant")
        return found
    if resumes and context.awaiting and not here:
        return list(context.awaiting)
    if kinds & {"former", "latter"}:
        return referents("former" if "former" in kinds else "latter", here or context.before, ())
    if "relative" in kinds:
        return _antecedent(clause, earlier, context)
    if clause.joint == "or":
        raise Unclear(CHOICE)
    if here:
        joined = all(segment.joint in ("", "and", "comma") for segment in earlier) and earlier[-1].joint == "and"
        return _one_of(here, joined)
    if clause.joint and not context.opening or kinds & {"it", "he", "is", "are", "verb"} and context.subjects:
        return list(context.subjects) or _none()
    raise Unclear(NO_SUBJECT)


def _antecedent(clause: Segment, earlier: Sequence[Segment], context: Context) -> list[Noun]:
    """The noun that "which is" is said of. "A that is r1 B and that is r2 C" relates A to C; "A r1 B, which is r2 C" B to C."""
    if clause.joint != "and" or context.opening:
        return main_nouns(earlier)[-1:] or list(context.objects[-1:] or context.subjects[-1:]) or _none()
    between = [*main_nouns(earlier[1:]), *(nouns_of(earlier[0].elements)[:1] if "relative" in earlier[0].kinds else [])]
    if between:
        raise Unclear(f"it may be said of {listed([*context.subjects, *between])}")
    return list(context.subjects) or _none()


def _none() -> list[Noun]:
    raise Unclear(NO_SUBJECT)


def _owner_or_owned(noun: Noun, earlier: Sequence[Segment], opening: bool) -> Noun:
    """The subject of "A with B above C": A or B."""
    owner = head(earlier[-1])
    if owner is None or owner.last_word in SCENES or not names_object(owner):
        return noun
    if not is_alive(noun):
        return owner
    if opening and is_alive(owner):
        raise Unclear(f"it may be said of {listed([owner, noun])}")
    return noun


def _joined_before(elements: Sequence[Element], clause: Segment, opening: bool) -> list[Noun]:
    """The phrases joined by "and" or commas to the last one: A and B of "A, B and C are"."""
    joined: list[Noun] = []
    start = len(elements) - len(clause.elements) - 1
    index = start
    while index > 0 and elements[index] in (Mark("and"), Mark("comma")):
        index -= 1
        if isinstance(elements[index], Noun):
            if index == 0 and not opening:
                break  # the object of the previous relation
            if not (index and elements[index - 1] == Mark("not")):
                joined.insert(0, elements[index])
            index -= 1
    return joined if Mark("and") in elements[index + 1:start + 1] else []


def find_objects(after: Sequence[Element], has_verb: bool, is_last: bool) -> list[Noun]:
    """The objects of a relation: the first phrase after it, or several phrases after a verb or "both"."""
    while after and after[0] in (Mark("newline"), Mark("both"), Mark("aside")):
        has_verb = has_verb or after[0] == Mark("both")
        after = after[1:]
    if after and after[0] == Mark("not"):
        raise Unclear(NEGATED)
    if not after or not isinstance(after[0], Noun):
        raise Unclear(NO_OBJECT)
    first = after[0]
    if len(after) > 2 and after[1] == Mark("or") and isinstance(after[2], Noun):
        raise Unclear(CHOICE)
    objects, index, has_and = [first], 1, False
    while has_verb:
        joints = index
        while joints < len(after) and after[joints] in (Mark("and"), Mark("comma")):
            joints += 1
        if joints == index or joints == len(after) or not isinstance(after[joints], Noun) \
                or bool(after[joints].determiners) != bool(first.determiners) or _begins_clause(after[joints + 1:]):
            break
        follows = after[joints + 1] if joints + 1 < len(after) else None
        ends = is_last if follows is None else isinstance(follows, Mark) and follows.kind in BOUNDARIES
        if not ends or has_and:
            break
        has_and = Mark("and") in after[index:joints]
        objects.append(after[joints])
        index = joints + 1
    return objects if has_and else [first]


def _begins_clause(rest: Sequence[Element]) -> bool:
    """Whether the phrase before `rest` has its own verb: "above a cat, and a bird, which is red, is ..."."""
    return bool(kinds_of(rest) & {"is", "are"}) and Mark("and") not in rest and not nouns_of(rest)


def inverted_subject(clause: Segment, after: Sequence[Element], opening: bool) -> int | None:
    """Index in `after` of the subject in "Above a table is a lamp" or "To the left of a dog, a cat"; else None."""
    starts = bool(after) and (isinstance(after[0], Noun) or bool(leading_pronoun(after)))
    leads = ("newline", "preposition", *(["verb"] if opening and not clause.joint else []))  # "Sitting under a tree, a woman"
    if any(not isinstance(element, Mark) or element.kind not in leads for element in clause.elements) \
            or not starts or not (opening or clause.joint):
        return None
    index = 1
    while index < len(after) and after[index] in (Mark("comma"), Mark("is"), Mark("are")):
        index += 1
    if index == len(after) or not isinstance(after[index], Noun):
        return None
    has_verb = bool(kinds_of(after[1:index]) & {"is", "are"})
    pronoun = isinstance(after[0], Mark)  # "and to its right a dog"
    if "verb" in clause.kinds and not is_alive(after[index]):
        return None
    without_verb = bool(after[index].determiners) and (pronoun or opening and not clause.joint and index > 1)
    return index if has_verb or without_verb else None
