"""The prompt as plain text: its words without weights and quotations, and the positions of phrases."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from .vocabulary import ADJECTIVES, ANIMALS, COMMANDS, DETERMINERS, JOINTS, PEOPLE, PREPOSITIONS

HIDDEN = "\0"  # replaces each character that is not read
_EMBEDDING = re.compile(r"(?<![^\s(])embedding:[^\s()<\[]+")
_ESCAPED = re.compile(r"\\[()\[\]{}]")
_WEIGHT = re.compile(r":\s{0,4}([^\s:()\[\]{}]{1,20})\s{0,4}(?=[)\]}])")
_ASIDE = re.compile(r"\\[(\[{]([^\\()\[\]{}]{0,200})\\[)\]}]")
_BRACKETS = re.compile(r"(?<!\\)\(([^\\()\[\]{}]{1,200})\)")
_ENDS = re.compile(r"\s*(?:$|[,.;:!?\n])")
_QUOTES = (("\"", "\""), ("\u201c", "\u201d"), ("\u00ab", "\u00bb"), ("\u201e", "\u201c\u201d"))
_SINGLE_QUOTES = (("'", "'"), ("\u2018", "\u2019"))  # these may be apostrophes
_QUOTED = re.compile("|".join([rf"{first}([^{last}\n]{{1,300}})[{last}]" for first, last in _QUOTES] + [
    rf"(?<![\w']){first}([^{last}\n]{{1,300}}){last}(?![\w'])" for first, last in _SINGLE_QUOTES]))
_SAID = re.compile(r"\b(?:say|says|saying|said|read|reads|reading|text|words?|titled|called|named|caption(?:ed)?|slogan"
                   r"|labell?ed|letters|lettering|written|writing|inscription|inscribed|message|typography|spell(?:s|ing)?"
                   r"|logo|title|print(?:ed)?|writes)\s*[:,]?\s*$", re.IGNORECASE)
_LAST_WORD = re.compile(r"([^\W_][\w'\u2019\-]*)\s*$")
_SENTENCE_END = re.compile(r"(?<=[.!?;\u3002\uff01\uff1f])(?=\s|$)")
_REACH = 40  # characters searched before a quotation
_OPEN = DETERMINERS | PREPOSITIONS | COMMANDS | set(JOINTS) | {"of"}
"""A quotation after one of these words is part of the sentence: `photo of "a dog"`."""
_LEADS = re.compile(rf"\s*(?:{'|'.join(sorted(DETERMINERS | PREPOSITIONS | {'with', 'which', 'who', 'that'}))})\b", re.IGNORECASE)
"""Begins a bracket with a phrase or a clause of its own."""
_NO_END = frozenset("left right top bottom middle center centre side corner of to a an the".split())
"""End a bracket that belongs to the sentence around it: "a dog (on the left)"."""


def plain_text(prompt: str) -> str:
    """The prompt with attention weights such as "(dog:1.3)" blanked out, and commas for the brackets of a remark.

    The length and all positions stay the same.
    """
    text = _ESCAPED.sub(", ", prompt)  # an escaped bracket is a real one: a break in the text
    text = _WEIGHT.sub(lambda weight: _blank(weight) if _is_number(weight.group(1)) else weight.group(), text)
    characters = list(text)
    for bracket in _BRACKETS.finditer(prompt):
        if _LEADS.match(bracket.group(1)) and _is_remark(prompt, bracket):
            characters[bracket.start()] = characters[bracket.end() - 1] = ","
    return re.sub(r"[()\[\]{}]", " ", "".join(characters))


def _is_remark(prompt: str, bracket: re.Match) -> bool:
    """Whether round brackets hold a remark on the name before them: "a dog (with a cat above it)", "a dog (mirrored)".

    Other brackets give weight to a part of a phrase: "a majestic (cat)".
    """
    name = _LAST_WORD.search(prompt[max(0, bracket.start() - _REACH):bracket.start()])
    inside, last = bracket.group(1), (bracket.group(1).lower().split() or [""])[-1]
    if name is None or name.group(1).lower() in _OPEN | ADJECTIVES or _WEIGHT.search(bracket.group()) or last in _NO_END:
        return False
    describes = (last.endswith("ed") or last in ADJECTIVES) and _ENDS.match(prompt, bracket.end())
    return bool(_LEADS.match(inside) or name.group(1).lower() in ANIMALS | PEOPLE or describes)


def plain_phrase(phrase: str) -> str:
    r"""A phrase without weights and brackets. Escaped brackets inside it stay: "miku \(vocaloid\)"."""
    escaped = _ESCAPED.findall(phrase)
    words = " ".join(plain_text(_ESCAPED.sub(HIDDEN, phrase)).split())
    if len(escaped) == 2 and words.startswith(HIDDEN) and words.endswith(HIDDEN):
        return words.strip(HIDDEN).strip()
    for bracket in escaped:
        words = words.replace(HIDDEN, bracket, 1)
    return words


def set_apart(prompt: str, speaks_of_places: Callable[[str], bool]) -> list[tuple[int, int]]:
    r"""(start, end) of each aside and quotation: "dog \(animal\)", `a sign saying "left"`.

    speaks_of_places: whether a text contains words for a relation or a place. An aside with such words is read.
    """
    text = plain_text(prompt)
    hidden = [match.span() for match in _ASIDE.finditer(prompt)
              if _follows_name(text, match.start()) and not speaks_of_places(plain_text(match.group(1)))]
    hidden += [match.span() for match in _BRACKETS.finditer(prompt) if not _LEADS.match(match.group(1))
               and _is_remark(prompt, match) and not speaks_of_places(match.group(1))]
    for match in _QUOTED.finditer(text):
        inside = match.group(match.lastindex)
        if _SAID.search(text[max(0, match.start() - _REACH):match.start()]) or (
                _follows_name(text, match.start()) and speaks_of_places(inside)):
            hidden.append(match.span())
    return hidden


def _follows_name(text: str, start: int) -> bool:
    """Whether a possible name precedes `start`: true for a neon sign "left of center", false for photo of "a dog"."""
    word = _LAST_WORD.search(text[max(0, start - _REACH):start])
    return word is not None and word.group(1).lower() not in _OPEN


def hide(text: str, spans: Iterable[tuple[int, int]]) -> str:
    """The text with the spans replaced by HIDDEN. The length stays the same."""
    pieces, done = [], 0
    for start, end in sorted(spans):
        pieces += [text[done:start], HIDDEN * (end - max(start, done))]
        done = max(done, end)
    return "".join([*pieces, text[done:]])


def without_embeddings(text: str) -> str:
    """The text with each embedding's name replaced by one placeholder word of the same length."""
    if ":" not in text:
        return text
    return _EMBEDDING.sub(lambda name: re.sub(r"[^,.;:!?\"']", "_", name.group()), text)


def _blank(match: re.Match) -> str:
    return " " * len(match.group())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def sentences(text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of each sentence."""
    start = 0
    for end in [match.start() for match in _SENTENCE_END.finditer(text)] + [len(text)]:
        yield start, end
        start = end


def embedding_at(text: str, start: int) -> int:
    """End of the embedding's name ("embedding:xyz") that starts at `start`; -1 if none does."""
    match = _EMBEDDING.match(text, start)
    return start + len(match.group().rstrip(",.;:!?\"'")) if match else -1


def occurrences(words: str, text: str) -> list[tuple[int, int]]:
    """(start, end) of each occurrence of `words` in the text, as whole words and regardless of case.

    Names of embeddings do not match: "dog" does not occur in "embedding:dog".
    """
    if "embedding:" not in words:
        text = without_embeddings(text)
    pattern = r"\s+".join(re.escape(word) for word in words.split())
    return [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)]


def first_alone(words: str, text: str, longer: Iterable[tuple[int, int]]) -> int:
    """Number, from 1, of the first occurrence of `words` outside of longer phrases ("dog" in "hot dog"); 0 for none.

    longer: (start, end) of the phrases in the text.
    """
    spans = list(longer)
    for number, (start, end) in enumerate(occurrences(words, text), 1):
        if not any(first <= start and end <= last and last - first > end - start for first, last in spans):
            return number
    return 0
