"""Weights with 8 bits a number, for files that ship: half the size of half precision.

A matrix W [rows, ...] becomes int8 numbers q of the same shape and one scale s [rows], s = max |W| / 127 over the row,
q = round(W / s). Read back, W' = s q, so that |W - W'| <= s / 2, plus the rounding to half precision.
"""
from __future__ import annotations

from collections.abc import Mapping

import torch

SUFFIX = ".row_scale"
"""The scales of a packed tensor `name` are the tensor `name.row_scale`, float32."""
SMALLEST = 2048
"""Matrices with fewer numbers stay as they are, and so does every vector: norms, biases, scales."""
LARGEST = 127


def pack(tensors: Mapping[str, torch.Tensor], keep: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """The tensors with every large floating-point matrix packed, except those whose names begin with one of `keep`.

    Other floating-point tensors become half precision, unless kept. What is packed already stays so.
    Raises ValueError where half precision cannot hold a value.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith(keep) or name.endswith(SUFFIX) or not tensor.is_floating_point():
            found[name] = tensor
        elif not (tensor.float().abs() <= torch.finfo(torch.float16).max).all():
            raise ValueError(f"{name} has values that are not finite or too large for half precision")
        elif tensor.ndim < 2 or tensor.numel() < SMALLEST:
            found[name] = tensor.half()
        else:
            rows = tensor.float().flatten(1)
            scale = rows.abs().amax(dim=1) / LARGEST
            steps = (rows / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round()
            found[name] = steps.to(torch.int8).view(tensor.shape)
            found[name + SUFFIX] = scale
    return found


def unpack(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors with packed ones as half precision again, the others as they are. ValueError for damaged ones."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(SUFFIX):
            packed = tensors.get(name.removesuffix(SUFFIX))
            if packed is None or packed.dtype != torch.int8:
                raise ValueError(f"{name} is there, but no 8-bit tensor of that name")
        elif tensor.dtype == torch.int8:
            scale = _checked_scale(name, tensor, tensors.get(name + SUFFIX))
            found[name] = (tensor.flatten(1) * scale[:, None]).half().view(tensor.shape)
        else:
            found[name] = tensor
    return found


def _checked_scale(name: str, packed: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    if scale is None:
        raise ValueError(f"{name} has 8-bit numbers, but no scales ({name}{SUFFIX})")
    if packed.ndim < 2 or scale.shape != packed.shape[:1] or not scale.is_floating_point():
        raise ValueError(f"{name} of shape {list(packed.shape)} needs one scale a row, its scales have the shape "
                         f"{list(scale.shape)} and type {scale.dtype}")
    largest = scale.float() * LARGEST
    if not (torch.isfinite(largest) & (largest >= 0) & (largest <= torch.finfo(torch.float16).max)).all():
        raise ValueError(f"{name} has scales that are negative, not finite or too large for half precision")
    return scale.float()
