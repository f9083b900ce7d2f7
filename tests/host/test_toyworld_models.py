"""The small models are ordinary host objects: every stock node accepts them, and they behave as in the model card."""
from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from dev.standalone import prepare_host

prepare_host()

import comfy.sd  # noqa: E402  (the host must be on the path first)
import latent_preview  # noqa: E402
from learn_to_steer.classifiers import checkpoint  # noqa: E402
from learn_to_steer.toyworld import models, text  # noqa: E402
from learn_to_steer.toyworld.config import FLUX_CONFIG, FORMAT, RULE, SAMPLING, UNET_DEVIATION, Sampling  # noqa: E402
from learn_to_steer.toyworld.detector import detect, judge  # noqa: E402
from learn_to_steer.toyworld.packing import SUFFIX  # noqa: E402
from learn_to_steer.toyworld.sampling import sample_latents, sample_pictures  # noqa: E402
from learn_to_steer.toyworld.scenes import LAYOUTS, Layout, random_scene, relation_parts, two_object_prompts  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import nodes as host_nodes  # noqa: E402
from dev.toyworld import pack, train  # noqa: E402


@pytest.fixture(scope="module")
def world() -> tuple:
    """The small world, loaded in inference mode, as in the server."""
    with torch.inference_mode():
        return models.load_unet_world()


@pytest.fixture(scope="module", params=["unet", "flux"])
def either(request: pytest.FixtureRequest) -> tuple[tuple, Sampling, Layout]:
    """Each small model with its usual sampling settings."""
    with torch.inference_mode():
        return models.LOADERS[request.param](), SAMPLING[request.param], LAYOUTS[request.param]


def stock_picture(world: tuple, prompt: str, seed: int, chosen: Sampling) -> torch.Tensor:
    """CLIPTextEncode, EmptyLatentImage, KSampler, VAEDecode: the stock nodes themselves."""
    model, clip, vae = world
    with torch.inference_mode():
        positive, = host_nodes.CLIPTextEncode().encode(clip, prompt)
        negative, = host_nodes.CLIPTextEncode().encode(clip, "")
        latent, = host_nodes.EmptyLatentImage().generate(64, 64, 1)
        sampled, = host_nodes.KSampler().sample(model, seed, chosen.steps, chosen.cfg, chosen.sampler, chosen.scheduler,
                                                positive, negative, latent)
        return host_nodes.VAEDecode().decode(vae, sampled)[0].clone()


def test_stock_nodes_draw_the_same_picture(either: tuple) -> None:
    world, chosen, _ = either
    prompt = "a photo of a dog to the left of a cat"
    picture = stock_picture(world, prompt, 7, chosen)
    assert picture.shape == (1, 64, 64, 3)
    assert 0 <= picture.min() and picture.max() <= 1 and picture.std() > 0.02
    assert torch.equal(picture, sample_pictures(*world, [prompt], [7], **asdict(chosen)))


@pytest.mark.parametrize("name", [name for name, rule in RULE.items() if rule])
def test_the_shipped_rule_fits_its_model(name: str) -> None:
    rule = checkpoint.load_classifier(models.WEIGHTS.parents[1] / "classifiers" / "weights" / f"{RULE[name]}.safetensors")
    results = rule.training["results"]
    assert rule.layout.channels == FLUX_CONFIG["num_heads"] * (FLUX_CONFIG["depth"] + FLUX_CONFIG["depth_single_blocks"])
    assert results["test"]["accuracy"] > results["test, all channels alike"]["accuracy"] + 0.05


def test_most_pictures_show_both_objects(either: tuple) -> None:
    world, chosen, layout = either
    prompts = two_object_prompts(16, "tune", layout.nouns)
    images = sample_pictures(*world, [prompt.text for prompt in prompts], list(range(16)), **asdict(chosen))
    verdicts = []
    for prompt, found in zip(prompts, detect(images), strict=True):
        (subject, phrase, other), = prompt.relations
        verdicts.append(judge(found, subject, relation_parts(phrase), other))
    assert sum(verdict.both_present for verdict in verdicts) >= 12  # guards against broken weights; rates: model card


def test_the_vae_gives_pictures_back(world: tuple) -> None:
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(np.stack([random_scene(rng).image for _ in range(8)])).float() / 255
    vae = world[2]
    latent, = host_nodes.VAEEncode().encode(vae, pixels)
    assert latent["samples"].shape == (8, 24, 16, 16)
    assert 0.7 < latent["samples"].std() / UNET_DEVIATION < 1.4
    error = (host_nodes.VAEDecode().decode(vae, latent)[0] - pixels).square().mean()
    assert -10 * torch.log10(error) > 30


def test_the_training_twin_equals_the_hosts_text_encoder(world: tuple) -> None:
    tensors = models.read_weights(models.WEIGHTS / "unet.safetensors", "unet")
    tokenizer = text.WordTokenizer()
    assert tensors["token_ids"].tolist() == tokenizer.ids
    twin = text.TextTransformer(len(tokenizer.ids))
    twin.load_state_dict({key: value.float() for key, value in models.part(tensors, "text.").items()})
    for caption in ("a photo of a teddy bear above a dog, and a cat below a car", ""):
        (hidden, details), = world[1].encode_from_tokens_scheduled(world[1].tokenize(caption))
        with torch.no_grad():
            expected = twin(tokenizer.rows([caption]))
        assert torch.allclose(hidden, expected, atol=2e-5)
        end = len(caption.replace(",", " ,").split()) + 1
        assert torch.allclose(details["pooled_output"], expected[:, end], atol=2e-5)


def test_previews_have_the_pictures_colours(world: tuple) -> None:
    model, _, vae = world
    pixels = torch.from_numpy(random_scene(np.random.default_rng(3), 2).image)[None].float() / 255
    latent = vae.encode(pixels)
    previewer = latent_preview.Latent2RGBPreviewer(model.model.latent_format.latent_rgb_factors,
                                                   model.model.latent_format.latent_rgb_factors_bias)
    preview = torch.from_numpy(np.array(previewer.decode_latent_to_preview(latent.clone()))).float() / 255
    means = pixels[0].unflatten(0, (16, 4)).unflatten(2, (16, 4)).mean(dim=(1, 3))
    assert preview.shape == (16, 16, 3)
    assert (preview - means).abs().mean() < 0.03


def test_gradients_reach_the_latent_when_loaded_outside_inference_mode() -> None:
    model, clip, _ = models.load_unet_world()
    (context, _), = clip.encode_from_tokens_scheduled(clip.tokenize("a dog above a cat"))
    latent = torch.randn(1, 24, 16, 16, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    out = model.model.diffusion_model(latent, torch.tensor([500.0]), context=context.clone(), transformer_options={})
    out.square().mean().backward()
    assert torch.isfinite(latent.grad).all() and latent.grad.abs().max() > 0


def test_batches_equal_single_pictures(world: tuple) -> None:
    prompts = ["a dog above a cat", "a car to the left of a train"]
    together = sample_latents(*world[:2], prompts, [3, 4], 2.0, steps=4)
    alone = torch.cat([sample_latents(*world[:2], [prompt], [seed], 2.0, steps=4)
                       for prompt, seed in zip(prompts, (3, 4), strict=True)])
    assert torch.allclose(together, alone, atol=1e-3)


def test_the_checkpoint_saver_writes_the_model(world: tuple, tmp_path: Path) -> None:
    path = tmp_path / "saved.safetensors"
    comfy.sd.save_checkpoint(str(path), world[0], clip=None, vae=world[2])
    with safe_open(path, framework="pt") as file:
        assert any(key.startswith("model.diffusion_model.") for key in file.keys())


@pytest.mark.parametrize("name", train.MODELS)
def test_the_shipped_file_is_small_and_says_how_it_was_trained(name: str) -> None:
    path = models.WEIGHTS / f"{name}.safetensors"
    assert path.stat().st_size <= 6.1e6
    assert models.read_summary(path)["pictures"] > 0


@pytest.mark.parametrize("name", train.MODELS)
def test_a_packed_file_is_half_as_large_and_gives_the_same_model(name: str, tmp_path: Path) -> None:
    """Every weight within half a step of its row, and what the network computes within two percent."""
    run = train.Run(name, train.Clock(None, 100), tmp_path, seed=0)
    run.save()
    plain, size = models.read_weights(run.export_file, name), run.export_file.stat().st_size
    with torch.inference_mode():
        before = models.LOADERS[name](run.export_file)
    pack.pack_file(run.export_file)
    assert run.export_file.stat().st_size < 0.56 * size
    assert models.read_summary(run.export_file)["pictures"] == 0
    packed = models.read_weights(run.export_file, name)
    assert {key: (value.dtype, value.shape) for key, value in packed.items()} == \
           {key: (value.dtype, value.shape) for key, value in plain.items()}
    for key, value in plain.items():
        step = value.double().flatten(1).abs().amax(dim=1) / 127 if value.ndim > 1 else torch.zeros(len(value))
        error = (packed[key].double() - value.double()).abs().view(len(value), -1).amax(dim=1)
        assert (error <= 0.51 * step + value.double().abs().max() * 2.0 ** -11).all(), key
    with torch.inference_mode():
        after = models.LOADERS[name](run.export_file)
    chosen = {**asdict(SAMPLING[name]), "steps": 2}
    pictures = [sample_latents(*world[:2], ["a dog above a cat"], [1], **chosen) for world in (before, after)]
    assert (pictures[1] - pictures[0]).norm() <= 0.02 * pictures[0].norm()


def test_a_damaged_packed_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    tensors = load_file(models.WEIGHTS / "unet.safetensors")
    scales = next(key for key in tensors if key.endswith(SUFFIX))
    del tensors[scales]
    save_file(tensors, path, metadata={"format": FORMAT, "model": "unet"})
    words = f"{path.name} is damaged: {scales.removesuffix(SUFFIX)} has 8-bit numbers.*Install the pack again"
    with pytest.raises(ValueError, match=words):
        models.load_unet_world(path)


@pytest.mark.parametrize(("content", "error", "message"), [
    (None, FileNotFoundError, "python dev.py run -m dev.toyworld.train unet"),
    (b"not a tensor file", ValueError, "no safetensors file"),
    ({"format": "something else"}, ValueError, "expected 'unet'"),
])
def test_bad_files_are_named(tmp_path: Path, content: object, error: type, message: str) -> None:
    path = tmp_path / "weights.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file({"a": torch.zeros(1)}, path, metadata={key: json.dumps(value) for key, value in content.items()})
    with pytest.raises(error, match=message):
        models.load_unet_world(path)


@pytest.mark.parametrize("name", train.MODELS)
def test_training_goes_on_where_it_stopped(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "BATCH", 2)

    def start(folder: str) -> train.Run:
        return train.Run(name, train.Clock(None, 100), tmp_path / folder, seed=0)

    straight, first = start("straight"), start("resumed")
    for _ in range(4):
        straight.step()
    for _ in range(2):
        first.step()
    first.save()
    second = start("resumed")
    assert second.resume()
    for _ in range(2):
        second.step()
    assert second.clock.step == 4
    for key, value in straight.average.items():
        assert torch.equal(value, second.average[key]), key
    assert models.read_summary(tmp_path / "resumed" / f"{name}.safetensors")["pictures"] == 4


@pytest.mark.parametrize("name", train.MODELS)
def test_training_can_begin_with_exported_weights(name: str, tmp_path: Path) -> None:
    """The weights are the file's; the latents have the recipe's deviation, whatever the file's."""
    first = train.Run(name, train.Clock(None, 100), tmp_path / "first", seed=0)
    first.transform = first.transform.rescaled(0.5, 0.0)
    first.save()
    second = train.Run(name, train.Clock(None, 100), tmp_path / "second", seed=1)
    second.start_from(first.export_file)
    for key, value in second.average.items():
        assert torch.allclose(value, first.average[key], rtol=1e-2, atol=1e-3), key
    pixels = torch.from_numpy(np.stack([random_scene(np.random.default_rng(k), 2).image for k in range(64)]))
    latents = second.transform.encode(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1)
    assert 0.7 < latents.std() / second.recipe.deviation < 1.4
    second.save()
    assert models.read_summary(second.export_file)["began_with"]["seed"] == 0


def test_an_exported_flux_is_loaded_by_the_hosts_own_loader(tmp_path: Path) -> None:
    run = train.Run("flux", train.Clock(None, 100), tmp_path, seed=0)
    run.save()
    model = comfy.sd.load_diffusion_model(str(run.export_file))
    assert type(model.model.diffusion_model).__name__ == "Flux"
    world = models.load_flux_world(run.export_file)
    pixels = torch.from_numpy(random_scene(np.random.default_rng(1), 2).image)[None].float() / 255
    latent = world[2].encode(pixels)
    assert latent.shape == (1, 16, 16, 16)
    assert (world[2].decode(latent) - pixels).square().mean().sqrt() < 0.05
    pictures = sample_pictures(*world, ["a dog above a cat"], [1], 3.0, steps=2, sampler="euler", scheduler="simple")
    assert pictures.shape == (1, 64, 64, 3)
    assert model.model.latent_format.latent_channels == 16
