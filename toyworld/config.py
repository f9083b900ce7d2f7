"""Shapes of the small models and of their files."""
from __future__ import annotations

from dataclasses import dataclass

FORMAT = "learn-to-steer small world 1"
"""Value of the key `format` in the metadata of an exported file."""

LENGTH = 77
START, END = 49406, 49407
VOCABULARY = 49408
"""Prompt length, start and end token and number of tokens of the real CLIP tokenizer."""

TEXT_CONFIG = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256,
               "hidden_act": "gelu", "max_position_embeddings": LENGTH, "eos_token_id": END}
"""In the form that `comfy.sd1_clip.SDClipModel` takes as `textmodel_json_config`."""

UNET_CHANNELS = 24
UNET_CONFIG = {
    "image_size": 32, "in_channels": UNET_CHANNELS, "out_channels": UNET_CHANNELS, "model_channels": 64,
    "channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": TEXT_CONFIG["hidden_size"],
    "num_heads": -1, "num_head_channels": 32, "use_spatial_transformer": True, "use_linear_in_transformer": True,
    "adm_in_channels": None, "use_temporal_attention": False, "legacy": False,
}
"""ComfyUI's UNetModel: a 16x16 and an 8x8 level with one residual block and one transformer each."""
UNET_SAMPLING: dict = {}
"""The noise schedule of Stable Diffusion as it is."""
UNET_DEVIATION = 0.35
"""Of the UNet's latents. Their neighbouring cells say much the same, so at a deviation of 1 everything would be decided in
the schedule's noisiest steps, and broad areas of one colour would shine through its very first."""

FLUX_CHANNELS = 16
FLUX_DEVIATION = 1.0
FLUX_PREFIX = "model.diffusion_model."
FLUX_TOKENS = 32
"""The FLUX model sees the first 32 tokens; the text transformer is causal, so they do not depend on the rest."""
FLUX_SHIFT = 10.0
"""Of the sampling schedule towards noise (FLUX.1 dev's: 3): what stands where is decided where nine tenths are noise."""
FLUX_CONFIG = {
    "in_channels": FLUX_CHANNELS, "out_channels": FLUX_CHANNELS, "patch_size": 2, "hidden_size": 256, "num_heads": 2,
    "axes_dim": [16, 56, 56], "theta": 10000, "mlp_ratio": 4.0, "depth": 1, "depth_single_blocks": 3,
    "context_in_dim": TEXT_CONFIG["hidden_size"], "vec_in_dim": TEXT_CONFIG["hidden_size"], "qkv_bias": True,
    "guidance_embed": False, "txt_ids_dims": [],
}
"""ComfyUI's Flux, in a shape that the host detects from the state dict (as a FLUX.1-schnell: no guidance embedding)."""


@dataclass(frozen=True)
class Sampling:
    """Settings of the stock KSampler."""

    steps: int
    cfg: float
    sampler: str
    scheduler: str


SAMPLING = {"unet": Sampling(25, 3.5, "euler_ancestral", "ddim_uniform"),
            "flux": Sampling(25, 4.5, "euler_ancestral", "simple")}
"""By backbone: how the small models are sampled in workflows, benchmarks and tests.

The fresh noise of an ancestral sampler mends what a small model got wrong in earlier steps: far fewer doubled objects."""

STEERING: dict[str, dict[str, float]] = {
    "unet": {}, "flux": {"end": 0.6, "step_size": 5.0, "stop_probability": 0.97, "compactness": 1.5}}
"""By backbone: where workflows and benchmarks steer with other settings than the defaults (names of SteeringSettings)."""
STEERING_LEARNED: dict[str, dict[str, float]] = {"unet": {}, "flux": {"compactness": 0.0}}
"""By backbone: what differs from STEERING with a trained classifier."""

RULE: dict[str, str | None] = {"unet": None, "flux": "toyworld_flux_geometric"}
"""By backbone: the shipped geometric classifier that workflows use, None for the built-in one."""
