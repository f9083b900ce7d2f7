"""The LoRA that teaches a small model a new object: an ordinary LoRA file for the host."""
from __future__ import annotations

import pytest

from dev.standalone import prepare_host

prepare_host()

import comfy.sd  # noqa: E402
import torch  # noqa: E402
from learn_to_steer.toyworld.models import LOADERS, WEIGHTS  # noqa: E402
from learn_to_steer.toyworld.text import WordTokenizer  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from dev.toyworld import lora  # noqa: E402
from dev.toyworld.train import build_recipe  # noqa: E402


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_the_host_loads_what_training_computed(kind, tmp_path):
    """Base weight plus up @ down, the same in the training twin and in the host's patched model."""
    recipe = build_recipe(kind, WordTokenizer())
    model, clip, _ = LOADERS[kind]()
    state = model.model.diffusion_model.state_dict()
    recipe.network.load_state_dict(state)
    recipe.modules.requires_grad_(False)
    low_rank = lora.LowRank(recipe.network, recipe.adaptable, rank=2)
    with torch.no_grad():
        for up in low_rank.up:
            up.normal_(std=0.1)
    save_file(low_rank.tensors(), tmp_path / "lora.safetensors")
    patched, _ = comfy.sd.load_lora_for_models(model, clip, load_file(tmp_path / "lora.safetensors"), 1.0, 0.0)
    names = [f"diffusion_model.{name}" for name in low_rank.base]
    assert names and set(names) == set(patched.patches)
    patched.patch_model()
    for name, wanted in low_rank.weights().items():
        got = patched.model.diffusion_model.get_parameter(name)
        torch.testing.assert_close(got, wanted, rtol=1e-2, atol=2e-3)
        assert not torch.equal(got, state[name])
    patched.unpatch_model()


@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_training_changes_the_low_rank_matrices(kind):
    tensors = lora.train(kind, "octopus", minutes=0.05, rank=2, seed=0, weights=WEIGHTS / f"{kind}.safetensors")
    ups = [tensor for name, tensor in tensors.items() if name.endswith("lora_up.weight")]
    assert ups and all(tensor.dtype == torch.float16 for tensor in tensors.values())
    assert any(tensor.abs().max() > 0 for tensor in ups)
