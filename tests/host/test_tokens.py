"""Words among the tokens of the host's own tokenizers, CLIP and T5."""
from __future__ import annotations

import re

import pytest
import torch
from comfy.sd1_clip import SD1Tokenizer
from comfy.sdxl_clip import SDXLTokenizer
from comfy.text_encoders.flux import FluxTokenizer
from learn_to_steer.host.tokens import TokenError, TokenisedPrompt

FLUX, SDXL = FluxTokenizer(), SDXLTokenizer()
STREAMS = ("l", "t5xxl")


def read(text: str) -> TokenisedPrompt:
    return TokenisedPrompt.read(text, FLUX)


def all_pieces(prompt: TokenisedPrompt, stream: str) -> list[str]:
    tokenizer = (FLUX.t5xxl if stream == "t5xxl" else FLUX.clip_l).tokenizer
    return tokenizer.convert_ids_to_tokens(list(prompt.streams[stream]))


def found(text: str, phrase: str, stream: str) -> tuple[str, int]:
    """The phrase's pieces, joined and without word marks, and the number of equal sequences before them."""
    prompt = read(text)
    pieces, places = all_pieces(prompt, stream), prompt.find(phrase, stream)
    wanted = [pieces[place] for place in places]
    earlier = sum(pieces[start:start + len(wanted)] == wanted for start in range(places[0]))
    return "".join(wanted).replace("▁", " ").replace("</w>", " ").strip(), earlier


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("text", "phrase"), [
    ('"dog" above (a "cat":1.2)', "dog"), ('"dog" above (a "cat":1.2)', "cat"), ("'cat' above 'bird'", "cat"),
    ("a dog,cat", "cat"), ("a (red:1.3)-dog", "dog"), (r"a \(dog\) above", "dog"), ("a [dog] above", "dog"),
    ("a big_dog", "dog"), ("“dog”—cat", "dog"), ("“dog”—cat", "cat"), ("the dog's bone", "dog"), ("dog.", "dog"),
    ("((dog)) (and (cat:0.5):1.1)", "cat"), ("an unclosed ((dog", "dog"), ("a  photo\n\nof\ta\u00a0dog ", "dog"),
    ("x: (dog: 3:1.1)", "dog"), ("a dog \\", "dog"), ("\\dog/", "dog"), ("() (:1) dog", "dog"), ("狗,cat", "cat")])
def test_words_beside_punctuation(text: str, phrase: str, stream: str):
    assert found(text, phrase, stream) == (phrase, 0)


def test_the_token_after_a_hyphen_is_taken_not_a_later_word():
    text = "a red-dog above a cat. Dog"
    assert found(text, "dog", "t5xxl") == ("dog", 0)
    assert found(text, "dog#2", "t5xxl") == ("Dog", 0)
    prompt = read(text)
    assert prompt.find("dog", "t5xxl") < prompt.find("cat", "t5xxl") < prompt.find("dog#2", "t5xxl")
    assert prompt.find("dog", "l") < prompt.find("cat", "l") < prompt.find("dog#2", "l")


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize(("text", "phrase", "before"), [
    ("a dogfish and two dogs left of a dog", "dog", "left of a"), ("a catfish and cats above a cat", "cat", "above a"),
    ("a hotdog, a dog-house, a dogfish under a Dog", "dog#2", "under a"),
    ("underdog, dog2 and 2dogs by the dog", "dog", "by the")])
def test_part_of_a_longer_word_is_not_the_word(text: str, phrase: str, before: str, stream: str):
    prompt = read(text)
    places, marker = prompt.find(phrase, stream), prompt.find(before, stream)
    assert places[0] == marker[-1] + 1
    assert found(text, phrase, stream)[0].lower() == phrase[:3]


@pytest.mark.parametrize("stream", STREAMS)
def test_occurrences_are_counted_whatever_the_case(stream: str):
    prompt = read("a dog above a Dog and a DOG")
    places = [prompt.find(f"dog#{number}", stream)[0] for number in (1, 2, 3)]
    assert places == sorted(set(places)) and prompt.find("DOG", stream) == prompt.find("dog", stream)
    pieces = all_pieces(prompt, stream)
    assert [pieces[place] for place in places[:2]] == (["dog</w>"] * 2 if stream == "l" else ["▁dog", "▁Dog"])
    for number in (0, 4):
        with pytest.raises(TokenError, match=f'does not contain "dog" {number} times. Write the object'):
            prompt.find(f"dog#{number}", stream)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("text", ["a Teddy\n Bear,", "a (teddy:1.2) bear", "a teddy (bear:1.2)", "(a teddy bear)", "a-teddy bear",
                                  "a teddy_bear"])
def test_phrases_of_several_words(text: str, stream: str):
    pieces = found(text, "teddy  bear", stream)[0]
    assert re.sub(r"[ _]", "", pieces).lower() == "teddybear"
    with pytest.raises(TokenError, match="does not contain"):
        read(text).find("bear teddy", stream)


def test_tokens_that_reach_into_punctuation_are_taken_whole():
    assert found("a 'dog' above", "dog", "l") == ("'d og", 0)  # CLIP splits off 'd as in "he'd"
    assert found("a 'dog' above", "dog", "t5xxl") == ("dog", 0)


def test_a_word_without_tokens_of_its_own_is_named():
    """T5 maps adjacent unknown characters to one token, across the border of a word."""
    assert found("a 狗 and a 鸟", "鸟", "t5xxl") == ("<unk>", 1)
    prompt = read("a ★狗 above a 鸟")
    assert prompt.find("狗", "l")
    with pytest.raises(TokenError, match="input 'positive': in the prompt .* does not keep \"狗\" apart from the text next to"):
        prompt.find("狗", "t5xxl")


@pytest.mark.parametrize("phrase", ["", "#2", "()", "do", "og", "1.2", "embedding:dog"])
def test_what_the_prompt_does_not_say(phrase: str):
    for stream in STREAMS:
        with pytest.raises(TokenError, match="input 'positive': the prompt .* does not contain"):
            read("a (dog:1.2) above").find(phrase, stream)


def test_words_over_the_end_of_a_chunk():
    """A CLIP chunk holds 75 tokens: the phrase's second word begins the second chunk."""
    prompt = TokenisedPrompt.read("green " * 74 + "teddy bear above (a dog:1.2)", SDXL)
    for stream in ("l", "g"):
        assert prompt.find("teddy bear", stream) == (75, 78) and prompt.find("green#74", stream) == (74,)
        assert prompt.find("dog", stream) == (81,)


def test_embeddings_are_no_words(tmp_path):
    torch.save({"string_to_param": {"*": torch.zeros(3, 768)}}, tmp_path / "dog.pt")
    tokenizer = SD1Tokenizer(embedding_directory=str(tmp_path))
    for text in ("embedding:dog, a cat above a dog", "(a embedding:dog:1.1) above, a cat and a dog",
                 "a embedding:missing cat, dog"):
        prompt = TokenisedPrompt.read(text, tokenizer)
        tokens = prompt.streams["l"]
        assert [tokens[place] for phrase in ("cat", "dog") for place in prompt.find(phrase, "l")] == [2368, 1929]
        if "embedding:dog" in text:
            assert [tokens[place] for place in prompt.find("embedding:dog", "l")] == [-1, -1, -1]
        with pytest.raises(TokenError, match="does not contain \"dog\" 2 times"):
            prompt.find("dog#2", "l")


GENEVAL = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket,
bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone,
microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""


@pytest.mark.parametrize(("text", "phrase", "pieces"), [
    ("a photo of a teddy bear", "teddy bear", "t e ddy ▁bear"), ("a zebra", "zebra", "ze bra"), ("a Zebra", "zebra", "▁Ze bra"),
    ("a giraffe.", "giraffe", "gir a ffe"), ("a tv", "tv", "t v"), ("a tv remote", "tv remote", "t v ▁remote"),
    ("a (tv:1.2)", "tv", "t v"), ("tv", "tv", "t v"), ("a dog", "dog", "▁dog"), ("a red tv", "red tv", "▁red ▁ t v")])
def test_a_t5_word_begins_at_the_first_token_with_text_of_its_own(text: str, phrase: str, pieces: str):
    """T5 splits some words into a bare word mark and pieces. The mark is left out, for every classifier."""
    prompt = read(text)
    whole, places = all_pieces(prompt, "t5xxl"), prompt.find(phrase, "t5xxl")
    assert [whole[place] for place in places] == pieces.split()
    weights = prompt.columns((phrase,), ("t5xxl",), len(whole)).weights[0]
    assert weights.nonzero().flatten().tolist() == list(places) and weights.sum() == pytest.approx(1)


def test_genevals_nouns_begin_where_the_paper_begins():
    """At the first token whose own text contains the word's first letter."""
    bare = set()
    for noun in GENEVAL.replace("\n", " ").split(", "):
        for stream in STREAMS:
            prompt = read(f"a photo of a {noun}")
            pieces, places = all_pieces(prompt, stream), prompt.find(noun, stream)
            texts = [piece.replace("▁", " ").replace("</w>", " ") for piece in pieces]
            assert noun[0] in texts[places[0]] and "".join(texts[place] for place in places).strip() == noun
            if pieces[places[0] - 1] == "▁":
                bare.add(noun)
    assert bare == {"zebra", "giraffe", "tv", "tv remote", "teddy bear"}
