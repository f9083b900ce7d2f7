"""Scenes: the drawing fits the boxes, captions name the objects, and their relation is unreliable."""
from __future__ import annotations

import numpy as np
import pytest
from learn_to_steer.toyworld import scenes


def draw(count: int, seed: int = 3) -> list[scenes.Scene]:
    rng = np.random.default_rng(seed)
    return [scenes.random_scene(rng) for _ in range(count)]


def test_the_words_the_issue_asks_for_are_known() -> None:
    assert len(set(scenes.NOUNS)) >= 12
    assert {"dog", "cat", "giraffe", "airplane", "teddy bear"} <= set(scenes.NOUNS)
    assert not set(scenes.NOUNS) & set(scenes.EXTRA_NOUNS)
    assert set(scenes.HELD_OUT_NOUNS) < set(scenes.NOUNS)


def test_the_same_seed_gives_the_same_scenes() -> None:
    first, second = draw(20), draw(20)
    assert [scene.caption for scene in first] == [scene.caption for scene in second]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))


def test_objects_lie_inside_and_apart() -> None:
    counts = set()
    for scene in draw(400):
        counts.add(len(scene.objects))
        assert scene.image.shape == (64, 64, 3) and scene.image.dtype == np.uint8
        for index, item in enumerate(scene.objects):
            x0, y0, x1, y1 = item.box
            assert 0 <= x0 < x1 <= 64 and 0 <= y0 < y1 <= 64
            for other in scene.objects[:index]:
                a, b = item.box, other.box
                gaps = [max(a[k], b[k]) - min(a[k + 2], b[k + 2]) for k in (0, 1)]
                assert max(gaps) >= scenes.MIN_GAP
    assert counts == {1, 2, 3, 4, 5}


def test_sizes_vary_by_half() -> None:
    sizes = [max(item.box[2] - item.box[0], item.box[3] - item.box[1]) for scene in draw(300) for item in scene.objects
             if len(scene.objects) == 2]
    assert max(sizes) >= 1.5 * min(sizes)


def test_something_is_drawn_exactly_where_the_boxes_are() -> None:
    rng = np.random.default_rng(0)
    canvas = np.full((64, 64, 3), 200, dtype=np.float32)
    objects = scenes.random_scene(rng, 2).objects
    sizes = tuple(max(item.box[2] - item.box[0], item.box[3] - item.box[1]) for item in objects)
    changed = (scenes.render(objects, sizes, canvas) != 200).any(axis=2)
    inside = np.zeros((64, 64), dtype=bool)
    for item in objects:
        x0, y0, x1, y1 = item.box
        inside[y0:y1, x0:x1] = True
        assert changed[y0:y1, x0:x1].mean() > 0.25
    assert not changed[~inside].any()


def test_captions_name_every_object_once_with_its_article() -> None:
    for scene in draw(300):
        for item in scene.objects:
            assert scene.caption.count(scenes.with_article(item.noun)) == 1
    assert scenes.with_article("airplane") == "an airplane" and scenes.with_article("teddy bear") == "a teddy bear"


def test_the_relation_word_is_little_better_than_chance() -> None:
    right = told = 0
    for scene in draw(6000):
        if len(scene.objects) != 2:
            continue
        first, second = scene.objects
        for relation in scenes.CARDINALS:
            if scene.caption.endswith(f"{first.noun} {relation} {scenes.with_article(second.noun)}"):
                told += 1
                right += relation in scenes.true_relations(first.box, second.box)
    chance = np.mean([len(scenes.true_relations(scene.objects[0].box, scene.objects[1].box)) / 4
                      for scene in draw(3000) if len(scene.objects) == 2])
    assert told > 2000
    assert chance + 0.02 < right / told < chance + 0.2


@pytest.mark.parametrize(("subject", "other", "expected"), [
    ((0, 0, 10, 10), (30, 0, 40, 10), {"to the left of"}),
    ((30, 0, 40, 10), (0, 0, 10, 10), {"to the right of"}),
    ((0, 0, 10, 10), (0, 30, 10, 40), {"above"}),
    ((0, 30, 10, 40), (0, 0, 10, 10), {"below"}),
    ((0, 0, 10, 10), (30, 30, 40, 40), {"above", "to the left of"}),
    ((30, 30, 40, 40), (0, 0, 10, 10), {"below", "to the right of"}),
    ((0, 0, 10, 10), (0, 0, 10, 10), set()),
    ((0, 0, 20, 20), (3, 0, 23, 20), set()),
])
def test_genevals_rule(subject: tuple, other: tuple, expected: set) -> None:
    assert scenes.true_relations(subject, other) == expected


def test_a_phrase_is_taken_apart() -> None:
    assert scenes.relation_parts("above") == ("above",)
    assert scenes.relation_parts("below and to the right of") == ("below", "to the right of")
    with pytest.raises(ValueError, match="no relation of the small world"):
        scenes.relation_parts("inside")


def test_tuning_and_reporting_prompts_share_no_ordered_pair() -> None:
    def pairs(split: str) -> set[tuple[str, str]]:
        return {(prompt.relations[0][0], prompt.relations[0][2]) for prompt in scenes.two_object_prompts(200, split)}

    assert not pairs("tune") & pairs("report")
    prompts = scenes.two_object_prompts(200)
    assert prompts == scenes.two_object_prompts(200) and len(prompts) == 200
    counts = [sum(prompt.relations[0][1] == relation for prompt in prompts) for relation in scenes.CARDINALS]
    assert counts == [50] * 4


def test_multi_relation_prompts_have_the_papers_forms() -> None:
    expected = {(3, 2): 3, (4, 2): 4, (4, 3): 4, (5, 3): 5}
    for (objects, relations), nouns in expected.items():
        for prompt in scenes.multi_relation_prompts(20, objects, relations):
            assert len(prompt.relations) == relations and len(prompt.nouns) == nouns
            assert all(scenes.with_article(noun) in prompt.text for noun in prompt.nouns)


def test_unknown_nouns_and_counts_are_named() -> None:
    with pytest.raises(ValueError, match="'unicorn'.*it knows dog"):
        scenes.sprite("unicorn", 16)
    with pytest.raises(ValueError, match="count must be 1 to 5"):
        scenes.random_scene(np.random.default_rng(0), 6)
    with pytest.raises(ValueError, match="split must be one of tune, report"):
        scenes.two_object_prompts(4, "test")
