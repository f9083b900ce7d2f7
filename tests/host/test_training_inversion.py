"""Inversion through the host's models reconstructs pictures and records the maps of each picture's own words."""
from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest
import torch

from dev.standalone import load_pack

load_pack()

import comfy.model_base  # noqa: E402  (the host must be on the path first)
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.weight_adapter  # noqa: E402
from comfy.sd1_clip import SD1Tokenizer  # noqa: E402
from tiny import unet_patcher  # noqa: E402
from tiny_flux import tiny_flux  # noqa: E402

captions, dataset, inversion, small_world, storage, trainer = (
    importlib.import_module(f"learn_to_steer.training.{name}")
    for name in ("captions", "dataset", "inversion", "small_world", "storage", "trainer"))
models = importlib.import_module("learn_to_steer.toyworld.models")
checkpoint = importlib.import_module("learn_to_steer.classifiers.checkpoint")

CAPTIONS = [captions.Caption("dog", "above", "cat"), captions.Caption("teddy bear", "to the left of", "apple")]


def patcher_of(weight: torch.Tensor):
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return comfy.model_patcher.ModelPatcher(module, torch.device("cpu"), torch.device("cpu"))


class TinyClip:
    """The host's tokenizer, with random embeddings."""

    def __init__(self) -> None:
        self.tokenizer, self.tokenizer_options = SD1Tokenizer(), {}
        self.table = torch.randn(49408, 32, generator=torch.Generator().manual_seed(1))
        self.patcher = patcher_of(self.table)

    def tokenize(self, text: str) -> dict:
        return self.tokenizer.tokenize_with_weights(text)

    def encode_from_tokens_scheduled(self, tokens: dict, add_dict: dict) -> list:
        ids = [int(pair[0]) for chunk in tokens["l"] for pair in chunk]
        return [[self.table[ids][None], {"pooled_output": self.table[ids[1]][None, :16], **add_dict}]]


class TinyVae:
    """A VAE whose latents have the picture's size: its colours and their mean."""

    def __init__(self, unit: int = 1) -> None:
        self.patcher, self.unit = patcher_of(torch.zeros(1)), unit

    def spacial_compression_encode(self) -> int:
        return self.unit

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        colours = images.movedim(-1, 1) * 2 - 1
        return torch.cat([colours, colours.mean(1, keepdim=True)], 1)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return (latents[:, :3].movedim(1, -1) + 1) / 2


def pictures(count: int = 2) -> torch.Tensor:
    return torch.rand(count, 16, 16, 3, generator=torch.Generator().manual_seed(7))


def tiny_unet(kind: str):
    patcher = unet_patcher()
    if kind == "v":
        model = patcher.model
        model.model_type = comfy.model_base.ModelType.V_PREDICTION
        model.model_sampling = comfy.model_base.model_sampling(model.model_config, model.model_type)
    return patcher


def flux_patcher():
    return comfy.model_patcher.ModelPatcher(tiny_flux(), torch.device("cpu"), torch.device("cpu"))


def inverter(model, **changes):
    backbone = "mmdit" if "Flux" in type(model.model.diffusion_model).__name__ else "unet"
    settings = inversion.InversionSettings.for_backbone(backbone, **{"steps": 10, **changes})
    return inversion.Inverter(model, TinyClip(), TinyVae(), settings)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_the_fixed_point_brings_pictures_back(kind: str) -> None:
    model = tiny_unet(kind)
    quality = {count: inverter(model, iterations=count).invert(pictures(), CAPTIONS, [0, 1]).psnr.min()
               for count in (1, 2, 5)}
    assert quality[1] < quality[2] < quality[5]
    assert quality[5] > 28


@pytest.mark.parametrize(("make", "channels"), [(lambda: tiny_unet("eps"), 14), (flux_patcher, 8)])
def test_a_batch_gives_each_pictures_own_maps(make, channels: int) -> None:
    tool = inverter(make())
    together = tool.invert(pictures(), CAPTIONS, [3, 4])
    assert together.maps.shape == (2, 6, 2, channels, 16, 16) and together.maps.dtype == torch.float16
    for number in range(2):
        alone = tool.invert(pictures()[number:number + 1], CAPTIONS[number:number + 1], [3 + number])
        assert torch.allclose(alone.maps[0].float(), together.maps[number].float(), atol=2e-4)
    assert not torch.allclose(together.maps[:, :, 0].float(), together.maps[:, :, 1].float(), atol=1e-4)


def test_prescribed_flow_asks_the_model_only_for_maps() -> None:
    tool = inverter(flux_patcher())
    asked = []
    tool.check = lambda: asked.append(1)
    result = tool.invert(pictures(), CAPTIONS, [0, 1])
    assert len(asked) == len(tool.settings.timesteps)
    assert result.psnr.min() > 60


def test_the_flows_own_field_is_used_below_one() -> None:
    free = inverter(flux_patcher(), gamma=0.0, eta=0.0).invert(pictures(), CAPTIONS, [0, 1])
    drawn = inverter(flux_patcher(), gamma=0.5, eta=0.9).invert(pictures(), CAPTIONS, [0, 1])
    assert free.psnr.isfinite().all() and drawn.psnr.min() > 10
    assert not torch.allclose(free.maps.float(), drawn.maps.float(), atol=1e-4)


def test_rectified_flow_with_full_gamma_is_a_straight_line() -> None:
    x, noise = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)

    def never(*_):
        raise AssertionError("the model's answer has no weight")

    found = inversion.invert_rectified_flow(never, x, noise, [0.0, 0.25, 0.7], gamma=1.0)
    assert torch.allclose(found, 0.3 * x + 0.7 * noise, atol=1e-6)


def test_settings_follow_the_paper() -> None:
    assert inversion.InversionSettings.for_backbone("unet").timesteps == (5, 10, 15, 20, 25, 49)
    assert inversion.InversionSettings.for_backbone("mmdit", 4).timesteps == (1, 3)
    assert inversion.InversionSettings.for_backbone("unet", 10).timesteps == (1, 2, 3, 4, 5, 9)
    assert inversion.InversionSettings.for_backbone("mmdit").least_psnr == 20
    with pytest.raises(storage.TrainingError, match="do not lie within"):
        inversion.InversionSettings(steps=20)


def test_interrupt_leaves_the_model_usable() -> None:
    tool = inverter(tiny_unet("eps"))
    before = tool.invert(pictures(), CAPTIONS, [0, 1])

    def stop() -> None:
        raise KeyboardInterrupt

    tool.check = stop
    with pytest.raises(KeyboardInterrupt):
        tool.invert(pictures(), CAPTIONS, [0, 1])
    tool.check = lambda: None
    assert torch.equal(tool.invert(pictures(), CAPTIONS, [0, 1]).maps, before.maps)


def test_from_small_world_pictures_to_a_classifier_file(tmp_path: Path) -> None:
    world = models.load_unet_world()
    tool = inversion.Inverter(*world, inversion.InversionSettings.for_backbone("unet", 10, iterations=2))
    source = small_world.DrawnScenes({"train": 2, "validation": 1, "test": 1})
    manifest = dataset.build_dataset(tmp_path / "data", source, tool, batch=8)
    assert manifest["splits"]["train"]["samples"] == 16 and manifest["splits"]["train"]["wrong_caption"] == 8
    assert manifest["splits"]["train"]["psnr_mean"] > 25
    assert manifest["channels"] == 22 and manifest["maps"]["backbone"] == "unet"
    settings = trainer.TrainingSettings(epochs=2, batch=16, without_nouns=("zebra",))
    run = trainer.TrainingRun(tmp_path / "run", [dataset.RelationDataset(tmp_path / "data")], settings, 32)
    trained = run.run()
    loaded = checkpoint.load_classifier(tmp_path / "run" / trainer.CLASSIFIER_FILE)
    assert loaded.layout == trained.layout and loaded.layout.channels == 22
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {
        "loss.png", "accuracy.png", "confusion.png", "per_step.png", "training.json"}
    used = {sample.picture for sample in (run.data["train"].samples[item.row] for item in run.chosen["train"])}
    with_it = {sample.picture for sample in run.data["train"].samples if "zebra" in (sample.subject, sample.object)}
    assert with_it and used and not used & with_it


def test_a_dataset_of_another_model_is_not_gone_on_with(tmp_path: Path) -> None:
    source = small_world.DrawnScenes({"train": 1})
    with pytest.raises(KeyboardInterrupt):
        dataset.build_dataset(tmp_path, source, stopped(inverter(tiny_unet("eps"))))
    with pytest.raises(storage.TrainingError, match="other settings .maps"):
        dataset.build_dataset(tmp_path, source, inverter(tiny_unet("eps"), iterations=3))


def with_lora(patcher, strength: float, seed: int = 0):
    """A clone with a patch on its first matrix, as the host's LoRA loader makes one."""
    name = next(key for key, weight in patcher.model.state_dict().items() if weight.ndim == 2)
    shape = patcher.model.state_dict()[name].shape
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(shape[0], 2, generator=generator), torch.randn(2, shape[1], generator=generator), None, None, None, None
    patched = patcher.clone()
    assert patched.add_patches({name: comfy.weight_adapter.LoRAAdapter({name}, weights)}, strength) == [name]
    return patched


def test_another_lora_strength_text_encoder_or_vae_is_another_model() -> None:
    model, clip, vae = tiny_unet("eps"), TinyClip(), TinyVae()
    other_clip, other_vae = TinyClip(), TinyVae()
    other_clip.patcher = with_lora(clip.patcher, 1.0)
    other_vae.patcher = patcher_of(torch.ones(1))
    marks = [inversion.fingerprint(*given) for given in (
        (model, clip, vae), (with_lora(model, 1.0), clip, vae), (with_lora(model, 0.1), clip, vae),
        (with_lora(model, 1.0, 1), clip, vae), (model, other_clip, vae), (model, clip, other_vae), (tiny_unet("v"), clip, vae))]
    assert len(set(marks)) == len(marks)
    assert inversion.fingerprint(with_lora(model, 0.1), TinyClip(), TinyVae()) == marks[2]


def test_what_is_loaded_at_the_moment_does_not_make_another_model() -> None:
    model, clip, vae = tiny_unet("eps"), TinyClip(), TinyVae()
    before = inversion.fingerprint(model, clip, vae)
    other = with_lora(model, 1.0)
    shifted = comfy.model_base.model_sampling(model.model.model_config, comfy.model_base.ModelType.V_PREDICTION)
    other.add_object_patch("model_sampling", shifted)
    its_own = inversion.fingerprint(other, clip, vae)
    name = next(iter(other.patches))
    plain = model.model.state_dict()[name].clone()
    comfy.model_management.load_models_gpu([other])
    try:
        assert not torch.equal(model.model.state_dict()[name], plain)  # the patch is in the weights that both share
        assert inversion.fingerprint(model, clip, vae) == before
        assert inversion.fingerprint(other, clip, vae) == its_own != before
    finally:
        comfy.model_management.unload_all_models()
    assert inversion.fingerprint(model, clip, vae) == before


def test_a_caption_that_the_text_encoder_does_not_keep_is_dropped(tmp_path: Path) -> None:
    class TwoPictures(small_world.DrawnScenes):
        def open(self, candidates):
            made = super().open(candidates)
            return [dataclasses.replace(made[0], image=pictures()[0], subject="dog#2"),
                    *(dataclasses.replace(item, image=pictures()[1]) for item in made[1:])]

    tool = inverter(tiny_unet("eps"), least_psnr=0.0)
    manifest = dataset.build_dataset(tmp_path, TwoPictures({"train": 1}), tool, batch=4)
    assert manifest["splits"]["train"]["dropped"] == {"words not found by the text encoder": 2}
    assert manifest["splits"]["train"]["samples"] == 6


def test_a_size_that_the_vae_cannot_bring_back_is_an_error() -> None:
    tool = inversion.Inverter(tiny_unet("eps"), TinyClip(), TinyVae(8), inversion.InversionSettings.for_backbone("unet", 10))
    with pytest.raises(storage.TrainingError, match="Pictures of 20 x 20.*size that 8 divides"):
        tool.invert(torch.zeros(1, 20, 20, 3), CAPTIONS[:1], [0])


def stopped(tool):
    def stop() -> None:
        raise KeyboardInterrupt

    tool.check = stop
    return tool
