"""Recording cross-attention: from queries and keys to one map per word.

This module knows no host and no architecture. `host/backbones/` passes in q, k, the grid and the shape of the call.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

FORWARD_KEY = "learn_to_steer_forward"
ROWS_TIMES_TOKENS = 2**24  # logits held at once, in elements over batch and heads (64 MB in fp32)


class WordMaps(torch.autograd.Function):
    """softmax(scale * q k^T) over the tokens, averaged over each word's tokens.

    The function returns only the words' columns and saves only q and k for backward. Backward recomputes the logits a few
    image rows at a time. The full image x text map of a layer is never held in memory.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, weights: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, weights)
        ctx.scale = scale
        return torch.cat([_probabilities(rows, k, scale) @ weights.T for rows in _pieces(q, k)], dim=2).transpose(2, 3)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        q, k, weights = ctx.saved_tensors
        gradient = gradient.transpose(2, 3)  # [B, heads, rows, words]
        dq, dk, start = [], torch.zeros_like(k, dtype=torch.promote_types(k.dtype, torch.float32)), 0
        for rows in _pieces(q, k):
            p = _probabilities(rows, k, ctx.scale)
            dp = gradient[:, :, start:start + rows.shape[2]].to(p.dtype) @ weights
            dlogits = ctx.scale * p * (dp - (p * dp).sum(-1, keepdim=True))
            dq.append(dlogits @ k.to(p.dtype))
            dk += dlogits.transpose(2, 3) @ rows.to(p.dtype)
            start += rows.shape[2]
        return torch.cat(dq, dim=2).to(q.dtype), dk.to(k.dtype), None, None


def _pieces(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """q split along its rows, so that the logits of one piece hold at most ROWS_TIMES_TOKENS elements."""
    per_row = q.shape[0] * q.shape[1] * k.shape[2]
    return q.split(max(1, ROWS_TIMES_TOKENS // per_row), dim=2)


def _probabilities(rows: Tensor, k: Tensor, scale: float) -> Tensor:
    precision = torch.promote_types(rows.dtype, torch.float32)
    return torch.softmax(scale * (rows.to(precision) @ k.to(precision).transpose(2, 3)), dim=-1)


def word_maps(q: Tensor, k: Tensor, weights: Tensor, scale: float | None = None) -> Tensor:
    """Probability with which every image row attends to each word: [B, heads, words, rows], in at least fp32.

    q: [B, heads, rows, d]; k: [B, heads, tokens, d].
    weights: [words, tokens]; the row of a word sums to 1 over that word's tokens.
    scale: factor on q k^T, 1/sqrt(d) unless given.
    """
    weights = weights.to(device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
    return WordMaps.apply(q, k, weights, q.shape[-1] ** -0.5 if scale is None else scale)


@dataclass(frozen=True)
class LayerMaps:
    """Maps of one attention layer. maps: [B, heads, words, h, w], probabilities; order: index in order of execution."""

    name: str
    order: int
    maps: Tensor


@dataclass(frozen=True)
class AttentionMaps:
    """Cross-attention maps of the words `phrases`, from one forward pass.

    layers: sorted by resolution, smallest first, then by order of execution (docs/method.md, "Maps").
    conditioning: the host's uuid of the conditioning that the maps belong to.
    """

    phrases: tuple[str, ...]
    layers: tuple[LayerMaps, ...]
    conditioning: object = None

    @staticmethod
    def collect(phrases: tuple[str, ...], layers: list[LayerMaps], conditioning: object = None) -> AttentionMaps:
        ordered = sorted(layers, key=lambda layer: (layer.maps.shape[-2] * layer.maps.shape[-1], layer.order))
        return AttentionMaps(phrases, tuple(ordered), conditioning)

    def placed(self, area: Sequence[int], size: Sequence[int]) -> AttentionMaps:
        """The maps of an area, padded with zeros to the whole picture.

        area: height, width, top and left of the area, in latent cells.
        size: height and width of the picture, in latent cells.
        """
        (h, w, top, left), (height, width) = area, size
        layers = []
        for layer in self.layers:
            rows, columns = layer.maps.shape[-2:]
            above, before = round(top * rows / h), round(left * columns / w)
            below, behind = round(height * rows / h) - above - rows, round(width * columns / w) - before - columns
            maps = F.pad(layer.maps, (before, max(0, behind), above, max(0, below)))
            layers.append(LayerMaps(layer.name, layer.order, maps))
        return AttentionMaps(self.phrases, tuple(layers), self.conditioning)

    @property
    def channels(self) -> int:
        """Layers x heads: the number of maps per word."""
        return sum(layer.maps.shape[1] for layer in self.layers)

    def stack(self, size: int | tuple[int, int], normalise: str = "resized") -> Tensor:
        """All maps at one resolution: [B, words, channels, size, size].

        normalise: "always" divides each map by its sum; "never" leaves raw probabilities; "resized" divides only when
            some layer had to be resized, which is the published classifiers' rule.
        """
        size = (size, size) if isinstance(size, int) else size
        resized = any(tuple(layer.maps.shape[-2:]) != size for layer in self.layers)
        parts = []
        for layer in self.layers:
            batch, heads, words, h, w = layer.maps.shape
            maps = layer.maps.transpose(1, 2).reshape(batch * words, heads, h, w)
            if (h, w) != size:
                maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
            parts.append(maps.reshape(batch, words, heads, *size))
        stacked = torch.cat(parts, dim=2)
        if normalise == "always" or (normalise == "resized" and resized):
            stacked = stacked / (stacked.sum(dim=(-2, -1), keepdim=True) + 1e-8)
        return stacked


@dataclass(frozen=True)
class WordColumns:
    """The columns of each word among the text tokens that the model attends to.

    phrases: W words; weights: [W, tokens], each row sums to 1. `tokens` is the length of the conditioning itself.
    """

    phrases: tuple[str, ...]
    weights: Tensor

    @staticmethod
    def build(positions: Mapping[str, tuple[int, ...]], tokens: int) -> WordColumns:
        weights = torch.zeros(len(positions), tokens)
        for row, columns in enumerate(positions.values()):
            weights[row, list(columns)] = 1.0 / len(columns)
        return WordColumns(tuple(positions), weights)

    def tiled(self, tokens: int) -> Tensor:
        """Weights [W, tokens] for a batch in which the host repeated the conditioning to reach `tokens` tokens.

        Equal keys get equal probability, so the sum over the copies equals the map without repetition.
        Raises ValueError where `tokens` is no multiple of the conditioning's length.
        """
        own = self.weights.shape[1]
        if tokens % own:
            raise ValueError(f"The model attends to {tokens} text tokens, the conditioning has {own}: the words' "
                             "places are not known. Something between the text encoder and the sampler changed the "
                             "conditioning's length.")
        return self.weights.repeat(1, tokens // own)


class UnreadableAttention(ValueError):
    """The rows of a recorded pass cannot be matched to a conditioning; the message says why."""


@dataclass
class MapRecorder:
    """Collects the maps of one forward pass.

    columns: one WordColumns per conditioning, keyed by the host's uuid of that conditioning; all hold the same phrases.
    forward: a pass is recorded only if its transformer_options carry this object under FORWARD_KEY. This keeps capture from
        recording the extra passes of steering, and steering from recording the sampler's.
    evaluated: pictures, height and width (in latent cells) of the network's input for the recorded conditioning.
    obstacle: why a block that ran could not be recorded, in words; None if every block could be.

    Between two calls of `take`, one conditioning is recorded: the first in `columns` that the model evaluates. A block that
    runs more than once is recorded the first time only.

    The maps of a steering pass hold its autograd graph and, through the graph, its activations. The caller must end every
    pass with `take` or `clear`, also after an exception.
    """

    columns: Mapping[object, WordColumns]
    forward: object = None
    layers: list[LayerMaps] = field(default_factory=list)
    active: bool = True
    conditioning: object = None
    evaluated: tuple[int, int, int] | None = None
    obstacle: str | None = None

    def record(self, name: str, order: int, q: Tensor, k: Tensor, grid: tuple[int, int], shape: Sequence[int],
               options: Mapping) -> None:
        """Records the maps of one attention layer.

        q: [N, heads, h*w, d] and k: [N, heads, tokens, d], of the host's whole batch; grid: (h, w).
        shape: [N, C, H, W], shape of the latents that the network was called with.
        options: the host's transformer_options.
        Raises UnreadableAttention where q or k does not have the N rows of the call.
        """
        if not self.active or options.get(FORWARD_KEY) is not self.forward:
            return
        uuids = list(options.get("uuids", ()))
        if self.conditioning is None:
            self.conditioning = next((uuid for uuid in self.columns if uuid in uuids), None)
        if self.conditioning not in uuids or any(layer.name == name for layer in self.layers):
            return  # another conditioning, or a repeated block (perturbed-attention guidance)
        if not q.shape[0] == k.shape[0] == shape[0] or shape[0] % len(uuids):
            raise UnreadableAttention(f"the cross-attention in block {name} works on {q.shape[0]} rows (keys: {k.shape[0]}), the "
                                      f"model was called with {shape[0]} for {len(uuids)} conditionings, so nobody can say "
                                      "which rows belong to which conditioning")
        batch, first = shape[0] // len(uuids), uuids.index(self.conditioning)
        chunk = slice(first * batch, (first + 1) * batch)
        maps = word_maps(q[chunk], k[chunk], self.columns[self.conditioning].tiled(k.shape[2]))
        self.layers.append(LayerMaps(name, order, maps.reshape(*maps.shape[:3], *grid)))
        self.evaluated = (batch, *shape[-2:])

    def miss(self, obstacle: str, options: Mapping) -> None:
        """Notes that a block ran but could not be recorded, and why."""
        if self.active and options.get(FORWARD_KEY, self.forward) is self.forward:
            self.obstacle = obstacle

    @contextlib.contextmanager
    def apart(self) -> Iterator[list[LayerMaps]]:
        """Inside the context, maps are recorded into the yielded list instead of `layers`."""
        before, self.layers = self.layers, []
        try:
            yield self.layers
        finally:
            self.layers = before

    def take(self) -> AttentionMaps:
        """Returns the maps recorded since the last call, and forgets them."""
        phrases = next(iter(self.columns.values())).phrases if self.columns else ()
        layers, conditioning = self.layers, self.conditioning
        self.clear()
        return AttentionMaps.collect(phrases, layers, conditioning)

    def clear(self) -> None:
        """Forgets the maps recorded since the last `take`. `evaluated` and `obstacle` stay, for the report."""
        self.layers, self.conditioning = [], None


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, rows, heads*d] -> [B, heads, rows, d]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)
