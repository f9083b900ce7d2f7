"""Multi-Relation Graph shows the relations and the words not understood. Without any relation its error quotes those words."""
from __future__ import annotations

import pytest
import torch
from comfy.sd1_clip import SD1Tokenizer
from learn_to_steer.nodes.relations import MultiRelationGraph
from learn_to_steer.prompts.relations import RelationError


class Encoder:
    """A CLIP with the host's tokenizer and no network."""

    tokenizer = SD1Tokenizer()
    tokenizer_options: dict = {}
    tokenize = staticmethod(tokenizer.tokenize_with_weights)

    def encode_from_tokens_scheduled(self, tokens, add_dict):
        return [[torch.zeros(1, 77, 8), dict(add_dict)]]


def run(prompt: str, **options):
    return MultiRelationGraph.execute(Encoder(), prompt, **options)


@pytest.mark.parametrize(("prompt", "said"), [
    ("a dog not above a cat", "\"dog not above a cat\": it is negated"),
    ("a dog on the left", "\"dog on the left\": absolute places are not steered yet"),
    ("a dog, a cat, sitting under a tree", "\"sitting under a tree\": it may be said of \"dog\" or \"cat\""),
    ("a dog next to a cat", "\"next to a cat\": only left, right, above and below are steered"),
    ("a dog above it", "\"dog above it\": nothing before it is meant by the pronoun"),
])
def test_a_prompt_of_which_nothing_is_understood_is_an_error_that_quotes_it(prompt: str, said: str):
    with pytest.raises(RelationError) as caught:
        run(prompt)
    assert str(caught.value).startswith(f"input 'prompt': no relation understood in \"{prompt}\". Not understood: ")
    assert said in str(caught.value) and "Write one" in str(caught.value) and "allow_no_relation" in str(caught.value)


def test_an_ordinary_prompt_without_a_relation_is_an_error_that_quotes_nothing():
    with pytest.raises(RelationError, match="no relation found in \"a dog seen from above\". Write one") as caught:
        run("a dog seen from above")
    assert "Not understood" not in str(caught.value)


def test_what_was_not_understood_is_shown_beside_what_was():
    graph, _, text = run("a dog left of a cat, a bird in the upper right corner").result
    shown = run("a dog left of a cat, a bird in the upper right corner").ui.as_dict()["text"][0]
    assert "1. dog to the left of cat" in shown and "Not understood: \"bird in the upper right corner\": absolute" in shown
    assert len(graph.relations) == len(graph.not_understood) == 1 and text == graph.prompt


def test_with_allow_no_relation_it_is_shown_and_no_error():
    output = run("a dog not above a cat", allow_no_relation=True)
    assert output.result[0].relations == ()
    assert "No relation found.\nNot understood: " in output.ui.as_dict()["text"][0]
