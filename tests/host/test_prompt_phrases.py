"""The host's tokenizers find every phrase that the reader finds: brackets, escapes, weights, quotations, embeddings."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from comfy.sd1_clip import SD1Tokenizer
from comfy.text_encoders.flux import FluxTokenizer
from learn_to_steer.host.tokens import TokenError, TokenisedPrompt
from learn_to_steer.prompts.graph import build_graph, understand
from learn_to_steer.prompts.relations import split_occurrence

FLUX = FluxTokenizer()
CASES = Path(__file__).parents[1] / "unit" / "prompt_cases.txt"
PROMPTS = [line.replace("\\n", "\n") for line in CASES.read_text(encoding="utf-8").splitlines()
           if line.strip() and not line.startswith(("#", " ")) and "embedding:" not in line]


def pieces(prompt: TokenisedPrompt, phrase: str, stream: str) -> str:
    tokenizer = (FLUX.t5xxl if stream == "t5xxl" else FLUX.clip_l).tokenizer
    tokens = tokenizer.convert_ids_to_tokens([prompt.streams[stream][place] for place in prompt.find(phrase, stream)])
    return "".join(tokens).replace("▁", "").replace("</w>", "").replace("<unk>", "")


def letters(text: str) -> str:
    return re.sub(r"[\W_]", "", text).lower()


@pytest.mark.parametrize("stream", ["l", "t5xxl"])
def test_every_phrase_that_is_read_has_its_tokens(stream: str):
    found = 0
    for text in PROMPTS:
        prompt = TokenisedPrompt.read(text, FLUX)
        for phrase in understand(text).phrases:
            assert letters(pieces(prompt, phrase, stream)) == letters(split_occurrence(phrase)[0]), (text, phrase)
            found += 1
    assert found > 300


@pytest.mark.parametrize("stream", ["l", "t5xxl"])
@pytest.mark.parametrize(("text", "lines", "phrase"), [
    ("[cat] above a dog", "", "cat"), ("a [fat cat] above a dog", "", "fat cat"), ("a [fat] cat above a dog", "", "fat cat"),
    ("a {fat} [cat] above a dog", "", "fat cat"), ("a [cat], a dog", "[cat] | above | dog", "cat"),
    (r"a dog \(animal\) above a cat", "", "dog"), (r"a \(cat\), a dog", r"\(cat\) | above | dog", "cat"),
    (r"miku \(vocaloid\), a dog", r"miku \(vocaloid\) | above | dog", r"miku \(vocaloid\)"),
    ("", r"miku \(vocaloid\) | above | dog", r"miku \(vocaloid\)")])
def test_brackets_are_no_part_of_a_name(text: str, lines: str, phrase: str, stream: str):
    graph = build_graph(text, lines)
    assert phrase in graph.phrases
    assert letters(pieces(TokenisedPrompt.read(graph.prompt, FLUX), phrase, stream)) == letters(phrase)


def test_a_quoted_word_is_not_the_thing():
    text = 'a sign saying "dog" above a dog'
    prompt = TokenisedPrompt.read(text, FLUX)
    first, second = (prompt.find(phrase, "l") for phrase in ("dog", "dog#2"))
    assert understand(text).phrases == ("sign", "dog#2") and first < second


@pytest.fixture
def with_embedding(tmp_path) -> SD1Tokenizer:
    torch.save({"string_to_param": {"*": torch.zeros(3, 768)}}, tmp_path / "my_cat.pt")
    return SD1Tokenizer(embedding_directory=str(tmp_path))


@pytest.mark.parametrize("text", ["embedding:my_cat above a dog", "a dog below (embedding:my_cat:1.2)",
                                  "a dog below embedding:my_cat, soft light", "a dog below an embedding:my_cat"])
def test_an_embedding_is_an_object_by_its_full_name(with_embedding, text: str):
    prompt = TokenisedPrompt.read(text, with_embedding)
    graph = understand(text)
    assert set(graph.phrases) == {"embedding:my_cat", "dog"} and graph.not_understood == ()
    assert [prompt.streams["l"][place] for place in prompt.find("embedding:my_cat", "l")] == [-1, -1, -1]


def test_an_embedding_that_the_host_lacks_is_named(with_embedding):
    prompt = TokenisedPrompt.read("embedding:missing above a dog", with_embedding)
    with pytest.raises(TokenError, match="read no embedding \"missing\": there is no such file in models/embeddings"):
        prompt.find("embedding:missing", "l")
    flux = TokenisedPrompt.read("embedding:my_cat above a dog", FLUX)
    with pytest.raises(TokenError, match="read no embedding \"my_cat\""):
        flux.find("embedding:my_cat", "t5xxl")


@pytest.mark.parametrize("words", ["my_cat", "cat"])
def test_the_name_without_its_prefix_is_refused_with_the_right_one(with_embedding, words: str):
    prompt = TokenisedPrompt.read("embedding:my_cat above a dog", with_embedding)
    if words == "my_cat":
        with pytest.raises(TokenError, match="part of an embedding's name: write the object as \"embedding:my_cat\""):
            prompt.find(words, "l")
    else:
        with pytest.raises(TokenError, match="does not contain \"cat\""):
            prompt.find(words, "l")
