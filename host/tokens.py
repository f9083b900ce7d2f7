"""Where a phrase's tokens are in the host's tokenised prompt.

The positions travel inside the conditioning, so that what is steered is what was encoded.
"""
from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from comfy.sd1_clip import escape_important, token_weights, unescape_important
from torch import Tensor

from ..prompts.text import occurrences, without_embeddings
from ..steering.attention import WordColumns

CONDITIONING_KEY = "learn_to_steer_prompt"
_EMBEDDING = "embedding:"  # how a prompt names a textual inversion
_WORD_MARK = "\u2581"  # T5's vocabulary marks the beginning of a word with it
_UNKNOWN = "?"


class TokenError(ValueError):
    """A phrase's tokens cannot be found; the message says which phrase, where, and what to do."""


@dataclass(frozen=True)
class TokenisedPrompt:
    """A prompt as the text encoders saw it.

    streams: token ids per text encoder ("l", "g", "h", "t5xxl"), chunks joined; -1 stands for an embedding.
    tokenize: the encoder's own tokenizer, in the same form, for looking phrases up.
    piece: a token's own text in the encoder's vocabulary, by stream and id, word marks included ("dog</w>").
    """

    text: str
    streams: Mapping[str, tuple[int, ...]]
    tokenize: Callable[[str], Mapping[str, tuple[int, ...]]]
    piece: Callable[[str, int], str]

    @staticmethod
    def read(text: str, tokenizer, tokenize: Callable[[str], Mapping[str, Sequence]] | None = None) -> TokenisedPrompt:
        """The prompt as the host's `tokenizer` sees it; tokenize: in place of the tokenizer's own (a CLIP adds options)."""
        tokenize = tokenize or tokenizer.tokenize_with_weights

        def flat(words: str) -> dict[str, tuple[int, ...]]:
            return flat_tokens(tokenize(words))

        return TokenisedPrompt(text, flat(text), flat, functools.partial(_piece, tokenizer))

    def find(self, phrase: str, stream: str) -> tuple[int, ...]:
        """Positions of the phrase's tokens in `stream`; "dog#2" asks for the second occurrence.

        The phrase counts where it stands as whole words, whatever the case. It begins at the first token with text of its
        own: T5 writes "zebra" as the bare word mark, "z" and "ebra", and the mark is left out, as in the paper's code.
        Raises TokenError where the prompt does not contain the phrase (often enough), and where the encoder's tokens join
        it to another word.
        """
        words, _, number = phrase.partition("#")
        words, wanted = words.strip(), int(number) if number.strip().isdecimal() else 1
        spans = self._spans(words)
        if not 1 <= wanted <= len(spans):
            times = "" if wanted == 1 else f" {wanted} times"
            raise TokenError(f"input 'positive': the prompt \"{self.text}\" does not contain \"{words}\"{times}. "
                             + self._advice(words))
        places = self._places(*spans[wanted - 1], stream)
        if _EMBEDDING in words and -1 not in (self.streams[stream][place] for place in places):
            name = words[words.index(_EMBEDDING) + len(_EMBEDDING):].split()[0]
            raise TokenError(f"input 'positive': the text encoder read no embedding \"{name}\": there is no such file in "
                             "models/embeddings, or none for this encoder. Put it there, or name the object in words.")
        if not places:
            raise TokenError(f"input 'positive': in the prompt \"{self.text}\" the text encoder does not keep \"{words}\" "
                             "apart from what stands beside it. Write a space before and after it, or use another word.")
        tokens = self.streams[stream]
        first = next((i for i, place in enumerate(places) if self.piece(stream, tokens[place]).strip(_WORD_MARK)), 0)
        return places[first:]

    def _spans(self, words: str) -> list[tuple[int, int]]:
        """(start, end) of the words in the text as the encoder reads it: the segments, a space between them.

        Square and curly brackets separate words, as in the graph: "[cat]" is a cat. "_" does so only where the words
        stand nowhere else, so that occurrences are numbered as in the graph.
        """
        text, words = (re.sub(r"[\[\]{}]", " ", " ".join(_segments(part))) for part in (self.text, words))
        if not words.strip():
            return []
        if _EMBEDDING not in words:  # "dog" is no word of "embedding:dog"
            text = without_embeddings(text)
        return occurrences(words, text) or occurrences(words, text.replace("_", " "))

    def _advice(self, words: str) -> str:
        name = re.search(rf"(?<!\S){_EMBEDDING}\S*(?<!\w){re.escape(words)}(?!\w)\S*", self.text) if words else None
        if name:
            return f"It is part of an embedding's name: write the object as \"{name.group().rstrip(',.;:!?)')}\"."
        return ("Write the object in the prompt exactly as in the relation (the same words in the same order), or change "
                "the relation.")

    def _places(self, start: int, end: int, stream: str) -> tuple[int, ...]:
        """Positions of the tokens that cover `start` to `end` of the text as read, () where other words share them.

        Between two tokens the text may be cut: what is before the cut has the same tokens without what follows. Where
        a token reaches over the border of the span ("'d" in "'dog'"), punctuation beside the span is taken in.
        """
        segments, special = _segments(self.text), set(self.tokenize("")[stream])
        text = " ".join(segments)
        places = [place for place, token in enumerate(self.streams[stream]) if token not in special]
        tokens = [self.streams[stream][place] for place in places]

        def before(cut: int) -> int | None:
            """How many tokens are before the cut; None where it goes through a token."""
            head = [token for token in self.tokenize(_up_to(cut, segments))[stream] if token not in special]
            return len(head) if tokens[:len(head)] == head else None

        while (first := before(start)) is None and start > 0 and _is_mark(text[start - 1]):
            start -= 1
        while (last := before(end)) is None and end < len(text) and _is_mark(text[end]):
            end += 1
        return () if first is None or last is None else tuple(places[first:last])

    def columns(self, phrases: Sequence[str], streams: Sequence[str], tokens: int) -> WordColumns:
        """Columns of the phrases among `tokens` text tokens; the first of `streams` that exists counts.

        A phrase of several tokens is the average over them.
        """
        stream = next((name for name in streams if name in self.streams), None)
        if stream is None:
            raise TokenError(f"input 'positive': encoded by {', '.join(self.streams)}, but this model reads "
                             f"{' or '.join(streams)}. Use the text encoder that belongs to the model.")
        return WordColumns.build({phrase: self.find(phrase, stream) for phrase in phrases}, tokens)


def _segments(text: str) -> list[str]:
    """The pieces of one weight each that the host tokenises one by one, without "(...:1.2)" and escapes.

    NFC is what both tokenizers make of the text first.
    """
    weighted = token_weights(escape_important(unicodedata.normalize("NFC", text)), 1.0)
    return [segment for segment in (unescape_important(words) for words, _ in weighted) if segment]


def _up_to(cut: int, segments: Sequence[str]) -> str:
    """The prompt up to the cut, a place in the segments joined by spaces, with the same segments for the host."""
    text = ""
    for segment in segments:
        head = segment[:max(cut, 0)].replace("(", "\\(").replace(")", "\\)")
        text += f"({head}:1)" if head else ""
        cut -= len(segment) + 1
    return text


def _is_mark(character: str) -> bool:
    return not character.isalnum() and not character.isspace()


def _piece(tokenizer, stream: str, token: int) -> str:
    """A token's own text; of an embedding, and where the vocabulary does not name it, a placeholder."""
    part = getattr(tokenizer, stream, None) or getattr(tokenizer, f"clip_{stream}", None)
    return getattr(part, "inv_vocab", {}).get(token, _UNKNOWN)


def flat_tokens(tokenised: Mapping[str, Sequence]) -> dict[str, tuple[int, ...]]:
    """Token ids of the host's `clip.tokenize`, chunks joined."""
    return {stream: tuple(-1 if isinstance(pair[0], Tensor) else int(pair[0]) for chunk in chunks for pair in chunk)
            for stream, chunks in tokenised.items()}


def _tokenizer(clip) -> Callable[[str], Mapping[str, Sequence]]:
    """The host's `clip.tokenize` without the text encoder itself, which a conditioning must not keep in memory."""
    options = {"tokenizer_options": dict(clip.tokenizer_options)} if clip.tokenizer_options else {}
    return functools.partial(clip.tokenizer.tokenize_with_weights, **options)


def encode_prompt(clip, text: str) -> list:
    """CONDITIONING of `text`, as the host's CLIPTextEncode makes it, with the token positions inside."""
    prompt = TokenisedPrompt.read(text, clip.tokenizer, _tokenizer(clip))
    return clip.encode_from_tokens_scheduled(clip.tokenize(text), add_dict={CONDITIONING_KEY: prompt})


def find_columns(conditionings: Sequence[dict], phrases: Sequence[str], streams: Sequence[str]
                 ) -> dict[object, WordColumns]:
    """The word columns of each conditioning that carries a prompt with all `phrases`, by the host's uuid.

    conditionings: the sampler's positive conditionings (dicts with "cross_attn" and "uuid").
    Raises TokenError where none fits, with the reason of the first that failed.
    """
    found, failures = {}, []
    for conditioning in conditionings:
        prompt = conditioning.get(CONDITIONING_KEY)
        if prompt is None:
            continue
        try:
            found[conditioning["uuid"]] = prompt.columns(phrases, streams, conditioning["cross_attn"].shape[1])
        except TokenError as error:
            failures.append(error)
    if found:
        return found
    if failures:
        raise failures[0]
    raise TokenError("input 'positive': this conditioning does not say where the words are. Take the 'positive' output "
                     "of \"Multi-Relation Graph\", or encode the prompt with \"Text Encode (Steerable)\" instead of "
                     "CLIP Text Encode. Where \"Conditioning (Concat)\" or \"Conditioning (Average)\" stands in between, connect "
                     "it to 'conditioning_to': what comes in by 'conditioning_from' loses the places of its words.")
