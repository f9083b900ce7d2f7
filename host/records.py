"""What a sampler run leaves behind: maps and reports, found again by the latent that came out of the run."""
from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..steering.report import SteeringReport

RUNS_KEPT = 8


@dataclass(frozen=True)
class StepMaps:
    """Maps of one denoising step, on the CPU in fp32. average: [B, words, h, w], the mean over layers and heads;
    every: [B, words, layers·heads, h, w] where it was asked for."""

    step: int
    sigma: float
    average: Tensor
    every: Tensor | None = None


@dataclass(frozen=True)
class AttentionRecord:
    """The maps of one sampler run. layers: names of the layers read; steps: in order."""

    phrases: tuple[str, ...]
    layers: tuple[str, ...]
    steps: tuple[StepMaps, ...]

    def average(self) -> Tensor:
        """Mean over the recorded steps: [B, words, h, w]."""
        return torch.stack([step.average for step in self.steps]).mean(0)


@dataclass(frozen=True)
class Run:
    """One sampler run: the latent it gave (None where it stands for all unsteered runs), its maps, its report."""

    samples: Tensor | None
    maps: AttentionRecord
    report: SteeringReport | None = None


@dataclass
class RunLog:
    """The last runs of one patched MODEL. Filled while sampling, read by the nodes behind the sampler.

    unsteered: stands for every run where there was nothing to steer, so the MODEL carries no patch.
    """

    unsteered: Run | None = None
    runs: deque[Run] = field(default_factory=lambda: deque(maxlen=RUNS_KEPT))

    @property
    def last(self) -> Run | None:
        """None where nothing was sampled."""
        return self.unsteered or (self.runs[-1] if self.runs else None)

    def find(self, samples: Tensor) -> Run:
        """The run that gave this latent. Raises LookupError where none did."""
        if self.unsteered is not None:
            return self.unsteered
        wanted = samples.detach().cpu()  # in half precision under the host's --fp16-intermediates
        for run in reversed(self.runs):
            if run.samples.shape == wanted.shape and torch.equal(run.samples.to(wanted.dtype), wanted):
                return run
        raise LookupError("input 'samples': no run of this model gave this latent. Connect the LATENT output of the "
                          "sampler that uses the patched model, straight, with nothing in between that changes it.")
