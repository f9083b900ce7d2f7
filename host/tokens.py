"""Finds the tokens of a phrase in the host's tokenised prompt.

The tokenised prompt travels inside the conditioning, so steering always reads the prompt that was encoded.
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
_EMBEDDING = "embedding:"  # prefix of a textual inversion in a prompt
_WORD_MARK = "\u2581"  # begins a word in T5's vocabulary
_UNKNOWN = "?"


class TokenError(ValueError):
    """A phrase's tokens cannot be found; the message says which phrase, where, and what to do."""


@dataclass(frozen=True)
class TokenisedPrompt:
    """A prompt as the text encoders received it.

    streams: token ids per text encoder ("l", "g", "h", "t5xxl"), chunks joined; -1 marks an embedding.
    tokenize: the encoder's tokenizer; returns ids in the form of `streams`. Used to look up phrases.
    piece: from stream and id to the token's text in the vocabulary, word marks included ("dog</w>").
    """

    text: str
    streams: Mapping[str, tuple[int, ...]]
    tokenize: Callable[[str], Mapping[str, tuple[int, ...]]]
    piece: Callable[[str, int], str]

    @staticmethod
    def read(text: str, tokenizer, tokenize: Callable[[str], Mapping[str, Sequence]] | None = None) -> TokenisedPrompt:
        """Tokenises a prompt with the host's `tokenizer`, or with `tokenize` if given (a CLIP adds options)."""
        tokenize = tokenize or tokenizer.tokenize_with_weights

        def flat(words: str) -> dict[str, tuple[int, ...]]:
            return flat_tokens(tokenize(words))

        return TokenisedPrompt(text, flat(text), flat, functools.partial(_piece, tokenizer))

    def find(self, phrase: str, stream: str) -> tuple[int, ...]:
        """Positions of the phrase's tokens in `stream`. "dog#2" means the second occurrence.

        A phrase matches whole words, regardless of case. A leading token that is only a word mark is left out, as in the
        paper's code: T5 splits "zebra" into the bare mark, "z" and "ebra".
        Raises TokenError where the prompt does not contain the phrase (or not that often), and where one of the encoder's
        tokens joins the phrase to another word.
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
                             "apart from the text next to it. Write a space before and after it, or use another word.")
        tokens = self.streams[stream]
        first = next((i for i, place in enumerate(places) if self.piece(stream, tokens[place]).strip(_WORD_MARK)), 0)
        return places[first:]

    def _spans(self, words: str) -> list[tuple[int, int]]:
        """(start, end) of each occurrence of the words in the text, which is the segments joined by spaces.

        Square and curly brackets separate words, as in the graph: "[cat]" is a cat. "_" separates words only if the words occur
        nowhere else, so that occurrences are numbered as in the graph.
        """
        text, words = (re.sub(r"[\[\]{}]", " ", " ".join(_segments(part))) for part in (self.text, words))
        if not words.strip():
            return []
        if _EMBEDDING not in words:  # "dog" does not match inside "embedding:dog"
            text = without_embeddings(text)
        return occurrences(words, text) or occurrences(words, text.replace("_", " "))

    def _advice(self, words: str) -> str:
        name = re.search(rf"(?<!\S){_EMBEDDING}\S*(?<!\w){re.escape(words)}(?!\w)\S*", self.text) if words else None
        if name:
            return f"It is part of an embedding's name: write the object as \"{name.group().rstrip(',.;:!?)')}\"."
        return ("Write the object in the prompt exactly as in the relation (the same words in the same order), or change "
                "the relation.")

    def _places(self, start: int, end: int, stream: str) -> tuple[int, ...]:
        """Positions of the tokens that cover `start` to `end` of the joined segments; () where another word shares one.

        A cut lies between two tokens if the text before it, tokenised alone, gives the same tokens as in the whole text. Where
        a token crosses the border of the span ("'d" in "'dog'"), the span grows to include the punctuation beside it.
        """
        segments, special = _segments(self.text), set(self.tokenize("")[stream])
        text = " ".join(segments)
        places = [place for place, token in enumerate(self.streams[stream]) if token not in special]
        tokens = [self.streams[stream][place] for place in places]

        def before(cut: int) -> int | None:
            """Number of tokens before the cut; None where the cut goes through a token."""
            head = [token for token in self.tokenize(_up_to(cut, segments))[stream] if token not in special]
            return len(head) if tokens[:len(head)] == head else None

        while (first := before(start)) is None and start > 0 and _is_mark(text[start - 1]):
            start -= 1
        while (last := before(end)) is None and end < len(text) and _is_mark(text[end]):
            end += 1
        return () if first is None or last is None else tuple(places[first:last])

    def columns(self, phrases: Sequence[str], streams: Sequence[str], tokens: int) -> WordColumns:
        """Columns of the phrases among `tokens` text tokens, in the first of `streams` that exists.

        A phrase of several tokens averages over them. Raises TokenError where no stream exists or a phrase is not found.
        """
        stream = next((name for name in streams if name in self.streams), None)
        if stream is None:
            raise TokenError(f"input 'positive': encoded by {', '.join(self.streams)}, but this model reads "
                             f"{' or '.join(streams)}. Use the text encoder that belongs to the model.")
        return WordColumns.build({phrase: self.find(phrase, stream) for phrase in phrases}, tokens)


def _segments(text: str) -> list[str]:
    """The segments of equal weight that the host tokenises separately, without "(...:1.2)" and escapes.

    The text is normalised to NFC first, as in both tokenizers.
    """
    weighted = token_weights(escape_important(unicodedata.normalize("NFC", text)), 1.0)
    return [segment for segment in (unescape_important(words) for words, _ in weighted) if segment]


def _up_to(cut: int, segments: Sequence[str]) -> str:
    """The prompt up to `cut`, written so that the host splits it into the same segments.

    cut: index into the segments joined by spaces.
    """
    text = ""
    for segment in segments:
        head = segment[:max(cut, 0)].replace("(", "\\(").replace(")", "\\)")
        text += f"({head}:1)" if head else ""
        cut -= len(segment) + 1
    return text


def _is_mark(character: str) -> bool:
    return not character.isalnum() and not character.isspace()


def _piece(tokenizer, stream: str, token: int) -> str:
    """A token's text in the vocabulary; a placeholder for an embedding or an unknown id."""
    part = getattr(tokenizer, stream, None) or getattr(tokenizer, f"clip_{stream}", None)
    return getattr(part, "inv_vocab", {}).get(token, _UNKNOWN)


def flat_tokens(tokenised: Mapping[str, Sequence]) -> dict[str, tuple[int, ...]]:
    """Token ids per stream from the output of the host's `clip.tokenize`, chunks joined; -1 marks an embedding."""
    return {stream: tuple(-1 if isinstance(pair[0], Tensor) else int(pair[0]) for chunk in chunks for pair in chunk)
            for stream, chunks in tokenised.items()}


def _tokenizer(clip) -> Callable[[str], Mapping[str, Sequence]]:
    """The host's `clip.tokenize` without the text encoder: a conditioning must not keep the encoder in memory."""
    options = {"tokenizer_options": dict(clip.tokenizer_options)} if clip.tokenizer_options else {}
    return functools.partial(clip.tokenizer.tokenize_with_weights, **options)


def encode_prompt(clip, text: str) -> list:
    """CONDITIONING of `text`, as from the host's CLIPTextEncode, with the tokenised prompt inside."""
    prompt = TokenisedPrompt.read(text, clip.tokenizer, _tokenizer(clip))
    return clip.encode_from_tokens_scheduled(clip.tokenize(text), add_dict={CONDITIONING_KEY: prompt})


def find_columns(conditionings: Sequence[dict], phrases: Sequence[str], streams: Sequence[str]
                 ) -> dict[object, WordColumns]:
    """The word columns of each conditioning whose prompt contains all `phrases`, keyed by the host's uuid.

    conditionings: the sampler's positive conditionings (dicts with "cross_attn" and "uuid").
    Raises TokenError where no conditioning fits, with the reason of the first that failed.
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
                     "it to 'conditioning_to': the input 'conditioning_from' loses the positions of the words.")
