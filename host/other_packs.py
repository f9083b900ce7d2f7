"""Names the patches of other packs on a MODEL, for messages about conflicts."""
from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping

from comfy.patcher_extension import WrappersMP

OWN_PACKAGE = __name__.rsplit(".", 2)[0]
AROUND_A_PASS = (WrappersMP.CALC_COND_BATCH, WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL)


def name_of(patch: object) -> str:
    """Module and qualified name of a function, method or object. The path that the host prefixes to a pack is left out."""
    while isinstance(patch, functools.partial):
        patch = patch.func
    named = patch if hasattr(patch, "__qualname__") else type(patch)
    module = str(getattr(named, "__module__", "")).replace("\\", "/").rsplit("/", 1)[-1]
    return f"{module}.{named.__qualname__}".replace(".<locals>", "").lstrip(".")


def patches_in_the_way(model_options: Mapping) -> tuple[str, ...]:
    """"place (name)" of each patch of another pack or the host that takes part in an evaluation of the model."""
    found = (f"{place} ({name_of(patch)})" for place, patch in _patches(model_options)
             if not str(getattr(patch, "__module__", "")).startswith(OWN_PACKAGE))
    return tuple(dict.fromkeys(found))


def what_to_do(model_options: Mapping) -> str:
    """Advice for an error message: names the patches on the MODEL and says to remove them."""
    found = patches_in_the_way(model_options)
    if not found:
        return "No other pack's patch was found on this MODEL, so look for a pack that replaces ComfyUI's own functions."
    return f"On this MODEL stand: {', '.join(found)}. Take what comes from another pack off the MODEL's line to the sampler."


def _patches(model_options: Mapping) -> Iterator[tuple[str, Callable]]:
    options = model_options.get("transformer_options", {})
    for place, patch in (("model_function_wrapper", model_options.get("model_function_wrapper")),
                         ("context_handler", model_options.get("context_handler")),
                         ("optimized_attention_override", options.get("optimized_attention_override"))):
        if patch is not None:
            yield place, patch
    for place, patches in options.get("patches", {}).items():
        for patch in patches:
            yield place, patch[1] if isinstance(patch, tuple) else patch
    for place, patches in options.get("patches_replace", {}).items():
        for patch in patches.values():
            yield f"{place} replacement", patch
    for kind in AROUND_A_PASS:
        for patches in options.get("wrappers", {}).get(kind, {}).values():
            for patch in patches:
                yield f"{kind} wrapper", patch
