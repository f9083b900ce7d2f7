"""The gradient equals finite differences through the host's UNet, sampler and conditioning code."""
from __future__ import annotations

import functools

import comfy.model_management
import comfy.ops
import comfy.supported_models
import pytest
import tiny
import torch
from conftest import PROMPT, Scene, pack
from learn_to_steer.host.gradient import differentiable, scaled_gradient
from learn_to_steer.host.patching import _patched
from learn_to_steer.host.records import RunLog
from learn_to_steer.host.steering import SteeringSession
from learn_to_steer.steering.attention import word_maps
from learn_to_steer.steering.objective import total_loss
from learn_to_steer.steering.optimizer import displacement
from learn_to_steer.steering.settings import SteeringSettings

SD15 = {"use_linear_in_transformer": False, "num_heads": 4, "num_head_channels": -1}
SDXL = {"channel_mult": [1, 2, 2], "num_res_blocks": [1, 1, 1], "transformer_depth": [0, 1, 2],
        "transformer_depth_output": [0, 0, 1, 1, 2, 2], "transformer_depth_middle": 2, "adm_in_channels": 32,
        "num_classes": "sequential", "num_heads": -1, "num_head_channels": 16}
KINDS = {"sd2": ({}, comfy.supported_models.SD20), "sd1": (SD15, comfy.supported_models.SD15),
         "sdxl": (SDXL, comfy.supported_models.SD20)}


class Checked(SteeringSession):
    """Compares gradients at the sampler's latent instead of moving it."""

    results: list[tuple[float, float]]
    gradients: list[torch.Tensor]

    def _steer(self, host_model, x, sigma, arguments, step):
        arguments = self.instrumented(arguments)
        with differentiable(self.base_model) as self.writes:
            sigma = sigma.clone()
            scale = self.base_model.model_sampling.calculate_input(sigma, torch.ones_like(x)).clone()
            latent = (x.clone() * scale).to(self.base_model.manual_cast_dtype or self.base_model.get_dtype())
            evaluate = functools.partial(self._evaluate, host_model, sigma, scale, arguments, step)

            def loss(at):
                seen = evaluate(at)
                return seen, total_loss(seen.judgement, (1.0,), None)

            seen, value = loss(latent)
            gradient = seen.gradient(value)
            self.gradients.append(gradient)
            generator = torch.Generator().manual_seed(step)
            random = torch.randn(latent.shape, generator=generator, dtype=latent.dtype)
            directions = [gradient / gradient.norm()]
            if latent.dtype == torch.float64:
                directions += [random / random.norm()]
            for direction in directions:
                h = 3e-2 if latent.dtype == torch.float32 else 1e-4
                difference = (loss(latent + h * direction)[1] - loss(latent - h * direction)[1]).sum().item() / (2 * h)
                self.results.append(((gradient * direction).sum().item(), difference))


def check(scene: Scene, recompute: bool, model=None, classifier=None, compactness: float = SteeringSettings.compactness,
          **options):
    """(computed, measured) directional derivatives of every steered step, and the gradients."""
    results, gradients = [], []

    def open_session(guider, sigmas):
        session = Checked(guider, sigmas, scene.steering(classifier, recompute=recompute, compactness=compactness))
        session.results, session.gradients = results, gradients
        return session

    scene.sample(_patched(model or scene.model, open_session, RunLog(), "check"), steps=4, **options)
    assert results
    return results, gradients


def assert_agree(results, tolerance: float) -> None:
    for claimed, measured in results:
        assert abs(claimed - measured) <= tolerance * abs(measured), (claimed, measured)


def build(kind: str, dtype=torch.float32) -> Scene:
    overrides, config = KINDS[kind]
    scene = Scene(overrides=overrides, config=config, dtype=dtype)
    if kind == "sdxl":
        scene.model.model.extra_conds = _with_label(scene.model.model)
    return scene


def _with_label(base):
    """Adds SDXL's vector of sizes and pooled text, with fixed values."""
    import comfy.conds
    original = type(base).extra_conds

    def extra_conds(**kwargs):
        label = torch.linspace(-1, 1, 32)[None].expand(kwargs["noise"].shape[0], -1)
        return {**original(base, **kwargs), "y": comfy.conds.CONDRegular(label)}
    return extra_conds


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences_fp32(kind: str, recompute: bool):
    scene = build(kind)
    assert all(parameter.is_inference() for parameter in scene.model.model.diffusion_model.parameters())
    assert_agree(check(scene, recompute)[0], 1e-3)


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
def test_finite_differences_fp64(kind: str, recompute: bool):
    assert_agree(check(build(kind, torch.float64), recompute)[0], 1e-5)


def test_recomputed_gradient_is_the_plain_one(scene: Scene):
    for plain, recomputed in zip(check(scene, False)[1], check(scene, True)[1], strict=True):
        assert torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-6 * plain.abs().max())


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
def test_batches_and_other_shapes(scene: Scene, recompute: bool):
    """The loss is summed over the batch, so the gradient of a picture does not depend on the others."""
    assert_agree(check(scene, recompute, batch=2, size=(12, 20))[0], 1e-3)


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
def test_inpainting_mask(scene: Scene, recompute: bool):
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1.0
    results, gradients = check(scene, recompute, noise_mask=mask)
    assert_agree(results, 1e-3)
    assert all(gradient[..., 8:].abs().max() == 0 for gradient in gradients)


def test_a_normalised_move_is_as_long_in_a_part_as_in_the_whole():
    """step_size is a percentage of the norm of the cells that can move, however small an inpainting mask is."""
    gradient = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    gradient[1, :, 4:] = 0
    gradient[1, :, :, 4:] = 0
    move = displacement(gradient, SteeringSettings(step_size=2.5))
    assert move[0].square().mean().sqrt() == pytest.approx(0.025, rel=1e-4)
    assert move[1, :, :4, :4].square().mean().sqrt() == pytest.approx(0.025, rel=1e-4)
    assert move[1].count_nonzero() == 4 * 4 * 4
    assert not displacement(torch.zeros(1, 4, 8, 8), SteeringSettings()).any()


def test_a_small_loss_keeps_its_gradient_in_half_precision():
    """This holds per picture of a batch: one relation nearly holds, the other does not."""
    generator = torch.Generator().manual_seed(0)
    start, k = torch.randn(2, 2, 64, 8, generator=generator), torch.randn(2, 2, 16, 8, generator=generator)
    words, target = torch.eye(16)[:2], torch.rand(2, 2, 2, 64, generator=generator)
    size = torch.tensor([1e-6, 1.0])

    def gradient(dtype: torch.dtype, scaled: bool) -> torch.Tensor:
        latent = start.clone().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        maps = word_maps(latent.to(dtype), k.to(dtype), words)
        judged = maps.detach().requires_grad_() if scaled else maps
        loss = size.to(judged.dtype) * ((judged - target.to(judged.dtype)) ** 2).flatten(1).mean(1)
        return scaled_gradient(loss, [judged], [maps], latent) if scaled else torch.autograd.grad(loss.sum(), latent)[0]

    def likeness(found: torch.Tensor) -> torch.Tensor:
        found, wanted = (part.flatten(1).double() / part.double().flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-30)
                         for part in (found, exact))
        return (found * wanted).sum(dim=1)

    exact = gradient(torch.float64, scaled=False)
    assert torch.allclose(gradient(torch.float64, scaled=True), exact, rtol=1e-9, atol=0)
    assert (likeness(gradient(torch.float16, scaled=True)) > 0.9999).all()
    assert likeness(gradient(torch.float16, scaled=False))[0] < 0.9  # it does matter


def test_a_loss_without_a_gradient_moves_nothing():
    latent = torch.zeros(1, 3, requires_grad=True)
    maps = latent * 2
    judged = maps.detach().requires_grad_()
    assert not scaled_gradient((judged * 0).sum(1), [judged], [maps], latent).any()


def test_weights_that_the_host_moves_for_each_use_stay_where_they_are():
    """The model is only partly on the GPU. Moved weights are normal tensors, so no clones are kept."""
    with torch.inference_mode():
        offloaded, resident = (comfy.ops.manual_cast.Linear(4, 4) for _ in range(2))
        resident.comfy_cast_weights = False
        model = torch.nn.Sequential(offloaded, resident)
        model.device = torch.device("meta")
        for part in model:
            part.weight, part.bias = (torch.nn.Parameter(torch.ones(shape), requires_grad=False) for shape in ((4, 4), 4))
    kept = offloaded.weight
    with differentiable(model):
        x = torch.ones(1, 4, requires_grad=True, dtype=torch.float64)  # another type, so that the weights are moved
        gradient, = torch.autograd.grad(offloaded(x).sum(), x)
        moved = comfy.model_management.cast_to(kept, torch.float64, torch.device("cpu"))
    assert offloaded.weight is kept and kept.is_inference() and not resident.weight.is_inference()
    assert gradient.eq(4).all() and not moved.is_inference()


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
def test_conditioning_with_an_area(scene: Scene, recompute: bool):
    with torch.inference_mode():
        positive = tiny.conditioning(pack, PROMPT, area=(8, 12, 6, 2))
    results, gradients = check(scene, recompute, positive=positive)
    assert_agree(results, 1e-3)
    for gradient in gradients:
        outside = gradient.clone()
        outside[..., 6:14, 2:14] = 0
        assert gradient.any() and not outside.any()


class ImagePrompt:
    """An image-prompt adapter: replaces the cross-attention, holds inference tensors, calls attention without options."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.k, self.v = torch.randn(2, 1, 4, 32, generator=generator).unbind(0)
        self.calls = 0

    def __call__(self, q, k, v, extra_options):
        from comfy.ldm.modules.attention import optimized_attention
        self.calls += 1
        heads = extra_options["n_heads"]
        width = q.shape[-1] // 32
        own_k, own_v = (part.expand(q.shape[0], -1, -1).repeat(1, 1, width) for part in (self.k, self.v))
        return optimized_attention(q, k, v, heads) + 0.5 * optimized_attention(q, own_k, own_v, heads)


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
def test_with_a_replaced_cross_attention(scene: Scene, recompute: bool):
    model = scene.model.clone()
    with torch.inference_mode():
        adapter = ImagePrompt()
    for block in (("input", 1), ("middle", 0), ("output", 1)):
        model.set_model_attn2_replace(adapter, *block)
    assert_agree(check(scene, recompute, model)[0], 1e-3)
    assert adapter.calls


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recomputed"])
def test_with_another_packs_layer_patch_and_fast_attention(scene: Scene, recompute: bool):
    """A handler of the host's layer hook still runs. An attention without a derivative is not used for the gradient."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock
    model, calls = scene.model.clone(), []

    def handler(layer, x, emb, *rest):
        calls.append(torch.is_grad_enabled())
        return layer(x, emb) * 0.9

    def without_derivative(func, *args, **kwargs):
        return func(*[arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args], **kwargs)

    model.set_model_forward_timestep_embed_patch((ResBlock, handler))
    model.model_options["transformer_options"]["optimized_attention_override"] = without_derivative
    scene.sample(model, steps=1)
    if not calls:
        pytest.skip("this host has no layer hook for residual blocks")
    assert_agree(check(scene, recompute, model)[0], 1e-3)
    assert True in calls


def test_a_replacement_that_cuts_the_gradient_is_an_error(scene: Scene):
    model = scene.model.clone()
    model.set_model_attn2_replace(lambda q, k, v, options: v.new_zeros(q.shape), "middle", 0)
    with pytest.raises(RuntimeError, match="in block middle.0.0 and cuts the gradient"):
        check(scene, False, model)


def test_longer_prompts_and_a_longer_negative():
    """Prompts over 77 tokens are joined chunks; the host repeats the shorter conditioning to the longer one's length."""
    long = PROMPT + " in a wide green field" * 20
    scene = Scene(long)
    assert scene.positive[0][0].shape[1] == 154
    assert_agree(check(scene, False)[0], 1e-3)
