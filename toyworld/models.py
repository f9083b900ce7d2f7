"""Loads the small models as ordinary MODEL, CLIP and VAE objects of the host, which every stock node accepts."""
from __future__ import annotations

import json
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import torch
from safetensors import safe_open

from .config import FLUX_PREFIX, FLUX_SHIFT, FLUX_TOKENS, FORMAT, LENGTH, TEXT_CONFIG, UNET_CONFIG, UNET_SAMPLING, VOCABULARY
from .latent import PATCH, PatchTransform
from .packing import unpack

WEIGHTS = Path(__file__).parent / "weights"


class SmallWorldLatent(comfy.latent_formats.LatentFormat):
    """Latent format of the patch transform: a quarter of the picture's side, no further scaling, colours for previews."""

    spacial_downscale_ratio = PATCH

    def __init__(self, transform: PatchTransform) -> None:
        self.latent_channels = transform.channels
        self.latent_rgb_factors, self.latent_rgb_factors_bias = transform.rgb_factors()


def _clip_class(length: int) -> type[comfy.sd1_clip.SD1ClipModel]:
    """A class of the host's CLIP with the small text transformer, for chunks of `length` tokens."""
    config = {**TEXT_CONFIG, "max_position_embeddings": length}

    class SmallText(comfy.sd1_clip.SDClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 (as the host's)
            super().__init__(device=device, dtype=dtype, model_options=model_options, max_length=length,
                             textmodel_json_config=dict(config), return_projected_pooled=False)

    class SmallClip(comfy.sd1_clip.SD1ClipModel):
        def __init__(self, device="cpu", dtype=None, model_options={}):  # noqa: B006 (as the host's)
            super().__init__(device=device, dtype=dtype, model_options=model_options, clip_model=SmallText)

    return SmallClip


def read_weights(path: Path, model: str) -> dict[str, torch.Tensor]:
    """The tensors of an exported file, unpacked. ValueError where the file is not one, is damaged, or holds another model."""
    remedy = ("Install the pack again; in a clone of its repository "
              f"`python dev.py run -m dev.toyworld.train {model}` trains the model anew.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except OSError as error:
        raise FileNotFoundError(f"Small-world weights {path} cannot be read ({error}). {remedy}") from error
    except Exception as error:
        raise ValueError(f"{path} is no safetensors file ({error}). {remedy}") from error
    if metadata.get("format") != FORMAT or metadata.get("model") != model:
        raise ValueError(f"{path} holds {metadata.get('model', 'no')!r} weights in format {metadata.get('format')!r}; "
                         f"expected {model!r} in {FORMAT!r}.")
    try:
        return unpack(tensors)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}. {remedy}") from error


def read_summary(path: Path) -> dict:
    """The training summary in the metadata of an exported file: seed, pictures, minutes, batch, threads."""
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["training"])


def read_kind(path: Path) -> str:
    """The kind of model in an exported file, a key of LOADERS. Raises ValueError for any other file."""
    with safe_open(path, framework="pt") as file:
        kind = (file.metadata() or {}).get("model")
    if kind not in LOADERS:
        raise ValueError(f"{path} holds no small-world model. It must be a file of `python dev.py run -m dev.toyworld.train`.")
    return kind


def part(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The tensors whose names begin with `prefix`, named without it."""
    return {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}


def build_transform(tensors: dict[str, torch.Tensor]) -> PatchTransform:
    state = part(tensors, "vae.")
    transform = PatchTransform(state["encode_weight"].shape[0])
    transform.load_state_dict(state)
    return transform.eval()


def build_clip(tensors: dict[str, torch.Tensor], length: int = LENGTH) -> comfy.sd.CLIP:
    """A CLIP with the host's tokenizer. Untrained tokens have the embedding 0."""
    prefix = "clip_l.transformer.text_model."
    state = {prefix + key: value for key, value in part(tensors, "text.").items()}
    rows = state[prefix + "embeddings.token_embedding.weight"]
    table = torch.zeros(VOCABULARY, rows.shape[1], dtype=rows.dtype)
    table[tensors["token_ids"].long()] = rows
    state[prefix + "embeddings.token_embedding.weight"] = table
    positions = prefix + "embeddings.position_embedding.weight"
    state[positions] = state[positions][:length]
    state["clip_l.transformer.text_projection.weight"] = torch.eye(rows.shape[1], dtype=rows.dtype)
    state["clip_l.logit_scale"] = torch.tensor(4.6055)
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, _clip_class(length))
    return comfy.sd.CLIP(target, state_dict=state, parameters=sum(value.numel() for value in state.values()),
                         tokenizer_data={"clip_l_max_length": length}, disable_dynamic=True)


def build_vae(tensors: dict[str, torch.Tensor]) -> comfy.sd.VAE:
    """A VAE around the patch transform. The host's class builds published VAEs only, so its parts are replaced here."""
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    transform = build_transform(tensors).to(vae.vae_dtype)
    vae.first_stage_model = transform
    vae.latent_channels = transform.channels
    vae.downscale_ratio = vae.upscale_ratio = PATCH
    offload = comfy.model_management.vae_offload_device()
    vae.patcher = comfy.model_patcher.ModelPatcher(transform, load_device=vae.device, offload_device=offload)
    return vae


def build_unet(tensors: dict[str, torch.Tensor]) -> comfy.model_patcher.ModelPatcher:
    """A v-prediction model of the Stable Diffusion 2 family, in fp32."""
    config = comfy.supported_models.SD20({**UNET_CONFIG, "dtype": torch.float32})
    config.unet_config["num_head_channels"] = UNET_CONFIG["num_head_channels"]
    config.latent_format = SmallWorldLatent(build_transform(tensors))
    config.sampling_settings = UNET_SAMPLING
    model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.V_PREDICTION)
    model.diffusion_model.load_state_dict({key: value.float() for key, value in part(tensors, "unet.").items()})
    device = comfy.model_management.get_torch_device()
    offload = comfy.model_management.unet_offload_device()
    return comfy.model_patcher.ModelPatcher(model.to(offload), load_device=device, offload_device=offload)


def load_unet_world(path: Path | None = None
                    ) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the small UNet. path: a file of weights, by default the shipped one."""
    tensors = read_weights(Path(path or WEIGHTS / "unet.safetensors"), "unet")
    return build_unet(tensors), build_clip(tensors), build_vae(tensors)


def build_flux(tensors: dict[str, torch.Tensor]) -> comfy.model_patcher.ModelPatcher:
    """The model as loaded by the host's "Load Diffusion Model", in fp32, with the small world's latent size."""
    state = {key: value for key, value in tensors.items() if key.startswith(FLUX_PREFIX)}
    options = {"dtype": torch.float32}
    model = comfy.sd.load_diffusion_model_state_dict(state, model_options=options, disable_dynamic=True)
    model.model.model_sampling.set_parameters(shift=FLUX_SHIFT, multiplier=1.0)
    latent_format = model.model.latent_format
    latent_format.spacial_downscale_ratio = PATCH
    transform = build_transform(tensors).restored(latent_format.scale_factor, latent_format.shift_factor)
    latent_format.latent_rgb_factors, latent_format.latent_rgb_factors_bias = transform.rgb_factors()
    return model


def load_flux_world(path: Path | None = None
                    ) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the small FLUX. Its chunks have 32 tokens."""
    tensors = read_weights(Path(path or WEIGHTS / "flux.safetensors"), "flux")
    return build_flux(tensors), build_clip(tensors, FLUX_TOKENS), build_vae(tensors)


LOADERS = {"unet": load_unet_world, "flux": load_flux_world}
"""Kind of small model -> its loader."""
