"""Optimisers of the small models: Muon for matrices and convolutions inside the blocks, AdamW for the rest."""
from __future__ import annotations

import torch
from torch import nn

# Coefficients of the quintic iteration that moves a matrix's singular values towards 1 (Keller Jordan's Muon).
_COEFFICIENTS, _ITERATIONS = (3.4445, -4.7750, 2.0315), 5


class FlatMuon(torch.optim.Optimizer):
    """Muon for weights of two or more dimensions, each flattened to a matrix [out, everything else].

    The rule is that of `torch.optim.Muon`, whose iteration always runs in bfloat16. On a CPU that emulates bfloat16, that takes
    longer than the rest of a training step. Updates are scaled to the usual size of AdamW's, so both share learning rates.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, weight_decay: float = 0.01, momentum: float = 0.95,
                 dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        super().__init__(weights, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                buffer = state["momentum_buffer"] if state else torch.zeros_like(weight)
                state["momentum_buffer"] = buffer.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonal(weight.grad.lerp(buffer, group["momentum"]).flatten(1).to(self._dtype))
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                size = 0.2 * max(update.shape) ** 0.5
                weight.add_(update.view_as(weight), alpha=-group["lr"] * size)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix [m, n] with singular values near 1 (about 0.7 to 1.2), in the same dtype."""
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if tall else wide


def split_optimizers(module: nn.Module, rates: tuple[float, float], outside: tuple[str, ...],
                     dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Muon for every matrix and convolution whose name contains none of `outside`, AdamW for the rest, and their rates.

    dtype: precision of Muon's matrix products.
    """
    matrices, rest = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            inside = parameter.ndim >= 2 and not any(word in name for word in outside)
            (matrices if inside else rest).append(parameter)
    return [FlatMuon(matrices, rates[0], dtype=dtype),
            torch.optim.AdamW(rest, lr=rates[1], betas=(0.9, 0.99), weight_decay=0.01, foreach=True)]
