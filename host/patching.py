"""Capture and steering as patches on the host's MODEL, and the memory that they ask the host for."""
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
WHOLE_KEY = "learn_to_steer_whole_weights"  # attachment of the root patcher: the same model without dynamic VRAM


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
    model, memory = _with_weights_that_stay(model), MemoryPlan(steering.settings.recompute)
    patched = _patched(model, lambda *run: SteeringSession(*run, steering, memory), runs, "learn_to_steer")
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "learn_to_steer", memory.prepare_sampling)
    return patched, runs


def _with_weights_that_stay(model):
    """The MODEL, or where the host's dynamic VRAM manages it, a clone over the same model loaded the classic way.

    Dynamic VRAM gives a layer's weights away once the layer ran, and a gradient needs them until backward. The host can load
    a model again without it, for conditionings with hooks, but remembers that for one patcher alone, so that each change of a
    LoRA would read the file once more. So the second load stays with the root patcher, which the loader node made and all
    clones share, and dies with it. The clone brings its own patches.
    """
    if not model.is_dynamic():
        return model
    if model.cached_patcher_init is None:
        raise SteeringError("input 'model': ComfyUI's dynamic VRAM gives its weights away while steering still needs them, and "
                            "its loader does not say how to load it otherwise. Load it with \"Load Checkpoint\" or \"Load "
                            "Diffusion Model\", or start ComfyUI with --disable-dynamic-vram.")
    root = _root(model)
    whole = root.get_attachment(WHOLE_KEY)
    if whole is None:
        log.info("loading the model a second time, without dynamic VRAM, which takes weights away that a gradient needs; start "
                 "ComfyUI with --disable-dynamic-vram to have it in memory once")
        whole = root.get_non_dynamic_delegate()
        whole.parent = None
        root.set_attachments(WHOLE_KEY, whole)
    own = model.clone(disable_dynamic=True, model_override=whole.get_clone_model_override())
    # When a loaded patcher dies, the host goes on managing its weights through the parent, which must be one over these weights.
    own.parent = whole
    return own


def _root(model):
    """The patcher from which all dynamic clones over this model's weights descend; a clone keeps its parent alive."""
    while model.parent is not None and model.parent.model is model.model:
        model = model.parent
    return model


def not_steered(steering: Steering, reason: str) -> Run:
    """Stands for a run in which nothing was moved."""
    graph = steering.graph
    report = SteeringReport(tuple(map(str, graph.relations)), steering.classifier.name, 0, (), (f"not steered: {reason}",))
    return Run(None, AttentionRecord(graph.phrases, (), ()), report)
