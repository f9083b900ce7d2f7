"""The checks before a classifier is used."""
from __future__ import annotations

import pytest
from learn_to_steer.classifiers.base import ClassifierError, MapLayout, RelationClassifier, check_layout, relation_indices
from learn_to_steer.classifiers.geometric import GeometricClassifier

FOUR = ("above", "below", "to the left of", "to the right of")


class Stub(RelationClassifier):
    def __init__(self, relations=FOUR, **layout):
        self.name, self.relations, self.layout = "stub", tuple(relations), MapLayout(**layout)


def test_layout_that_fits_passes():
    check_layout(Stub(channels=195, backbone="unet"), 195, "unet")
    check_layout(Stub(), 7, "mmdit")
    check_layout(Stub(max_channels=1368, backbone="unet"), 1368, "unet")


@pytest.mark.parametrize(("layout", "words"), [
    ({"channels": 1368, "backbone": "mmdit"}, "on 1368 maps of a FLUX model; this model gives 195 maps of a UNet"),
    ({"channels": 128}, "trained on 128 maps; this model gives 195 maps of a UNet"),
    ({"backbone": "mmdit"}, "trained on the maps of a FLUX model; this model gives 195 maps of a UNet"),
    ({"max_channels": 100}, "positions for at most 100 maps; this model gives 195 maps of a UNet"),
])
def test_layout_that_does_not_fit_is_named(layout, words):
    with pytest.raises(ClassifierError, match=words) as error:
        check_layout(Stub(**layout), 195, "unet")
    assert "Load a classifier trained for this model" in str(error.value)


@pytest.mark.parametrize("layout", [{"size": 0}, {"normalise": "sometimes"}, {"backbone": "dit"}])
def test_impossible_layout_is_refused(layout):
    with pytest.raises(ClassifierError, match="Map layout"):
        MapLayout(**layout)


def test_relation_indices_of_one_and_of_a_diagonal():
    learned, geometric = Stub((*FOUR, "is")), GeometricClassifier()
    assert relation_indices(learned, ["to the left of"]) == [2]
    assert relation_indices(learned, "below") == [1]
    assert relation_indices(learned, ("above", "to the left of")) == [0, 2]
    for pair in (("above", "to the left of"), ("to the left of", "above")):
        assert [geometric.relations[i] for i in relation_indices(geometric, pair)] == ["above and to the left of"]


def test_unknown_relation_is_named_with_the_known_ones():
    with pytest.raises(ClassifierError, match="'inside'.*above, below, to the left of, to the right of"):
        relation_indices(Stub(), ["above", "inside"])
    with pytest.raises(ClassifierError, match="without a predicate"):
        relation_indices(Stub(), [])


def test_what_has_the_parts_of_a_classifier_is_one():
    assert isinstance(Stub(), RelationClassifier)
