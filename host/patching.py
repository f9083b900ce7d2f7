"""Capture and steering as patches on the host's MODEL."""
from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections.abc import Callable

from comfy.patcher_extension import WrappersMP

from ..classifiers.base import relation_indices
from ..steering.report import SteeringReport
from .backbones import find_backbone
from .capturing import Capture, CaptureSession
from .memory import MemoryPlan
from .records import AttentionRecord, Run, RunLog
from .session import Session
from .steering import Steering, SteeringSession
from .stepping import RehearsedModel, SteeringError

log = logging.getLogger("learn_to_steer")
STEERING_KEY = "learn_to_steer"  # key of the steering wrappers
WHOLE_KEY = "learn_to_steer_whole_weights"  # attachment of the root patcher: the same model, loaded without dynamic VRAM


def _patched(model, open_session: Callable[..., Session], log_of_runs: RunLog, key: str):
    """A clone of the host's ModelPatcher that opens a session for each sampler run and files the resulting Run."""

    def outer_sample(executor, noise, latent_image, sampler, sigmas, *rest, **options):
        if not hasattr(sampler, "sampler_function"):
            raise SteeringError(f"input 'sampler': {type(sampler).__name__} has no sampler function to watch. Use a sampler of "
                                "the host (KSampler, KSamplerSelect).")
        session, denoised = None, None

        def sampler_function(model_k, x, sigmas, extra_args=None, callback=None, **more):
            nonlocal session
            if isinstance(model_k, RehearsedModel):
                return sampler.sampler_function(model_k, x, sigmas, extra_args=extra_args, callback=callback, **more)

            def watched_callback(info: dict) -> None:
                nonlocal denoised
                denoised = info.get("denoised")
                if callback is not None:
                    callback(info)

            session = open_session(executor.class_obj, sigmas)
            return session.run(sampler.sampler_function, model_k, x, sigmas, extra_args, watched_callback, more)

        watched = copy.copy(sampler)
        watched.sampler_function = functools.wraps(sampler.sampler_function)(sampler_function)
        samples = executor(noise, latent_image, watched if len(sigmas) > 1 else sampler, sigmas, *rest, **options)
        run = log_of_runs.blank("the schedule has no step to sample") if session is None else session.result()
        # The host's custom samplers also output the last prediction of the clean latent, processed like this.
        process = executor.class_obj.model_patcher.model.process_latent_out
        run.found_by(samples, *(() if denoised is None else (process(denoised.cpu()),)))
        run.before = log_of_runs.search(latent_image) if latent_image.count_nonzero() else None
        log_of_runs.file(run)
        return samples

    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, outer_sample)
    return patched


def apply_capture(model, capture: Capture) -> tuple[object, RunLog]:
    """A clone of MODEL whose sampler runs are recorded, and the log of those runs.

    Without words to watch, the clone carries no patch. Raises UnsupportedModel for an architecture without a backbone.
    """
    find_backbone(model.model.diffusion_model)
    runs = RunLog(capture, lambda reason: Run(AttentionRecord(capture.phrases, (), (), (f"nothing was recorded: {reason}",))))
    if not capture.phrases:
        return model.clone(), dataclasses.replace(runs, unsteered=runs.blank("there are no words to watch, and the graph has no "
                                                                             "relation"))
    return _patched(model, lambda *run: CaptureSession(*run, capture), runs, "learn_to_steer_capture"), runs


def apply_steering(model, steering: Steering) -> tuple[object, RunLog]:
    """A clone of MODEL whose sampler runs are steered, and the log of those runs.

    With nothing to steer, the clone carries no patch.
    Raises UnsupportedModel for an architecture without a backbone, ClassifierError for a relation that the classifier does not
    know, and SteeringError for a MODEL that is steered already.
    """
    find_backbone(model.model.diffusion_model)
    counted = steering.graph.counted()
    if counted.relations:
        steering = dataclasses.replace(steering, graph=counted)
    for relation in counted.relations:
        relation_indices(steering.classifier, relation.predicates)
    request = (steering.graph, steering.classifier.name, steering.settings)
    blank = functools.partial(not_steered, steering)
    if steering.is_off:  # before _with_weights_that_stay: off means the host's own model, dynamic VRAM included
        reason = steering.settings.off_because or "the graph has no relation"
        return model.clone(), RunLog(request, blank, unsteered=blank(reason))
    if model.get_wrappers(WrappersMP.OUTER_SAMPLE, STEERING_KEY):
        raise SteeringError("input 'model': this model is steered already, by an \"Apply Spatial Steering\" further up its line, "
                            "and one run is steered once. Take one of the two nodes out, or bypass it. Several relations go into "
                            "one \"Multi-Relation Graph\".")
    runs = RunLog(request, blank)
    model, memory = _with_weights_that_stay(model), MemoryPlan(steering.settings.recompute)
    patched = _patched(model, lambda *run: SteeringSession(*run, steering, memory), runs, STEERING_KEY)
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, STEERING_KEY, memory.prepare_sampling)
    return patched, runs


def _with_weights_that_stay(model):
    """The MODEL itself or, if the host's dynamic VRAM manages it, a clone over the same model loaded without dynamic VRAM.

    Dynamic VRAM frees a layer's weights after the layer has run; a gradient needs them until backward. The host can load a
    model a second time without it (for conditionings with hooks) but caches that load per patcher, so every change of a LoRA
    would read the file again. Here the second load is attached to the root patcher, which the loader node made and all clones
    share, and is freed with it. The clone keeps the patches of `model`.
    """
    if not model.is_dynamic():
        return model
    if model.cached_patcher_init is None:
        raise SteeringError("input 'model': ComfyUI's dynamic VRAM frees this model's weights while steering still needs them, "
                            "and the model's loader offers no way to load it without. Load it with \"Load Checkpoint\" or \"Load "
                            "Diffusion Model\", or start ComfyUI with --disable-dynamic-vram.")
    root = _root(model)
    whole = root.get_attachment(WHOLE_KEY)
    if whole is None:
        log.info("loading the model a second time, without dynamic VRAM, which frees weights that a gradient needs; start "
                 "ComfyUI with --disable-dynamic-vram to keep only one copy in memory")
        whole = root.get_non_dynamic_delegate()
        whole.parent = None
        root.set_attachments(WHOLE_KEY, whole)
    own = model.clone(disable_dynamic=True, model_override=whole.get_clone_model_override())
    # When a loaded patcher is freed, the host manages its weights through the parent, so the parent must own the same weights.
    own.parent = whole
    return own


def _root(model):
    """The patcher that all clones over this model's weights descend from. A clone keeps its parent alive."""
    while model.parent is not None and model.parent.model is model.model:
        model = model.parent
    return model


def not_steered(steering: Steering, reason: str) -> Run:
    """A Run that was not steered, for a reason in words."""
    graph = steering.graph
    reason = f"not steered: {reason}"
    report = SteeringReport(tuple(map(str, graph.relations)), steering.classifier.name, 0, (), (reason,))
    return Run(AttentionRecord(graph.phrases, (), (), (reason,)), report)
