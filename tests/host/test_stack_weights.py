"""Steering in the user's own stack: models in half precision, in fp8 and quantised, as the host's loaders and nodes make them."""
from __future__ import annotations

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
from torch import Tensor

SHARP = 3e-5


def as_scene(model) -> Scene:
    scene = Scene()
    scene.model = model
    return scene


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("build", ["fp8", "quantised"])
def test_a_gradient_of_coarse_weights_is_as_sharp_as_the_arithmetic(build: str, recompute: bool):
    """Weights of 8 bits multiplied in float64: nothing of the weights' coarseness is in the derivative."""
    with torch.inference_mode():
        if build == "fp8":
            model = cast_patcher(torch.float8_e4m3fn, torch.float64)
        else:
            model = quantised_patcher()
            for part in model.model.modules():
                part._full_precision_mm = True
            model.set_model_compute_dtype(torch.float64)
    assert_agree(check(as_scene(model), recompute)[0], SHARP)


def flux_file(folder: Path, quantise: bool) -> str:
    """A small FLUX as a file; quantised as fp8 checkpoints are: numbers, a scale, and the format's name."""
    weights = {}
    for name, value in FluxScene(references=()).model.model.diffusion_model.state_dict().items():
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
    assert_steers(scene, size=(8, 8), recompute=(quantise,))


# --- half precision ------------------------------------------------------------------------------------------------


def gradients(scene: Scene, **options) -> Tensor:
    """Of the first step, [1, 4, h, w]."""
    found = []
    steering = scene.steering(stop_probability=1.0, max_updates=1, end=0.2)

    def move(gradient: Tensor, settings) -> Tensor:
        found.append(gradient.double().clone())
        return torch.zeros_like(gradient)

    object.__setattr__(steering, "move", move)
    scene.sample(apply_steering(scene.model, steering)[0], steps=4, **options)
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
