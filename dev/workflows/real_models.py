"""Workflows for models that users download: Stable Diffusion 2.1 and FLUX.1, with the paper's sampling settings."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .sheet import Group, Node, Note, Output, Sheet, read_note

GREEN, RED, BLUE, YELLOW = "#8A8", "#A88", "#88A", "#b58b2a"
PROMPT = "a photo of a dog to the right of a teddy bear"
SD21, DEV, SCHNELL = "v2-1_512-ema-pruned.safetensors", "flux1-dev.safetensors", "flux1-schnell.safetensors"
LORA = "my_dog_lora.safetensors"
SD21_SAMPLING = {"seed": 0, "steps": 50, "cfg": 7.5, "sampler_name": "ddim", "scheduler": "ddim_uniform"}


def sd21_note(name: str, height: int = 640) -> Note:
    paper = read_note("_paper", classifier="sd2")
    files = read_note("_sd21_files", model=SD21)
    return Note(read_note(name, files=files, paper=paper, unmeasured=read_note("_unmeasured"), lora=LORA), 520, height)


def flux_note(name: str, schnell: bool = False) -> Note:
    classifier = "flux_schnell" if schnell else "flux_dev"
    files = read_note("_flux_files", model=SCHNELL if schnell else DEV,
                      repository="FLUX.1-schnell" if schnell else "FLUX.1-dev")
    paper = read_note("_paper", classifier=classifier)
    return Note(read_note(name, files=files, paper=paper, unmeasured=read_note("_unmeasured")), 560, 680)


def shown(sheet: Sheet, samples: Output, maps: Output, report: Output | None, vae: Output,
          name: str) -> list[list[Node]]:
    """Columns of nodes after a sampler: picture, attention and report."""
    decoded = sheet.node("VAEDecode", width=240, samples=samples, vae=vae)
    picture = sheet.node("SaveImage", "Save steered picture", width=420, extra_height=120, images=decoded["IMAGE"],
                         filename_prefix=f"learn_to_steer/{name}")
    overlay = sheet.node("LearnToSteerOverlay", width=560, maps=maps, image=decoded["IMAGE"])
    columns = [[decoded], [picture], [overlay]]
    if report is not None:
        columns[-1].append(sheet.node("LearnToSteerReport", width=560, report=report))
    return columns


def checkpoint(sheet: Sheet, note: Note, prompt: str, lora: bool = False) -> tuple[Output, Node, Node, Node, Output]:
    """Adds the left columns of a checkpoint workflow. Returns (model, graph, negative, latent, vae)."""
    loader = sheet.node("CheckpointLoaderSimple", width=360, ckpt_name=SD21)
    model, clip = loader["MODEL"], loader["CLIP"]
    column = [loader]
    if lora:
        patched = sheet.node("LoraLoader", width=360, model=model, clip=clip, lora_name=LORA)
        model, clip = patched["MODEL"], patched["CLIP"]
        column.append(patched)
    latent = sheet.node("EmptyLatentImage", width=360, width_=512, height_=512)
    graph = sheet.node("LearnToSteerGraph", "Prompt", width=420, clip=clip, prompt=prompt)
    negative = sheet.node("CLIPTextEncode", "Negative prompt", width=420, clip=clip, text="")
    sheet.column(Group("Read me", [[note]], YELLOW), Group("Model", [[*column, latent]]))
    sheet.column(Group("What should be where", [[graph, negative]], GREEN))
    return model, graph, negative, latent, loader["VAE"]


def steered_sampler(sheet: Sheet, model: Output, graph: Node, negative: Node, latent: Node) -> tuple[Node, Node]:
    classifier = sheet.node("LearnToSteerClassifierLoader", width=320)
    sampler = sheet.node("LearnToSteerKSampler", width=320, model=model, positive=graph["positive"],
                         negative=negative["CONDITIONING"], latent_image=latent["LATENT"], graph=graph["graph"],
                         classifier=classifier["classifier"], **SD21_SAMPLING)
    return classifier, sampler


def sd21_steering(name: str, object_info: Mapping[str, Any]) -> Sheet:
    sheet = Sheet(name, object_info)
    note = sd21_note(name)
    model, graph, negative, latent, vae = checkpoint(sheet, note, PROMPT)
    plain = sheet.node("KSampler", width=320, model=model, positive=graph["positive"],
                       negative=negative["CONDITIONING"], latent_image=latent["LATENT"], **SD21_SAMPLING)
    decoded = sheet.node("VAEDecode", width=240, samples=plain["LATENT"], vae=vae)
    saved = sheet.node("SaveImage", "Save unsteered picture", width=420, extra_height=120, images=decoded["IMAGE"],
                       filename_prefix="learn_to_steer/sd21_unsteered")
    classifier, sampler = steered_sampler(sheet, model, graph, negative, latent)
    behind = shown(sheet, sampler["latent"], sampler["maps"], sampler["report"], vae, "sd21_steered")
    sheet.column(Group("Without steering", [[plain], [decoded], [saved]], RED),
                 Group("With steering, the same seed", [[classifier, sampler], *behind], BLUE))
    return sheet


def personalised_lora(name: str, object_info: Mapping[str, Any]) -> Sheet:
    sheet = Sheet(name, object_info)
    note = sd21_note(name)
    model, graph, negative, latent, vae = checkpoint(
        sheet, note, "a photo of a sks dog to the right of a teddy bear", lora=True)
    classifier, sampler = steered_sampler(sheet, model, graph, negative, latent)
    behind = shown(sheet, sampler["latent"], sampler["maps"], sampler["report"], vae, "personalised")
    sheet.column(Group("Steered sampling", [[classifier, sampler], *behind], BLUE))
    return sheet


def attention_maps(name: str, object_info: Mapping[str, Any]) -> Sheet:
    sheet = Sheet(name, object_info)
    loader = sheet.node("CheckpointLoaderSimple", width=360, ckpt_name=SD21)
    positive = sheet.node("LearnToSteerTextEncode", "Prompt", width=420, clip=loader["CLIP"],
                          text="a photo of a dog and a teddy bear on a green meadow under a blue sky")
    negative = sheet.node("CLIPTextEncode", "Negative prompt", width=420, clip=loader["CLIP"], text="")
    latent = sheet.node("EmptyLatentImage", width=360, width_=512, height_=512)
    capture = sheet.node("LearnToSteerCapture", width=320, model=loader["MODEL"], words="dog, teddy bear, meadow, sky")
    sampler = sheet.node("KSampler", width=320, model=capture["model"], positive=positive["conditioning"],
                         negative=negative["CONDITIONING"], latent_image=latent["LATENT"], **SD21_SAMPLING)
    maps = sheet.node("LearnToSteerMaps", width=240, capture=capture["capture"], samples=sampler["LATENT"])
    decoded = sheet.node("VAEDecode", width=240, samples=maps["samples"], vae=loader["VAE"])
    picture = sheet.node("SaveImage", "Picture", width=420, extra_height=120, images=decoded["IMAGE"],
                         filename_prefix="learn_to_steer/attention_picture")
    average = sheet.node("LearnToSteerOverlay", "Average over the steps", width=700, maps=maps["maps"],
                         image=decoded["IMAGE"])
    each = sheet.node("LearnToSteerOverlay", "Each step, without the picture", width=700, maps=maps["maps"],
                      steps="each step")
    sheet.column(Group("Read me", [[sd21_note(name, 460)]], YELLOW), Group("Model", [[loader, latent]]))
    sheet.column(Group("Prompt", [[positive, negative]], GREEN))
    sheet.column(Group("Watched sampling", [[capture, sampler], [maps, decoded], [picture]], BLUE))
    sheet.column(Group("Attention", [[average, each]], RED))
    return sheet


def flux(sheet: Sheet, note: Note, prompt: str, relations: Sequence[tuple[str, str, str]], picture: str,
         schnell: bool = False) -> Sheet:
    """A FLUX workflow with the host's guider and sampler nodes. Steering is a patch on MODEL."""
    side, steps = (256, 4) if schnell else (512, 50)
    model = sheet.node("UNETLoader", width=360, unet_name=SCHNELL if schnell else DEV)
    clip = sheet.node("DualCLIPLoader", width=360, clip_name1="clip_l.safetensors",
                      clip_name2="t5xxl_fp16.safetensors", type="flux")
    vae = sheet.node("VAELoader", width=360, vae_name="ae.safetensors")
    listed = [sheet.node("LearnToSteerRelation", f"Relation {number}", width=300, subject=subject, relation=relation,
                         object=other) for number, (subject, relation, other) in enumerate(relations, 1)]
    grown = {"relation_list": [node["relation"] for node in listed]} if listed else {}
    graph = sheet.node("LearnToSteerGraph", "Prompt", width=420, clip=clip["CLIP"], prompt=prompt, **grown)
    classifier = sheet.node("LearnToSteerClassifierLoader", width=320)
    # Of four steps few are steered, so each gets more updates.
    settings = {"max_updates": 10} if schnell else {}
    steering = sheet.node("LearnToSteerApply", width=320, model=model["MODEL"], graph=graph["graph"],
                          classifier=classifier["classifier"], save_memory=True, **settings)
    conditioning, behind_prompt = graph["positive"], []
    if not schnell:
        guidance = sheet.node("FluxGuidance", width=420, conditioning=conditioning, guidance=3.5)
        conditioning, behind_prompt = guidance["CONDITIONING"], [guidance]
    guider = sheet.node("BasicGuider", width=320, model=steering["model"], conditioning=conditioning)
    noise = sheet.node("RandomNoise", width=300, noise_seed=0)
    sampler = sheet.node("KSamplerSelect", width=300, sampler_name="euler")
    sigmas = sheet.node("BasicScheduler", width=300, model=model["MODEL"], scheduler="simple", steps=steps)
    latent = sheet.node("EmptySD3LatentImage", width=300, width_=side, height_=side)
    run = sheet.node("SamplerCustomAdvanced", width=300, noise=noise["NOISE"], guider=guider["GUIDER"],
                     sampler=sampler["SAMPLER"], sigmas=sigmas["SIGMAS"], latent_image=latent["LATENT"])
    result = sheet.node("LearnToSteerResult", width=240, steering=steering["steering"], samples=run["output"])
    behind = shown(sheet, result["samples"], result["maps"], result["report"], vae["VAE"], picture)
    behind[0].insert(0, result)
    prompt_columns = [[graph, *behind_prompt]]
    sheet.column(Group("Read me", [[note]], YELLOW), Group("Model", [[model, clip, vae]]))
    sheet.column(Group("What should be where", [listed, *prompt_columns] if listed else prompt_columns, GREEN))
    sheet.column(Group("Steering", [[classifier, steering, guider]], RED))
    sheet.column(Group("Sampling", [[noise, sampler, sigmas, latent, run]], BLUE))
    sheet.column(Group("What came out", behind))
    return sheet


def flux_dev(name: str, object_info: Mapping[str, Any]) -> Sheet:
    note = flux_note(name)
    return flux(Sheet(name, object_info), note, PROMPT, (), "flux_dev_steered")


def flux_schnell(name: str, object_info: Mapping[str, Any]) -> Sheet:
    note = flux_note(name, schnell=True)
    return flux(Sheet(name, object_info), note, PROMPT, (), "flux_schnell_steered", schnell=True)


def multi_relation(name: str, object_info: Mapping[str, Any]) -> Sheet:
    note = flux_note(name)
    relations = (("dog", "to the left of", "cat"), ("cat", "above", "skateboard"),
                 ("airplane", "to the right of", "car"))
    prompt = "a photo of a dog to the left of a cat above a skateboard and an airplane to the right of a car"
    return flux(Sheet(name, object_info), note, prompt, relations, "multi_relation")


SHEETS = {"sd21_steering": sd21_steering, "flux_dev_steering": flux_dev, "flux_schnell_steering": flux_schnell,
          "multi_relation": multi_relation, "personalised_lora": personalised_lora, "attention_maps": attention_maps}
