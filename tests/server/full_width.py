"""Writes model files at the real widths with random weights, under the names that the workflows ask for.

    python full_width.py sd21|flux MODELS_FOLDER

Run as a process of its own (COMFYUI_PATH set), so that its memory is given back. FLUX has 2 of its 19 double blocks and 4 of
its 38 single blocks. T5-XXL would have 4.7 GB: its matrices are holes of a sparse file, so zeros, which makes its blocks do
nothing; its embedding and norms are there.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

from standalone import load_pack

load_pack()

import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.text_encoders.sd2_clip  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine  # noqa: E402
from comfy.sd1_clip import SDClipModel  # noqa: E402
from comfy.text_encoders.t5 import T5  # noqa: E402
from learn_to_steer.benchmarks.passes import SD21, random_flux, random_unet  # noqa: E402

ROOT = Path(comfy.__path__[0])
KL = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
      "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
"""The autoencoder of Stable Diffusion; FLUX's has 16 channels."""


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


def write_flux(models: Path) -> None:
    def save(folder: str, name: str, state: dict) -> None:
        (models / folder).mkdir(parents=True, exist_ok=True)
        comfy.utils.save_torch_file({key: value.contiguous() for key, value in state.items()}, str(models / folder / name))

    save("diffusion_models", "flux1-dev.safetensors", random_flux().model.diffusion_model.state_dict())
    decoder = {"target": "comfy.ldm.modules.diffusionmodules.model.Decoder", "params": {**KL, "z_channels": 16}}
    encoder = {"target": "comfy.ldm.modules.diffusionmodules.model.Encoder", "params": {**KL, "z_channels": 16}}
    plain = {"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"}
    save("vae", "ae.safetensors", filled(AutoencodingEngine(encoder_config=encoder, decoder_config=decoder,
                                                            regularizer_config=plain)).state_dict())
    text = filled(SDClipModel(device="cpu", dtype=torch.float16)).transformer.state_dict()
    save("text_encoders", "clip_l.safetensors", text)
    write_t5(models / "text_encoders" / "t5xxl_fp16.safetensors")


def write_t5(path: Path) -> None:
    """A safetensors file of fp8 tensors: small ones written, large ones left as holes."""
    config = json.loads((ROOT / "text_encoders" / "t5_config_xxl.json").read_text())
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in
                  T5(config, dtype=torch.float16, device="meta", operations=comfy.ops.disable_weight_init).state_dict().items()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        header[name] = {"dtype": "F8_E4M3", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name, shape in shapes.items():
            if len(shape) == 1 or name == "shared.weight":
                value = torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * 0.5
                file.seek(8 + len(head) + header[name]["data_offsets"][0])
                file.write(value.to(torch.float8_e4m3fn).view(torch.uint8).numpy().tobytes())
        file.truncate(8 + len(head) + offset)


if __name__ == "__main__":
    {"sd21": write_sd21, "flux": write_flux}[sys.argv[1]](Path(sys.argv[2]))
