"""Channel weights for the geometric classifier: the localisation accuracy of every layer and head on labelled maps.

This is not in the paper. Each channel needs a single number, so few pictures suffice: for the small FLUX, forty give nearly
the accuracy of two thousand.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..classifiers.geometric import DIRECTIONS, GeometricClassifier, GeometricSettings, locate
from ..prompts.relations import RELATIONS
from .data import Data, Item, check_splits, common_layout, read_split
from .dataset import RelationDataset
from .evaluation import BATCH, Evaluation, evaluate
from .storage import TrainingError

_AXES = torch.tensor([DIRECTIONS[relation] for relation in RELATIONS])
_CPU = torch.device("cpu")


def agreement(data: Data, items: Sequence[Item]) -> Tensor:
    """[C], 0 to 1: the share of items in which a single channel has the subject's centre on the right side of the object's."""
    right = torch.zeros(())
    for first in range(0, len(items), BATCH):
        subject_maps, object_maps, _, truth = data.batch(items[first:first + BATCH], _CPU)
        channels = subject_maps.shape[1]
        offsets = [locate(maps.flatten(0, 1)[:, None], GeometricSettings.sharpness).centre.view(-1, channels, 2)
                   for maps in (subject_maps, object_maps)]
        along = ((offsets[0] - offsets[1]) * _AXES[truth][:, None]).sum(-1)
        right = right + (along > 0).float().sum(0) + 0.5 * (along == 0).float().sum(0)
    return right / len(items)


def channel_weights(agreed: Tensor, pictures: int) -> Tensor:
    """[C], summing to 1: proportional to the square of each channel's excess over chance.

    agreed: [C], from `agreement`. pictures: their number; the excess counts only beyond two standard errors of chance.
    Raises TrainingError where no channel is better than chance.
    """
    edge = (2 * agreed - 1 - 2 * pictures ** -0.5).clamp(min=0)
    if not edge.any():
        raise TrainingError(f"No channel is right more often than chance on {pictures} pictures. Build the dataset with more "
                            "pictures, or record later steps.")
    return edge.square() / edge.square().sum()


def calibrate(datasets: Sequence[RelationDataset], name: str = "geometric") -> GeometricClassifier:
    """A geometric classifier for the datasets' model, with channel weights measured on the training split.

    Its `training` holds the accuracy on the test split (validation if there is no test split), with these weights and with
    equal weights.
    """
    layout, steps, licence = common_layout(datasets)
    check_splits(datasets)
    train = read_split(datasets, "train", steps.timesteps)
    if not train.samples:
        raise TrainingError("The dataset has no samples in its train split. Build it with pictures for training.")
    pictures = len({sample.picture for sample in train.samples})
    weights = channel_weights(agreement(train, train.items()), pictures)
    rule = GeometricClassifier(size=layout.size, channel_weights=weights, name=name, backbone=layout.backbone, licence=licence)
    test = {split: read_split(datasets, split, steps.timesteps) for split in ("test", "validation")}
    split = "test" if test["test"].samples else "validation"
    alike = GeometricClassifier(size=layout.size)
    results = {f"{split}{label}": _evaluate(classifier, test[split]).summary()
               for label, classifier in (("", rule), (", all channels alike", alike)) if test[split].samples}
    rule.training = {"pictures": pictures, "channels_used": int((weights > 0).sum()), "results": results}
    return rule


def _evaluate(classifier: GeometricClassifier, data: Data) -> Evaluation:
    columns = [classifier.relations.index(relation) for relation in RELATIONS]
    def classify(subject_maps: Tensor, object_maps: Tensor, _) -> Tensor:
        return classifier.logits(subject_maps, object_maps, torch.zeros(len(subject_maps)))[:, columns]

    return evaluate(classify, data, data.items(), _CPU)
