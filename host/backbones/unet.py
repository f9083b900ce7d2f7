"""UNets of the Stable Diffusion family: cross-attention in spatial transformers (SD1.x, SD2.x, SDXL).

Maps are read in the host's `patches_replace["attn2"]`, which also sees the q and k of packs that replace the
cross-attention (image-prompt adapters call attention without the host's options, so an attention override would
miss them). Recomputation uses the host's `forward_timestep_embed_patch`.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator

import comfy.ldm.modules.attention as host_attention
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel

from ...steering.attention import MapRecorder, split_heads
from ..gradient import recompute

BlockKey = tuple[str, int, int]


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
        if recompute_blocks:
            patches = dict(options.get("patches", {}))
            theirs = patches.get("forward_timestep_embed_patch", [])
            patches["forward_timestep_embed_patch"] = [
                (kind, _recomputing(theirs, recorder)) for kind in (ResBlock, SpatialTransformer)] + list(theirs)
            options["patches"] = patches
        return options


def _cross_attentions(diffusion_model: UNetModel) -> Iterator[BlockKey]:
    """Keys of all cross-attentions in execution order, as the host asks for them in `patches_replace`."""
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
                raise RuntimeError(f"The cross-attention replacement in block {name} cuts the gradient: it comes from "
                                   "another pack on this model's line. Take that pack out while steering.")
            return out
        return host_attention.optimized_attention(q, k, v, heads, attn_precision=extra_options.get("attn_precision"),
                                                  transformer_options=extra_options)

    return attend


def _recomputing(theirs: list, recorder: MapRecorder) -> Callable:
    """Stands where the host calls a layer of a block; the first matching handler of another pack still runs it."""

    def handler(layer, x, emb, context, options, output_shape, time_context, num_video_frames, image_only_indicator):
        other = next((handle for kind, handle in theirs if isinstance(layer, kind)), None)
        frozen = dict(options)  # the host goes on changing its own: block and index belong to this call

        def run(x, emb):
            if other is not None:
                return (other(layer, x, emb, context, dict(frozen), output_shape, time_context, num_video_frames,
                              image_only_indicator),)
            if isinstance(layer, ResBlock):
                return (layer(x, emb),)
            return (layer(x, context, dict(frozen)),)

        (out,) = recompute(run, recorder, x, emb)
        if other is None and isinstance(layer, SpatialTransformer) and "transformer_index" in options:
            options["transformer_index"] += 1  # the host skips its own count for a patched layer
        return out

    return handler
