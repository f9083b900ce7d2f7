"""Captions of labelled pictures, and the result of inverting a picture under a caption. Plain tensors, no host."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Caption:
    """`A {subject} {relation} a {object}` (docs/method.md, "Training data"), with "an" before a vowel."""

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
    """The result of inverting B pictures, each under its caption.

    maps: [B, steps, 2, channels, size, size] fp16 on the CPU, subject before object.
    psnr: [B], in dB, of the reconstruction.
    unread: [B], True where the text encoder does not keep the caption's objects, so that the maps are meaningless; empty if
        there is no such caption.
    """

    maps: Tensor
    psnr: Tensor
    unread: tuple[bool, ...] = ()
