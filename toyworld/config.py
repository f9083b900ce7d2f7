"""Shapes and settings of the small models, and the format of their files."""
from __future__ import annotations

from dataclasses import dataclass

FORMAT = "learn-to-steer small world 1"
"""Value of `format` in the metadata of an exported file."""

LENGTH = 77
START, END = 49406, 49407
VOCABULARY = 49408
"""Prompt length, start and end token and number of tokens of the real CLIP tokenizer."""

TEXT_CONFIG = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 256,
               "hidden_act": "gelu", "max_position_embeddings": LENGTH, "eos_token_id": END}
"""The text transformer's configuration, in the form of SDClipModel's argument `textmodel_json_config`."""

UNET_CHANNELS = 24
UNET_CONFIG = {
    "image_size": 32, "in_channels": UNET_CHANNELS, "out_channels": UNET_CHANNELS, "model_channels": 64,
    "channel_mult": [1, 2], "num_res_blocks": [1, 1], "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": TEXT_CONFIG["hidden_size"],
    "num_heads": -1, "num_head_channels": 32, "use_spatial_transformer": True, "use_linear_in_transformer": True,
    "adm_in_channels": None, "use_temporal_attention": False, "legacy": False,
}
"""Configuration of ComfyUI's UNetModel: a 16x16 and an 8x8 level, each with one residual block and one transformer."""
UNET_SAMPLING: dict = {}
"""Changes to Stable Diffusion's noise schedule: none."""
UNET_DEVIATION = 0.35
"""Standard deviation of the UNet's latents. Neighbouring cells are strongly correlated. With a deviation of 1, the layout would
be decided in the noisiest steps of the schedule, and large areas of one colour would be visible at its highest sigma."""

FLUX_CHANNELS = 16
FLUX_DEVIATION = 1.0
FLUX_PREFIX = "model.diffusion_model."
FLUX_TOKENS = 32
"""Number of prompt tokens that the small FLUX sees. The text transformer is causal, so they do not depend on later tokens."""
FLUX_SHIFT = 10.0
"""Shift of the sampling schedule towards noise (FLUX.1 dev: 3). The layout is decided where nine tenths of x are noise."""
FLUX_CONFIG = {
    "in_channels": FLUX_CHANNELS, "out_channels": FLUX_CHANNELS, "patch_size": 2, "hidden_size": 256, "num_heads": 2,
    "axes_dim": [16, 56, 56], "theta": 10000, "mlp_ratio": 4.0, "depth": 1, "depth_single_blocks": 3,
    "context_in_dim": TEXT_CONFIG["hidden_size"], "vec_in_dim": TEXT_CONFIG["hidden_size"], "qkv_bias": True,
    "guidance_embed": False, "txt_ids_dims": [],
}
"""Configuration of ComfyUI's Flux. The host detects it from the state dict as FLUX.1-schnell (no guidance embedding)."""


@dataclass(frozen=True)
class Sampling:
    """Settings of the stock KSampler."""

    steps: int
    cfg: float
    sampler: str
    scheduler: str


SAMPLING = {"unet": Sampling(25, 3.5, "euler_ancestral", "ddim_uniform"),
            "flux": Sampling(25, 4.5, "euler_ancestral", "simple")}
"""By backbone: the sampling settings of workflows, benchmarks and tests.

An ancestral sampler adds fresh noise, with which a small model corrects errors of earlier steps: far fewer doubled objects."""

STEERING: dict[str, dict[str, float]] = {
    "unet": {}, "flux": {"end": 0.6, "step_size": 5.0, "stop_probability": 0.97, "compactness": 1.5}}
"""By backbone: fields of SteeringSettings that workflows and benchmarks change from the defaults."""
STEERING_LEARNED: dict[str, dict[str, float]] = {"unet": {}, "flux": {"compactness": 0.0}}
"""By backbone: changes to STEERING for a trained classifier."""

RULE: dict[str, str | None] = {"unet": None, "flux": "toyworld_flux_geometric"}
"""By backbone: name of the shipped geometric classifier used in workflows; None for the built-in one."""
