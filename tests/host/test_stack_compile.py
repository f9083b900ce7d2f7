"""Steering beside `torch.compile`: the compiled network samples, a gradient is taken of the network itself."""
from __future__ import annotations

import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from conftest import Scene
from stack import STEPS, assert_steers, same
from test_kontext import FluxScene


@pytest.fixture
def compiled_passes() -> list[bool]:
    """Of each pass through a compiled network, whether it may build a graph for backward."""
    return []


def compiling(passes: list[bool], **options):
    """The host's TorchCompileModel with a backend that runs what it is given, so that a test needs no compiler."""
    def backend(graph: torch.fx.GraphModule, inputs):
        def run(*arguments):
            passes.append(torch.is_grad_enabled())
            return graph.forward(*arguments)
        return run

    def patch(model):
        model = model.clone()
        set_torch_compile_wrapper(model=model, backend=backend, **options)
        return model
    return patch


@pytest.mark.parametrize("below", [False, True], ids=["above", "below"])
def test_the_network(scene: Scene, compiled_passes: list[bool], below: bool):
    patch = compiling(compiled_passes)
    before, after = (same, patch) if below else (patch, same)
    assert_steers(scene, before, after, recompute=(below,))
    assert compiled_passes
