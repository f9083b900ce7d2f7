"""The passes timed by `cost`: one evaluation of the host's model as in a sampler, plain, with capture, and steered."""
from __future__ import annotations

import time
from collections.abc import Callable

import comfy.model_base
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch
from comfy.sd1_clip import SD1Tokenizer
from comfy.text_encoders.flux import FluxTokenizer
from learn_to_steer.classifiers.geometric import GeometricClassifier
from learn_to_steer.host.capturing import Capture
from learn_to_steer.host.patching import apply_capture, apply_steering
from learn_to_steer.host.steering import Steering
from learn_to_steer.host.tokens import CONDITIONING_KEY, TokenisedPrompt, encode_prompt
from learn_to_steer.prompts.graph import build_graph
from learn_to_steer.steering.settings import SteeringSettings
from learn_to_steer.toyworld.models import LOADERS

from dev.toyworld.recipes import fast_dtype

PROMPT = "a photo of a dog to the right of a teddy bear"
SD21 = {"image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "channel_mult": [1, 2, 4, 4],
        "num_res_blocks": [2, 2, 2, 2], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
        "num_heads": -1, "num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True,
        "use_spatial_transformer": True, "adm_in_channels": None, "use_temporal_attention": False, "legacy": False}
FLUX_DEV = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "hidden_size": 3072, "num_heads": 24,
    "axes_dim": [16, 56, 56], "theta": 10000, "mlp_ratio": 4.0, "qkv_bias": True, "txt_ids_dims": [],
    "context_in_dim": 4096, "vec_in_dim": 768, "depth": 19, "depth_single_blocks": 38, "guidance_embed": True,
    "yak_mlp": False, "txt_norm": False,
}
FLUX = {**FLUX_DEV, "depth": 2, "depth_single_blocks": 4}
"""FLUX.1 dev at full width, with 2 of its 19 double blocks and 4 of its 38 single blocks."""


def fill_alike(module: torch.nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.normal_(std=0.02)


def random_unet(settings: dict, config=comfy.supported_models.SD20, dtype: torch.dtype = torch.float32,
                fill: Callable[[torch.nn.Module], object] = fill_alike) -> comfy.model_patcher.ModelPatcher:
    """The host's UNet with random weights. Shapes, time and memory are real; pictures are meaningless."""
    model_config = config({**settings, "dtype": dtype})
    model_config.unet_config.update(settings)  # the class sets its own head counts
    model_config.manual_cast_dtype = None
    base = comfy.model_base.BaseModel(model_config, model_type=model_config.model_type({}), device="cpu")
    fill(base.diffusion_model)
    return comfy.model_patcher.ModelPatcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def random_flux() -> comfy.model_patcher.ModelPatcher:
    """The host's FLUX with random weights, in bf16 if the CPU multiplies it in hardware."""
    config = comfy.supported_models.Flux({**FLUX, "dtype": fast_dtype()})
    config.manual_cast_dtype = None
    base = config.get_model({}, device="cpu")
    fill_alike(base.diffusion_model)
    return comfy.model_patcher.ModelPatcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def conditioning(tokenizer, stream: str, width: int, details: dict) -> list:
    """A random encoding of PROMPT, with the length that the tokenizer gives."""
    prompt = TokenisedPrompt.read(PROMPT, tokenizer)
    return [[torch.randn(1, len(prompt.streams[stream]), width), {CONDITIONING_KEY: prompt, **details}]]


def prepare(size: str, kind: str, backbone: str) -> tuple[Callable[..., float], int, str]:
    """Returns a function that runs one pass (see `one_pass`), the bytes of the model's weights, and their dtype."""
    if size == "small world":
        model, clip, _ = LOADERS[backbone]()
        shape, positive = (1, None, 16, 16), encode_prompt(clip, PROMPT)
    elif backbone == "unet":
        side = 32 if "256" in size else 64
        model, shape = random_unet(SD21), (1, 4, side, side)
        positive = conditioning(SD1Tokenizer(), "l", 1024, {})
    else:
        side = 64 if "512" in size else 128
        model, shape = random_flux(), (1, 16, side, side)
        positive = conditioning(FluxTokenizer(), "t5xxl", 4096, {"pooled_output": torch.randn(1, 768), "guidance": 3.5})
    weights = sum(value.numel() * value.element_size() for value in model.model.state_dict().values())
    dtype = str(model.model_dtype()).removeprefix("torch.")
    return one_pass(model, shape, positive, kind), weights, dtype


def one_pass(model, shape: tuple, positive: list, kind: str) -> Callable[..., float]:
    """A function that runs one pass and returns its seconds. With `warm_up=True` it uses a latent of 16x16.

    The pass is an evaluation with the positive conditioning alone or, for a gradient, the gradient evaluation before it.
    """
    shape = tuple(model.get_model_object("latent_format").latent_channels if n is None else n for n in shape)
    graph = build_graph(PROMPT)
    noise = torch.randn(shape)
    runs, seconds = None, [0.0]
    if kind == "capture":
        model, _ = apply_capture(model, Capture(graph.phrases))
    if kind.startswith("gradient"):
        settings = SteeringSettings(start=0.0, end=1.0, max_updates=1, stop_probability=1.1,
                                    recompute=kind.endswith("recomputed"))
        model, runs = apply_steering(model, Steering(graph, GeometricClassifier(), settings))

    def evaluation(model_k, x, sigmas, extra_args=None, callback=None, disable=None):
        """A sampler of one step. Steering adds its gradient evaluation before the sampler's evaluation."""
        began = time.perf_counter()
        denoised = model_k(x, sigmas[0] * x.new_ones([x.shape[0]]), **extra_args)
        seconds[0] = time.perf_counter() - began
        callback({"x": x, "i": 0, "sigma": sigmas[0], "sigma_hat": sigmas[0], "denoised": denoised})
        return denoised

    sampler = comfy.samplers.KSAMPLER(evaluation)
    sigmas = torch.stack([model.get_model_object("model_sampling").sigma_max * 0.7, torch.tensor(0.0)])

    def run(warm_up: bool = False) -> float:
        start = noise[:, :, :16, :16] if warm_up else noise
        comfy.sample.sample_custom(model, start, 1.0, sampler, sigmas, positive, positive, torch.zeros_like(start),
                                   disable_pbar=True, seed=0)
        return seconds[0] if runs is None else runs.last.report.seconds

    return run
