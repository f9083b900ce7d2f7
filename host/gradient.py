"""Making the host's model differentiable for the length of one evaluation, and undoing it.

The host runs nodes under inference mode, with kernels and in-place updates that autograd cannot follow.
`differentiable` lifts all of that; `recompute` trades time for memory, block by block.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import comfy.ldm.modules.attention as host_attention
import comfy.model_management
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..steering.attention import LayerMaps, MapRecorder
from .saved_tensors import InPlaceWriteTracker, Recomputation, mutation_of_saved_tensors, open_scope


class NormalTensors(TorchFunctionMode):
    """Replaces inference tensors by clones where an operation meets them.

    Autograd refuses to save inference tensors for backward. Conditioning, image-prompt adapters and other packs' closures
    hold them where nobody can replace them beforehand. A tensor gets one clone, which dies with it. A tensor that is only
    copied gets none: the copy is a normal tensor by itself, and the host copies weights from main memory layer by layer.

    Code that enters inference mode again (a ControlNet here, tiling in other packs) computes nothing for autograd and is left
    alone. Inference tensors change nowhere else, so after such code every clone counts as stale.
    """

    def __init__(self) -> None:
        super().__init__()
        self._clones = WeakTensorKeyDictionary()

    def _clone(self, value: Tensor) -> Tensor:
        if value not in self._clones:
            self._clones[value] = value.clone()
        return self._clones[value]

    def _normal(self, value):
        if isinstance(value, Tensor):
            return self._clone(value) if value.is_inference() else value
        if type(value) in (list, tuple) and any(isinstance(item, Tensor) for item in value):
            return type(value)(self._normal(item) for item in value)
        return value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled():
            self._clones.clear()
            return func(*args, **(kwargs or {}))
        if func is torch.empty_like or func is Tensor.copy_ and not args[0].is_inference():
            return func(*args, **(kwargs or {}))
        if func is Tensor.to and (copied := func(*args, **(kwargs or {}))) is not args[0]:
            return copied
        args = tuple(map(self._normal, args))
        kwargs = {name: self._normal(value) for name, value in kwargs.items()} if kwargs else {}
        return func(*args, **kwargs)


def replace_inference_weights(module: torch.nn.Module) -> None:
    """Puts a normal clone in the place of each parameter and buffer that is an inference tensor.

    One at a time, so one layer of extra memory. The values stay the same bit for bit; the module is not differentiable with
    respect to them. Weights that the host keeps in main memory and moves for each use stay as they are: the moved copies are
    normal tensors, and the originals may be pinned. Must run outside inference mode.
    """
    device = getattr(module, "device", torch.device("cpu"))
    for part in module.modules():
        moved = getattr(part, "comfy_cast_weights", False)
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference() and not (moved and parameter.device.type != device.type):
                part._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()


@contextlib.contextmanager
def _host_global(name: str, value) -> Iterator[None]:
    """Sets a global of the host's model management for a while."""
    before = getattr(comfy.model_management, name)
    setattr(comfy.model_management, name, value)
    try:
        yield
    finally:
        setattr(comfy.model_management, name, before)


@contextlib.contextmanager
def differentiable(model: torch.nn.Module) -> Iterator[InPlaceWriteTracker]:
    """Inside, forward passes through `model` (the host's BaseModel) can be differentiated w.r.t. their input.

    Lifts inference mode, keeps tensors that are later updated in place (residual streams) right for backward,
    and restores every global on the way out, also after an exception or an interrupt. Gives an object whose `paused()`
    a backward pass may run in.

    `in_training` has the host pick kernels that have a derivative (rotary embedding). Without `NUM_STREAMS` the host moves
    offloaded weights on the compute stream, each into memory of its own: its other streams write one layer's weights over
    those of an earlier layer, which backward still needs, in buffers that may be inference tensors.
    """
    with (torch.inference_mode(False), torch.enable_grad(), _host_global("in_training", True), _host_global("NUM_STREAMS", 0)):
        replace_inference_weights(model)
        with NormalTensors(), mutation_of_saved_tensors() as writes:
            yield writes


REACH = 2.0 ** 10
"""Largest gradient at the maps while it passes through the model."""


def scaled_gradient(loss: Tensor, judged: Sequence[Tensor], maps: Sequence[Tensor], latent: Tensor) -> Tensor:
    """d loss / d latent, [B, ...], for a `loss` [B] of the leaves `judged`, equal to the `maps` [B, ...] made of `latent`.

    A loss near 0 has a gradient so small that half precision rounds it to 0 inside the model. So the gradient at the maps,
    which is in single precision, goes on multiplied by a power of two, a picture each, which is taken out at the end.
    """
    at_maps = torch.autograd.grad(loss.sum(), judged)
    largest = torch.stack([part.abs().flatten(1).amax(dim=1) for part in at_maps]).amax(dim=0)
    usable = largest.isfinite() & (largest > 0)
    scale = torch.where(usable, 2.0 ** torch.log2(REACH / torch.where(usable, largest, 1.0)).floor(), 1.0)
    upward = [part * scale.view(-1, *[1] * (part.ndim - 1)) for part in at_maps]
    found, = torch.autograd.grad(maps, latent, upward)
    return found.detach() / scale.view(-1, *[1] * (found.ndim - 1)).to(found.dtype)


def differentiable_attention(func: Callable, *args, **kwargs) -> Tensor:
    """An `optimized_attention_override` with a derivative, whatever fast kernel the user chose for sampling."""
    return host_attention.attention_pytorch(*args, **kwargs)


class _RecomputedBlock(torch.autograd.Function):
    """A block whose activations are computed again for backward.

    `torch.utils.checkpoint` would be silently wrong here: the host's blocks update their input in place.
    So the block always works on copies, and the maps that it records leave as outputs of their own.
    """

    @staticmethod
    def forward(ctx, block: Recomputation, layers: list[LayerMaps], *inputs: Tensor):
        ctx.block = block
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        outputs, recorded = block.run([value.clone() for value in inputs])
        layers.extend(recorded)
        return (*outputs, *(layer.maps for layer in recorded))

    @staticmethod
    def backward(ctx, *gradients: Tensor | None):
        inputs = [value.detach().requires_grad_() for value in ctx.saved_tensors]
        with torch.enable_grad(), NormalTensors(), mutation_of_saved_tensors() as writes:
            outputs, recorded = ctx.block.run([value.clone() for value in inputs])
            results = [*outputs, *(layer.maps for layer in recorded)]
            wanted = [(result, gradient) for result, gradient in zip(results, gradients, strict=True)
                      if gradient is not None and result.requires_grad]
            with writes.paused():
                found = torch.autograd.grad([result for result, _ in wanted], inputs, [g for _, g in wanted],
                                            allow_unused=True)
        return None, None, *found


def recompute(run: Callable[..., Sequence[Tensor]], recorder: MapRecorder, *inputs: Tensor) -> Sequence[Tensor]:
    """`run(*inputs)` without keeping its activations; what it records arrives in `recorder` as usual.

    run: from tensors to a sequence of tensors, pure apart from recording; differentiated w.r.t. `inputs` only.
    """
    if not torch.is_grad_enabled() or not any(value.requires_grad for value in inputs):
        return run(*inputs)

    def run_apart(copies: list[Tensor]) -> tuple[Sequence[Tensor], list[LayerMaps]]:
        with recorder.apart() as recorded:
            return run(*copies), recorded

    layers: list[LayerMaps] = []
    results = _RecomputedBlock.apply(open_scope().keep_function(run_apart), layers, *inputs)
    count = len(results) - len(layers)
    for layer, maps in zip(layers, results[count:], strict=True):
        recorder.layers.append(LayerMaps(layer.name, layer.order, maps))
    return results[:count]


class FrozenControl:
    """A ControlNet seen as constant: its residuals do not depend on the latent for the gradient.

    It runs as the host runs it; what it adds is held fixed while the latent is moved, which saves the memory of a
    second backward pass. Everything else is the wrapped control's own.
    """

    def __init__(self, control, recorder: MapRecorder):
        self._control, self._recorder = control, recorder

    def __getattr__(self, name: str):
        return getattr(self._control, name)

    def get_control(self, x_noisy: Tensor, *args, **kwargs):
        active, self._recorder.active = self._recorder.active, False
        try:
            with torch.inference_mode(), _host_global("in_training", False):
                return self._control.get_control(x_noisy.detach(), *args, **kwargs)
        finally:
            self._recorder.active = active
