"""The paper's relation network: an extractor shared by both objects, and a head (docs/method.md, "The classifier").

Module names follow the state dict of the published checkpoints; transformer layers are PyTorch's own.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..files.faults import shown
from .base import ClassifierError

STEP_MODES = ("mid", "pre", "off")
# Limits far above any real network: a damaged config must not build without end.
_LARGEST = 65536
_MOST_LAYERS = 64


@dataclass(frozen=True)
class ExtractorConfig:
    """Attention over the channels (layers x heads of the base model) of one object.

    step_mode: "mid" adds the step embedding before every layer, "pre" before the first layer only, "off" never.
    use_mean: takes the mean over the channels instead of attention.
    """

    nhead: int = 2
    num_layers: int = 2
    dim_feedforward: int = 128
    layer_attn_nheads: int = 2
    dropout: float = 0.3
    step_mode: str = "mid"
    use_mean: bool = False


@dataclass(frozen=True)
class HeadConfig:
    """The head: from the two aggregated maps to logits. `mode` is kept from published files and has no effect."""

    nhead: int = 4
    num_layers: int = 2
    dim_feedforward: int = 128
    dropout: float = 0.3
    timestep_embedding_dim: int = 16
    mode: str = ""


@dataclass(frozen=True)
class NetworkConfig:
    """Settings of the whole network. The defaults are the paper's for SD; `paper_config` also gives those for FLUX.

    num_timesteps: number of rows of the step embeddings; map_size: each map is [map_size, map_size]; d_model: width.
    Raises ClassifierError for a value out of range.
    """

    num_timesteps: int = 50
    map_size: int = 16
    d_model: int = 256
    extractor: ExtractorConfig = ExtractorConfig()
    classifier: HeadConfig = HeadConfig()

    def __post_init__(self) -> None:
        extractor, head = self.extractor, self.classifier
        counts = {"num_timesteps": self.num_timesteps, "map_size": self.map_size, "d_model": self.d_model,
                  "extractor.nhead": extractor.nhead, "extractor.dim_feedforward": extractor.dim_feedforward,
                  "extractor.layer_attn_nheads": extractor.layer_attn_nheads, "classifier.nhead": head.nhead,
                  "classifier.dim_feedforward": head.dim_feedforward}
        for name, value in counts.items():
            _require(1 <= value <= _LARGEST, name, value, f"a whole number from 1 to {_LARGEST}")
        for name, value in (("extractor.num_layers", extractor.num_layers), ("classifier.num_layers", head.num_layers)):
            _require(0 <= value <= _MOST_LAYERS, name, value, f"a whole number from 0 to {_MOST_LAYERS}")
        for name in ("extractor.nhead", "extractor.layer_attn_nheads", "classifier.nhead"):
            _require(self.d_model % counts[name] == 0, name, counts[name], f"a divisor of d_model {self.d_model}")
        for name, value in (("extractor.dropout", extractor.dropout), ("classifier.dropout", head.dropout)):
            _require(0 <= value < 1, name, value, "a number from 0 to below 1")
        _require(self.d_model % 2 == 0, "d_model", self.d_model, "an even number")
        _require(0 <= head.timestep_embedding_dim <= _LARGEST, "classifier.timestep_embedding_dim",
                 head.timestep_embedding_dim, f"a whole number from 0 to {_LARGEST}")
        _require(extractor.step_mode in STEP_MODES, "extractor.timestep_embedding.mode", extractor.step_mode,
                 f"one of {', '.join(STEP_MODES)}")

    @classmethod
    def from_dict(cls, config: Mapping) -> NetworkConfig:
        """Reads the nested `config` of a published checkpoint. Raises ClassifierError naming the invalid entry."""
        parts = {"extractor": _entry(config, "extractor", Mapping), "classifier": _entry(config, "classifier", Mapping)}
        extractor, head = parts["extractor"], parts["classifier"]
        step = _entry(extractor, "timestep_embedding", Mapping, "extractor.", default={"enable": False})
        enabled = _entry(step, "enable", bool, "extractor.timestep_embedding.", default=True)
        size = config.get("map_size")
        if isinstance(size, (list, tuple)) and len(size) == 2 and size[0] == size[1]:
            config = {**config, "map_size": size[0]}
        return cls(
            **{name: _entry(config, name, int) for name in ("num_timesteps", "map_size", "d_model")},
            extractor=ExtractorConfig(
                **{name: _entry(extractor, name, int, "extractor.")
                   for name in ("nhead", "num_layers", "dim_feedforward", "layer_attn_nheads")},
                dropout=_entry(extractor, "dropout", float, "extractor."),
                step_mode=_entry(step, "mode", str, "extractor.timestep_embedding.", default="mid") if enabled
                else "off",
                use_mean=_entry(extractor, "use_mean", bool, "extractor.", default=False)),
            classifier=HeadConfig(
                **{name: _entry(head, name, int, "classifier.")
                   for name in ("nhead", "num_layers", "dim_feedforward", "timestep_embedding_dim")},
                dropout=_entry(head, "dropout", float, "classifier."), mode=str(head.get("mode", ""))))

    def to_dict(self) -> dict:
        """The nested form that `from_dict` and published checkpoints use."""
        extractor, head = dict(vars(self.extractor)), dict(vars(self.classifier))
        mode = extractor.pop("step_mode")
        extractor["timestep_embedding"] = {"enable": mode != "off", **({} if mode == "off" else {"mode": mode})}
        return {"num_timesteps": self.num_timesteps, "map_size": self.map_size, "d_model": self.d_model,
                "extractor": extractor, "classifier": head}


def paper_config(backbone: str, **changes) -> NetworkConfig:
    """The paper's network for "unet" (SD 1.4, SD 2.1) or "mmdit" (FLUX); `changes` replace fields of NetworkConfig."""
    if backbone == "unet":
        return NetworkConfig(**changes)
    settings = {"extractor": ExtractorConfig(nhead=4, num_layers=4, dim_feedforward=512, layer_attn_nheads=4),
                "classifier": HeadConfig(nhead=8, num_layers=4, dim_feedforward=512)}
    return NetworkConfig(**{**settings, **changes})


class RelationNetwork(nn.Module):
    """Two stacks of maps and step indices -> logits.

    input_channels: length of the position table; a stack may have fewer channels.
    """

    def __init__(self, config: NetworkConfig, input_channels: int, num_relations: int) -> None:
        super().__init__()
        self.config, self.input_channels, self.num_relations = config, input_channels, num_relations
        self.object_extractor = None if config.extractor.use_mean else ObjectExtractor(config, input_channels)
        self.relation_classifier = RelationHead(config, num_relations)

    def forward(self, subject_maps: Tensor, object_maps: Tensor, steps: Tensor) -> Tensor:
        """subject_maps, object_maps: [B, C, map_size, map_size]; steps: [B] int64 -> logits [B, num_relations]."""
        maps = torch.cat([subject_maps, object_maps]).flatten(2)
        if self.object_extractor is None:
            aggregated = maps.mean(dim=1)
        else:
            aggregated = self.object_extractor(maps, torch.cat([steps, steps]))
        return self.relation_classifier(torch.cat(aggregated.chunk(2), dim=1), steps)


class ObjectExtractor(nn.Module):
    """One object's stack of maps [B, C, cells] -> one aggregated map [B, cells]."""

    def __init__(self, config: NetworkConfig, input_channels: int) -> None:
        super().__init__()
        settings, width, cells = config.extractor, config.d_model, config.map_size ** 2
        self.step_mode = settings.step_mode
        self.input_projection = nn.Linear(cells, width)
        if self.step_mode != "off":
            self.timestep_embedding = nn.Embedding(config.num_timesteps, width)
        self.positional_encoding = PositionTable(input_channels, width, settings.dropout)
        self.transformer = EncoderLayers(width, settings.num_layers, settings.nhead, settings.dim_feedforward,
                                         settings.dropout)
        self.query_vector = nn.Parameter(torch.empty(1, 1, width))
        nn.init.normal_(self.query_vector, std=width ** -0.5)
        self.layer_attention = nn.MultiheadAttention(width, settings.layer_attn_nheads, dropout=settings.dropout,
                                                     batch_first=True)
        self.output_projection = nn.Linear(width, cells)

    def forward(self, maps: Tensor, steps: Tensor) -> Tensor:
        hidden = self.positional_encoding(self.input_projection(maps))
        step = None if self.step_mode == "off" else self.timestep_embedding(steps)[:, None]
        if self.step_mode == "pre":
            hidden = hidden + step
        for layer in self.transformer.layers:
            hidden = layer(hidden + step if self.step_mode == "mid" else hidden)
        query = self.query_vector.expand(len(hidden), -1, -1)
        aggregated, _ = self.layer_attention(query, hidden, hidden, need_weights=False)
        return self.output_projection(aggregated[:, 0])


class RelationHead(nn.Module):
    """Two aggregated maps, concatenated to [B, 2 x cells], and step indices [B] -> logits [B, relations]."""

    def __init__(self, config: NetworkConfig, num_relations: int) -> None:
        super().__init__()
        settings, width = config.classifier, config.d_model
        if settings.timestep_embedding_dim:
            self.timestep_embedding = nn.Embedding(config.num_timesteps, settings.timestep_embedding_dim)
        self.projection = nn.Linear(2 * config.map_size ** 2, width)
        self.positional_encoding = PositionTable(1, width, settings.dropout)
        self.transformer = EncoderLayers(width, settings.num_layers, settings.nhead, settings.dim_feedforward,
                                         settings.dropout)
        self.fc = nn.Sequential(
            nn.Linear(width + settings.timestep_embedding_dim, 256), nn.LayerNorm(256), nn.LeakyReLU(0.1),
            nn.Dropout(settings.dropout),
            nn.Linear(256, 128), nn.LayerNorm(128), nn.LeakyReLU(0.1), nn.Dropout(settings.dropout),
            nn.Linear(128, num_relations))

    def forward(self, maps: Tensor, steps: Tensor) -> Tensor:
        hidden = self.positional_encoding(self.projection(maps)[:, None])
        for layer in self.transformer.layers:
            hidden = layer(hidden)
        features = hidden[:, 0]
        if hasattr(self, "timestep_embedding"):
            features = torch.cat([features, self.timestep_embedding(steps)], dim=1)
        return self.fc(features)


class PositionTable(nn.Module):
    """Adds a sinusoidal position code to a sequence [B, L, width], L <= `length`. The table is part of the state dict."""

    def __init__(self, length: int, width: int, dropout: float) -> None:
        super().__init__()
        frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
        angle = torch.arange(length)[:, None] * frequency
        self.register_buffer("pe", torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[None])
        self.dropout = nn.Dropout(dropout)

    def forward(self, sequence: Tensor) -> Tensor:
        return self.dropout(sequence + self.pe[:, :sequence.shape[1]])


class EncoderLayers(nn.Module):
    """Pre-norm transformer layers, each initialised separately. The caller loops over `layers`."""

    def __init__(self, width: int, count: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, feedforward, dropout, activation="relu", batch_first=True,
                                       norm_first=True) for _ in range(count))


def _entry(config: Mapping, name: str, kind: type, path: str = "", **fallback):
    """`config[name]` as `kind`, or `fallback["default"]`. Raises ClassifierError if it is missing or of another type."""
    if name not in config:
        if "default" in fallback:
            return fallback["default"]
        raise ClassifierError(f"Classifier config: {path}{name} is missing. The file is damaged or of an unknown kind; "
                              "get it again.")
    value = config[name]
    if kind is Mapping:
        _require(isinstance(value, Mapping), path + name, value, "a group of settings")
        return value
    if kind is str:
        _require(isinstance(value, str), path + name, value, "a word")
        return value
    try:
        read = kind(value)
    except (TypeError, ValueError, OverflowError):
        read = None
    _require(read is not None and read == value, path + name, value,
             {int: "a whole number", float: "a number", bool: "true or false"}[kind])
    return read


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ClassifierError(f"Classifier config: {name} is {shown(value)}, but must be {wanted}. The file is damaged or "
                              "of an unknown kind; get it again.")
