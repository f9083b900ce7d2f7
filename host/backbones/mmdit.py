"""Joint-attention transformers of the FLUX.1 family (dev, schnell, Kontext).

Text and image tokens share one attention; its image-query x text-key part is the cross-attention of the paper. Each
block is called through the host's `patches_replace["dit"]`, which knows the number of text tokens. An
`optimized_attention_override` set for that block alone receives q and k after rotary embedding. Only a wrapper around the
network (`WrappersMP.DIFFUSION_MODEL`) knows the shape of the latent, because tokens of reference latents follow the
picture's.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from types import CellType, FunctionType

from comfy.ldm.flux.model import Flux
from comfy.patcher_extension import WrappersMP
from torch import Tensor
from torch.nn import Module

from ...steering.attention import MapRecorder
from ..gradient import recompute
from ..other_packs import name_of

SHAPE_KEY = "learn_to_steer_shape"  # in transformer_options: shape [N, C, H, W] of the network's input latents
OVERRIDE_KEY = "optimized_attention_override"  # the host's single slot, see comfy.ldm.modules.attention.wrap_attn


class MMDiTBackbone:
    name = "mmdit"
    streams = ("t5xxl", "l", "h")

    def matches(self, diffusion_model) -> bool:
        """FLUX.1 only: FLUX.2, Ovis and LongCat share the class but not modulation, text encoder or text positions."""
        if not isinstance(diffusion_model, Flux):
            return False
        params = diffusion_model.params
        return not (params.global_modulation or params.txt_norm or params.yak_mlp or params.txt_ids_dims)

    def layers(self, diffusion_model) -> int:
        return len(diffusion_model.double_blocks) + len(diffusion_model.single_blocks)

    def instrument(self, diffusion_model, options: dict, recorder: MapRecorder, recompute_blocks: bool) -> dict:
        options = dict(options)
        replace = dict(options.get("patches_replace", {}))
        dit = dict(replace.get("dit", {}))
        blocks = {("double_block", index): block for index, block in enumerate(diffusion_model.double_blocks)}
        blocks.update({("single_block", index): block for index, block in enumerate(diffusion_model.single_blocks)})
        for order, (key, block) in enumerate(blocks.items()):
            dit[key] = _replacement(diffusion_model, key, order, block, dit.get(key), recorder, recompute_blocks)
        options["patches_replace"] = {**replace, "dit": dit}

        wrappers = dict(options.get("wrappers", {}))
        around_network = dict(wrappers.get(WrappersMP.DIFFUSION_MODEL, {}))
        around_network[SHAPE_KEY] = [_note_shape]
        options["wrappers"] = {**wrappers, WrappersMP.DIFFUSION_MODEL: around_network}
        return options


def _note_shape(executor, x, timestep, context, y, guidance, ref_latents, control, transformer_options, **kwargs):
    options = {**transformer_options, SHAPE_KEY: tuple(x.shape)}
    return executor(x, timestep, context, y, guidance, ref_latents, control, options, **kwargs)


def _replacement(network: Flux, key: tuple[str, int], order: int, block: Module, theirs: Callable | None, recorder: MapRecorder,
                 recompute_blocks: bool) -> Callable:
    """A replacement of one block that records its attention. It calls `theirs`, another pack's replacement, if there is one.

    With recomputation, `theirs` runs a second time in backward.
    """
    double = key[0] == "double_block"
    streams = ("img", "txt") if double else ("img",)  # single blocks hold text and image in "img", text first
    name = ".".join(map(str, key))

    def replacement(args: dict, extra: dict) -> dict:
        options = args.get("transformer_options") or {}
        if SHAPE_KEY not in options or not double and "img_slice" not in options:
            recorder.miss(f"{_foreign_forward(network)} runs the model's blocks without ComfyUI's options", options)
            return extra["original_block"](args) if theirs is None else theirs(args, extra)
        original = _bound_to(block, extra["original_block"]) if recompute_blocks else extra["original_block"]
        text = args["txt"].shape[1] if double else options["img_slice"][0]
        override = _recording(name, order, text, network.patch_size, options.get(OVERRIDE_KEY), recorder)
        options = {**options, OVERRIDE_KEY: override}
        # Without the hidden states, which a closure kept for backward would hold in memory.
        constants = {name: value for name, value in args.items() if name not in streams}

        def run(*hidden: Tensor) -> tuple[Tensor, ...]:
            given = {**constants, **dict(zip(streams, hidden, strict=True)), "transformer_options": dict(options)}
            out = original(given) if theirs is None else theirs(given, {"original_block": original})
            if any(value.requires_grad for value in hidden) and not out["img"].requires_grad:
                raise RuntimeError(f"Another pack on this model's line replaces {name} and cuts the gradient there. Take that "
                                   "pack out while steering.")
            return tuple(out[stream] for stream in streams)

        hidden = tuple(args[stream] for stream in streams)
        results = recompute(run, recorder, *hidden) if recompute_blocks else run(*hidden)
        return dict(zip(streams, results, strict=True))

    return replacement


def _foreign_forward(network: Flux) -> str:
    """Name of the function that replaced the host's own forward and calls the blocks."""
    for method in ("forward_orig", "_forward", "forward"):
        found = getattr(network, method)
        if getattr(found, "__func__", found) is not getattr(Flux, method):
            return name_of(found)
    return "another pack"


def _bound_to(block: Module, block_wrap: Callable) -> Callable:
    """The host's `block_wrap`, bound to the current values of the variables in its closure.

    Those are loop variables: in backward, the original would run the network's last block.
    Raises RuntimeError where the function does not close over `block`, because then the block that it runs is unknown.
    """
    held = [cell.cell_contents for cell in getattr(block_wrap, "__closure__", None) or ()]
    if not isinstance(block_wrap, FunctionType) or not any(value is block for value in held):
        raise RuntimeError("This ComfyUI calls the blocks of FLUX in a way that this version of Learn to Steer does not support, "
                           "so it cannot recompute them. Switch save_memory off (it also switches itself on for weights that "
                           "are cast or offloaded), or install a newer version of the pack.")
    return FunctionType(block_wrap.__code__, block_wrap.__globals__, block_wrap.__name__, block_wrap.__defaults__,
                        tuple(map(CellType, held)))


def _recording(name: str, order: int, text: int, patch_size: int, theirs: Callable | None, recorder: MapRecorder) -> Callable:
    def override(func, q, k, v, heads, *args, **kwargs):
        options: Mapping = kwargs.get("transformer_options") or {}
        if SHAPE_KEY in options:
            shape = options[SHAPE_KEY]
            grid = tuple(-(-side // patch_size) for side in shape[-2:])  # the host pads up to whole patches
            picture = slice(text, text + grid[0] * grid[1])
            recorder.record(name, order, q[:, :, picture], k[:, :, :text], grid, shape, options)
        if theirs is not None:
            return theirs(func, q, k, v, heads, *args, **kwargs)
        return func(q, k, v, heads, *args, **kwargs)

    return override
