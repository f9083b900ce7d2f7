"""Places in the picture: what stands where, and the relations between things on opposite sides."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .clauses import Context, find_subjects
from .elements import Element, Mark, Noun
from .predicates import Order, Place, Predicate
from .pronouns import Unclear
from .relations import ABOVE, BELOW, LEFT, RIGHT
from .segments import head, is_frame, nouns_of, split, things
from .vocabulary import SCENES

NOT_STEERED = "absolute places are not steered yet; say where one thing stands from another"
NO_OBJECT = "it does not say above or below what"


@dataclass(frozen=True)
class Placed:
    """Things said to be at a place; owner: what "a table with a cat underneath" speaks of."""

    place: Place
    things: tuple[Noun, ...]
    owner: Noun | None = None


Found = tuple[Noun, tuple[str, ...], Noun]


def find_placed(elements: Sequence[Element], context: Context) -> list[Placed]:
    """The things at each place of a sentence, in order; none where that is unclear."""
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
            context = Context(False, placed[-1].things if isinstance(element, Place) else (), (), ())
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


def relate(placed: Sequence[Placed]) -> tuple[list[Found], list[Placed]]:
    """The relations between things at opposite sides, and the places that take part in none."""
    used: set[int] = set()
    above = _opposite(placed, lambda place: place.row, used)
    left = _opposite(placed, lambda place: place.column, used)
    relations: list[Found] = []
    for (one, other), pair in above.items():
        sides = [name for name, key in ((LEFT, (one, other)), (RIGHT, (other, one))) if left.pop(key, None)]
        relations.append((pair[0], (ABOVE, *sides[:1]), pair[1]))
    relations += [(one, (LEFT,), other) for one, other in left.values()]
    rest = []
    for index, one in enumerate(placed):
        if one.owner is not None and index not in used and one.owner.last_word not in SCENES:
            relations += [(thing, (ABOVE if one.place.row == -1 else BELOW,), one.owner) for thing in one.things]
        elif index not in used:
            rest.append(one)
    return relations, rest


def _opposite(placed: Sequence[Placed], rank_of: Callable[[Place], int | None], used: set[int]
              ) -> dict[tuple[int, int], tuple[Noun, Noun]]:
    """The pairs of things of which the first is nearer to the left or top, by where they stand in the text.

    Indices of the places that are needed for it enter `used`. Single words ("dog left") go with each other only.
    """
    found = {}
    for faint in (False, True):
        ranks = {index: rank_of(one.place) for index, one in enumerate(placed)
                 if one.things and one.place.faint == faint and rank_of(one.place) is not None}
        for first, second in _neighbours(ranks):
            for one in placed[first].things:
                for other in placed[second].things:
                    if one.words.lower() != other.words.lower() or "another" in other.determiners:
                        found[one.start, other.start] = one, other
                        used |= {first, second}
    return found


def _neighbours(rank_by_index: Mapping[int, int]) -> list[tuple[int, int]]:
    """Pairs of indices (lower rank, next rank), each with the nearest in the text; none where all have one rank."""
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


def in_order(elements: Sequence[Element]) -> list[Found]:
    """The relations of a list behind "from left to right:"; none where relations follow instead."""
    for index, element in enumerate(elements):
        if isinstance(element, Order):
            listed = things(split(elements[index + 1:]))
            if not any(isinstance(one, Predicate | Place | Order) for one in elements[index + 1:]):
                return [(one, element.names, other) for one, other in zip(listed, listed[1:], strict=False)]
    return []


def is_ordinary(one: Placed) -> bool:
    """True for "the sky above" and "a valley below", which ask for nothing, and "one cookie left"."""
    scenery = not one.things or any(thing.last_word in SCENES or is_frame(thing) for thing in one.things)
    return one.place.faint or one.place.bare and scenery
