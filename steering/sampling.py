"""The place inside the host's sampler where steering and capture happen.

Both wrap the sampler function of a run (host: WrappersMP.OUTER_SAMPLE, a copy of the SAMPLER): it is handed a model
that looks at the sampler's latent before a step's first evaluation. The sampler's own mathematics is untouched.
"""
from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import comfy.model_management
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..classifiers.base import RelationClassifier, relation_indices
from .attention import FORWARD_KEY, AttentionMaps, MapRecorder
from .backbones import find_backbone
from .gradient import FrozenControl, differentiable, differentiable_attention, scaled_gradient
from .objective import judge
from .optimizer import Look, SteeringSettings, displacement, steer_step
from .records import AttentionRecord, Run, RunLog, StepMaps
from .relations import RelationGraph
from .report import SteeringReport, UpdateRecord
from .saved_tensors import WritesSeen
from .stepping import RehearsedModel, SampledModel, Schedule, SteeringError, first_evaluations, unwrapped
from .tokens import find_columns

log = logging.getLogger("learn_to_steer")


class PositiveOnly:
    """Stands where the host's inpainting model expects the guider: the positive conditioning alone, without CFG."""

    def __init__(self, base_model, conditioning: list[dict]):
        self.inner_model, self._conditioning = base_model, conditioning

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict, seed=None) -> Tensor:
        return comfy.samplers.calc_cond_batch(self.inner_model, [self._conditioning], x, sigma, model_options)[0]


class Session:
    """One sampler run that is watched.

    guider: the host's; recorder: filled by the instrumented passes.
    """

    def __init__(self, guider, sigmas: Tensor, phrases: Sequence[str], forward: object):
        self.base_model = guider.inner_model
        self.network = self.base_model.diffusion_model
        self.backbone = find_backbone(self.network)
        self.positive = self._positive(guider)
        columns = find_columns(self.positive, phrases, self.backbone.streams)
        self.recorder = MapRecorder(columns, forward)
        self.schedule = Schedule.of(self.base_model.model_sampling, sigmas)
        self.steps: list[StepMaps] = []
        self.layers: tuple[str, ...] = ()

    @staticmethod
    def _positive(guider) -> list[dict]:
        if "positive" not in guider.conds:
            raise SteeringError(f"the guider {type(guider).__name__} has no conditioning called 'positive' to read. Use "
                                "CFGGuider, BasicGuider or a KSampler.")
        return guider.conds["positive"]

    def run(self, function: Callable, model, x: Tensor, sigmas: Tensor, extra_args: dict, callback: Callable | None,
            options: dict) -> Tensor:
        """Calls the host's sampler function with a model and a callback that this session watches."""
        raise NotImplementedError

    def take(self, x: Tensor, sigma: Tensor) -> AttentionMaps:
        """What was recorded of the model at x and sigma, in the whole picture where the conditioning has an area."""
        maps = self.recorder.take()
        area = next((comfy.samplers.get_area_and_mult(cond, x, sigma).area for cond in self.positive
                     if maps.layers and cond["uuid"] == maps.conditioning and "area" in cond), None)
        return maps if area is None else maps.placed(area, x.shape[-2:])

    def keep(self, step: int, maps: AttentionMaps, size: int | tuple[int, int], every: bool = False) -> None:
        stack = maps.stack(size, "always").detach().float().cpu()
        self.layers = tuple(layer.name for layer in maps.layers)
        self.steps.append(StepMaps(step, self.schedule.sigmas[step], stack.mean(2), stack if every else None))

    def record(self) -> AttentionRecord:
        phrases = next(iter(self.recorder.columns.values())).phrases
        return AttentionRecord(phrases, self.layers, tuple(self.steps))


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
            self.keep(step, maps, _grid(x, self.capture.resolution), self.capture.every)


def _grid(x: Tensor, longest: int) -> tuple[int, int]:
    """Height and width of maps whose longer side is `longest`, in the picture's proportions."""
    h, w = x.shape[-2:]
    return max(1, round(longest * h / max(h, w))), max(1, round(longest * w / max(h, w)))


class SteeringSession(Session):
    """Moves the sampler's latent before the first evaluation of each step in the window."""

    def __init__(self, guider, sigmas: Tensor, steering: Steering):
        super().__init__(guider, sigmas, steering.graph.phrases, object())
        self.steering = steering
        self.classifier = steering.classifier.to(guider.model_patcher.load_device)
        self.window = self.schedule.window(steering.settings.start, steering.settings.end)
        self.records: list[UpdateRecord] = []
        self.last_maps: AttentionMaps | None = None
        self.writes: WritesSeen | None = None  # while a step is being steered

    def run(self, function, model, x, sigmas, extra_args, callback, options):
        begins = first_evaluations(function, model, x, sigmas, extra_args, options)
        evaluations = 0

        def around(model, x, sigma, arguments):
            nonlocal evaluations
            step = begins.get(evaluations)
            evaluations += 1
            if step in self.window:
                self._steer(unwrapped(model), x, sigma, arguments, step)
            return model(x, sigma, **arguments)

        return function(SampledModel(model, around), x, sigmas, extra_args=extra_args, callback=callback, **options)

    def _steer(self, host_model, x: Tensor, sigma: Tensor, arguments: dict, step: int) -> None:
        """Changes the sampler's own `x` in place, which is the one thing that every k-diffusion sampler shares."""
        settings, relations = self.steering.settings, self.steering.graph.relations
        arguments = self.instrumented(arguments)
        with differentiable(self.base_model) as self.writes:
            sigma = sigma.clone()
            start = x.detach().clone()
            scale = self.base_model.model_sampling.calculate_input(sigma, torch.ones_like(start))
            look = functools.partial(self._look, host_model, sigma, scale, arguments, step)
            end = steer_step(start * scale, look, tuple(relation.weight for relation in relations), settings,
                             self.schedule.moment(step), sum(r.step < step for r in self.records), self._on_record,
                             self.steering.move)
            difference = (end - start * scale) / scale
        if self.last_maps is not None:
            self.keep(step, self.last_maps, _grid(x, self.classifier.layout.size))
            self.last_maps = None
        if difference.any():
            x.copy_(start + difference)

    def _look(self, host_model, sigma: Tensor, scale: Tensor, arguments: dict, step: int, latent: Tensor) -> Look | None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        leaf = latent.detach().requires_grad_()
        x = leaf / scale
        active = next((cond for cond in self.positive if cond["uuid"] in self.recorder.columns and
                       comfy.samplers.get_area_and_mult(cond, x.detach(), sigma) is not None), None)
        if active is None:
            return None
        if active.get("control") is not None:
            active = {**active, "control": FrozenControl(active["control"], self.recorder)}
        alone = copy.copy(host_model)
        alone.inner_model = PositiveOnly(self.base_model, [active])
        alone(x, sigma, **arguments)
        maps = self.take(x.detach(), sigma)
        if not maps.layers:
            return None
        seen = AttentionMaps(maps.phrases, tuple(dataclasses.replace(layer, maps=layer.maps.detach().requires_grad_())
                                                 for layer in maps.layers))
        judgement = judge(seen, self.steering.graph.relations, self.classifier, self.backbone.name,
                          self.schedule.progress[step], self.steering.settings.compactness)
        self.last_maps = seen

        def gradient(loss: Tensor) -> Tensor:
            with self.writes.paused():
                return scaled_gradient(loss, *([layer.maps for layer in part.layers] for part in (seen, maps)), leaf)

        return Look(judgement, gradient)

    def instrumented(self, arguments: dict) -> dict:
        """The sampler's arguments for the model, so that a pass is recorded and can be differentiated."""
        model_options = arguments["model_options"]
        transformer_options = {**model_options.get("transformer_options", {}), FORWARD_KEY: self.recorder.forward,
                               "optimized_attention_override": differentiable_attention}
        transformer_options["wrappers"] = {
            kind: {key: wrappers for key, wrappers in by_key.items() if key not in STEP_CACHES}
            for kind, by_key in transformer_options.get("wrappers", {}).items()}
        model_options = {**model_options, "transformer_options": self.backbone.instrument(
            self.network, transformer_options, self.recorder, self.steering.settings.recompute)}
        return {"denoise_mask": None, **arguments, "model_options": model_options}

    def _on_record(self, record: UpdateRecord) -> None:
        self.records.append(record)
        if record.outcome == "non-finite gradient":
            log.warning("step %d, update %d: the gradient is not finite; this update is left out", record.step,
                        record.update)
        if self.steering.on_update is not None:
            self.steering.on_update(record)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def report(self) -> SteeringReport:
        notes = ()
        if not self.window:
            settings, progress = self.steering.settings, self.schedule.progress
            notes = (f"not steered: no step lies between start_percent {settings.start:g} and end_percent {settings.end:g}. The "
                     f"{len(progress)} steps of this run begin at {progress[0]:.2f} to {progress[-1]:.2f} of the whole noise "
                     "schedule; image to image and second passes begin late.",)
        if any(record.outcome == "not recorded" for record in self.records):
            notes = (*notes, "in some steps nothing was recorded: the conditioning is not active there, or another pack "
                     "skipped the model's blocks",)
        return SteeringReport(tuple(map(str, self.steering.graph.relations)), self.classifier.name, self.schedule.steps,
                              tuple(self.records), notes)


STEP_CACHES = ("easycache",)
"""Keys of the host's wrappers that answer from an earlier step instead of running the model. A gradient needs the model, and
an evaluation at a moved latent is no step for a cache to count."""
ROOM = {False: 6, True: 2}
"""By `recompute`: memory of a gradient evaluation, as a multiple of what the host reserves for a pass."""


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


@dataclass(frozen=True)
class Steering:
    """What to steer, by what, and how. on_update: called after each evaluation (progress); move: from a gradient to
    the latent's displacement (a benchmark compares others)."""

    graph: RelationGraph
    classifier: RelationClassifier
    settings: SteeringSettings
    on_update: Callable[[UpdateRecord], None] | None = None
    move: Callable[[Tensor, SteeringSettings], Tensor] = displacement

    @property
    def is_off(self) -> bool:
        return self.settings.is_off or not self.graph.counted().relations


def _patched(model, open_session: Callable[..., Session], log_of_runs: RunLog, key: str):
    """A clone of the host's ModelPatcher that opens a session for each sampler run and files what it leaves."""

    def outer_sample(executor, noise, latent_image, sampler, sigmas, *rest, **options):
        if not hasattr(sampler, "sampler_function") or len(sigmas) < 2:
            raise SteeringError(f"input 'sampler': {type(sampler).__name__} has no sampler function to watch, or the "
                                "schedule has no step. Use a sampler of the host (KSampler, KSamplerSelect).")
        sessions = []

        def sampler_function(model_k, x, sigmas, extra_args=None, callback=None, **more):
            if isinstance(model_k, RehearsedModel):
                return sampler.sampler_function(model_k, x, sigmas, extra_args=extra_args, callback=callback, **more)
            session = open_session(executor.class_obj, sigmas)
            sessions.append(session)
            return session.run(sampler.sampler_function, model_k, x, sigmas, extra_args, callback, more)

        watched = copy.copy(sampler)
        watched.sampler_function = functools.wraps(sampler.sampler_function)(sampler_function)
        samples = executor(noise, latent_image, watched, sigmas, *rest, **options)
        for session in sessions:
            report = session.report() if isinstance(session, SteeringSession) else None
            log_of_runs.runs.append(Run(samples.detach().float().cpu(), session.record(), report))
        return samples

    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, outer_sample)
    return patched


def apply_capture(model, capture: Capture) -> tuple[object, RunLog]:
    """A clone of MODEL whose sampler runs are recorded, and the log that they fill.

    Raises UnsupportedModel for an architecture without a backbone.
    """
    find_backbone(model.model.diffusion_model)
    runs = RunLog()
    return _patched(model, lambda *run: CaptureSession(*run, capture), runs, "learn_to_steer_capture"), runs


def apply_steering(model, steering: Steering) -> tuple[object, RunLog]:
    """A clone of MODEL whose sampler runs are steered, and the log that they fill.

    With nothing to steer the clone carries no patch at all. Raises UnsupportedModel for an architecture without a
    backbone and ClassifierError for a relation that the classifier does not know.
    """
    find_backbone(model.model.diffusion_model)
    counted = steering.graph.counted()
    if counted.relations:
        steering = dataclasses.replace(steering, graph=counted)
    for relation in counted.relations:
        relation_indices(steering.classifier, relation.predicates)
    if steering.is_off:  # (the host's own model, however its memory is managed)
        reason = "the settings switch steering off" if steering.graph.relations else "the graph has no relation"
        return model.clone(), RunLog(unsteered=not_steered(steering, reason))
    runs = RunLog()
    model = _with_weights_that_stay(model)
    patched = _patched(model, lambda *run: SteeringSession(*run, steering), runs, "learn_to_steer")
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "learn_to_steer",
                                 functools.partial(_reserve_memory, ROOM[steering.settings.recompute]))
    return patched, runs


def _with_weights_that_stay(model):
    """The MODEL, or where the host's dynamic VRAM manages it, the same model loaded the classic way.

    Dynamic VRAM gives a layer's weights away once the layer ran, and a gradient needs them until backward. The host makes
    such a delegate itself, for conditionings with hooks. It is loaded from the file once per MODEL.
    """
    if not model.is_dynamic():
        return model
    if model.cached_patcher_init is None:
        raise SteeringError("input 'model': ComfyUI's dynamic VRAM gives its weights away while steering still needs them, and "
                            "its loader does not say how to load it otherwise. Load it with \"Load Checkpoint\" or \"Load "
                            "Diffusion Model\", or start ComfyUI with --disable-dynamic-vram.")
    log.info("loading the model a second time, without dynamic VRAM, which takes weights away that a gradient needs; start "
             "ComfyUI with --disable-dynamic-vram to have it in memory once")
    return model.get_non_dynamic_delegate()


def _reserve_memory(room: int, executor, model, noise_shape, conds, *rest, **options):
    """Has the host keep the memory of a gradient free beside the model, as that of a batch `room` times as large."""
    return executor(model, [noise_shape[0] * room, *noise_shape[1:]], conds, *rest, **options)


def not_steered(steering: Steering, reason: str) -> Run:
    """Stands for a run in which nothing was moved."""
    graph = steering.graph
    report = SteeringReport(tuple(map(str, graph.relations)), steering.classifier.name, 0, (), (f"not steered: {reason}",))
    return Run(None, AttentionRecord(graph.phrases, (), ()), report)
