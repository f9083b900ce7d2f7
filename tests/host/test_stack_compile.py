"""Steering beside `torch.compile`: the compiled network samples, a gradient is taken of the network itself."""
from __future__ import annotations

import pytest
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from conftest import Scene
from learn_to_steer.host.capturing import Capture
from learn_to_steer.host.patching import apply_capture, apply_steering
from stack import assert_steers, run, same
from test_kontext import FluxScene

UNET_PART, FLUX_BLOCK = "diffusion_model.middle_block.1.transformer_blocks.0.ff", "diffusion_model.double_blocks.1"


class Compiling:
    """The host's TorchCompileModel as a function from MODEL to MODEL, with a backend that runs what it is given.

    seen: of each evaluation, whether it builds a graph for backward and whether it meets the compiled module.
    """

    def __init__(self, place: str):
        self.place, self.passes, self.seen = place, 0, set()

    def backend(self, graph: torch.fx.GraphModule, inputs):
        def run(*arguments):
            self.passes += 1
            return graph.forward(*arguments)
        return run

    def look(self, executor, *args, **kwargs):
        module = executor.class_obj.get_submodule(self.place)
        self.seen.add((torch.is_grad_enabled(), isinstance(module, torch._dynamo.OptimizedModule)))
        return executor(*args, **kwargs)

    def __call__(self, model):
        torch._dynamo.reset()
        model = model.clone()
        set_torch_compile_wrapper(model=model, backend=self.backend, keys=[self.place],
                                  options={"guard_filter_fn": skip_torch_compile_dict})
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "look", self.look)  # inside the one that puts the compiled module in
        return model


@pytest.mark.parametrize("below", [False, True], ids=["above", "below"])
def test_a_part_of_the_unet(scene: Scene, below: bool):
    compiling = Compiling(UNET_PART)
    before, after = (same, compiling) if below else (compiling, same)
    assert_steers(scene, before, after, recompute=(not below,))
    assert compiling.passes and compiling.seen == {(False, True), (True, False)}


def test_a_block_of_flux():
    """Recomputation has to know the block that the host runs."""
    compiling = Compiling(FLUX_BLOCK)
    _, records = run(FluxScene(references=()), compiling, same, {"size": (8, 8), "cfg": 1.0}, recompute=True,
                     stop_probability=1.0, max_updates=1, end=0.2)
    assert {record.outcome for record in records} == {"moved"}
    assert compiling.passes and compiling.seen == {(False, True), (True, False)}


def test_the_whole_network_once_compiled_is_still_read():
    """The node drops the guards on the host's options, where recording stands, so a graph of an earlier run would be taken."""
    scene = Scene(overrides={"channel_mult": [1], "num_res_blocks": [1], "transformer_depth": [1],
                             "transformer_depth_output": [0, 0]})
    compiling = Compiling("diffusion_model")
    model = compiling(scene.model)
    plain = scene.sample(model, steps=1, cfg=1.0)
    maps = []
    for watched in (model, scene.model):
        patched, runs = apply_capture(watched, Capture(("dog", "teddy bear"), every=True))
        torch.testing.assert_close(scene.sample(patched, steps=1, cfg=1.0), plain)
        maps.append(runs.last.maps)
    assert compiling.passes and maps[0].layers == maps[1].layers
    assert torch.equal(maps[0].steps[0].every, maps[1].steps[0].every)
    steered, runs = apply_steering(model, scene.steering(stop_probability=1.0, max_updates=1))
    scene.sample(steered, steps=2, cfg=1.0)
    assert {record.outcome for record in runs.last.report.records} == {"moved"}
