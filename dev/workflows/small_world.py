"""Workflows for the small world, which need no download."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learn_to_steer.toyworld.config import RULE, SAMPLING, STEERING

from .sheet import Group, Node, Note, Output, Sheet, read_note

SEED, MULTI_SEED, FLUX_SEED = 1, 22, 3  # first seeds with the right objects misplaced without steering, and all correct with it
PROMPT = "a photo of a dog to the right of a teddy bear"
MULTI_PROMPT = "a photo of a dog to the left of a cat and an apple above the cat"
INPUTS = {"start": "start_percent", "end": "end_percent"}
"""Setting in STEERING -> the sampler's input, where the names differ."""
GREEN, RED, BLUE = "#8A8", "#A88", "#88A"


def enlarged(sheet: Sheet, image: Output) -> Node:
    """A node that enlarges 64x64 pictures eight times, pixel by pixel."""
    return sheet.node("ImageScale", "Enlarge", width=300, image=image, upscale_method="nearest-exact", width_=512,
                      height_=512, crop="disabled")


def start(sheet: Sheet, note: Note, prompt: str, backbone: str) -> tuple[Node, Node, Node, Node]:
    """Adds the columns that both lines share. Returns (loader, graph, negative, latent)."""
    loader = sheet.node("LearnToSteerToyLoader", backbone=backbone)
    graph = sheet.node("LearnToSteerGraph", "Prompt", width=420, clip=loader["clip"], prompt=prompt)
    negative = sheet.node("CLIPTextEncode", "Negative prompt (empty)", width=420, clip=loader["clip"], text="")
    latent = sheet.node("EmptyLatentImage", width=300, width_=64, height_=64)
    sheet.column(Group("Read me", [[note]], "#b58b2a"), Group("Model", [[loader, latent]]))
    sheet.column(Group("What should be where", [[graph, negative]], GREEN))
    return loader, graph, negative, latent


def line(sheet: Sheet, parts: tuple[Node, Node, Node, Node], name: str, sampling: Mapping[str, Any],
         steering: Mapping[str, float] | None, rule: str | None = None) -> list[list[Node]]:
    """Columns of nodes of one line: capture, sampler, picture, overlay and verdict.

    steering: inputs of the steering sampler, None for unsteered; rule: a shipped classifier, None for the built-in one.
    """
    loader, graph, negative, latent = parts
    capture = sheet.node("LearnToSteerCapture", model=loader["model"], graph=graph["graph"])
    common = {**sampling, "model": capture["model"], "positive": graph["positive"],
              "negative": negative["CONDITIONING"], "latent_image": latent["LATENT"]}
    first, behind = [capture], []
    if steering is not None:
        classifier = sheet.node("LearnToSteerClassifierLoader", **({"classifier_name": f"{rule} (shipped)"} if rule else {}))
        sampler = sheet.node("LearnToSteerKSampler", width=320, graph=graph["graph"],
                             classifier=classifier["classifier"], **common, **steering)
        report = sheet.node("LearnToSteerReport", width=620, report=sampler["report"])
        first += [classifier]
        behind = [[report, sheet.node("SaveImage", "Save plot", width=620, collapsed=True, images=report["plot"],
                                      filename_prefix="learn_to_steer/probability")]]
    else:
        sampler = sheet.node("KSampler", width=320, **common)
    samples = sampler["LATENT" if steering is None else "latent"]
    maps = sheet.node("LearnToSteerMaps", capture=capture["capture"], samples=samples)
    decoded = sheet.node("VAEDecode", samples=maps["samples"], vae=loader["vae"])
    judge = sheet.node("LearnToSteerToyJudge", f"Judge {name}", width=380, image=decoded["IMAGE"], graph=graph["graph"])
    picture = enlarged(sheet, decoded["IMAGE"])
    overlay = sheet.node("LearnToSteerOverlay", width=560, maps=maps["maps"], image=decoded["IMAGE"])
    saved = sheet.node("SaveImage", f"Save {name} picture", width=380, images=picture["IMAGE"],
                       filename_prefix=f"learn_to_steer/{name}")
    saved_overlay = sheet.node("SaveImage", f"Save {name} attention", width=560, collapsed=True,
                               images=overlay["overlay"], filename_prefix=f"learn_to_steer/attention_{name}")
    return [first, [sampler], [maps, decoded, picture], [saved, judge], [overlay, saved_overlay], *behind]


def two_lines(name: str, object_info: Mapping[str, Any], prompt: str, seed: int, backbone: str = "unet",
              note_height: int = 380) -> Sheet:
    """A workflow with the same prompt and seed, without and with steering."""
    sheet = Sheet(name, object_info)
    parts = start(sheet, Note(read_note(name), 440, note_height), prompt, backbone)
    chosen = SAMPLING[backbone]
    sampling = {"seed": seed, "steps": chosen.steps, "cfg": chosen.cfg, "sampler_name": chosen.sampler,
                "scheduler": chosen.scheduler}
    steering = {INPUTS.get(name, name): value for name, value in STEERING[backbone].items()}
    sheet.column(Group("Without steering", line(sheet, parts, "unsteered", sampling, None), RED),
                 Group("With steering, the same seed", line(sheet, parts, "steered", sampling, steering, RULE[backbone]), BLUE))
    return sheet


def steering(name: str, object_info: Mapping[str, Any]) -> Sheet:
    return two_lines(name, object_info, PROMPT, SEED)


def multi_relation(name: str, object_info: Mapping[str, Any]) -> Sheet:
    return two_lines(name, object_info, MULTI_PROMPT, MULTI_SEED, note_height=320)


def flux_steering(name: str, object_info: Mapping[str, Any]) -> Sheet:
    return two_lines(name, object_info, PROMPT, FLUX_SEED, "flux", 320)


def train(name: str, object_info: Mapping[str, Any]) -> Sheet:
    """The training workflow: pictures, dataset, classifier, file."""
    sheet = Sheet(name, object_info)
    loader = sheet.node("LearnToSteerToyLoader", width=320, backbone="unet")
    dataset = sheet.node("LearnToSteerDatasetBuilder", width=420, model=loader["model"], clip=loader["clip"],
                         vae=loader["vae"], name="small_world", train_per_relation=24, validation_per_relation=4,
                         test_per_relation=4, steps=10, iterations=2, batch=16)
    trained = sheet.node("LearnToSteerTrain", width=420, dataset=dataset["dataset"], name="small_world",
                         learning_rate=0.0003, epochs=12, width_=64)
    loss = sheet.node("PreviewImage", "Loss", width=420, extra_height=120, images=trained["loss"])
    confusion = sheet.node("PreviewImage", "Confusion matrix", width=420, extra_height=120, images=trained["confusion"])
    saved = sheet.node("LearnToSteerSaveClassifier", width=360, classifier=trained["classifier"], name="small_world",
                       overwrite=True)
    sheet.column(Group("Read me", [[Note(read_note(name), 480, 460)]], "#b58b2a"), Group("Model", [[loader]]))
    sheet.column(Group("Pictures to attention maps", [[dataset]], GREEN))
    sheet.column(Group("Attention maps to a classifier", [[trained, saved], [loss], [confusion]], BLUE))
    return sheet


SHEETS = {"toyworld_steering": steering, "toyworld_multi_relation": multi_relation,
          "toyworld_flux_steering": flux_steering, "train_relation_classifier": train}
