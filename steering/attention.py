"""Recording cross-attention: from q and k to the maps of the words asked for.

Nothing here knows a host or an architecture; `backbones/` brings q, k, the grid and the shape of the call.
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

    Only the words' columns leave this function, and only q and k are saved for backward, which computes the logits again,
    some image rows at a time. The full image x text map of a layer never exists at once.
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
    per_row = q.shape[0] * q.shape[1] * k.shape[2]
    return q.split(max(1, ROWS_TIMES_TOKENS // per_row), dim=2)


def _probabilities(rows: Tensor, k: Tensor, scale: float) -> Tensor:
    precision = torch.promote_types(rows.dtype, torch.float32)
    return torch.softmax(scale * (rows.to(precision) @ k.to(precision).transpose(2, 3)), dim=-1)


def word_maps(q: Tensor, k: Tensor, weights: Tensor, scale: float | None = None) -> Tensor:
    """Attention of every image row to each word.

    q: [B, heads, rows, d]; k: [B, heads, tokens, d]; weights: [words, tokens], a word's row sums to 1 over its
    tokens; scale: 1/sqrt(d) unless given. Returns [B, heads, words, rows] in at least fp32: probabilities.
    """
    weights = weights.to(device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
    return WordMaps.apply(q, k, weights, q.shape[-1] ** -0.5 if scale is None else scale)


@dataclass(frozen=True)
class LayerMaps:
    """Maps of one attention layer. maps: [B, heads, words, h, w], probabilities; order: place in execution."""

    name: str
    order: int
    maps: Tensor


@dataclass(frozen=True)
class AttentionMaps:
    """What one forward pass shows of the words `phrases`.

    layers: resolution ascending, within a resolution in execution order (docs/method.md, "Maps").
    conditioning: the host's uuid of the one that they are of.
    """

    phrases: tuple[str, ...]
    layers: tuple[LayerMaps, ...]
    conditioning: object = None

    @staticmethod
    def collect(phrases: tuple[str, ...], layers: list[LayerMaps], conditioning: object = None) -> AttentionMaps:
        ordered = sorted(layers, key=lambda layer: (layer.maps.shape[-2] * layer.maps.shape[-1], layer.order))
        return AttentionMaps(phrases, tuple(ordered), conditioning)

    def placed(self, area: Sequence[int], size: Sequence[int]) -> AttentionMaps:
        """Maps of a part of the picture in the whole of it, zero around that part.

        area: height, width, top and left of the part, size: height and width of the whole, both in latent cells.
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

        normalise: "resized" divides each map by its sum when any layer had to be resized (the published
        classifiers' rule; raw probabilities otherwise), "always" always, "never" never.
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
    """Where words stand among the text tokens that the model attends to.

    phrases: W words; weights: [W, tokens], rows sum to 1; tokens is the length of the conditioning itself.
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
        """Weights for a batch in which the host repeated the conditioning to reach `tokens` tokens.

        Equal keys share the probability equally, so the sum over the copies is the map without repetition.
        """
        own = self.weights.shape[1]
        if tokens % own:
            raise ValueError(f"The model attends to {tokens} text tokens, the conditioning has {own}: the words' "
                             "places are not known. Something between the text encoder and the sampler changed the "
                             "conditioning's length.")
        return self.weights.repeat(1, tokens // own)


class UnreadableAttention(ValueError):
    """A pass whose maps cannot be told apart; the message says why."""


@dataclass
class MapRecorder:
    """Collects maps during one forward pass, for the conditionings that it knows.

    columns: one WordColumns per conditioning, by the host's uuid of that conditioning; all have the same phrases.
    Of several of them that the model evaluates, only the first is recorded until `take`, and of it the first pass.
    forward: only passes whose transformer_options carry this under FORWARD_KEY are recorded, so that a capture does
    not record the extra passes of steering, nor the other way round.
    evaluated: pictures, height and width, in latent cells, of what the network was given for the recorded conditioning.
    obstacle: in words, why a block that ran could not be recorded; None where nothing was in the way.

    Maps of a steering pass hold that pass's graph, and through it its activations. So whoever starts a pass calls `take` or
    `clear` when it ends, however it ends.
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
        """q: [N, heads, h*w, d], k: [N, heads, tokens, d] of the host's whole batch; shape: [N, C, H, W] of the latents that
        the network was called with; options: transformer_options.

        Raises UnreadableAttention where q has other rows than the call.
        """
        if not self.active or options.get(FORWARD_KEY) is not self.forward:
            return
        uuids = list(options.get("uuids", ()))
        if self.conditioning is None:
            self.conditioning = next((uuid for uuid in self.columns if uuid in uuids), None)
        if self.conditioning not in uuids or any(layer.name == name for layer in self.layers):
            return  # another conditioning, or another pass at the same point (perturbed-attention guidance)
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
        """A block ran in a way in which it cannot be recorded."""
        if self.active and options.get(FORWARD_KEY, self.forward) is self.forward:
            self.obstacle = obstacle

    @contextlib.contextmanager
    def apart(self) -> Iterator[list[LayerMaps]]:
        """Inside, maps go into the list that this gives instead of into `layers`."""
        before, self.layers = self.layers, []
        try:
            yield self.layers
        finally:
            self.layers = before

    def take(self) -> AttentionMaps:
        """What was recorded since the last call."""
        phrases = next(iter(self.columns.values())).phrases if self.columns else ()
        layers, conditioning = self.layers, self.conditioning
        self.clear()
        return AttentionMaps.collect(phrases, layers, conditioning)

    def clear(self) -> None:
        """Forgets what was recorded since the last `take`. `evaluated` and `obstacle` stay, for whoever reports them."""
        self.layers, self.conditioning = [], None


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, rows, heads*d] -> [B, heads, rows, d]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)
