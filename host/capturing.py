"""Recording cross-attention maps while the sampler does what it would have done anyway."""
from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..steering.attention import AttentionMaps
from .session import Session, map_grid
from .stepping import SampledModel


@dataclass(frozen=True)
class Capture:
    """What to record: words, window as fractions of the schedule, longer side of the maps, layers whose name contains
    one of `layers` (all when empty), and whether every layer and head is kept beside the average."""

    phrases: tuple[str, ...]
    start: float = 0.0
    end: float = 1.0
    resolution: int = 16
    layers: tuple[str, ...] = ()
    every: bool = False

    def wants(self, layer: str) -> bool:
        return not self.layers or any(part in layer for part in self.layers)


class CaptureSession(Session):
    """Records maps while the sampler does what it would have done anyway."""

    def __init__(self, guider, sigmas: Tensor, capture: Capture):
        super().__init__(guider, sigmas, capture.phrases, None)
        self.capture = capture
        self.recorder.active = False
        self.seen: AttentionMaps | None = None

    def run(self, function, model, x, sigmas, extra_args, callback, options):
        window = self.schedule.window(self.capture.start, self.capture.end)
        step = 0
        model_options = extra_args["model_options"]
        model_options = {**model_options, "transformer_options": self.backbone.instrument(
            self.network, model_options.get("transformer_options", {}), self.recorder, recompute_blocks=False)}

        def around(model, x, sigma, arguments):
            self.recorder.active = step in window
            try:
                with self.recording():
                    denoised = model(x, sigma, **arguments)
                    self.seen = self.take(x, sigma)  # a step's maps are those of the last evaluation before its callback
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

    def _keep(self, step: int, x: Tensor) -> None:
        seen, self.seen = self.seen, None
        layers = () if seen is None else tuple(layer for layer in seen.layers if self.capture.wants(layer.name))
        if layers:
            maps = AttentionMaps(seen.phrases, layers)
            self.keep(step, maps, map_grid(x, self.capture.resolution), self.capture.every)
