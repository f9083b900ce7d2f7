"""Results of sampler runs: maps and reports, looked up by the latent that a run returned."""
from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..steering.report import SteeringReport

KEPT_BYTES = 512 * 2**20
"""Memory limit for all kept runs of this process, in bytes."""
LATENT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Types to which the host may cast a latent between two nodes (--fp16-intermediates)."""


@dataclass(frozen=True)
class StepMaps:
    """Maps of one denoising step, on the CPU in fp32.

    average: [B, words, h, w], the mean over layers and heads.
    every: [B, words, layers * heads, h, w] if requested; converted to fp16 when newer runs need the memory.
    """

    step: int
    sigma: float
    average: Tensor
    every: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(maps.nbytes for maps in (self.average, self.every) if maps is not None)


@dataclass(frozen=True)
class AttentionRecord:
    """The maps of one sampler run. layers: names of the recorded layers; steps: in order; notes: why maps are missing."""

    phrases: tuple[str, ...]
    layers: tuple[str, ...]
    steps: tuple[StepMaps, ...]
    notes: tuple[str, ...] = ()

    def average(self) -> Tensor:
        """Mean over the recorded steps: [B, words, h, w]."""
        return torch.stack([step.average for step in self.steps]).mean(0)

    @property
    def nbytes(self) -> int:
        return sum(step.nbytes for step in self.steps)


class Run:
    """One sampler run: its maps, its report, and the hashes by which its latents are recognised.

    steps: number of denoising steps; before: the run whose latent this run started from, or None.
    """

    def __init__(self, maps: AttentionRecord, report: SteeringReport | None = None, steps: int = 0):
        self.maps, self.report, self.steps = maps, report, steps
        self.before: Run | None = None
        self._latents: tuple[weakref.ref[Tensor], ...] = ()
        self._hashes: frozenset[bytes] = frozenset()

    def found_by(self, *latents: Tensor) -> None:
        """Registers the latents that this run returned."""
        self._latents = tuple(map(weakref.ref, latents))
        self._hashes = frozenset(latent_hash(latent.to(dtype)) for latent in latents for dtype in LATENT_DTYPES)

    def gave(self, samples: Tensor) -> bool:
        """Whether the run returned this tensor object; its values are not compared."""
        return any(latent() is samples for latent in self._latents)

    def gave_values(self, hashed: bytes) -> bool:
        """Whether the run returned a latent with this hash, in any of LATENT_DTYPES."""
        return hashed in self._hashes

    def whole(self) -> Run:
        """This run and all runs before it, joined into one. Step numbers continue from run to run."""
        stages = [self]
        while stages[0].before is not None:
            stages.insert(0, stages[0].before)
        if len(stages) == 1:
            return self
        steps, notes, before = [], [], 0
        for number, stage in enumerate(stages, 1):
            steps += [replace(maps, step=maps.step + before) for maps in stage.maps.steps]
            notes += [f"stage {number}: {note}" for note in stage.maps.notes]
            before += stage.steps
        layers = next((stage.maps.layers for stage in stages if stage.maps.layers), ())
        report = None if self.report is None else SteeringReport.of_stages([stage.report for stage in stages])
        return Run(AttentionRecord(self.maps.phrases, layers, tuple(steps), tuple(notes)), report, before)

    @property
    def nbytes(self) -> int:
        """Bytes of the maps, plus an estimate for the report's numbers as Python objects."""
        records = () if self.report is None else self.report.records
        return self.maps.nbytes + sum(600 + 32 * (2 * len(record.loss) + sum(map(len, record.probability))) for record in records)

    def halve_heads(self) -> None:
        self._change_heads(Tensor.half)

    def drop_heads(self) -> None:
        self._change_heads(lambda every: None)

    def _change_heads(self, change: Callable[[Tensor], Tensor | None]) -> None:
        self.maps = replace(self.maps, steps=tuple(
            step if step.every is None else replace(step, every=change(step.every)) for step in self.maps.steps))

    def drop_maps(self) -> None:
        if self.maps.steps:
            note = ("the maps of this run were dropped, since newer runs need the memory. Record fewer steps at a lower "
                    "resolution, switch keep_heads off, or sample again")
            self.maps = replace(self.maps, steps=(), notes=(*self.maps.notes, note))


def latent_hash(samples: Tensor) -> bytes:
    """SHA-256 of a latent's dtype, shape and bits. It does not depend on the device, and NaN equals itself."""
    values = samples.detach().cpu().contiguous()
    head = f"{values.dtype} {tuple(values.shape)} ".encode()
    return hashlib.sha256(head + values.flatten().view(torch.uint8).numpy().tobytes()).digest()


class RunArchive:
    """The runs of this process, oldest first, within `limit` bytes.

    A run outlives its log: the host may drop a patched MODEL from its cache, keep the latent, and execute the patching node
    again. The newest run is always kept whole. Older runs lose data in this order, oldest run first: maps per head are
    converted to fp16, then dropped, then all maps are dropped, then the run itself.
    """

    def __init__(self, limit: int = KEPT_BYTES):
        self.limit = limit
        self._filed: list[tuple[weakref.ref[RunLog], object, Run]] = []
        self._bytes = 0

    def add(self, log: RunLog, run: Run) -> None:
        self._filed.append((weakref.ref(log), log.request, run))
        self._bytes += run.nbytes
        for lighten in (Run.halve_heads, Run.drop_heads, Run.drop_maps):
            for *_, old in self._filed[:-1]:
                if self._bytes <= self.limit:
                    return
                self._bytes -= old.nbytes
                lighten(old)
                self._bytes += old.nbytes
        while self._bytes > self.limit and len(self._filed) > 1:
            self._bytes -= self._filed.pop(0)[-1].nbytes

    def of(self, log: RunLog) -> list[Run]:
        return [run for owner, _, run in self._filed if owner() is log]

    def alike(self, log: RunLog) -> list[Run]:
        """Runs of other logs with the same request."""
        return [run for owner, request, run in self._filed
                if owner() is not log and log.request is not None and request == log.request]


ARCHIVE = RunArchive()


def _nothing_done(reason: str) -> Run:
    return Run(AttentionRecord((), (), (), (reason,)))


@dataclass(eq=False)
class RunLog:
    """The runs of one patched MODEL. Filled during sampling, read by the nodes after the sampler.

    request: what each run was asked to do; equal when the host executes the same node again.
    blank: makes an empty Run, given a reason in words.
    unsteered: the Run to report where there is nothing to steer and the MODEL carries no patch.
    """

    request: object = None
    blank: Callable[[str], Run] = _nothing_done
    unsteered: Run | None = None
    archive: RunArchive = field(default_factory=lambda: ARCHIVE, repr=False)

    def file(self, run: Run) -> None:
        self.archive.add(self, run)

    @property
    def runs(self) -> list[Run]:
        return self.archive.of(self)

    @property
    def last(self) -> Run | None:
        """The newest run; None before the first."""
        runs = self.runs
        return self.unsteered or (runs[-1] if runs else None)

    def search(self, samples: Tensor) -> Run | None:
        """The newest run that returned this latent, or None."""
        runs = [*reversed(self.runs), *reversed(self.archive.alike(self))]
        by_identity = next((run for run in runs if run.gave(samples)), None)
        if by_identity is not None or not runs:
            return by_identity
        hashed = latent_hash(samples)
        return next((run for run in runs if run.gave_values(hashed)), None)

    def find(self, samples: Tensor) -> Run:
        """The run that returned this latent. Raises LookupError where none did."""
        run = self.unsteered or self.search(samples)
        if run is None:
            raise LookupError("input 'samples': no run of this model gave this latent. Connect it directly to the LATENT output "
                              "of the sampler that uses the patched model, with no node in between that changes it.")
        return run
