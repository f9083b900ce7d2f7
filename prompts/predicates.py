"""English words for spatial relations, and the canonical name of each."""
from __future__ import annotations

import re
from collections.abc import Iterator

from .relations import RELATIONS, RelationError

_GAP = r"[\s\-_]+"
_ADVERB = rf"(?:(?:slightly|just|directly|also|immediately|diagonally|a{_GAP}bit|a{_GAP}little){_GAP})?"
_SIDE = rf"(?:left|right)(?:{_GAP}hand)?(?:{_GAP}side)?"
_TO_THE = rf"(?:to|on|at|towards?){_GAP}(?:the{_GAP})?(?:(?:far|immediate|direct){_GAP})?"
_TOWARDS_SIDE = rf"(?:{_TO_THE})?{_SIDE}"
_OF = rf"{_GAP}of"
_HIGHER = rf"on{_GAP}(?:the{_GAP})?top{_OF}|atop|above|over|higher{_GAP}(?:up{_GAP})?than"
_LOWER = rf"below|underneath|under|beneath|lower{_GAP}(?:down{_GAP})?than"
_UPRIGHT = rf"(?:{_HIGHER}|{_LOWER})(?:{_OF}\b)?"
_UPRIGHT_IN_PAIR = rf"(?:{_UPRIGHT}|on{_GAP}top|higher|lower|up|down)"
_AND = rf"{_GAP}(?:and|&){_GAP}{_ADVERB}"
_CORNER = rf"(?:{_TO_THE})?(?:upper|top|lower|bottom|above|below)[\s\-_]*{_SIDE}"


def _forms(of: str) -> str:
    """All predicates as one pattern, diagonals first; `of` is what follows a final "left" or "right"."""
    return (rf"{_UPRIGHT_IN_PAIR}(?:{_AND}|{_GAP}{_ADVERB}){_TOWARDS_SIDE}{of}"
            rf"|{_TOWARDS_SIDE}(?:{_OF})?{_AND}{_UPRIGHT}"
            rf"|{_CORNER}{of}|{_TOWARDS_SIDE}{of}|{_UPRIGHT}")


_IN_PROMPT = re.compile(rf"(?<![\w\-])(?:{_forms(_OF)})(?![\w\-'’])", re.IGNORECASE)
_ALONE = re.compile(rf"(?:{_forms(f'(?:{_OF})?')})", re.IGNORECASE)
_LEADING = re.compile(rf"(?:(?:is|are|was|were|sits?|stands?|lies?|sitting|standing|lying|placed|located|positioned"
                      rf"|situated|directly|just|slightly|the){_GAP})+", re.IGNORECASE)
_UP_WORD = re.compile(r"above|over|atop|top|upper|higher|\bup\b", re.IGNORECASE)
_DOWN_WORD = re.compile(r"below|under|beneath|lower|bottom|\bdown\b", re.IGNORECASE)

# Where the same words are no relation between two things.
_OTHER_USE_BEFORE = re.compile(r"\b(?:a|an|the|its|his|her|their|from|all|as|see)\s*$", re.IGNORECASE)
_OTHER_USE_AFTER = re.compile(
    r"\s*(?:\d\d|[$€£]|(?:all|average|ground|zero|freezing|time|and\s+over|the\s+top|the\s+years|construction|control"
    r"|pressure|attack|cover|development|way|the\s+influence|each\s+other|one\s+another)\b)", re.IGNORECASE)


def _canonical(words: str) -> tuple[str, ...]:
    names = []
    if _UP_WORD.search(words):
        names.append("above")
    elif _DOWN_WORD.search(words):
        names.append("below")
    side = re.search("left|right", words, re.IGNORECASE)
    if side:
        names.append(f"to the {side.group().lower()} of")
    return tuple(names)


def parse_predicate(text: str) -> tuple[str, ...]:
    """Canonical names of one relation in words: ("above",), or ("above", "to the left of") for a diagonal.

    Raises RelationError for words that are none of the four relations or their diagonals.
    """
    words = " ".join(text.split())
    match = _ALONE.fullmatch(_LEADING.sub("", words, count=1) if _LEADING.match(words) else words)
    if not match:
        raise RelationError(
            f"Unknown relation {words!r}. Known are {', '.join(RELATIONS)}, synonyms such as \"on top of\" or "
            f"\"beneath\", and diagonals such as \"above and to the left of\".")
    return _canonical(match.group())


def find_predicates(text: str) -> Iterator[tuple[int, int, tuple[str, ...]]]:
    """(start, end, canonical names) of each predicate in running text, in order.

    Left out are other uses of the same words: "seen from above", "the left of", "under construction", "over 60".
    """
    for match in _IN_PROMPT.finditer(text):
        if not _OTHER_USE_BEFORE.search(text[max(0, match.start() - 12):match.start()]) \
                and not _OTHER_USE_AFTER.match(text, match.end()):
            yield match.start(), match.end(), _canonical(match.group())
