"""Makes the host's model differentiable for one evaluation, then restores it.

The host runs nodes in inference mode, with in-place updates and with kernels that have no derivative.
`differentiable` works around all three. `recompute` trades time for memory, block by block.
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
    """Replaces the inference tensors among an operation's arguments by normal clones.

    Autograd refuses to save inference tensors for backward. Conditioning, image-prompt adapters and closures of other packs
    hold such tensors out of our reach. Each inference tensor gets one clone, which is freed together with it. An operation
    that only copies its argument needs no clone, because the copy is a normal tensor. This matters for weights, which the host
    copies from main memory layer by layer.

    Code that enters inference mode again (a ControlNet here, tiling in other packs) takes no part in autograd and runs
    unchanged. Only such code can write to an inference tensor, so all clones are dropped after it.
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
    """Replaces each parameter and buffer that is an inference tensor by a normal clone with the same bits.

    Clones are made one at a time, so the extra memory is one tensor.
    Weights that the host keeps in main memory and moves for each use stay as they are: moved weights are normal tensors, and
    the originals may be pinned. Must be called outside inference mode.
    """
    device = getattr(module, "device", torch.device("cpu"))
    for part in module.modules():
        moved = getattr(part, "comfy_cast_weights", False)
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_inference() and not (moved and parameter.device.type != device.type):
                part._parameters[name] = torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.is_inference():
                part._buffers[name] = buffer.clone()


@contextlib.contextmanager
def _constant_weights(module: torch.nn.Module) -> Iterator[None]:
    """Inside the context no weight requires a gradient, so autograd saves no activations for one.

    Older hosts load weights that require a gradient; so do some packs.
    """
    requiring = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in requiring:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        with torch.inference_mode():  # elsewhere an inference tensor can't be made to require a gradient again
            for parameter in requiring:
                parameter.requires_grad_(True)


@contextlib.contextmanager
def _host_global(name: str, value) -> Iterator[None]:
    """Sets a global of the host's model management, and restores it on exit."""
    before = getattr(comfy.model_management, name)
    setattr(comfy.model_management, name, value)
    try:
        yield
    finally:
        setattr(comfy.model_management, name, before)


@contextlib.contextmanager
def differentiable(model: torch.nn.Module) -> Iterator[InPlaceWriteTracker]:
    """Inside the context, forward passes through `model` (the host's BaseModel) are differentiable w.r.t. their input.

    The context leaves inference mode and protects tensors saved for backward from in-place updates (residual streams). It
    restores every global on exit, also after an exception or an interrupt. A backward pass may run inside the yielded
    tracker's `paused()`.

    `in_training` makes the host choose kernels that have a derivative (rotary embedding). With `NUM_STREAMS` = 0 the host
    moves offloaded weights on the compute stream, each into memory of its own. Its offload streams reuse buffers, which may be
    inference tensors: one layer's weights would overwrite those of an earlier layer, which backward still needs.
    """
    with (torch.inference_mode(False), torch.enable_grad(), _host_global("in_training", True), _host_global("NUM_STREAMS", 0)):
        replace_inference_weights(model)
        with _constant_weights(model), NormalTensors(), mutation_of_saved_tensors() as writes:
            yield writes


REACH = 2.0 ** 10
"""Upper bound on the gradient at the maps when it enters the model's backward pass."""


def scaled_gradient(loss: Tensor, judged: Sequence[Tensor], maps: Sequence[Tensor], latent: Tensor) -> Tensor:
    """d loss / d latent, [B, ...].

    loss: [B], computed from `judged`. judged: leaf copies of `maps`. maps: [B, ...], computed from `latent`.

    Near a loss of 0 the gradient is so small that half precision rounds it to 0 inside the model. The gradient at the maps is
    in single precision; it is scaled by a power of two per picture, sent through the model, and scaled back at the end.
    """
    at_maps = torch.autograd.grad(loss.sum(), judged)
    largest = torch.stack([part.abs().flatten(1).amax(dim=1) for part in at_maps]).amax(dim=0)
    usable = largest.isfinite() & (largest > 0)
    scale = torch.where(usable, 2.0 ** torch.log2(REACH / torch.where(usable, largest, 1.0)).floor(), 1.0)
    upward = [part * scale.view(-1, *[1] * (part.ndim - 1)) for part in at_maps]
    found, = torch.autograd.grad(maps, latent, upward)
    return found.detach() / scale.view(-1, *[1] * (found.ndim - 1)).to(found.dtype)


def differentiable_attention(func: Callable, *args, **kwargs) -> Tensor:
    """An `optimized_attention_override` with a derivative, regardless of the kernel chosen for sampling."""
    return host_attention.attention_pytorch(*args, **kwargs)


class _RecomputedBlock(torch.autograd.Function):
    """A block whose activations are recomputed in backward.

    `torch.utils.checkpoint` would give silently wrong gradients, because the host's blocks update their input in place.
    Here the block works on copies of its inputs, and the recorded maps are outputs of the function.
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
    """`run(*inputs)`, recomputed in backward instead of keeping its activations. Its maps reach `recorder` as usual.

    run: from tensors to a sequence of tensors; pure apart from recording. It is differentiated w.r.t. `inputs` only.
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
    """A ControlNet whose residuals count as constants in the gradient.

    The ControlNet runs in inference mode, as in the host, which saves the memory of a second backward pass. All other
    attributes are those of the wrapped control.
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
