"""A dataset of attention maps on disk: built shard by shard, resumable, read back for training.

A folder holds plan.json (the request), shards/<split>-<number>.safetensors (shards.py), manifest.json (the content) and
in_use.lock, which one process at a time holds. The content of a shard depends on its number alone, and a file is written whole
or not at all. A run that was killed at any point therefore resumes to the same bytes.
"""
from __future__ import annotations

import hashlib
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..classifiers.base import BACKBONES, NORMALISATIONS
from ..files.entries import Entries
from ..files.faults import FileFault
from ..files.writing import remove_partial_files, replace_file, write_json
from ..prompts.relations import RELATIONS
from .captions import Caption, Inverted
from .shards import Sample, Shard, read_maps, read_shard, shard_bytes
from .sources import SPLITS, UNREADABLE, Candidate, Drop, Example, Source
from .storage import TrainingError, alone_in, faults_of, read_json

LOGGER = logging.getLogger("learn_to_steer")
FORMAT = "learn-to-steer relation dataset 1"
PICTURES = "candidates_sha256"
ADDED = ("shards", "unreadable")
"""Entries that manifests of older datasets do not have."""
_NAMED = 5


class MapMaker(Protocol):
    """Turns pictures and captions into maps; implemented by `inversion.Inverter`."""

    least_psnr: float

    def describe(self) -> dict:
        """Everything that determines the maps, as JSON values; includes backbone, size, normalise, steps and timesteps."""

    def invert(self, images: Tensor, captions: Sequence[Caption], seeds: Sequence[int]) -> Inverted:
        """Inverts pictures. images: [B, H, W, 3] from 0 to 1, with one caption and one seed each."""


@dataclass(frozen=True)
class BuildProgress:
    """Counts so far. done, total: candidates (pictures); samples: samples kept; dropped: samples and pictures left out."""

    done: int
    total: int
    samples: int
    dropped: int


def build_dataset(folder: Path, source: Source, maker: MapMaker, batch: int = 16, seed: int = 0,
                  on_progress: Callable[[BuildProgress], None] = lambda progress: None) -> dict:
    """Builds the dataset, or resumes one begun with the same settings. Returns its manifest.

    batch: number of pictures per shard; they are inverted together.
    Raises TrainingError where the folder holds another dataset, where another process builds in it, or where no picture gives
    a usable sample.
    """
    candidates = source.candidates()
    if not candidates and not (folder / "manifest.json").exists():
        raise TrainingError("There are no pictures to build from: none of those that are labelled is in the folder, or the "
                            "numbers per relation are 0. Choose the folder that holds them.")
    plan = {"format": FORMAT, "batch": batch, "seed": seed, "source": source.describe(), "maps": maker.describe(),
            "licence": source.licence, PICTURES: _digest(candidates)}
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    with alone_in(folder):
        remove_partial_files(folder)
        remove_partial_files(folder / "shards")
        differences = _differences(folder / "plan.json", plan)
        if differences == [PICTURES] and (folder / "manifest.json").exists():  # a finished dataset needs no pictures
            LOGGER.warning("%s is finished, from other pictures than are there now, and is used as it is. Delete it to build it "
                           "anew.", folder)
            return RelationDataset(folder).manifest
        if differences:
            named = ("other pictures are in the folder" if name == PICTURES else name for name in differences)
            raise TrainingError(f"{folder} holds a dataset that was begun with other settings ({', '.join(named)}). "
                                "Choose another folder, or delete this one.")
        if not (folder / "plan.json").exists():
            write_json(folder / "plan.json", plan)
        manifest = _manifest(plan, _build_shards(folder, candidates, source, maker, batch, seed, on_progress))
        write_json(folder / "manifest.json", manifest)
    if names := manifest.get("unreadable"):
        LOGGER.warning("%d picture files could not be read and were passed over: %s. manifest.json lists them.", len(names),
                       _some(names))
    return manifest


def _build_shards(folder: Path, candidates: Sequence[Candidate], source: Source, maker: MapMaker, batch: int, seed: int,
                  on_progress: Callable[[BuildProgress], None]) -> dict[str, Shard]:
    """Makes the missing shards. Returns all shards by name."""
    listed = _listed_shards(folder)
    found: dict[str, Shard] = {}
    done = 0
    for name, members in _jobs(candidates, batch):
        path = folder / "shards" / name
        shard = _usable_shard(path, members, listed.get(name))
        if shard is None:
            content, shard = shard_bytes(*_make_shard(members, source, maker, seed))
            replace_file(path, content)
        found[name] = shard
        done += len(members)
        on_progress(BuildProgress(done, len(candidates), sum(len(shard.samples) for shard in found.values()),
                                  sum(len(shard.drops) for shard in found.values())))
    return found


def _usable_shard(path: Path, members: Sequence[Candidate], sha256: str | None) -> Shard | None:
    """The existing shard, or None if it must be made again.

    A shard is made again if it is missing, damaged, made of other pictures, or not the one that the manifest lists. Damage comes
    from the disk; a killed process leaves none.
    """
    try:
        shard = read_shard(path) if path.exists() else None
    except FileFault as error:
        LOGGER.warning("%s: %s. It is made again.", path, error)
        return None
    if shard is None or shard.candidates != len(members) or shard.pictures != {member.picture for member in members}:
        return None
    return shard if sha256 in (None, shard.sha256) else None


def _listed_shards(folder: Path) -> dict[str, str]:
    """Checksums by name from an existing manifest; empty if it is damaged, because it is then written again."""
    try:
        return {name: entry["sha256"] for name, entry in read_json(folder / "manifest.json")["shards"].items()}
    except (TrainingError, KeyError, TypeError, AttributeError):
        return {}


def wrong_relation(seed: int, example: Example) -> str:
    """The relation in an example's wrong caption: one of the other three, drawn by the seed and the example alone."""
    others = [relation for relation in RELATIONS if relation != example.relation]
    return random.Random(f"{seed}:{example.picture}:{example.subject}:{example.object}").choice(others)


def _jobs(candidates: Sequence[Candidate], batch: int) -> Iterator[tuple[str, list[Candidate]]]:
    """Name and members of each shard. All members of a shard belong to one split."""
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
    """Names of the entries in which an existing plan differs from `plan`; none if there is no plan yet."""
    if not path.exists():
        return []
    existing, wanted = read_json(path), json.loads(json.dumps(plan))
    if not isinstance(existing, dict):
        return list(wanted)
    return [name for name in {**wanted, **existing} if existing.get(name) != wanted.get(name)]


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
    drops = [drop for shard in shards.values() for drop in shard.drops]
    unreadable = sorted({drop.picture for drop in drops if drop.reason == UNREADABLE})
    if not channels:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(drop.reason for drop in drops).items())
        pictures = f"; files that cannot be read: {_some(unreadable)}" if unreadable else ""
        raise TrainingError(f"No picture gives a usable sample ({reasons}{pictures}). Choose other pictures or settings, and "
                            "another folder.")
    if len(channels) > 1:
        raise TrainingError(f"The shards hold maps of different models ({sorted(channels)} channels). Delete the "
                            "folder and build it again.")
    listed = {name: {"samples": len(shard.samples), "sha256": shard.sha256} for name, shard in shards.items()}
    return {**plan, "channels": channels.pop(), "splits": splits, "shards": listed, "unreadable": unreadable}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(name[:100] for name in names[:_NAMED]) + more


class RelationDataset:
    """A finished dataset. Maps are read from the disk on demand (safetensors maps files into memory)."""

    def __init__(self, folder: Path) -> None:
        """Raises TrainingError for a folder without a finished dataset, or with a damaged manifest."""
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            state = "is not finished: go on with the command that began it" if (self.folder / "plan.json").is_file() \
                else "holds no dataset: build one with `python -m training build`"
            raise TrainingError(f"{self.folder} {state}.")
        self.manifest = read_json(path)
        if not isinstance(self.manifest, dict) or self.manifest.get("format") != FORMAT:
            raise TrainingError(f"{self.folder} holds a dataset of another format. Build it again.")
        with faults_of(path, _AGAIN):
            self.channels, self.timesteps = _check_manifest(self.manifest)

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest without the entries in ADDED, so that it stays the same when those are added."""
        known = {name: value for name, value in self.manifest.items() if name not in ADDED}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()

    def read(self, split: str) -> tuple[list[Sample], list[Tensor]]:
        """Samples of a split and, in the same order, their maps: [steps, 2, channels, size, size] fp16 each."""
        size = self.manifest["maps"]["size"]
        samples, maps = [], []
        for path, shard in self._shards(split):
            if shard.samples:
                with faults_of(path, f"Delete it. {_AGAIN}"):
                    maps.extend(read_maps(path, shard, (len(self.timesteps), 2, self.channels, size, size)).unbind(0))
                samples.extend(shard.samples)
        return samples, maps

    def pictures(self, split: str) -> set[str]:
        """Names of all pictures with samples in a split."""
        return {sample.picture for _, shard in self._shards(split) for sample in shard.samples}

    def _shards(self, split: str) -> Iterator[tuple[Path, Shard]]:
        """All shards of a split. Raises TrainingError where they differ from the manifest."""
        folder, listed = self.folder / "shards", self.manifest.get("shards")
        existing = {path.name for path in folder.glob(f"{split}-*.safetensors")}
        names = existing if listed is None else {name for name in listed if name.startswith(f"{split}-")}
        if foreign := existing - names:
            raise TrainingError(f"{folder / min(foreign)} does not belong to the dataset: its manifest does not list it. "
                                "Take it away.")
        samples = 0
        for name in sorted(names):
            with faults_of(folder / name, f"Delete it. {_AGAIN}" if name in existing else _AGAIN):
                shard = read_shard(folder / name)
                if listed is not None and listed[name]["sha256"] != shard.sha256:
                    raise FileFault("the file is another one than the manifest lists")
            samples += len(shard.samples)
            yield folder / name, shard
        if samples != (wanted := self.manifest["splits"][split]["samples"]):
            raise TrainingError(f"{folder} holds {samples} samples for {split}, but its manifest lists {wanted}: shards are "
                                f"missing or were added. {_AGAIN}")


_AGAIN = "Go on with the command that built the dataset: it makes what is missing."


def _check_manifest(manifest: dict) -> tuple[int, tuple[int, ...]]:
    """Channels and timesteps of a checked manifest. Raises FileFault naming the invalid entry."""
    entries = Entries(manifest)
    maps = entries.group("maps")
    maps.text("backbone", BACKBONES)
    maps.text("normalise", NORMALISATIONS)
    maps.whole("size", 1, 65536)
    timesteps, steps = maps.wholes("timesteps"), maps.whole("steps", 1)
    if not timesteps or max(timesteps) >= steps:
        raise FileFault(f"maps.timesteps must be step indices below {steps}")
    entries.text("licence")
    entries.group("source").text("kind")
    for split in SPLITS:
        entries.group("splits").group(split).whole("samples")
    listed = entries.group("shards", default=None) if manifest.get("shards") is not None else None
    for name in listed.values if listed else ():
        if not re.fullmatch(rf"({'|'.join(SPLITS)})-\d{{5,9}}\.safetensors", name):
            raise FileFault("shards lists a name that no shard has")
        listed.group(name).text("sha256")
    return entries.whole("channels", 0, 65536), timesteps
