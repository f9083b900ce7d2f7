"""The optimisers of the small models: Muon for the matrices and convolutions inside the blocks, AdamW for the rest."""
from __future__ import annotations

import torch
from torch import nn


class FlatMuon(torch.optim.Muon):
    """PyTorch's Muon over weights of two or more dimensions, each seen as a matrix [out, everything else].

    Learning rates mean the same as AdamW's: the update is scaled to the size that AdamW's usually has.
    """

    def __init__(self, weights: list[nn.Parameter], lr: float, weight_decay: float = 0.01) -> None:
        self._weights = weights
        self._matrices = [nn.Parameter(weight.detach().flatten(1)) for weight in weights]  # share the memory
        super().__init__(self._matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def step(self, closure=None):
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            matrix.grad = weight.grad.flatten(1)
        return super().step(closure)


def split_optimizers(module: nn.Module, rates: tuple[float, float], outside: tuple[str, ...]
                     ) -> list[torch.optim.Optimizer]:
    """Muon for every matrix and convolution whose name holds none of `outside`, AdamW for what is left; their rates."""
    matrices, rest = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            inside = parameter.ndim >= 2 and not any(word in name for word in outside)
            (matrices if inside else rest).append(parameter)
    return [FlatMuon(matrices, rates[0]),
            torch.optim.AdamW(rest, lr=rates[1], betas=(0.9, 0.99), weight_decay=0.01, foreach=True)]
