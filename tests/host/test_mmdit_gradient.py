"""FLUX: the gradient of a loss on the maps equals finite differences, with and without recomputation."""
from __future__ import annotations

import functools
import gc

import pytest
import torch
from torch import Tensor

from dev.standalone import load_pack

load_pack()

import comfy.model_management  # noqa: E402
from learn_to_steer.host.backbones.mmdit import MMDiTBackbone  # noqa: E402
from learn_to_steer.host.gradient import differentiable  # noqa: E402
from learn_to_steer.steering.attention import MapRecorder, WordColumns  # noqa: E402
from tiny_flux import Inputs, tiny_flux  # noqa: E402

WORDS = {"dog": (2,), "teddy bear": (4, 5)}


def loss_of(base, inputs: Inputs, recompute_blocks: bool, options: dict | None = None, **extra) -> Tensor:
    """A nonlinear function of every map of every block, in float64."""
    recorder = MapRecorder({"positive": WordColumns.build(WORDS, inputs.context.shape[1])})
    options = {"uuids": ["positive"], **(options or {})}
    options = MMDiTBackbone().instrument(base.diffusion_model, options, recorder, recompute_blocks)
    inputs.run(base, options, **extra)
    generator, loss = torch.Generator().manual_seed(9), torch.zeros((), dtype=torch.float64)
    layers = recorder.take().layers
    assert len(layers) == 4
    for layer in layers:
        weights = torch.randn(layer.maps.shape, generator=generator, dtype=torch.float64)
        loss = loss + (weights * (layer.maps.double() + 0.05).log()).sum()
    return loss


def gradient_of(base, inputs: Inputs, recompute_blocks: bool, options: dict | None = None, **extra) -> Tensor:
    """The gradient as computed in a node: inference mode is on, and all tensors were made in it."""
    with torch.inference_mode(), differentiable(base) as writes:
        x = inputs.x.clone().requires_grad_()
        loss = loss_of(base, inputs.at(x), recompute_blocks, options, **extra)
        with writes.paused():
            (gradient,) = torch.autograd.grad(loss, x)
    return gradient


def worst_error(base, inputs: Inputs, gradient: Tensor, step: float, directions: int = 4, **extra) -> float:
    """Largest relative error of directional derivatives against central differences, along random directions."""
    generator, worst = torch.Generator().manual_seed(3), 0.0
    for _ in range(directions):
        direction = torch.randn(gradient.shape, generator=generator, dtype=torch.float64)
        direction = direction + direction.norm() * gradient / gradient.norm()  # no direction with a vanishing slope
        direction = (direction / direction.norm()).to(inputs.x.dtype)
        with differentiable(base), torch.no_grad():
            ahead, behind = (float(loss_of(base, inputs.at(inputs.x + sign * step * direction), False, **extra))
                             for sign in (1, -1))
        slope = float((gradient.double() * direction.double()).sum())
        worst = max(worst, abs((ahead - behind) / (2 * step) - slope) / abs(slope))
    return worst


def loaded(guidance: bool = True, dtype: torch.dtype = torch.float32, **inputs):
    """Model and conditioning as from a loader node: inference tensors."""
    with torch.inference_mode():
        base = tiny_flux(guidance, dtype)
        given = Inputs.random(dtype=dtype, **inputs)
    assert base.diffusion_model.img_in.weight.is_inference() and given.context.is_inference()
    return base, given


@pytest.mark.parametrize("recompute_blocks", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("guidance", [True, False], ids=["dev", "schnell"])
def test_gradient_agrees_with_finite_differences(guidance, recompute_blocks):
    base, inputs = loaded(guidance, size=(7, 10))
    gradient = gradient_of(base, inputs, recompute_blocks)
    assert worst_error(base, inputs, gradient, step=2e-2) < 1e-3


@pytest.mark.parametrize("recompute_blocks", [False, True], ids=["kept", "recomputed"])
def test_gradient_agrees_sharply_in_float64(recompute_blocks):
    base, inputs = loaded(dtype=torch.float64, size=(6, 8), reference=(4, 6))
    base.diffusion_model.pe_embedder.register_forward_hook(lambda module, args, out: out.double())
    gradient = gradient_of(base, inputs, recompute_blocks)
    assert worst_error(base, inputs, gradient, step=1e-4) < 1e-6


@pytest.mark.parametrize("reference", [None, (6, 10)], ids=["plain", "reference"])
@pytest.mark.parametrize("batch", [1, 2])
def test_recomputed_gradient_is_the_kept_one(reference, batch):
    base, inputs = loaded(reference=reference, batch=batch)
    kept, recomputed = (gradient_of(base, inputs, blocks) for blocks in (False, True))
    assert (kept - recomputed).norm() <= 1e-5 * kept.norm()


def test_other_packs_patches_and_controls_are_differentiated_too():
    """A replaced block, an attention override, and a control whose residuals the host adds in place."""
    def override(func, q, k, v, heads, *args, **kwargs):
        return func(q * 1.1, k, v, heads, *args, **kwargs)

    def replacement(args, extra):
        out = extra["original_block"]({**args, "img": args["img"] * 0.9})
        return {**out, "img": out["img"] + 0.1 * args["img"].sin()}

    options = {"optimized_attention_override": override,
               "patches_replace": {"dit": {("double_block", 0): replacement, ("single_block", 1): replacement}}}
    base, inputs = loaded(size=(8, 8))
    residual = torch.randn(1, 16, 256, generator=torch.Generator().manual_seed(4))
    control = {"input": [residual, residual], "output": [residual, residual]}
    for blocks in (False, True):
        gradient = gradient_of(base, inputs, blocks, options, control=control)
        assert worst_error(base, inputs, gradient, step=2e-2, options=options, control=control) < 1e-3


@pytest.mark.parametrize("recompute_blocks", [False, True], ids=["kept", "recomputed"])
def test_a_replacement_that_cuts_the_gradient_is_named(recompute_blocks):
    def cached(args, extra):
        return {name: value.detach() for name, value in extra["original_block"](args).items()}

    base, inputs = loaded()
    options = {"patches_replace": {"dit": {("double_block", 1): cached}}}
    with pytest.raises(RuntimeError, match=r"replaces double_block\.1 and cuts the gradient"):
        gradient_of(base, inputs, recompute_blocks, options)
    assert comfy.model_management.in_training is False


def late_bound(block_wrap):
    """A host that calls its blocks by index: the closure does not hold the block."""
    held = [block_wrap]
    return lambda args: held[0](args)


def other_block(base):
    """A host whose closure holds another block than the replaced one."""
    block = base.diffusion_model.double_blocks[0]

    def block_wrap(args):
        img, txt = block(img=args["img"], txt=args["txt"], vec=args["vec"], pe=args["pe"], attn_mask=args.get("attn_mask"),
                         transformer_options=args.get("transformer_options"))
        return {"img": img, "txt": txt}

    return block_wrap


class Wrapped:
    """A host that passes an object instead of a function."""

    def __init__(self, block_wrap):
        self.block_wrap = block_wrap

    def __call__(self, args):
        return self.block_wrap(args)


@pytest.mark.parametrize("stand_in", ["late bound", "other block", "object", "partial"])
def test_a_block_that_cannot_be_bound_is_refused(monkeypatch, stand_in):
    """Backward would silently recompute the network's last block instead. Without recomputation nothing is bound."""
    base, inputs = loaded()
    make = {"late bound": late_bound, "other block": lambda wrap: other_block(base), "object": Wrapped,
            "partial": functools.partial}[stand_in]
    instrument, key = MMDiTBackbone.instrument, ("double_block", 1)

    def with_a_stand_in(self, network, options, recorder, recompute_blocks):
        options = instrument(self, network, options, recorder, recompute_blocks)
        replacement = options["patches_replace"]["dit"][key]
        options["patches_replace"]["dit"][key] = lambda args, extra: replacement(
            args, {"original_block": make(extra["original_block"])})
        return options

    monkeypatch.setattr(MMDiTBackbone, "instrument", with_a_stand_in)
    with pytest.raises(RuntimeError, match="This ComfyUI calls the blocks of FLUX in a way .*Switch save_memory off"):
        gradient_of(base, inputs, True)
    assert comfy.model_management.in_training is False
    if stand_in != "other block":  # that one is another network
        assert worst_error(base, inputs, gradient_of(base, inputs, False), step=2e-2, directions=1) < 1e-3


@pytest.mark.parametrize("recompute_blocks", [False, True], ids=["kept", "recomputed"])
def test_nothing_stays_behind(recompute_blocks):
    """After gradients a plain run gives the same bits, the host's flag is restored, and no tensor is left."""
    def tensors() -> int:
        gc.collect()
        return sum(type(thing) is Tensor for thing in gc.get_objects())

    base, inputs = loaded()
    with torch.inference_mode():
        before = inputs.run(base, {})
    gradient_of(base, inputs, recompute_blocks)
    count = tensors()
    for _ in range(3):
        gradient_of(base, inputs, recompute_blocks)
    assert tensors() == count and comfy.model_management.in_training is False
    with torch.inference_mode():
        assert torch.equal(before, inputs.run(base, {}))
