"""The base class of capture and steering: a session around one sampler run.

A session calls the run's sampler function (host: WrappersMP.OUTER_SAMPLE, a copy of the SAMPLER) with a wrapped model. The
wrapper intercepts every evaluation. The sampler's mathematics is untouched.
"""
from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence

import comfy.samplers
from torch import Tensor

from ..steering.attention import AttentionMaps, MapRecorder, UnreadableAttention
from .backbones import find_backbone
from .other_packs import what_to_do
from .records import AttentionRecord, Run, StepMaps
from .stepping import Schedule, SteeringError
from .tokens import find_columns

log = logging.getLogger("learn_to_steer")
NOTHING_SEEN = ("Another pack skips or replaces the model's blocks (a step cache, a replaced attention). Take it out of the "
                "model's line")
COMPILED = "torch.compile"  # the host's key of the wrapper that puts compiled modules in the network's place


class Session:
    """One sampler run.

    guider: the host's guider; sigmas: the run's schedule, [steps + 1]; phrases: the words to record.
    forward: marks the passes to record, see MapRecorder.
    """

    def __init__(self, guider, sigmas: Tensor, phrases: Sequence[str], forward: object):
        self.base_model = guider.inner_model
        self.model_options = guider.model_options
        self.network = self.base_model.diffusion_model
        self.backbone = find_backbone(self.network)
        self.positive = self._positive(guider)
        self.chosen: dict | None = None  # the conditioning recorded at this noise level
        self.most_active = 0  # largest number of positive conditionings active at once
        columns = find_columns(self.positive, phrases, self.backbone.streams)
        self.recorder = MapRecorder(columns, forward)
        self.schedule = Schedule.of(self.base_model.model_sampling, sigmas)
        self.steps: list[StepMaps] = []
        self.layers: tuple[str, ...] = ()

    @staticmethod
    def _positive(guider) -> list[dict]:
        if "positive" not in guider.conds:
            raise SteeringError(f"the guider {type(guider).__name__} has no conditioning called 'positive'. Use "
                                "CFGGuider, BasicGuider or a KSampler.")
        return guider.conds["positive"]

    def run(self, function: Callable, model, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Callable | None,
            options: dict) -> Tensor:
        """Calls the host's sampler function with this session's wrappers around the model and the callback."""
        raise NotImplementedError

    def choose(self, x: Tensor, sigma: Tensor) -> dict | None:
        """The conditioning to record at this noise level, or None.

        It is the first in the guider's order that is active and names all the words. It is chosen before the pass, because a
        host that is short of memory runs the conditionings one by one and in another order.
        """
        ordered = sorted(self.positive, key=lambda cond: "default" in cond)  # the host runs default conditionings last
        active = [cond for cond in ordered if comfy.samplers.get_area_and_mult(cond, x, sigma) is not None]
        self.chosen = next((cond for cond in active if cond["uuid"] in self.recorder.columns), None)
        if self.chosen is not None:
            self.most_active = max(self.most_active, len(active))
            self.recorder.conditioning = self.chosen["uuid"]
        return self.chosen

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Context for one evaluation of the model and the `take` after it. On exit the recorder is always cleared.

        Raises SteeringError where the maps cannot be matched to a conditioning.
        """
        try:
            yield
        except UnreadableAttention as error:
            raise SteeringError(f"input 'model': {error}. {what_to_do(self.model_options)}") from error
        finally:
            self.recorder.clear()

    def take(self, x: Tensor, sigma: Tensor) -> AttentionMaps:
        """The maps recorded at x and sigma. Maps of a conditioning with an area are padded to the whole picture.

        Raises UnreadableAttention where the network was evaluated on another size than x has.
        """
        maps = self.recorder.take()
        if not maps.layers:
            return maps
        area = None if self.chosen is None else comfy.samplers.get_area_and_mult(self.chosen, x, sigma).area
        expected = (x.shape[0], *(x.shape[-2:] if area is None else area[:2]))
        if self.recorder.evaluated != expected:
            shown, wanted = ("{} x {} x {}".format(*shape) for shape in (self.recorder.evaluated, expected))
            raise UnreadableAttention(f"the model was evaluated on {shown} (pictures x height x width in latent cells) instead "
                                      f"of {wanted}, in tiles perhaps, so the maps are not those of the picture")
        return maps if area is None else maps.placed(area, x.shape[-2:])

    def notes(self) -> tuple[str, ...]:
        """Remarks for the user about the conditionings of this run."""
        if self.most_active < 2:
            return ()
        return (f"{self.most_active} positive conditionings are active together: only the first of them that names all the "
                "objects is read and followed here. The others go on shaping the picture",)

    def outside_the_window(self, start: float, end: float) -> str:
        """Why the window contains no step, in words."""
        progress = self.schedule.progress
        if not progress:
            return "the schedule has no denoising step"
        return (f"no step lies between start_percent {start + 0.0:g} and end_percent {end:g}. The {len(progress)} steps of this "
                f"run begin at {progress[0]:.2f} to {progress[-1]:.2f} of the whole noise schedule; image to image and second "
                "passes begin late")

    def keep(self, step: int, maps: AttentionMaps, size: int | tuple[int, int], every: bool = False) -> None:
        stack = maps.stack(size, "always").detach().float().cpu()
        self.layers = tuple(layer.name for layer in maps.layers)
        self.steps.append(StepMaps(step, self.schedule.sigmas[step], stack.mean(2), stack if every else None))

    def record(self) -> AttentionRecord:
        phrases = next(iter(self.recorder.columns.values())).phrases
        return AttentionRecord(phrases, self.layers, tuple(self.steps), self.notes())

    def result(self) -> Run:
        """The Run to file. Logs a warning where nothing was recorded."""
        maps = self.record()
        if not maps.steps:
            log.warning("%s", "; ".join(maps.notes))
        return Run(maps, None, self.schedule.steps)


def without_wrappers(transformer_options: dict, keys: Collection[str]) -> dict:
    """A copy of the host's options without the wrappers of these keys."""
    wrappers = {kind: {key: value for key, value in by_key.items() if key not in keys}
                for kind, by_key in transformer_options.get("wrappers", {}).items()}
    return {**transformer_options, "wrappers": wrappers}


def map_grid(x: Tensor, longest: int) -> tuple[int, int]:
    """Height and width of maps whose longer side is `longest`, in the picture's proportions."""
    h, w = x.shape[-2:]
    return max(1, round(longest * h / max(h, w))), max(1, round(longest * w / max(h, w)))
