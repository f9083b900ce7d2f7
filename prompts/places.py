"""Places in the picture: which nouns are at which place, and the relations between nouns on opposite sides."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .clauses import Context, find_subjects
from .elements import Element, Mark, Noun
from .predicates import Order, Place, Predicate
from .pronouns import Unclear
from .relations import ABOVE, BELOW, LEFT, RIGHT
from .segments import head, is_frame, main_nouns, nouns_of, split
from .vocabulary import SCENES

NOT_STEERED = "absolute places are not steered yet; say where one thing stands from another"
NO_OBJECT = "it does not say above or below what"


@dataclass(frozen=True)
class Placed:
    """The nouns at a place. owner: the table in "a table with a cat underneath"."""

    place: Place
    nouns: tuple[Noun, ...]
    owner: Noun | None = None


FoundRelation = tuple[Noun, tuple[str, ...], Noun]
"""Subject, canonical predicates, object."""


def find_placed(elements: Sequence[Element], context: Context) -> list[Placed]:
    """The nouns at each place of a sentence, in order; no nouns where they are unclear."""
    placed: list[Placed] = []
    start = 0
    for index, element in enumerate(elements):
        if isinstance(element, Place):
            earlier = elements[start:index]
            heads = element.heads or not any(isinstance(one, Noun) for one in elements[:index])
            following = _phrase_after(elements[index + 1:], heads)
            segments = split(earlier)
            if following is not None and head(segments[-1]) is None:
                placed.append(Placed(element, (following,)))
            elif start and len(segments) == 1 and head(segments[0]) is None and nouns_of(earlier):
                placed.append(Placed(element, (nouns_of(earlier)[-1],)))  # "on the left, facing a cat on the right"
            else:
                placed.append(Placed(element, *_subjects(earlier, placed, context, element.bare)))
        if isinstance(element, Place | Predicate):
            start = index + 1
            context = Context(False, placed[-1].nouns if isinstance(element, Place) else (), (), ())
    return placed


def _phrase_after(elements: Sequence[Element], after_comma: bool) -> Noun | None:
    """The phrase of "on the left is a dog", "on the left a dog" and, where a comma may stand, "on the left, a dog"."""
    index = 0
    while index < len(elements) and isinstance(elements[index], Mark) \
            and (elements[index].kind in ("is", "are", "verb") or after_comma and elements[index].kind == "comma"):
        index += 1
    return elements[index] if index < len(elements) and isinstance(elements[index], Noun) else None


def _subjects(earlier: Sequence[Element], placed: Sequence[Placed], context: Context, bare: bool
              ) -> tuple[tuple[Noun, ...], Noun | None]:
    segments = split(earlier)
    owner = head(segments[-2]) if bare and segments[-1].joint == "with" and len(segments) > 1 else None
    try:
        return tuple(find_subjects(earlier, context, of_pronoun=bare)), owner
    except Unclear:
        return (), None


def relate(placed: Sequence[Placed]) -> tuple[list[FoundRelation], list[Placed]]:
    """The relations between nouns on opposite sides, and the places that are part of no relation."""
    used: set[int] = set()
    above = _opposite(placed, lambda place: place.row, used)
    left = _opposite(placed, lambda place: place.column, used)
    relations: list[FoundRelation] = []
    for (one, other), pair in above.items():
        sides = [name for name, key in ((LEFT, (one, other)), (RIGHT, (other, one))) if left.pop(key, None)]
        relations.append((pair[0], (ABOVE, *sides[:1]), pair[1]))
    relations += [(one, (LEFT,), other) for one, other in left.values()]
    rest = []
    for index, one in enumerate(placed):
        if one.owner is not None and index not in used and one.owner.last_word not in SCENES:
            relations += [(noun, (ABOVE if one.place.row == -1 else BELOW,), one.owner) for noun in one.nouns]
        elif index not in used:
            rest.append(one)
    return relations, rest


def _opposite(placed: Sequence[Placed], rank_of: Callable[[Place], int | None], used: set[int]
              ) -> dict[tuple[int, int], tuple[Noun, Noun]]:
    """Pairs of nouns, keyed by their starts in the text. The first of a pair is nearer to the left or the top.

    rank_of: column or row of a place. Indices of the places used are added to `used`.
    Faint places ("dog left, cat right") pair only with each other.
    """
    found = {}
    for faint in (False, True):
        ranks = {index: rank_of(one.place) for index, one in enumerate(placed)
                 if one.nouns and one.place.faint == faint and rank_of(one.place) is not None}
        for first, second in _neighbours(ranks):
            for one in placed[first].nouns:
                for other in placed[second].nouns:
                    if one.words.lower() != other.words.lower() or "another" in other.determiners:
                        found[one.start, other.start] = one, other
                        used |= {first, second}
    return found


def _neighbours(rank_by_index: Mapping[int, int]) -> list[tuple[int, int]]:
    """Pairs of indices (lower rank, next rank), each index paired with the nearest in the text. No pairs within one rank."""
    ranks: dict[int, list[int]] = {}
    for index, rank in rank_by_index.items():
        ranks.setdefault(rank, []).append(index)
    order = sorted(ranks)
    pairs: dict[tuple[int, int], None] = {}
    for low, high in zip(order, order[1:], strict=False):
        for one in ranks[low]:
            pairs[one, min(ranks[high], key=lambda other: abs(other - one))] = None
        for other in ranks[high]:
            pairs[min(ranks[low], key=lambda one: abs(other - one)), other] = None
    return sorted(pairs)


def in_order(elements: Sequence[Element]) -> list[FoundRelation]:
    """The relations of a list after "from left to right:"; none if the list itself contains relations."""
    for index, element in enumerate(elements):
        if isinstance(element, Order):
            listed = main_nouns(split(elements[index + 1:]))
            if not any(isinstance(one, Predicate | Place | Order) for one in elements[index + 1:]):
                return [(one, element.names, other) for one, other in zip(listed, listed[1:], strict=False)]
    return []


def is_ordinary(one: Placed) -> bool:
    """Whether a place needs no remark: "the sky above", "a valley below", "one cookie left"."""
    scenery = not one.nouns or any(noun.last_word in SCENES or is_frame(noun) for noun in one.nouns)
    return one.place.faint or one.place.bare and scenery
