"""Recording cross-attention maps during a sampler run, without changing its result."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..steering.attention import AttentionMaps
from .session import COMPILED, NOTHING_SEEN, Session, map_grid, without_wrappers
from .stepping import SampledModel


@dataclass(frozen=True)
class Capture:
    """What to record.

    phrases: the words.
    start, end: the window of recorded steps, as fractions of the schedule.
    resolution: longer side of the maps, in cells.
    layers: record only layers whose name contains one of these; every layer if empty.
    every: keep the maps of every layer and head beside the average.
    """

    phrases: tuple[str, ...]
    start: float = 0.0
    end: float = 1.0
    resolution: int = 16
    layers: tuple[str, ...] = ()
    every: bool = False

    def wants(self, layer: str) -> bool:
        return not self.layers or any(part in layer for part in self.layers)


class CaptureSession(Session):
    """A session that records maps and leaves the latent alone."""

    def __init__(self, guider, sigmas: Tensor, capture: Capture):
        super().__init__(guider, sigmas, capture.phrases, None)
        self.capture = capture
        self.recorder.active = False
        self.seen: AttentionMaps | None = None
        self.layers_passed_over: tuple[str, ...] = ()

    def run(self, function, model, x, sigmas, extra_args, callback, options):
        window = self.schedule.window(self.capture.start, self.capture.end)
        step = 0
        model_options = extra_args["model_options"]
        # A compiled network may skip what is put into its options: the host's node has no guard on them.
        options_of_blocks = without_wrappers(model_options.get("transformer_options", {}), (COMPILED,))
        model_options = {**model_options, "transformer_options": self.backbone.instrument(
            self.network, options_of_blocks, self.recorder, recompute_blocks=False)}

        def around(model, x, sigma, arguments):
            self.recorder.active = step in window and self.choose(x, sigma) is not None
            try:
                with self.recording():
                    denoised = model(x, sigma, **arguments)
                    if self.recorder.active:  # a step keeps the maps of the last evaluation before its callback
                        self.seen = self.take(x, sigma)
                return denoised
            finally:
                self.recorder.active = False

        def watched_callback(info: dict) -> None:
            nonlocal step
            self._keep(info["i"], info["x"])
            step = info["i"] + 1
            if callback is not None:
                callback(info)

        return function(SampledModel(model, around), x, sigmas, callback=watched_callback,
                        extra_args={**extra_args, "model_options": model_options}, **options)

    def notes(self):
        capture = self.capture
        if self.steps:
            return super().notes()
        if not self.schedule.window(capture.start, capture.end):
            return (f"nothing was recorded: {self.outside_the_window(capture.start, capture.end)}",)
        if not self.most_active:
            return ("nothing was recorded: no conditioning that names the words is active in the steps that were to be recorded. "
                    "Change its timestep range, or start_percent and end_percent",)
        if self.layers_passed_over:
            return (f"nothing was recorded: no layer's name contains {' or '.join(capture.layers)}. Change 'layers' (this model "
                    f"has {', '.join(self.layers_passed_over[:3])}, ...), or leave it empty",)
        return (f"nothing was recorded. {NOTHING_SEEN}",)

    def _keep(self, step: int, x: Tensor) -> None:
        seen, self.seen = self.seen, None
        if seen is None:
            return
        layers = tuple(layer for layer in seen.layers if self.capture.wants(layer.name))
        if layers:
            self.keep(step, AttentionMaps(seen.phrases, layers), map_grid(x, self.capture.resolution), self.capture.every)
        else:
            self.layers_passed_over = tuple(layer.name for layer in seen.layers)
