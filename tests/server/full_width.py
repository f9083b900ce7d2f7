"""Writes model files at the real widths with random weights, under the names that the workflows ask for.

    python full_width.py MODELS_FOLDER

Run as a process of its own (COMFYUI_PATH set), so that its memory is given back.
"""
from __future__ import annotations

import sys
from pathlib import Path

from standalone import load_pack

load_pack()

import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.text_encoders.sd2_clip  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402
from learn_to_steer.benchmarks.passes import SD21, random_unet  # noqa: E402

KL = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
      "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
"""The autoencoder of Stable Diffusion."""


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """Small random matrices, norms as at the beginning of training."""
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.half()
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.5 * parameter[0].numel() ** -0.5)
        else:
            parameter.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return module


def write_sd21(models: Path) -> None:
    model = random_unet(SD21, dtype=torch.float16, fill=filled)
    target = comfy.supported_models_base.ClipTarget(comfy.text_encoders.sd2_clip.SD2Tokenizer,
                                                    comfy.text_encoders.sd2_clip.SD2ClipModel)
    clip = comfy.sd.CLIP(target, parameters=1, disable_dynamic=True)
    filled(clip.cond_stage_model)
    vae = comfy.sd.VAE(sd=filled(AutoencoderKL(ddconfig=KL, embed_dim=4)).state_dict())
    folder = models / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(folder / "v2-1_512-ema-pruned.safetensors"), model, clip, vae)


if __name__ == "__main__":
    write_sd21(Path(sys.argv[1]))
