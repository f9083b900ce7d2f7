"""Other packs that cut the gradient, hide the maps or mix the rows: steering works around them or names them in an error."""
from __future__ import annotations

import functools
import re
import types

import pytest
import torch
from comfy_extras.nodes_model_downscale import PatchModelAddDownscale
from conftest import Scene
from learn_to_steer.host.capturing import Capture
from learn_to_steer.host.other_packs import name_of, patches_in_the_way
from learn_to_steer.host.patching import apply_capture, apply_steering
from learn_to_steer.host.stepping import SteeringError
from test_gradient import assert_agree, check
from test_kontext import FluxScene

HERE = re.escape(__name__)
TAKE_OFF = "Take what comes from another pack off the MODEL's line"


def steered(scene: Scene, model=None, **options):
    patched, runs = apply_steering(model or scene.model, scene.steering(stop_probability=1.0, max_updates=1))
    return scene.sample(patched, steps=2, **options), runs.last.report


def captured(scene: Scene, model, **options):
    patched, runs = apply_capture(model, Capture(("dog",)))
    scene.sample(patched, steps=1, **options)
    return runs.last.maps


# --- a cut gradient ------------------------------------------------------------------------------------------------


class MixtureOfTiles:
    """A tiling pack: a model function wrapper that works in inference mode."""

    @torch.inference_mode()
    def __call__(self, model_function, given: dict):
        return model_function(given["input"], given["timestep"], **given["c"])


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_wrapper_without_a_gradient_is_named(scene: Scene, recompute: bool):
    model = scene.model.clone()
    model.set_model_unet_function_wrapper(MixtureOfTiles())
    with pytest.raises(SteeringError, match=r"input 'model': .* 7 of 7 blocks .*model_function_wrapper "
                                            rf"\({HERE}\.MixtureOfTiles\).*{TAKE_OFF}"):
        check(scene, recompute, model)


def test_a_patch_that_cuts_in_the_middle_is_named(scene: Scene):
    """Blocks before the cut have a gradient, blocks after it have none."""
    model = scene.model.clone()

    def resized(h, transformer_options):
        return torch.from_numpy(h.detach().numpy().copy()) if transformer_options["block"] == ("input", 3) else h

    model.set_model_input_block_patch_after_skip(resized)
    with pytest.raises(SteeringError, match=r"something cuts it: 1 of 7 blocks .*\(middle\.0\.0\).*"
                                            rf"input_block_patch_after_skip \({HERE}\..*resized\)"):
        check(scene, False, model)


@pytest.mark.parametrize("method", ["bicubic", "area"])
def test_the_hosts_deep_shrink_has_a_gradient(scene: Scene, method: str):
    model = PatchModelAddDownscale.execute(scene.model, 3, 2.0, 0.0, 1.0, True, method, method).args[0]
    assert_agree(check(scene, False, model)[0], 1e-3)


def test_a_gradient_is_taken_on_one_device_where_the_host_samples_on_several(scene: Scene):
    """The host evaluates its clones on other devices under no_grad."""
    model = scene.model.clone()
    model.model_options["multigpu_clones"] = {torch.device("cpu"): model}
    assert_agree(check(scene, False, model)[0], 1e-3)
    assert torch.equal(scene.sample(model), scene.sample())


# --- maps that cannot be seen --------------------------------------------------------------------------------------


def teacache_flux_forward(self, *args, transformer_options=None, **kwargs):
    """A pack's own forward, which passes no options to the block replacements."""
    def without_options(patch):
        def replacement(args, extra):
            mine = {name: value for name, value in args.items() if name != "transformer_options"}
            return patch(mine, {"original_block": lambda given: extra["original_block"](
                {**given, "transformer_options": args["transformer_options"]})})
        return replacement

    if transformer_options is None:  # an older host passes it by position
        *args, transformer_options = args
    dit = transformer_options.get("patches_replace", {}).get("dit", {})
    replaced = {"dit": {key: without_options(patch) for key, patch in dit.items()}}
    options = {**transformer_options, "patches_replace": replaced}
    return type(self).forward_orig(self, *args, transformer_options=options, **kwargs)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_a_forward_of_another_pack_is_named_in_the_report(recompute: bool):
    scene = FluxScene(references=())
    network = scene.model.model.diffusion_model
    plain = scene.sample(steps=2, size=(8, 8))
    network.forward_orig = types.MethodType(teacache_flux_forward, network)
    patched, runs = apply_steering(scene.model, scene.steering(recompute=recompute, end=1.0))
    assert torch.equal(scene.sample(patched, steps=2, size=(8, 8)), plain)
    report = runs.last.report
    assert {record.outcome for record in report.records} == {"not recorded"}
    assert any(f"{__name__}.teacache_flux_forward runs the model's blocks without ComfyUI's options" in warning
               for warning in report.warnings)
    assert not captured(scene, scene.model, size=(8, 8)).steps


def test_a_block_of_another_packs_making_is_named_in_the_report(scene: Scene):
    model = scene.model.clone()
    block = model.model.diffusion_model.middle_block[1].transformer_blocks[0]

    def forward(x, context=None, transformer_options=None):
        less = {key: value for key, value in transformer_options.items() if key != "activations_shape"}
        return type(block).forward(block, x, context, less)

    model.add_object_patch("diffusion_model.middle_block.1.transformer_blocks.0.forward", forward)
    _, report = steered(scene, model)
    assert {record.outcome for record in report.records} == {"moved"}
    assert any("middle.0.0 without ComfyUI's options (activations_shape)" in note for note in report.notes)
    assert "middle.0.0" not in captured(scene, model).layers


# --- rows and tiles ------------------------------------------------------------------------------------------------


def couple(scene: Scene, regions: int):
    """Attention couple on the UNet: its attn2 patch repeats the positive rows per region and averages them afterwards."""
    model = scene.model.clone()

    def repeated(q, k, v, extra_options):
        chunks = [part.chunk(len(extra_options["cond_or_uncond"])) for part in (q, k, v)]
        times = [regions if cond == 0 else 1 for cond in extra_options["cond_or_uncond"]]
        return tuple(torch.cat([chunk.repeat(n, 1, 1) for chunk, n in zip(part, times, strict=True)]) for part in chunks)

    def averaged(out, extra_options):
        parts, start, conds = [], 0, extra_options["cond_or_uncond"]
        size = out.shape[0] // sum(regions if cond == 0 else 1 for cond in conds)
        for cond in conds:
            rows = size * (regions if cond == 0 else 1)
            parts.append(out[start:start + rows].unflatten(0, (-1, size)).mean(0))
            start += rows
        return torch.cat(parts)

    model.set_model_attn2_patch(repeated)
    model.set_model_attn2_output_patch(averaged)
    return model


@pytest.mark.parametrize("cfg", [1.0, 3.0], ids=["positive alone", "both conditionings"])
def test_rows_repeated_inside_the_attention_are_refused(scene: Scene, cfg: float):
    """With two regions, both conditionings give 3 rows, and the positive one alone 2 rows that look like two pictures."""
    model = couple(scene, regions=2)
    assert torch.allclose(scene.sample(model, steps=1, cfg=cfg), scene.sample(steps=1, cfg=cfg), atol=1e-4)
    refused = (r"input 'model': the cross-attention in block input\.1\.0 works on \d rows.*attn2_patch "
               rf"\({HERE}\.couple\.repeated\).*{TAKE_OFF}")
    with pytest.raises(SteeringError, match=refused):
        captured(scene, model, cfg=cfg)
    with pytest.raises(SteeringError, match=refused):
        steered(scene, model, cfg=cfg)


def in_tiles(model_function, given: dict, together: bool = False):
    """Evaluates the left and the right half, one after the other or as a batch."""
    halves = given["input"].chunk(2, dim=-1)
    if not together:
        return torch.cat([model_function(half, given["timestep"], **given["c"]) for half in halves], dim=-1)
    c = {key: torch.cat([value, value]) if isinstance(value, torch.Tensor) else value for key, value in given["c"].items()}
    out = model_function(torch.cat(halves), torch.cat([given["timestep"]] * 2), **c)
    return torch.cat(out.chunk(2), dim=-1)


@pytest.mark.parametrize(("together", "shown"), [(False, "1 x 16 x 8"), (True, "2 x 16 x 8")], ids=["one by one", "batched"])
def test_tiles_are_not_taken_for_the_picture(scene: Scene, together: bool, shown: str):
    model = scene.model.clone()
    model.set_model_unet_function_wrapper(functools.partial(in_tiles, together=together))
    for run in (captured, steered):
        with pytest.raises(SteeringError, match=f"evaluated on {shown} .* instead of 1 x 16 x 16.*model_function_wrapper "
                                                rf"\({HERE}\.in_tiles\)"):
            run(scene, model, cfg=1.0)


def test_a_batch_keeps_its_rows(scene: Scene):
    """The maps of each of two pictures equal those of the picture alone."""
    maps = captured(scene, scene.model, batch=2, cfg=3.0).steps[0].average
    assert maps.shape[0] == 2
    with torch.inference_mode():
        scene.negative, negative = scene.positive, scene.negative
        same = captured(scene, scene.model, batch=2, cfg=3.0).steps[0].average
        scene.negative = negative
    assert torch.allclose(maps, same, atol=1e-5)


# --- names ---------------------------------------------------------------------------------------------------------


def test_our_own_patches_are_not_accused(scene: Scene):
    patched, _ = apply_steering(apply_capture(scene.model, Capture(("dog",)))[0], scene.steering())
    options = {**patched.model_options}
    options["transformer_options"] = {"wrappers": patched.wrappers}
    assert patches_in_the_way(options) == ()
    assert patches_in_the_way({"transformer_options": {"optimized_attention_override": MixtureOfTiles()}}) == (
        f"optimized_attention_override ({__name__}.MixtureOfTiles)",)


def test_a_pack_is_named_without_the_path_of_its_folder():
    class Method:
        __module__ = "/srv/ComfyUI/custom_nodes/ComfyUI-Tiles.nodes"

    assert name_of(Method()).startswith("ComfyUI-Tiles.nodes.") and "/" not in name_of(Method())
