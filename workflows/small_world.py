"""The sheets for the small world, which need no download."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .sheet import Group, Node, Note, Output, Sheet, read_note

SAMPLING = {"steps": 25, "cfg": 2.0, "sampler_name": "ddim", "scheduler": "ddim_uniform"}
SEED, MULTI_SEED = 20, 77  # chosen: wrong without steering, right and clean with it
GREEN, RED, BLUE = "#8A8", "#A88", "#88A"


def enlarged(sheet: Sheet, image: Output) -> Node:
    """64×64 pictures are shown eight times as large, pixel by pixel."""
    return sheet.node("ImageScale", "Enlarge", width=300, image=image, upscale_method="nearest-exact", width_=512,
                      height_=512, crop="disabled")


def start(sheet: Sheet, note: Note, prompt: str) -> tuple[Node, Node, Node, Node]:
    """The columns that both lines share: (loader, graph, negative, latent)."""
    loader = sheet.node("LearnToSteerToyLoader")
    graph = sheet.node("LearnToSteerGraph", "Prompt", width=420, clip=loader["clip"], prompt=prompt)
    negative = sheet.node("CLIPTextEncode", "Negative prompt (empty)", width=420, clip=loader["clip"], text="")
    latent = sheet.node("EmptyLatentImage", width=300, width_=64, height_=64)
    sheet.column(Group("Read me", [[note]], "#b58b2a"), Group("Model", [[loader, latent]]))
    sheet.column(Group("What should be where", [[graph, negative]], GREEN))
    return loader, graph, negative, latent


def line(sheet: Sheet, parts: tuple[Node, Node, Node, Node], name: str, seed: int, steered: bool) -> list[list[Node]]:
    """Capture, sampler, picture, overlay and verdict of one line, as columns of nodes."""
    loader, graph, negative, latent = parts
    capture = sheet.node("LearnToSteerCapture", model=loader["model"], graph=graph["graph"])
    common = {**SAMPLING, "seed": seed, "model": capture["model"], "positive": graph["positive"],
              "negative": negative["CONDITIONING"], "latent_image": latent["LATENT"]}
    first, behind = [capture], []
    if steered:
        classifier = sheet.node("LearnToSteerClassifierLoader")
        sampler = sheet.node("LearnToSteerKSampler", width=320, graph=graph["graph"],
                             classifier=classifier["classifier"], **common)
        report = sheet.node("LearnToSteerReport", width=620, report=sampler["report"])
        first += [classifier]
        behind = [[report, sheet.node("SaveImage", "Save plot", width=620, collapsed=True, images=report["plot"],
                                      filename_prefix="learn_to_steer/probability")]]
    else:
        sampler = sheet.node("KSampler", width=320, **common)
    samples = sampler["latent" if steered else "LATENT"]
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


def steering(name: str, object_info: Mapping[str, Any]) -> Sheet:
    sheet = Sheet(name, object_info)
    parts = start(sheet, Note(read_note(name), 440, 380), "a photo of a dog to the right of a teddy bear")
    sheet.column(Group("Without steering", line(sheet, parts, "unsteered", SEED, False), RED),
                 Group("With steering, the same seed", line(sheet, parts, "steered", SEED, True), BLUE))
    return sheet


def multi_relation(name: str, object_info: Mapping[str, Any]) -> Sheet:
    sheet = Sheet(name, object_info)
    prompt = "a photo of a dog to the left of a cat and an apple above the cat"
    parts = start(sheet, Note(read_note(name), 440, 320), prompt)
    sheet.column(Group("Without steering", line(sheet, parts, "unsteered", MULTI_SEED, False), RED),
                 Group("With steering, the same seed", line(sheet, parts, "steered", MULTI_SEED, True), BLUE))
    return sheet


SHEETS = {"toyworld_steering": steering, "toyworld_multi_relation": multi_relation}
