"""Captions of labelled pictures, and what inverting a picture under one gives. Plain tensors, no host."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Caption:
    """`A {subject} {relation} a {object}` (docs/method.md, "Training data"), "an" where English wants it."""

    subject: str
    relation: str
    object: str

    @property
    def text(self) -> str:
        return f"A{_n(self.subject)} {self.subject} {self.relation} a{_n(self.object)} {self.object}"


def _n(noun: str) -> str:
    return "n" if noun[:1].lower() in "aeiou" else ""


@dataclass(frozen=True)
class Inverted:
    """What inverting pictures under a caption each gives.

    maps: [B, steps, 2, channels, size, size] fp16 on the CPU, subject before object; psnr: of the reconstruction,
    [B] in dB; unread: [B], where the text encoder does not know the caption's objects, so that the maps mean nothing
    (empty: nowhere).
    """

    maps: Tensor
    psnr: Tensor
    unread: tuple[bool, ...] = ()
