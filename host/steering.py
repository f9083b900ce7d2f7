"""Steering a sampler run: moves the latent before the first evaluation of each step in the window."""
from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import comfy.model_management
import comfy.samplers
import torch
from torch import Tensor

from ..classifiers.base import RelationClassifier
from ..prompts.relations import RelationGraph
from ..steering.attention import FORWARD_KEY, AttentionMaps
from ..steering.objective import judge
from ..steering.optimizer import Evaluation, displacement, steer_step
from ..steering.report import NON_FINITE, NOT_RECORDED, SteeringReport, UpdateRecord
from ..steering.settings import SteeringSettings
from .gradient import FrozenControl, differentiable, differentiable_attention, scaled_gradient
from .memory import MemoryPlan
from .moved_latent import MovedLatent
from .other_packs import what_to_do
from .records import Run
from .rehearsal import rehearse
from .saved_tensors import InPlaceWriteTracker
from .session import COMPILED, NOTHING_SEEN, Session, map_grid, without_wrappers
from .stepping import SampledModel, SteeringError, unwrapped

log = logging.getLogger("learn_to_steer")
FOR_SAMPLING_ALONE = ("easycache", COMPILED)
"""Keys of the host's wrappers that are removed from steering passes. A step cache skips the model and reuses the output of an
earlier step: a gradient needs the model, and the cache must not count an evaluation at a moved latent as a step. A compiled
network or block replaces the one that is recorded, recomputed and differentiated, and would be compiled anew for it."""


@dataclass(frozen=True)
class Steering:
    """A request to steer.

    graph: the relations; classifier: the source of the gradient; settings: how to steer.
    on_update: called after each evaluation, for progress.
    move: from a gradient to the latent's displacement; a benchmark replaces it.
    """

    graph: RelationGraph
    classifier: RelationClassifier
    settings: SteeringSettings
    on_update: Callable[[UpdateRecord], None] | None = None
    move: Callable[[Tensor, SteeringSettings], Tensor] = displacement

    @property
    def is_off(self) -> bool:
        return self.settings.is_off or not self.graph.counted().relations


class PositiveOnly:
    """Takes the guider's place inside the host's inpainting model: evaluates the positive conditioning alone, without CFG."""

    def __init__(self, base_model, conditioning: list[dict]):
        self.inner_model, self._conditioning = base_model, conditioning

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict, seed=None) -> Tensor:
        return comfy.samplers.calc_cond_batch(self.inner_model, [self._conditioning], x, sigma, model_options)[0]


class SteeringSession(Session):
    """A session that moves the latent before the first evaluation of each step in the window."""

    def __init__(self, guider, sigmas: Tensor, steering: Steering, memory: MemoryPlan | None = None):
        super().__init__(guider, sigmas, steering.graph.phrases, object())
        self.steering = steering
        self.memory = memory or MemoryPlan(steering.settings.recompute)
        self.classifier = steering.classifier.to(guider.model_patcher.load_device)
        self.window = self.schedule.window(steering.settings.start, steering.settings.end)
        self.records: list[UpdateRecord] = []
        self.inactive: set[int] = set()  # steps in which no conditioning that names the objects is active
        self.last_maps: AttentionMaps | None = None
        self.writes: InPlaceWriteTracker | None = None  # while a step is being steered

    def run(self, function, model, x, sigmas, extra_args, callback, options):
        rehearsal = rehearse(function, model, x, sigmas, extra_args, options, self.window)
        latent = MovedLatent(rehearsal)

        def around(model, x, sigma, arguments):
            step, x = latent.handed(x)
            if step in self.window:
                move = self._steer(unwrapped(model), x, sigma, arguments, step)
                x = x if move is None else latent.moved(move)
            return model(x, sigma, **arguments)

        result = function(SampledModel(model, around), x, sigmas, extra_args=extra_args, callback=latent.watched(callback),
                          **options)
        return latent.result(result)

    def _steer(self, host_model, x: Tensor, sigma: Tensor, arguments: dict, step: int) -> Tensor | None:
        """The move of the latent x at this step, in the sampler's space, or None if x stays. x itself is not written to."""
        settings, relations = self.steering.settings, self.steering.graph.relations
        arguments = self.instrumented(arguments)
        with differentiable(self.base_model) as self.writes:
            sigma = sigma.clone()
            start = x.detach().clone()
            scale = self.base_model.model_sampling.calculate_input(sigma, torch.ones_like(start))
            evaluate = functools.partial(self._evaluate, host_model, sigma, scale, arguments, step)
            end = steer_step(start * scale, evaluate, tuple(relation.weight for relation in relations), settings,
                             self.schedule.step_info(step), self._on_record, self.steering.move)
            difference = (end - start * scale) / scale
        if self.last_maps is not None:
            self.keep(step, self.last_maps, map_grid(x, self.classifier.layout.size))
            self.last_maps = None
        return difference if difference.any() else None

    def _evaluate(self, host_model, sigma: Tensor, scale: Tensor, arguments: dict, step: int, latent: Tensor
                  ) -> Evaluation | None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        leaf = latent.detach().requires_grad_()
        x = leaf / scale
        active = self.choose(x.detach(), sigma)
        if active is None:
            self.inactive.add(step)
            return None
        if active.get("control") is not None:
            active = {**active, "control": FrozenControl(active["control"], self.recorder)}
        alone = copy.copy(host_model)
        alone.inner_model = PositiveOnly(self.base_model, [active])
        with self.recording():
            alone(x, sigma, **arguments)
            maps = self.take(x.detach(), sigma)
        if not maps.layers:
            return None
        self._refuse_a_cut(maps)
        seen = AttentionMaps(maps.phrases, tuple(dataclasses.replace(layer, maps=layer.maps.detach().requires_grad_())
                                                 for layer in maps.layers))
        judgement = judge(seen, self.steering.graph.relations, self.classifier, self.backbone.name,
                          self.schedule.progress[step], self.steering.settings.compactness)
        self.last_maps = seen

        def gradient(loss: Tensor) -> Tensor:
            with self.writes.paused():
                return scaled_gradient(loss, *([layer.maps for layer in part.layers] for part in (seen, maps)), leaf)

        return Evaluation(judgement, gradient)

    def _refuse_a_cut(self, maps: AttentionMaps) -> None:
        """Raises SteeringError where autograd has no path from the maps back to the latent."""
        cut = [layer.name for layer in sorted(maps.layers, key=lambda layer: layer.order) if not layer.maps.requires_grad]
        if cut:
            first = ", ".join(cut[:3]) + (", ..." if len(cut) > 3 else "")
            raise SteeringError("input 'model': steering follows the gradient of the cross-attention maps, and something cuts "
                                f"it: {len(cut)} of {len(maps.layers)} blocks give maps without a gradient ({first}). "
                                f"{what_to_do(self.model_options)}")

    def instrumented(self, arguments: dict) -> dict:
        """The sampler's arguments for the model, changed so that the pass is recorded and differentiable."""
        model_options = arguments["model_options"]
        transformer_options = {**model_options.get("transformer_options", {}), FORWARD_KEY: self.recorder.forward,
                               "optimized_attention_override": differentiable_attention}
        transformer_options = without_wrappers(transformer_options, FOR_SAMPLING_ALONE)
        model_options = {**model_options, "transformer_options": self.backbone.instrument(
            self.network, transformer_options, self.recorder, self.memory.recompute)}
        model_options.pop("multigpu_clones", None)  # the host's evaluation on several GPUs has no gradient
        return {"denoise_mask": None, **arguments, "model_options": model_options}

    def _on_record(self, record: UpdateRecord) -> None:
        self.records.append(record)
        if record.outcome == NON_FINITE:
            log.warning("step %d, update %d: the gradient is not finite; a smaller move is tried once, then this step goes on "
                        "unsteered", record.step, record.update)
        if self.steering.on_update is not None:
            self.steering.on_update(record)
        comfy.model_management.throw_exception_if_processing_interrupted()

    def report(self) -> SteeringReport:
        settings, obstacle = self.steering.settings, self.recorder.obstacle
        reasons = () if self.window else (f"not steered: {self.outside_the_window(settings.start, settings.end)}",)
        notes = (*self.memory.notes, *self.notes())
        if obstacle is not None and not any(record.outcome == NOT_RECORDED for record in self.records):
            notes = (*notes, f"the maps of some blocks are missing: {obstacle}")
        return SteeringReport(tuple(map(str, self.steering.graph.relations)), self.classifier.name, self.schedule.steps,
                              tuple(self.records), notes, reasons, tuple(sorted(self.inactive)), obstacle or NOTHING_SEEN)

    def result(self) -> Run:
        report, maps = self.report(), self.record()
        for warning in report.warnings:
            log.warning("%s", warning)
        if not maps.steps:
            maps = dataclasses.replace(maps, notes=(*report.warnings, *report.remarks))
        return Run(maps, report, report.steps)
