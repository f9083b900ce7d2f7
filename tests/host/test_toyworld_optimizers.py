"""The small models' own Muon follows PyTorch's rule."""
from __future__ import annotations

import pytest
import torch

from dev.toyworld.optimizers import FlatMuon, orthogonal


@pytest.mark.parametrize("shape", [(40, 96), (96, 40)])
def test_singular_values_come_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=generator)))
    assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-6), (torch.float32, 1e-3)])
def test_it_moves_a_matrix_as_the_reference_does(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(96, 40, generator=generator)
    ours, reference = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = (FlatMuon([ours], 1e-2, dtype=dtype),
                  torch.optim.Muon([reference], lr=1e-2, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))
    for _ in range(5):
        gradient = torch.randn(start.shape, generator=generator)
        for weight, optimizer in zip((ours, reference), optimizers, strict=True):
            weight.grad = gradient.clone()
            optimizer.step()
    assert (reference - start).abs().max() > 10 * tolerance
    torch.testing.assert_close(ours, reference, rtol=0, atol=tolerance)


def test_a_convolution_is_the_matrix_of_its_filters():
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 8, 4, 3, 3, generator=generator)
    filters, matrix = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.flatten(1).clone())
    filters.grad, matrix.grad = gradient, gradient.flatten(1)
    FlatMuon([filters, matrix], 1e-2).step()
    torch.testing.assert_close(filters.flatten(1), matrix)
