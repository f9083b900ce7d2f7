"""Writes model files of real width with random weights, under the names used in the workflows.

    python full_width.py sd21|flux MODELS_FOLDER

Run it in its own process (COMFYUI_PATH set), so that its memory is released.
FLUX has 1 of its 19 double and 2 of its 38 single blocks. T5-XXL has all layers, in fp8, as the workflows advise for little
memory. Only its embedding and first block hold values; the rest of the file is sparse and reads as zeros.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from dev.standalone import load_pack

load_pack()

import comfy.clip_model  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.text_encoders.sd2_clip  # noqa: E402
import comfy.text_encoders.t5  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.ldm.models.autoencoder import AutoencoderKL  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from dev.benchmarks.passes import FLUX_DEV, SD21, random_unet  # noqa: E402

KL = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
      "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
"""The autoencoder of Stable Diffusion."""
TYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3"}
LORA = {  # layer: (inputs, outputs); names as the usual trainers write them
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_q": (320, 320),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (1024, 320),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_v": (1024, 1280),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (1024, 1024),
}


def fill(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Small random matrices, norms as at the beginning of training."""
    if tensor.ndim > 1:
        return tensor.normal_(std=0.5 * tensor[0].numel() ** -0.5)
    return tensor.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in module.named_parameters():
        parameter.data = fill(name, parameter.data.half())
    return module


def write_sd21(models: Path) -> None:
    model = random_unet(SD21, dtype=torch.float16, fill=filled)
    target = comfy.supported_models_base.ClipTarget(comfy.text_encoders.sd2_clip.SD2Tokenizer,
                                                    comfy.text_encoders.sd2_clip.SD2ClipModel)
    clip = comfy.sd.CLIP(target, parameters=1, disable_dynamic=True)
    filled(clip.cond_stage_model)
    vae = comfy.sd.VAE(sd=filled(AutoencoderKL(ddconfig=KL, embed_dim=4)).state_dict())
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(place(models, "checkpoints/v2-1_512-ema-pruned")), model, clip, vae)
    matrices = {}
    for layer, (inputs, outputs) in LORA.items():
        matrices[f"{layer}.lora_down.weight"] = torch.randn(2, inputs).half() * inputs ** -0.5
        matrices[f"{layer}.lora_up.weight"] = torch.randn(outputs, 2).half() * 0.1
    save_file(matrices, place(models, "loras/my_dog_lora"))


def write_flux(models: Path) -> None:
    settings = {**FLUX_DEV, "depth": 1, "depth_single_blocks": 2}
    operations = comfy.ops.disable_weight_init
    host = Path(comfy.sd1_clip.__file__).parent
    with torch.device("meta"):  # names and shapes alone
        for name, guidance in (("dev", True), ("schnell", False)):
            network = Flux(**{**settings, "guidance_embed": guidance}, dtype=torch.bfloat16, operations=operations)
            write(place(models, f"diffusion_models/flux1-{name}"), network, torch.bfloat16)
        config = json.loads((host / "sd1_clip_config.json").read_text())
        clip = comfy.clip_model.CLIPTextModel(config, None, None, operations)
        write(place(models, "text_encoders/clip_l"), clip, torch.float16)
        config = json.loads((host / "text_encoders" / "t5_config_xxl.json").read_text())
        t5 = comfy.text_encoders.t5.T5(config, None, None, operations)
        write(place(models, "text_encoders/t5xxl_fp16"), t5, torch.float8_e4m3fn,
              lambda name: "norm" in name or name.startswith(("shared.", "encoder.block.0.")))
        vae = AutoencoderKL(ddconfig={**KL, "z_channels": 16}, embed_dim=16)
        del vae.quant_conv, vae.post_quant_conv  # FLUX's has none
        write(place(models, "vae/ae"), vae, torch.float16)


def write(file: Path, module: torch.nn.Module, dtype: torch.dtype, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Writes a safetensors file for a module on the meta device. Tensors that are not `wanted` stay sparse."""
    tensors, header, end = module.state_dict(), {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        start = out.tell()
        out.truncate(start + end)
        for name, tensor in tensors.items():
            if wanted(name):
                out.seek(start + header[name]["data_offsets"][0])
                values = fill(name, torch.empty(tensor.shape, dtype=torch.float16, device="cpu")).to(dtype)
                out.write(values.view(torch.uint8).numpy())


def place(models: Path, name: str) -> Path:
    file = models / f"{name}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


if __name__ == "__main__":
    {"sd21": write_sd21, "flux": write_flux}[sys.argv[1]](Path(sys.argv[2]))
