"""Steering in the user's own stack: models in half precision, in fp8 and quantised, as the host's loaders and nodes make them."""
from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from conftest import Scene
from learn_to_steer.host.patching import apply_steering
from stack import assert_steers
from test_gradient import assert_agree, check
from test_kontext import FluxScene
from test_memory import cast_patcher, quantised_patcher
from tiny_flux import tiny_flux
from torch import Tensor

SHARP = 3e-5


def as_scene(model) -> Scene:
    scene = Scene()
    scene.model = model
    return scene


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_gradient_of_fp8_weights_is_as_sharp_as_the_arithmetic(recompute: bool):
    """Weights of 8 bits multiplied in float64: nothing of the weights' coarseness is in the derivative."""
    with torch.inference_mode():
        model = cast_patcher(torch.float8_e4m3fn, torch.float64)
    assert_agree(check(as_scene(model), recompute)[0], SHARP)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_gradient_of_quantised_weights_is_that_of_the_weights_they_stand_for(recompute: bool):
    """The host multiplies quantised weights in single precision at most, too coarse for sharp differences."""
    plain = Scene()
    with torch.inference_mode():
        quantised = as_scene(quantised_patcher())
        plain.model.model.diffusion_model.load_state_dict({
            name: (value.dequantize() if isinstance(value, comfy.ops.QuantizedTensor) else value).float()
            for name, value in quantised.model.model.diffusion_model.named_parameters()})
        for part in quantised.model.model.modules():
            part._full_precision_mm = True
    ours, wanted = (gradients(part, recompute) for part in (quantised, plain))
    assert (ours - wanted).norm() < SHARP * wanted.norm()


def flux_file(folder: Path, quantise: bool) -> str:
    """A small FLUX as a file; quantised as fp8 checkpoints are: numbers, a scale, and the format's name."""
    weights = {}
    for name, value in tiny_flux(channels=16).diffusion_model.state_dict().items():
        weights[name] = value.detach().clone()
        if quantise and value.ndim == 2 and "_blocks." in name:
            scale, layer = value.abs().max() / 448, name.removesuffix(".weight")
            weights[name], weights[f"{layer}.weight_scale"] = (value / scale).to(torch.float8_e4m3fn), scale
            form = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
            weights[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(form).encode()), dtype=torch.uint8)
    path = str(folder / "flux.safetensors")
    comfy.utils.save_torch_file(weights, path)
    return path


@pytest.mark.parametrize("quantise", [False, True], ids=["weight_dtype fp8_e4m3fn", "quantised file"])
def test_a_flux_file_of_fp8_weights(tmp_path: Path, quantise: bool):
    """From the loader to the moved latent."""
    options = {} if quantise else {"dtype": torch.float8_e4m3fn}  # as "Load Diffusion Model" sets it
    with torch.inference_mode():
        scene = FluxScene(references=())
        scene.model = comfy.sd.load_diffusion_model(flux_file(tmp_path, quantise), model_options=options)
    weight = scene.model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    assert isinstance(weight, comfy.ops.QuantizedTensor) if quantise else weight.dtype == torch.float8_e4m3fn
    assert_steers(scene, size=(8, 8), channels=16, recompute=(quantise,))


# --- half precision ------------------------------------------------------------------------------------------------


def gradients(scene: Scene, recompute: bool = False) -> Tensor:
    """Of the first step, [1, 4, h, w]."""
    found = []
    steering = scene.steering(stop_probability=1.0, max_updates=1, end=0.2, recompute=recompute)

    def move(gradient: Tensor, settings) -> Tensor:
        found.append(gradient.double().clone())
        return torch.zeros_like(gradient)

    scene.sample(apply_steering(scene.model, dataclasses.replace(steering, move=move))[0], steps=4)
    return found[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_unet_in_half_precision(dtype: torch.dtype):
    """The gradient is that of the same weights in single precision, as far as the arithmetic goes."""
    scene, exact = Scene(dtype=dtype), Scene()
    with torch.inference_mode():
        exact.model.model.load_state_dict({name: value.float() for name, value in scene.model.model.state_dict().items()})
    assert_steers(scene, tolerance=None)
    ours, wanted = (gradients(part).flatten() for part in (scene, exact))
    assert torch.nn.functional.cosine_similarity(ours, wanted, dim=0) > (0.98 if dtype == torch.bfloat16 else 0.999)
