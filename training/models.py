"""Loads MODEL, CLIP and VAE for the command line with the host's loaders."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import comfy.sd
import comfy.utils

from ..toyworld.models import LOADERS, read_kind
from .storage import TrainingError

SMALL_WORLD = "small-world"


def load_models(model: str, clip: Sequence[Path] | None, clip_type: str, vae: Path | None) -> tuple:
    """Loads (MODEL, CLIP, VAE).

    model: "small-world" (the small UNet), "small-world:flux", "small-world:FILE" (other weights of either), a checkpoint file
        with all three inside, or a diffusion model file, which needs `clip` and `vae`.
    Raises TrainingError where files are missing.
    """
    name, _, which = model.partition(":")
    if name == SMALL_WORLD and (not which or which in LOADERS):
        return LOADERS[which or "unet"]()
    if name == SMALL_WORLD:
        return LOADERS[read_kind(Path(which))](Path(which))
    missing = [str(file) for file in (Path(model), *(clip or ()), *([vae] if vae else ())) if not Path(file).is_file()]
    if missing:
        raise TrainingError(f"There is no file {', '.join(missing)}.")
    if not clip and not vae:
        loaded = comfy.sd.load_checkpoint_guess_config(model, output_vae=True, output_clip=True)[:3]
        if None in loaded:
            raise TrainingError(f"{model} does not hold a model, text encoder and VAE together. Name the others with "
                                "--clip and --vae.")
        return loaded
    if not clip or not vae:
        raise TrainingError("A diffusion model file needs both --clip and --vae.")
    kinds = {kind.name.lower(): kind for kind in comfy.sd.CLIPType}
    if clip_type.lower() not in kinds:
        raise TrainingError(f"--clip-type {clip_type!r} is unknown to the host; it knows {', '.join(sorted(kinds))}.")
    return (comfy.sd.load_diffusion_model(model),
            comfy.sd.load_clip([str(file) for file in clip], clip_type=kinds[clip_type.lower()]),
            comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(vae))))
