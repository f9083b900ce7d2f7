"""Where a phrase's tokens are in the host's tokenised prompt.

The positions travel inside the conditioning, so that what is steered is what was encoded.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from .attention import WordColumns

CONDITIONING_KEY = "learn_to_steer_prompt"


class TokenError(ValueError):
    """A phrase's tokens cannot be found; the message says which phrase, where, and what to do."""


@dataclass(frozen=True)
class TokenisedPrompt:
    """A prompt as the text encoders saw it.

    streams: token ids per text encoder ("l", "g", "h", "t5xxl"), chunks joined; -1 stands for an embedding.
    tokenize: the encoder's own tokenizer, in the same form, for looking phrases up.
    """

    text: str
    streams: Mapping[str, tuple[int, ...]]
    tokenize: Callable[[str], Mapping[str, tuple[int, ...]]]

    @staticmethod
    def read(text: str, tokenize: Callable[[str], Mapping[str, Sequence]]) -> TokenisedPrompt:
        """The prompt as the host's `tokenize` (of a CLIP or a tokenizer) sees it."""
        def flat(words: str) -> dict[str, tuple[int, ...]]:
            return flat_tokens(tokenize(words))

        return TokenisedPrompt(text, flat(text), flat)

    def find(self, phrase: str, stream: str) -> tuple[int, ...]:
        """Positions of the phrase's tokens in `stream`; "dog#2" asks for the second occurrence.

        Raises TokenError where the prompt does not contain the phrase (often enough).
        """
        words, _, number = phrase.partition("#")
        words, wanted = words.strip(), int(number) if number.strip().isdigit() else 1
        special = set(self.tokenize("")[stream])
        tokens = self.streams[stream]
        for variant in dict.fromkeys((words, words.lower(), words.capitalize(), words.title())):
            ids = tuple(token for token in self.tokenize(variant)[stream] if token not in special)
            starts = [start for start in range(len(tokens)) if ids and tokens[start:start + len(ids)] == ids]
            starts = self._whole_words(variant, starts)
            if len(starts) >= wanted:
                start = starts[wanted - 1]
                return tuple(range(start, start + len(ids)))
        times = "" if wanted == 1 else f" {wanted} times"
        raise TokenError(f"input 'positive': the prompt \"{self.text}\" does not contain \"{words}\"{times}. Write the "
                         "object in the prompt exactly as in the relation (the same words in the same order), or "
                         "change the relation.")

    def _whole_words(self, words: str, starts: list[int]) -> list[int]:
        """Drops matches that are the beginning of a longer word ("dog" in "dogfish", where tokens are word pieces)."""
        begun = list(re.finditer(rf"(?<!\w){re.escape(words)}", self.text))
        if len(begun) != len(starts):  # the longer word has tokens of its own, or the case differs
            return starts
        return [start for start, match in zip(starts, begun, strict=True)
                if not re.match(r"\w", self.text[match.end():match.end() + 1])]

    def columns(self, phrases: Sequence[str], streams: Sequence[str], tokens: int) -> WordColumns:
        """Columns of the phrases among `tokens` text tokens; the first of `streams` that exists counts.

        A phrase of several tokens is the average over them.
        """
        stream = next((name for name in streams if name in self.streams), None)
        if stream is None:
            raise TokenError(f"input 'positive': encoded by {', '.join(self.streams)}, but this model reads "
                             f"{' or '.join(streams)}. Use the text encoder that belongs to the model.")
        return WordColumns.build({phrase: self.find(phrase, stream) for phrase in phrases}, tokens)


def flat_tokens(tokenised: Mapping[str, Sequence]) -> dict[str, tuple[int, ...]]:
    """Token ids of the host's `clip.tokenize`, chunks joined."""
    return {stream: tuple(-1 if isinstance(pair[0], Tensor) else int(pair[0]) for chunk in chunks for pair in chunk)
            for stream, chunks in tokenised.items()}


def encode_prompt(clip, text: str) -> list:
    """CONDITIONING of `text`, as the host's CLIPTextEncode makes it, with the token positions inside."""
    prompt = TokenisedPrompt.read(text, clip.tokenize)
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
                     "CLIP Text Encode.")
