"""Steering a sampler run: the latent is moved before the first evaluation of each step in the window."""
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
from ..steering.report import SteeringReport, UpdateRecord
from ..steering.settings import SteeringSettings
from .gradient import FrozenControl, differentiable, differentiable_attention, scaled_gradient
from .moved_latent import MovedLatent
from .rehearsal import rehearse
from .saved_tensors import InPlaceWriteTracker
from .session import Session, map_grid
from .stepping import SampledModel, unwrapped

log = logging.getLogger("learn_to_steer")
STEP_CACHES = ("easycache",)
"""Keys of the host's wrappers that answer from an earlier step instead of running the model. A gradient needs the model, and
an evaluation at a moved latent is no step for a cache to count."""


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


class PositiveOnly:
    """Stands where the host's inpainting model expects the guider: the positive conditioning alone, without CFG."""

    def __init__(self, base_model, conditioning: list[dict]):
        self.inner_model, self._conditioning = base_model, conditioning

    def __call__(self, x: Tensor, sigma: Tensor, model_options: dict, seed=None) -> Tensor:
        return comfy.samplers.calc_cond_batch(self.inner_model, [self._conditioning], x, sigma, model_options)[0]


class SteeringSession(Session):
    """Moves the sampler's latent before the first evaluation of each step in the window."""

    def __init__(self, guider, sigmas: Tensor, steering: Steering):
        super().__init__(guider, sigmas, steering.graph.phrases, object())
        self.steering = steering
        self.classifier = steering.classifier.to(guider.model_patcher.load_device)
        self.window = self.schedule.window(steering.settings.start, steering.settings.end)
        self.records: list[UpdateRecord] = []
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
        """The move of the latent x at this step, or None. x is left as it is."""
        settings, relations = self.steering.settings, self.steering.graph.relations
        arguments = self.instrumented(arguments)
        with differentiable(self.base_model) as self.writes:
            sigma = sigma.clone()
            start = x.detach().clone()
            scale = self.base_model.model_sampling.calculate_input(sigma, torch.ones_like(start))
            evaluate = functools.partial(self._evaluate, host_model, sigma, scale, arguments, step)
            end = steer_step(start * scale, evaluate, tuple(relation.weight for relation in relations), settings,
                             self.schedule.step_info(step), sum(r.step < step for r in self.records), self._on_record,
                             self.steering.move)
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

        return Evaluation(judgement, gradient)

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
