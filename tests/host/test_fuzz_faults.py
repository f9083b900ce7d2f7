"""Faults at random operations of watched runs: whatever breaks, wherever, the model is as it was found."""
from __future__ import annotations

import random

import comfy.model_management
import pytest
import torch
from conftest import Scene
from learn_to_steer.host.capturing import Capture
from learn_to_steer.host.patching import apply_capture, apply_steering
from test_kontext import FluxScene
from torch.utils._python_dispatch import TorchDispatchMode

FAULTS = (comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError, RuntimeError, ValueError,
          KeyboardInterrupt)
WATCHES = ("steered", "steered, recomputed", "captured")


class Fault(TorchDispatchMode):
    """Counts the operations of a run, forward and backward, and raises `kind` in place of operation `at`."""

    def __init__(self, at: int = -1, kind: type[BaseException] = RuntimeError):
        super().__init__()
        self.at, self.kind, self.seen = at, kind, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        if self.seen - 1 == self.at:
            raise self.kind("injected")
        return func(*args, **(kwargs or {}))


def global_state() -> tuple:
    """Everything process-wide that a watched pass switches."""
    return (comfy.model_management.in_training, torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(),
            torch._C._autograd._top_saved_tensors_default_hooks(False))


def model_state(model) -> tuple:
    """Weights bit for bit, hooks on every module, and what nodes put on the MODEL."""
    network = model.model.diffusion_model
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
                for module in network.modules())
    forwards = sum("forward" in vars(module) for module in network.modules())
    weights = tuple(hash(value.detach().clone().numpy().tobytes()) for value in model.model.state_dict().values())
    return weights, hooks, forwards, repr(sorted(model.model_options)), repr(model.wrappers), repr(model.object_patches)


class Subject:
    """One scene and one watch to watch it, with the bits that undisturbed runs give."""

    def __init__(self, kind: str, watch: str):
        self.scene = Scene() if kind == "unet" else FluxScene(references=())
        graph = self.scene.graph
        if watch == "captured":
            self.watched, _ = apply_capture(self.scene.model, Capture(graph.phrases))
        else:
            steering = self.scene.steering(stop_probability=1.0, max_updates=2, end=1.0, recompute=watch.endswith("recomputed"))
            self.watched, _ = apply_steering(self.scene.model, steering)
        self.plain, self.result = self.run(self.scene.model), self.run(self.watched)
        self.state, self.globals = model_state(self.scene.model), global_state()
        with Fault() as undisturbed:
            self.run(self.watched)
        self.operations = undisturbed.seen

    def run(self, model):
        return self.scene.sample(model, steps=2, size=(8, 8))

    def survives(self, at: int, kind: type[BaseException]) -> None:
        caught = None
        try:
            with Fault(at, kind):
                self.run(self.watched)
        except kind as error:
            caught = error
        # the host itself answers a lack of memory in places, by smaller pieces or fewer pictures at once
        assert kind is torch.OutOfMemoryError or caught is not None and "injected" in str(caught)
        assert global_state() == self.globals
        assert model_state(self.scene.model) == self.state
        assert torch.equal(self.run(self.scene.model), self.plain)
        assert torch.equal(self.run(self.watched), self.result)


@pytest.fixture(scope="module")
def subjects() -> dict:
    return {}


def faults(count: int, seed: int) -> list:
    """`count` faults, spread over models and kinds of watching; `place` is where in the run, 0 to 1."""
    rng = random.Random(seed)
    cases = [(kind, watch) for kind in ("unet", "flux") for watch in WATCHES]
    return [pytest.param(*cases[number % len(cases)], rng.random(), FAULTS[number % len(FAULTS)],
                         id=f"{number}-{'-'.join(cases[number % len(cases)])}") for number in range(count)]


def check(subjects: dict, kind: str, watch: str, place: float, fault: type[BaseException]) -> None:
    if (kind, watch) not in subjects:
        subjects[kind, watch] = Subject(kind, watch)
    subject = subjects[kind, watch]
    subject.survives(int(place * subject.operations), fault)


@pytest.mark.parametrize(("kind", "watch", "place", "fault"), faults(24, seed=1))
def test_a_fault_leaves_no_trace(subjects, kind, watch, place, fault):
    check(subjects, kind, watch, place, fault)


@pytest.mark.fuzz
@pytest.mark.parametrize(("kind", "watch", "place", "fault"), faults(300, seed=2))
def test_three_hundred_faults_leave_no_trace(subjects, kind, watch, place, fault):
    check(subjects, kind, watch, place, fault)
