"""A dataset of attention maps on disk: built shard by shard, resumable, read back for training.

A folder holds plan.json (what was asked for), shards/<split>-<number>.safetensors (maps, and as metadata what each row
is and what was dropped) and manifest.json (what is inside). A shard's content is decided by its number alone and a file
appears whole or not at all, so a run that was killed anywhere goes on to the same bytes.
"""
from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..files.writing import remove_partial_files, replace_file, write_json
from ..prompts.relations import RELATIONS
from .captions import Caption, Inverted
from .sources import SPLITS, Candidate, Drop, Example, Source
from .storage import TrainingError, read_json

LOGGER = logging.getLogger("learn_to_steer")
FORMAT = "learn-to-steer relation dataset 1"
METADATA_KEY = "relation_maps"
PICTURES = "candidates_sha256"


class MapMaker(Protocol):
    """From pictures and captions to maps; `inversion.Inverter` is one."""

    least_psnr: float

    def describe(self) -> dict:
        """Everything that decides the maps, as JSON values; among them backbone, size, normalise, steps, timesteps."""

    def invert(self, images: Tensor, captions: Sequence[Caption], seeds: Sequence[int]) -> Inverted:
        """images: [B, H, W, 3] from 0 to 1."""


@dataclass(frozen=True)
class Sample:
    """A row of a shard: the maps of one picture under one caption. relation: the truth; caption_relation: the word in
    the caption; psnr: of the reconstruction, dB."""

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
class BuildProgress:
    """Counts of candidates (pictures), and of samples kept and dropped so far."""

    done: int
    total: int
    samples: int
    dropped: int


@dataclass(frozen=True)
class Shard:
    """What a shard holds, without its maps."""

    candidates: int
    samples: tuple[Sample, ...]
    drops: tuple[Drop, ...]
    channels: int


def build_dataset(folder: Path, source: Source, maker: MapMaker, batch: int = 16, seed: int = 0,
                  on_progress: Callable[[BuildProgress], None] = lambda progress: None) -> dict:
    """Builds the dataset, or goes on with one that was begun by the same settings, and returns its manifest.

    batch: pictures in a shard, which are inverted together. Raises TrainingError where the folder holds another
    dataset.
    """
    candidates = source.candidates()
    if not candidates and not (folder / "manifest.json").exists():
        raise TrainingError("There are no pictures to build from: none of those that are labelled is in the folder, or the "
                            "numbers per relation are 0. Choose the folder that holds them.")
    plan = {"format": FORMAT, "batch": batch, "seed": seed, "source": source.describe(), "maps": maker.describe(),
            "licence": source.licence, PICTURES: _digest(candidates)}
    shards = folder / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    remove_partial_files(folder)
    remove_partial_files(shards)
    differences = _differences(folder / "plan.json", plan)
    if differences == [PICTURES] and (folder / "manifest.json").exists():  # they may be deleted after
        LOGGER.warning("%s is finished, from other pictures than are there now, and is used as it is. Delete it to build it "
                       "anew.", folder)
        return read_json(folder / "manifest.json")
    if differences:
        named = ("other pictures are in the folder" if name == PICTURES else name for name in differences)
        raise TrainingError(f"{folder} holds a dataset that was begun with other settings ({', '.join(named)}). "
                            "Choose another folder, or delete this one.")
    if not (folder / "plan.json").exists():
        write_json(folder / "plan.json", plan)
    found: dict[str, Shard] = {}
    done = 0
    jobs = list(_jobs(candidates, batch))
    for name, members in jobs:
        path = shards / name
        shard = _read_shard(path) if path.exists() else None
        if shard is None:
            maps, shard = _make_shard(members, source, maker, seed)
            replace_file(path, _shard_bytes(maps, shard))
        found[name] = shard
        done += len(members)
        on_progress(BuildProgress(done, len(candidates), sum(len(shard.samples) for shard in found.values()),
                             sum(len(shard.drops) for shard in found.values())))
    manifest = _manifest(plan, found)
    write_json(folder / "manifest.json", manifest)
    return manifest


def wrong_relation(seed: int, example: Example) -> str:
    """The relation word of an example's wrong caption, drawn from the other three; always the same."""
    others = [relation for relation in RELATIONS if relation != example.relation]
    return random.Random(f"{seed}:{example.picture}:{example.subject}:{example.object}").choice(others)


def _jobs(candidates: Sequence[Candidate], batch: int) -> Iterator[tuple[str, list[Candidate]]]:
    """Name and members of each shard; none has candidates of two splits."""
    for split in SPLITS:
        members = [candidate for candidate in candidates if candidate.split == split]
        for number, first in enumerate(range(0, len(members), batch)):
            yield f"{split}-{number:05d}.safetensors", members[first:first + batch]


def _make_shard(members: Sequence[Candidate], source: Source, maker: MapMaker, seed: int) -> tuple[Tensor, Shard]:
    opened = source.open(members)
    drops = [item for item in opened if isinstance(item, Drop)]
    examples = [item for item in opened if isinstance(item, Example)]
    if not examples:
        return torch.zeros(0), Shard(len(members), (), tuple(drops), 0)
    images = torch.stack([example.image for example in examples])
    words = [[example.relation for example in examples], [wrong_relation(seed, example) for example in examples]]
    seeds = [_seed(seed, example.picture) for example in examples]
    kept, samples = [], []
    for relations in words:
        captions = [Caption(example.subject, relation, example.object)
                    for example, relation in zip(examples, relations, strict=True)]
        inverted = maker.invert(images, captions, seeds)
        rows = zip(examples, relations, inverted.maps, inverted.psnr.tolist(), inverted.unread or [False] * len(examples),
                   strict=True)
        for example, relation, maps, quality, unread in rows:
            reason = "words not found by the text encoder" if unread else _fault(maps, quality, maker.least_psnr)
            if reason is not None:
                drops.append(Drop(example.picture, reason))
                continue
            samples.append(Sample(example.picture, example.subject, example.relation, example.object, relation,
                                  round(quality, 3)))
            kept.append(maps)
    maps = torch.stack(kept) if kept else torch.zeros(0)
    return maps, Shard(len(members), tuple(samples), tuple(drops), maps.shape[3] if kept else 0)


def _fault(maps: Tensor, quality: float, least_psnr: float) -> str | None:
    if not maps.isfinite().all():
        return "maps are not finite"
    return None if quality >= least_psnr else f"reconstruction below {least_psnr:g} dB"


def _seed(seed: int, picture: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{picture}:noise".encode()).digest()[:6], "big")


def _digest(candidates: Sequence[Candidate]) -> str:
    return hashlib.sha256(json.dumps([asdict(candidate) for candidate in candidates]).encode()).hexdigest()


def _differences(path: Path, plan: dict) -> list[str]:
    """Names of what is otherwise in the plan that is there, which may be none."""
    if not path.exists():
        return []
    there, wanted = read_json(path), json.loads(json.dumps(plan))
    if not isinstance(there, dict):
        return list(wanted)
    return [name for name in {**wanted, **there} if there.get(name) != wanted.get(name)]


def _shard_bytes(maps: Tensor, shard: Shard) -> bytes:
    return save({"maps": maps.contiguous()}, {METADATA_KEY: json.dumps(asdict(shard))})


def _read_shard(path: Path) -> Shard | None:
    """None for a file that is damaged (by the disk: a kill leaves none), so that it is made again."""
    try:
        with safe_open(path, framework="pt") as file:
            content = json.loads(file.metadata()[METADATA_KEY])
            rows = file.get_slice("maps").get_shape()[0]
        shard = Shard(content["candidates"], tuple(Sample(**sample) for sample in content["samples"]),
                      tuple(Drop(**drop) for drop in content["drops"]), content["channels"])
        return shard if rows == len(shard.samples) else None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return None


def _manifest(plan: dict, shards: dict[str, Shard]) -> dict:
    splits = {}
    for split in SPLITS:
        here = [shard for name, shard in shards.items() if name.startswith(f"{split}-")]
        samples = [sample for shard in here for sample in shard.samples]
        drops = [drop for shard in here for drop in shard.drops]
        quality = [sample.psnr for sample in samples]
        splits[split] = {
            "candidates": sum(shard.candidates for shard in here), "pictures": len({s.picture for s in samples}),
            "samples": len(samples), "true_caption": sum(not s.is_wrong_caption for s in samples),
            "wrong_caption": sum(s.is_wrong_caption for s in samples),
            "relations": dict(Counter(s.relation for s in samples)),
            "dropped": dict(Counter(drop.reason for drop in drops)),
            "psnr_mean": round(sum(quality) / len(quality), 3) if quality else None,
            "psnr_least": min(quality, default=None)}
    channels = {shard.channels for shard in shards.values() if shard.samples}
    if len(channels) > 1:
        raise TrainingError(f"The shards hold maps of different models ({sorted(channels)} channels). Delete the "
                            "folder and build it again.")
    return {**plan, "channels": channels.pop() if channels else 0, "splits": splits}


class RelationDataset:
    """A finished dataset; maps stay on the disk until they are asked for (safetensors maps files into memory)."""

    def __init__(self, folder: Path) -> None:
        """Raises TrainingError for a folder without a finished dataset."""
        self.folder = Path(folder)
        if not (self.folder / "manifest.json").is_file():
            state = "is not finished: go on with the command that began it" if (self.folder / "plan.json").is_file() \
                else "holds no dataset: build one with `python -m training build`"
            raise TrainingError(f"{self.folder} {state}.")
        self.manifest = read_json(self.folder / "manifest.json")
        if not isinstance(self.manifest, dict) or self.manifest.get("format") != FORMAT:
            raise TrainingError(f"{self.folder} holds a dataset of another format. Build it again.")
        self.channels = self.manifest["channels"]
        self.timesteps = tuple(self.manifest["maps"]["timesteps"])

    def read(self, split: str) -> tuple[list[Sample], list[Tensor]]:
        """Samples of a split and, in step, their maps: [steps, 2, channels, size, size] fp16 each."""
        samples, maps = [], []
        for path, shard in self._shards(split):
            if shard.samples:
                with safe_open(path, framework="pt") as file:
                    maps.extend(file.get_tensor("maps").unbind(0))
                samples.extend(shard.samples)
        return samples, maps

    def pictures(self, split: str) -> set[str]:
        """Names of the pictures that a split has samples of."""
        return {sample.picture for _, shard in self._shards(split) for sample in shard.samples}

    def _shards(self, split: str) -> Iterator[tuple[Path, Shard]]:
        for path in sorted((self.folder / "shards").glob(f"{split}-*.safetensors")):
            shard = _read_shard(path)
            if shard is None:
                raise TrainingError(f"{path} is damaged. Delete it and go on with the command that built the dataset.")
            yield path, shard
