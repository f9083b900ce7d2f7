"""Finds English words for spatial relations and places in a text, and gives each its canonical name."""
from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from .relations import RELATIONS, RelationError
from .vocabulary import ALWAYS_FRAME, DETERMINERS, FRAME, JOINTS, OTHER_VERBS, PREPOSITIONS, VERBS

_GAP = r"[\s\-_]+"
_ADVERB = rf"(?:(?:slightly|just|directly|also|immediately|diagonally|a{_GAP}bit|a{_GAP}little){_GAP})?"
_SIDE = rf"(?:left|right)(?:(?:{_GAP}hand)?{_GAP}side)?"
_FAR = rf"(?:(?:far|immediate|direct|very|extreme){_GAP})?"
_YONDER = rf"(?:over{_GAP})?"  # "over to the left of": the same as "to the left of"
_TO_THE = rf"{_YONDER}(?:to|on|at|towards?){_GAP}(?:the{_GAP})?{_FAR}"
_TOWARDS_SIDE = rf"(?:{_TO_THE})?{_SIDE}"
_OF = rf"{_GAP}of"
_ABOVE = rf"on{_GAP}(?:the{_GAP})?top{_OF}|atop|above|higher{_GAP}(?:up{_GAP})?than"
_LOWER = rf"on{_GAP}(?:the{_GAP})?bottom{_OF}|below|underneath|under|beneath|lower{_GAP}(?:down{_GAP})?than"
_UPRIGHT = rf"(?:{_ABOVE}|over|{_LOWER})(?:{_OF}\b)?"
_UPRIGHT_IN_PAIR = rf"(?:(?:{_ABOVE}|{_LOWER})(?:{_OF}\b)?|on{_GAP}top|higher|lower|up|down)"
_AND = rf"{_GAP}(?:and|&){_GAP}{_ADVERB}"
_CORNER = rf"(?:{_TO_THE})?(?:upper|top|lower|bottom|above|below)[\s\-_]*{_SIDE}"
_TO_ITS = rf"{_YONDER}(?:to|on|at){_GAP}(?:its|his|her|their){_GAP}(?:immediate{_GAP})?{_SIDE}(?!{_OF})"


def _forms(of: str) -> str:
    """All predicates as one pattern, diagonals first. of: pattern after a final "left" or "right"."""
    return (rf"(?:{_UPRIGHT_IN_PAIR}(?:{_AND}|{_GAP}{_ADVERB})|over{_AND}){_TOWARDS_SIDE}{of}"
            rf"|{_TOWARDS_SIDE}(?:{_OF})?{_AND}{_UPRIGHT}"
            rf"|{_CORNER}{of}|{_TOWARDS_SIDE}{of}|{_UPRIGHT}")


_IN_PROMPT = re.compile(rf"(?<![\w\-])(?:{_TO_ITS}|{_forms(_OF)})(?![\w\-'\u2019])", re.IGNORECASE)
_ALONE = re.compile(rf"(?:{_forms(f'(?:{_OF})?')})", re.IGNORECASE)
_LEADING = re.compile(rf"(?:(?:is|are|was|were|sits?|stands?|lies?|sitting|standing|lying|placed|located|positioned"
                      rf"|situated|directly|just|slightly|the){_GAP})+", re.IGNORECASE)
_OVER_TO = re.compile(rf"over(?={_GAP}(?:to|on|at|towards?)\b)", re.IGNORECASE)
_UP_WORD = re.compile(r"above|over|atop|top|upper|higher|\bup\b", re.IGNORECASE)
_DOWN_WORD = re.compile(r"below|under|beneath|lower|bottom|\bdown\b", re.IGNORECASE)

# Contexts in which the same words are no relation between two objects.
_OTHER_USE_BEFORE = re.compile(
    r"\b(?:a|an|the|its|his|her|their|from|all|as|see)\s*$", re.IGNORECASE)
_IDIOMS = re.compile(
    r"\b(?:(?:game|voice|cross|heads?|all)\s+over|so\s+below|(?:what|nothing|(?<!a )little|much|all|anything)"
    r"(?:['\u2019]s|\s+that\s+is|\s+is|\s+was|\s+remains)?\s+left\s+of)\b", re.IGNORECASE)
_OTHER_USE_AFTER = re.compile(
    r"\s*(?:\d\d|(?:\d|an?\b|half\s+an?\b|several\b|many\b|a\s+(?:few|hundred|thousand|dozen)\b)\s*(?:year|month|week|day|hour|decade"
    r"|centur(?:y|ies)|mile|met(?:er|re)|foot|feet|pound|ton)s?\b|(?:full\s+)?(?:sail|steam|power)\b|[$\u20ac\u00a3]|[a-z]{3,6}\s+(?:feet|foot|inch(?:es)?|met(?:er|re)s|years|pounds|percent|hours|minutes)\b"
    r"|(?:all|average|ground|zero|freezing|time|and\s+over|the\s+top|the\s+years|the\s+age|construction|control|pressure"
    r"|attack|cover|development|repair|arrest|siege|water|way|the\s+influence|the\s+counter|a\s+spell|each\s+other"
    r"|one\s+another|history|heels|there|here|exposed|exposure|saturated|sized|easy|center|centre)\b)", re.IGNORECASE)

# Distances: "two meters above", "10 cm below", "a bit to the left of".
_NUMBER = (r"(?:\d{1,9}(?:[.,]\d{1,9})?|an?|one|two|three|four|five|six|seven|eight|nine|ten|twenty|fifty|a\s+hundred"
           r"|half|half\s+an?|a\s+few|several|some|many|a\s+couple\s+of|a\s+little|a\s+short|a\s+long|a\s+tiny|a\s+good)")
_UNIT = (r"(?:mm|cm|m|km|px|pixels?|inch(?:es)?|ft|yards?|(?:centi|milli|kilo)?met(?:er|re)s?|miles?|bit|little|lot|ways?"
         r"|distance|touch|tad|bits|(?:hair|stone|arm|hand)['\u2019]s\s+(?:breadth|width|throw|length)|(?P<thing>feet|foot|steps?|paces?"
         r"|stor(?:ey|y|eys|ies)|floors?|blocks?))")
_ABOUT = (r"\b(?:about|around|roughly|approximately|nearly|almost|only|exactly|just|at\s+least|slightly|somewhat|directly"
          r"|immediately|high|far|straight|partly|(?<!the )(?<!to )(?<!on )(?<!at )right)")
_DISTANCE = re.compile(rf"(?:{_ABOUT}\s+)*(?:\b{_NUMBER}\s*-?{_UNIT}|{_ABOUT})(?:\s+and\s+a\s+half)?"
                       rf"(?:\s+(?:away|further|farther|off|more|up|down|high))?(?:\s+and)?\s*$", re.IGNORECASE)
_THING_BEFORE = re.compile(r"(?:^|[.;:!?\n]|\b(?:of|and|with|or|on|in|at))\s*$", re.IGNORECASE)
_REACH = 48  # number of characters before a predicate that may hold a distance

_FRAMES = "|".join(sorted(FRAME | ALWAYS_FRAME))
_OF_FRAME = rf"(?:\s+of\s+(?:the|this|an?|our|my)\s+(?:\w{{1,20}}\s+)?(?:{_FRAMES})\b)?"
_PLACE = re.compile(
    rf"(?<![\w\-])(?:(?P<to>{_YONDER}(?:to|on|at|in|near|towards?|along){_GAP}(?:the{_GAP})?{_FAR})?"
    rf"(?P<edge>(?:(?:upper|top|lower|bottom)[\s\-]*)?(?:left|right)|top|bottom|middle|cent(?:er|re))"
    rf"(?:(?:{_GAP}hand)?{_GAP}(?:side|corner|half|part|third|edge|area|portion))?|(?P<bare>above|below|underneath|beneath)"
    rf"(?=\s*(?:$|[,.;:!?\"\0])))(?![\w\-'\u2019]){_OF_FRAME}", re.IGNORECASE)
_LABEL_BEFORE = re.compile(r"(?:^|[,.;:\n])\s*$")  # "left: a dog, right: a cat"
_COLON, _ENDS = re.compile(r"\s*:"), re.compile(r"\s*(?:$|[,.;\n]|and\b)")
_GOES_ON = re.compile(r"\s*(?:$|\n|[^\w\s'\u2019\-]|([\w'\u2019]+))")
_MAY_FOLLOW = DETERMINERS | PREPOSITIONS | frozenset(JOINTS) | frozenset(VERBS) | OTHER_VERBS | {"that", "not"}
_TURNED = re.compile(r"\b(?:look|fac|turn|point|lean|tilt|mov|walk|runn|head|glanc|gaz|staring|stare|driv|fly|bend|roll"
                     r"|slid|shift|swerv)\w{0,4}(?:\s+\w{1,12})?\s*$", re.IGNORECASE)

_REASONS = {"other": "only left, right, above and below are steered",
            "part": "it may mean a part of it; write \"above\" or \"on top of\" where that is meant",
            "whose": "write \"to the left of\" or \"to the right of\" and the object",
            "misspelt": "it looks like a misspelt relation"}
_ORDER = re.compile(r"(?<![\w\-])(?:from\s+)?(?:the\s+)?(?P<first>left|right|top|bottom)\s+to\s+(?:the\s+)?"
                    r"(?:left|right|top|bottom)(?![\w\-])", re.IGNORECASE)
_MISSPELT = (rf"(?:to|on|at){_GAP}(?:the{_GAP})?(?:rigth|rihgt|rgiht|riht|rigt|righ|rght|lfet|letf|elft|lef|lft|leftt){_GAP}of"
             r"|beneth|beneeth|benath|benneath|undernead|underneeth|underneth|undeneath"
             r"|abov|abve|abvoe|aboce|aboove|belwo|bellow|beloww")
_UNSTEERED = re.compile(
    rf"(?<![\w\-])(?:(?P<other>next{_GAP}to|beside|behind|in{_GAP}front{_OF}|between|on{_GAP}(?:either|both|each|every){_GAP}sides?{_OF})"
    rf"|(?P<part>(?:at|in|near){_GAP}the{_GAP}(?:(?:upper|top|lower|bottom)[\s\-]*)?(?:left|right|top|bottom)"
    rf"(?:{_GAP}(?:corner|half|part|edge|side))?{_OF})"
    rf"|(?P<whose>(?:to|on|at){_GAP}(?:the|an?){_GAP}\w{{1,20}}(?:{_GAP}\w{{1,20}})?['\u2019]s{_GAP}{_SIDE})"
    rf"|(?P<misspelt>{_MISSPELT}))"
    r"(?![\w\-'\u2019])", re.IGNORECASE)


@dataclass(frozen=True)
class Predicate:
    """Words for a relation at text[start:end]. names: canonical. to_pronoun: the words include the object ("to its left")."""

    start: int
    end: int
    names: tuple[str, ...]
    words: str
    to_pronoun: bool = False


@dataclass(frozen=True)
class Place:
    """Words for a place in the picture at text[start:end].

    column: -1 left, 0 middle, 1 right, None unknown; row: -1 top, 0 middle, 1 bottom, None unknown.
    bare: "above", "below" or "on top" without an object.
    heads: the noun at this place follows ("on the left: a dog").
    faint: a single word, as in "dog left, cat right"; it may have another meaning ("one cookie left").
    """

    start: int
    end: int
    column: int | None
    row: int | None
    bare: bool = False
    heads: bool = False
    faint: bool = False


@dataclass(frozen=True)
class Unsteered:
    """Words at text[start:end] for a relation that cannot be steered, and why.

    complete: the words include the object, as in "to the cat's left".
    """

    start: int
    end: int
    reason: str
    complete: bool = False


@dataclass(frozen=True)
class Order:
    """Words at text[start:end] for the order of a list: "from left to right". names: relation of each item to the next."""

    start: int
    end: int
    names: tuple[str, ...]


Found = Predicate | Place | Unsteered | Order


def _canonical(words: str) -> tuple[str, ...]:
    names = []
    words = _OVER_TO.sub("", words)
    if _UP_WORD.search(words):
        names.append("above")
    elif _DOWN_WORD.search(words):
        names.append("below")
    side = re.search("left|right", words, re.IGNORECASE)
    if side:
        names.append(f"to the {side.group().lower()} of")
    return tuple(names)


def parse_predicate(text: str) -> tuple[str, ...]:
    """Canonical names of a relation: ("above",), or ("above", "to the left of") for a diagonal.

    Raises RelationError for words that mean none of the four relations or their diagonals.
    """
    words = " ".join(text.split())
    match = _ALONE.fullmatch(_LEADING.sub("", words, count=1) if _LEADING.match(words) else words)
    if not match:
        raise RelationError(
            f"Unknown relation {words!r}. Known are {', '.join(RELATIONS)}, synonyms such as \"on top of\" or "
            f"\"beneath\", and diagonals such as \"above and to the left of\".")
    return _canonical(match.group())


def find_predicates(text: str) -> Iterator[Predicate]:
    """The predicates of running text, in order. A predicate includes the distance before it ("two meters above").

    Other uses of the same words are left out: "seen from above", "the left of", "under construction", "over 60".
    """
    idioms = {match.end() for match in _IDIOMS.finditer(text)}
    for match in _IN_PROMPT.finditer(text):
        before = text[max(0, match.start() - _REACH):match.start()]
        other_use = match.end() in idioms or _OTHER_USE_BEFORE.search(before) or _OTHER_USE_AFTER.match(text, match.end())
        if not other_use:
            distance = _DISTANCE.search(before)
            names_object = distance and distance["thing"] and _THING_BEFORE.search(before[:distance.start()])
            start = match.start() - (len(before) - distance.start() if distance and not names_object else 0)
            words = match.group()
            yield Predicate(start, match.end(), _canonical(words), words, bool(re.fullmatch(_TO_ITS, words, re.IGNORECASE)))


def find_places(text: str) -> Iterator[Place]:
    """The places of running text, in order: "on the left", "in the upper right corner of the image", "above" alone.

    Other uses are left out: "on the left wing", "looking to the right", "in the middle of a road".
    """
    for match in _PLACE.finditer(text):
        word = _GOES_ON.match(text, match.end())
        follows = word is not None and (word.group(1) or "").lower()
        before = text[max(0, match.start() - _REACH):match.start()]
        if follows is False or follows and follows not in _MAY_FOLLOW and not follows.endswith("ing") or _TURNED.search(before):
            continue
        heads = bool(_COLON.match(text, match.end()))
        single = bool(match["edge"]) and not match["to"]
        faint = single and match.group().lower() in ("left", "right") and bool(_ENDS.match(text, match.end()))
        if match["bare"] and _OTHER_USE_BEFORE.search(before) or single and not faint and not (
                heads and _LABEL_BEFORE.search(before)):
            continue
        edge = (match["edge"] or match["bare"]).lower()
        middle = 0 if edge.startswith(("m", "c")) else None
        row = -1 if _UP_WORD.search(edge) else 1 if _DOWN_WORD.search(edge) else middle
        column = -1 if "left" in edge else 1 if "right" in edge else middle
        bare = bool(match["bare"]) or match.group().lower() == "on top"
        yield Place(match.start(), match.end(), column, row, bare, heads, faint)


def find_all(text: str) -> list[Found]:
    """Predicates, places, orders and relations that cannot be steered, in order. Of two that overlap, the longer is kept."""
    unsteered = (Unsteered(match.start(), match.end(), _REASONS[match.lastgroup], match.lastgroup == "whose")
                 for match in _UNSTEERED.finditer(text))
    found: list[Found] = []
    orders = (Order(match.start(), match.end(), _order(match["first"].lower())) for match in _ORDER.finditer(text))
    for one in sorted([*find_predicates(text), *find_places(text), *unsteered, *orders], key=_longest_first):
        if not found or one.start >= found[-1].end:
            found.append(one)
    return found


def _order(first: str) -> tuple[str, ...]:
    return {"top": ("above",), "bottom": ("below",)}.get(first) or (f"to the {first} of",)


def _longest_first(one: Found) -> tuple[int, int, int]:
    return one.start, -one.end, (Order, Place, Predicate, Unsteered).index(type(one))


def speaks_of_places(text: str) -> bool:
    """Whether the text contains words for a relation or a place, in any meaning ("left of center")."""
    return bool(_IN_PROMPT.search(text) or _PLACE.search(text))
