"""Randomly flipped maps are labelled with the relation that holds after the flip."""
from __future__ import annotations

import torch
from learn_to_steer.prompts.relations import RELATIONS
from learn_to_steer.training.trainer import mirrored

OFFSETS = {"above": (-4, 0), "below": (4, 0), "to the left of": (0, -4), "to the right of": (0, 4)}


def spot(row: int, column: int) -> torch.Tensor:
    maps = torch.zeros(1, 16, 16)
    maps[0, row, column] = 1
    return maps


def test_the_label_follows_the_maps():
    truth = torch.arange(len(RELATIONS)).repeat(64)
    subject, other = (torch.stack([spot(7 + sign * OFFSETS[RELATIONS[k]][0], 7 + sign * OFFSETS[RELATIONS[k]][1])
                                   for k in truth]) for sign in (1, 0))
    torch.manual_seed(0)
    first, second, labels = mirrored(subject, other, truth)
    for a, b, label in zip(first, second, labels, strict=True):
        offset = a[0].nonzero()[0] - b[0].nonzero()[0]
        assert tuple(offset.tolist()) == OFFSETS[RELATIONS[label]]
    assert 0.3 < (labels != truth).float().mean() < 0.7
    assert (first[:, 0].flatten(1).argmax(1) // 16).unique().numel() > 3  # really turned over, not only exchanged
