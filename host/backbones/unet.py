"""UNets of the Stable Diffusion family: cross-attention in spatial transformers (SD1.x, SD2.x, SDXL).

Maps are recorded in the host's `patches_replace["attn2"]`, which also receives the q and k of packs that replace the
cross-attention. An attention override would miss those: image-prompt adapters call attention without the host's options.
Recomputation uses the host's `forward_timestep_embed_patch`. Older hosts call that patch for plain layers only; there it
uses a wrapper around the network.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import comfy.ldm.modules.attention as host_attention
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, TimestepBlock, UNetModel, forward_timestep_embed
from comfy.patcher_extension import WrappersMP

from ...steering.attention import MapRecorder, split_heads
from ..gradient import recompute

BlockKey = tuple[str, int, int]
WRAPPER_KEY = "learn_to_steer_recompute"


def _layer_patch_reaches_all() -> bool:
    """Whether this host calls `forward_timestep_embed_patch` for every layer of a block.

    Older hosts skip residual blocks and transformers.
    """

    class Layer(TimestepBlock):
        def forward(self, x, emb):
            return False

    options = {"patches": {"forward_timestep_embed_patch": [(Layer, lambda *_: True)]}}
    return forward_timestep_embed([Layer()], None, None, transformer_options=options)


LAYER_PATCH_REACHES_ALL = _layer_patch_reaches_all()


class UNetBackbone:
    name = "unet"
    streams = ("l", "g", "h")

    def matches(self, diffusion_model) -> bool:
        return isinstance(diffusion_model, UNetModel) and not any(
            isinstance(module, SpatialVideoTransformer) for module in diffusion_model.modules())

    def layers(self, diffusion_model) -> int:
        return sum(1 for _ in _cross_attentions(diffusion_model))

    def instrument(self, diffusion_model, options: dict, recorder: MapRecorder, recompute_blocks: bool) -> dict:
        options = dict(options)
        replace = dict(options.get("patches_replace", {}))
        attn2 = dict(replace.get("attn2", {}))
        for order, key in enumerate(_cross_attentions(diffusion_model)):
            attn2[key] = _recording(order, key, attn2.get(key, attn2.get(key[:2])), recorder)
        options["patches_replace"] = {**replace, "attn2": attn2}
        if recompute_blocks and not LAYER_PATCH_REACHES_ALL:
            wrappers = dict(options.get("wrappers", {}))
            theirs = wrappers.get(WrappersMP.DIFFUSION_MODEL, {})
            wrappers[WrappersMP.DIFFUSION_MODEL] = {**theirs, WRAPPER_KEY: [_recomputing_pass(recorder)]}
            options["wrappers"] = wrappers
        elif recompute_blocks:
            patches = dict(options.get("patches", {}))
            theirs = patches.get("forward_timestep_embed_patch", [])
            patches["forward_timestep_embed_patch"] = [
                (kind, _recomputing(theirs, recorder)) for kind in (ResBlock, SpatialTransformer)] + list(theirs)
            options["patches"] = patches
        return options


def _cross_attentions(diffusion_model: UNetModel) -> Iterator[BlockKey]:
    """Keys of all cross-attentions in `patches_replace`, in order of execution."""
    sections = (("input", diffusion_model.input_blocks), ("middle", [diffusion_model.middle_block]),
                ("output", diffusion_model.output_blocks))
    for section, blocks in sections:
        for number, block in enumerate(blocks):
            for layer in block or ():
                if isinstance(layer, SpatialTransformer):
                    for index, transformer in enumerate(layer.transformer_blocks):
                        if transformer.attn2 is not None:
                            yield section, number, index


def _recording(order: int, key: BlockKey, theirs: Callable | None, recorder: MapRecorder) -> Callable:
    name = ".".join(map(str, key))

    def attend(q, k, v, extra_options):
        heads = extra_options["n_heads"]
        if missing := [key for key in ("activations_shape", "original_shape") if key not in extra_options]:
            recorder.miss(f"another pack runs block {name} without ComfyUI's options ({', '.join(missing)})", extra_options)
        else:
            grid, shape = tuple(extra_options["activations_shape"][-2:]), extra_options["original_shape"]
            recorder.record(name, order, split_heads(q, heads), split_heads(k, heads), grid, shape, extra_options)
        if theirs is not None:
            out = theirs(q, k, v, extra_options)
            if q.requires_grad and not out.requires_grad:
                raise RuntimeError(f"Another pack on this model's line replaces the cross-attention in block {name} and cuts "
                                   "the gradient there. Take that pack out while steering.")
            return out
        return host_attention.optimized_attention(q, k, v, heads, attn_precision=extra_options.get("attn_precision"),
                                                  transformer_options=extra_options)

    return attend


def _recomputing(theirs: list, recorder: MapRecorder) -> Callable:
    """A layer handler that recomputes in backward. It calls the first handler of another pack that matches the layer."""

    def handler(layer, x, emb, context, options, output_shape, time_context, num_video_frames, image_only_indicator):
        their_handler = next((handle for kind, handle in theirs if isinstance(layer, kind)), None)
        frozen = dict(options)  # the host writes the next block and index into its dict before backward runs

        def run(x, emb):
            if their_handler is not None:
                return (their_handler(layer, x, emb, context, dict(frozen), output_shape, time_context, num_video_frames,
                                      image_only_indicator),)
            if isinstance(layer, ResBlock):
                return (layer(x, emb),)
            return (layer(x, context, dict(frozen)),)

        (out,) = recompute(run, recorder, x, emb)
        if their_handler is None and isinstance(layer, SpatialTransformer) and "transformer_index" in options:
            options["transformer_index"] += 1  # the host does not count a patched layer itself
        return out

    return handler


def _recomputing_pass(recorder: MapRecorder) -> Callable:
    """A wrapper around one pass through the network that gives every layer a recomputing `forward`."""

    def wrapper(executor, *args, **kwargs):
        with contextlib.ExitStack() as replaced_forwards:
            for layer in executor.class_obj.modules():
                if isinstance(layer, (ResBlock, SpatialTransformer)):
                    replaced_forwards.enter_context(_recomputing_forward(layer, recorder))
            return executor(*args, **kwargs)

    return wrapper


@contextlib.contextmanager
def _recomputing_forward(layer: ResBlock | SpatialTransformer, recorder: MapRecorder) -> Iterator[None]:
    """Gives this layer alone a `forward` that recomputes. The class is not changed."""
    before, original = vars(layer).get("forward"), layer.forward

    def residual(x, emb):
        return recompute(lambda x, emb: (original(x, emb),), recorder, x, emb)[0]

    def transformer(x, context=None, transformer_options=None):
        frozen = dict(transformer_options or {})  # the host changes its dict before backward runs
        return recompute(lambda x: (original(x, context, dict(frozen)),), recorder, x)[0]

    layer.forward = residual if isinstance(layer, ResBlock) else transformer
    try:
        yield
    finally:
        del layer.forward
        if before is not None:
            layer.forward = before
