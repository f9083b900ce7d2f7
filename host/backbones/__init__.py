"""Backbones: for each architecture, where its cross-attention is recorded and where its blocks are recomputed."""
from __future__ import annotations

from typing import Protocol

from ...steering.attention import MapRecorder
from .mmdit import MMDiTBackbone
from .unet import UNetBackbone


class UnsupportedModel(ValueError):
    """The model's architecture has no backbone here."""


class Backbone(Protocol):
    """One architecture.

    name: as in `MapLayout.backbone`.
    streams: the text encoders' token streams that the cross-attention reads. The first one present is used.
    """

    name: str
    streams: tuple[str, ...]

    def matches(self, diffusion_model) -> bool:
        """Whether `diffusion_model` (the host's network module) is of this architecture."""

    def layers(self, diffusion_model) -> int:
        """Number of attention layers from which maps are recorded in one forward pass."""

    def instrument(self, diffusion_model, options: dict, recorder: MapRecorder, recompute_blocks: bool) -> dict:
        """A copy of `options` (the host's transformer_options) with which a forward pass records into `recorder`.

        Patches of other packs stay in place and are called as before. With `recompute_blocks`, backward recomputes the
        activations block by block.
        """


BACKBONES: tuple[Backbone, ...] = (UNetBackbone(), MMDiTBackbone())


def find_backbone(diffusion_model) -> Backbone:
    """The backbone of a host network. Raises UnsupportedModel, naming the network's class and the supported backbones."""
    for backbone in BACKBONES:
        if backbone.matches(diffusion_model):
            return backbone
    known = ", ".join(backbone.name for backbone in BACKBONES)
    raise UnsupportedModel(f"input 'model': this model's network is a {type(diffusion_model).__name__}, which cannot be "
                           f"read or steered (supported: {known}). Load a supported model, or take the steering and "
                           "capture nodes out of the model's line.")
