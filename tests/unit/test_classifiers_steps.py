"""The step mapping: the paper's indices at the trained schedule, by progress everywhere else."""
from __future__ import annotations

import pytest
import torch
from learn_to_steer.classifiers.base import ClassifierError
from learn_to_steer.classifiers.steps import PAPER_TIMESTEPS, StepMapping


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_paper_indices_at_the_trained_schedule(dtype):
    steps = torch.arange(50, dtype=dtype)
    got = StepMapping(PAPER_TIMESTEPS[50], 50).index(steps / 50)
    expected = [5] * 6 + [10] * 5 + [15] * 5 + [20] * 5 + [25] * 5 + [49] * 24
    assert got.tolist() == expected and got.dtype == torch.int64


def test_schnell_and_its_four_steps():
    assert StepMapping((3, 1), 4).index(torch.arange(4) / 4).tolist() == [1, 1, 3, 3]


@pytest.mark.parametrize("count", [3, 20, 25, 28, 100, 1000])
def test_other_step_counts_map_by_progress(count):
    """Smallest trained index >= i * 50 / count in whole numbers: trained * count >= i * 50; the last one beyond it."""
    mapping = StepMapping(PAPER_TIMESTEPS[50], 50)
    got = mapping.index(torch.arange(count) / count)
    expected = [next((t for t in mapping.timesteps if t * count >= i * 50), 49) for i in range(count)]
    assert got.tolist() == expected


def test_every_schedule_length_survives_float32():
    for length in range(2, 300):
        trained = tuple(range(0, length, 3))
        got = StepMapping(trained, length).index(torch.arange(length, dtype=torch.float32) / length)
        assert got.tolist() == [min(-(-i // 3) * 3, trained[-1]) for i in range(length)]


@pytest.mark.parametrize(("steps", "length"), [((), 50), ((5, 50), 50), ((-1, 3), 4)])
def test_impossible_steps_are_refused(steps, length):
    with pytest.raises(ClassifierError, match="do not lie within a schedule"):
        StepMapping(steps, length)
