"""Shards: the files of a dataset. Each holds the maps of a few pictures; its metadata describes the rows and the drops.

The metadata holds a checksum of the maps, and the manifest a checksum of the metadata. A swapped shard is detected without
reading its maps; altered maps are detected when they are read. Older datasets have no checksums.
"""
from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..files.entries import Entries
from ..files.faults import FileFault
from ..files.reading import LARGEST_DOCUMENT, check_header, parse_json
from ..prompts.relations import RELATIONS
from .sources import Drop

METADATA_KEY = "relation_maps"


@dataclass(frozen=True)
class Sample:
    """A row of a shard: the maps of one picture under one caption.

    relation: the true relation; caption_relation: the relation in the caption; psnr: of the reconstruction, in dB.
    """

    picture: str
    subject: str
    relation: str
    object: str
    caption_relation: str
    psnr: float

    @property
    def is_wrong_caption(self) -> bool:
        return self.caption_relation != self.relation


@dataclass(frozen=True)
class Shard:
    """The description of a shard, without its maps. maps_sha256: checksum of the maps' bytes; None in older datasets."""

    candidates: int
    samples: tuple[Sample, ...]
    drops: tuple[Drop, ...]
    channels: int
    maps_sha256: str | None = None

    @property
    def sha256(self) -> str:
        """Checksum of the description. It covers the maps through maps_sha256."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def pictures(self) -> set[str]:
        return {item.picture for item in (*self.samples, *self.drops)}


def shard_bytes(maps: Tensor, shard: Shard) -> tuple[bytes, Shard]:
    """The content of a shard's file, and the shard with the checksum of its maps."""
    maps = maps.contiguous()
    shard = replace(shard, maps_sha256=_sha256(maps))
    return save({"maps": maps}, {METADATA_KEY: json.dumps(asdict(shard), allow_nan=False)}), shard


def read_shard(path: Path) -> Shard:
    """Reads a shard without its maps. Raises FileFault for a file that is missing or damaged."""
    check_header(path, LARGEST_DOCUMENT)
    try:
        with safe_open(path, framework="pt") as file:
            text, shape = (file.metadata() or {}).get(METADATA_KEY), file.get_slice("maps").get_shape()
    except Exception as error:  # safetensors documents no list of what it raises on damaged bytes
        raise FileFault("the file is damaged") from error
    if text is None:
        raise FileFault("the file holds no maps of a dataset")
    entries = Entries.of(parse_json(text))
    shard = Shard(entries.whole("candidates"), tuple(map(_sample, entries.items("samples"))),
                  tuple(map(_drop, entries.items("drops"))), entries.whole("channels"), entries.text("maps_sha256", default=None))
    if shape[0] != len(shard.samples):
        raise FileFault(f"the file has maps of {shape[0]} samples, and describes {len(shard.samples)}")
    return shard


def read_maps(path: Path, shard: Shard, shape: tuple[int, ...]) -> Tensor:
    """The maps of a shard with samples, [samples, *shape] fp16. Raises FileFault for altered maps or another shape."""
    with safe_open(path, framework="pt") as file:
        maps = file.get_tensor("maps")
    if tuple(maps.shape) != (len(shard.samples), *shape) or maps.dtype != torch.float16:
        raise FileFault(f"the file holds maps of shape {list(maps.shape)}, but by the manifest it must be "
                        f"{[len(shard.samples), *shape]}")
    if shard.maps_sha256 is not None and _sha256(maps) != shard.maps_sha256:
        raise FileFault("the maps have been altered since they were written")
    return maps


def _sha256(maps: Tensor) -> str:
    return hashlib.sha256(maps.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()


def _sample(value: object) -> Sample:
    entries = Entries.of(value, "a sample")
    return Sample(entries.text("picture"), entries.text("subject"), entries.text("relation", RELATIONS), entries.text("object"),
                  entries.text("caption_relation", RELATIONS), entries.number("psnr"))


def _drop(value: object) -> Drop:
    entries = Entries.of(value, "a drop")
    return Drop(entries.text("picture"), entries.text("reason"))
