"""Nodes that record cross-attention and show it as heat maps."""
from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..host.capturing import Capture
from ..host.patching import apply_capture
from ..host.records import AttentionRecord
from ..pictures.overlays import captioned, overlay
from .runs import find_run
from .types import CATEGORY, Graph, Maps, RunLog, check_numbers, maps_output


class AttentionCapture(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerCapture",
            display_name="Attention Capture",
            category=CATEGORY,
            description="Patches a MODEL so that any sampler run records where the model looks for chosen words. The "
                        "picture stays the same bit for bit. Read the result with \"Attention Maps\".",
            search_aliases=["cross attention", "DAAM", "heat map"],
            inputs=[
                io.Model.Input("model", tooltip="The model to record. SD1.x, SD2.x, SDXL and FLUX.1 are supported."),
                io.String.Input("words", default="", tooltip="Words or phrases of the prompt, separated by commas: dog, "
                                "teddy bear. Empty: the objects of the graph."),
                Graph.Input("graph", optional=True, tooltip="Optional: its objects are recorded too."),
                io.Float.Input("start_percent", default=0.0, min=0.0, max=1.0, step=0.01, advanced=True,
                               tooltip="Where recording begins, as a fraction of the denoising schedule."),
                io.Float.Input("end_percent", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                               tooltip="Where recording ends, as a fraction of the denoising schedule."),
                io.Int.Input("resolution", default=32, min=4, max=128, advanced=True,
                             tooltip="Longer side of the recorded maps, in cells."),
                io.String.Input("layers", default="", advanced=True, tooltip="Record only layers whose name contains one "
                                "of these words, separated by commas (input, middle, output.5, double, single). Empty: "
                                "all."),
                io.Boolean.Input("keep_heads", default=False, advanced=True, tooltip="Keep the maps of every layer and "
                                 "head as well as their average. Needs much more memory."),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The model with recording, for any sampler."),
                RunLog.Output("capture", display_name="capture", tooltip="For \"Attention Maps\", behind the sampler."),
            ],
        )

    @classmethod
    def execute(cls, model, words: str, start_percent: float, end_percent: float, resolution: int, layers: str,
                keep_heads: bool, graph=None) -> io.NodeOutput:
        check_numbers(start_percent=start_percent, end_percent=end_percent)
        phrases = dict.fromkeys([*_split(words), *(graph.phrases if graph is not None else ())])
        if not phrases and graph is None:
            raise ValueError("input 'words': nothing to watch. Name words of the prompt, or connect a graph with relations.")
        patched, runs = apply_capture(model, Capture(tuple(phrases), start_percent, end_percent, resolution,
                                                     _split(layers), keep_heads))
        return io.NodeOutput(patched, runs)


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


class AttentionMapsNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerMaps",
            display_name="Attention Maps",
            category=CATEGORY,
            description="Gives the maps that \"Attention Capture\" recorded while this latent was sampled.",
            inputs=[
                RunLog.Input("capture", tooltip="From \"Attention Capture\"."),
                io.Latent.Input("samples", tooltip="The LATENT output of the sampler that used the recorded model. It "
                                "identifies the run."),
            ],
            outputs=[
                maps_output(),
                io.Latent.Output("latent", display_name="samples", tooltip="The same latent, for the VAE."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, capture, samples) -> io.NodeOutput:
        return io.NodeOutput(find_run(capture, samples, cls.hidden, "capture").maps, samples)


class AttentionOverlay(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerOverlay",
            display_name="Attention Overlay",
            category=CATEGORY,
            description="Heat maps of the recorded words, on the picture or alone, one panel per word.",
            search_aliases=["heat map", "attention map"],
            inputs=[
                Maps.Input("maps", tooltip="From \"Attention Maps\" or a steering sampler."),
                io.Image.Input("image", optional=True, tooltip="The decoded picture of the same run. Without it the heat "
                               "maps stand alone. If there are no maps, it is shown with a line that says why."),
                io.Combo.Input("steps", options=["average", "each step", "last step"], default="average",
                               tooltip="The average over the recorded steps, one picture per step, or the last step."),
                io.Float.Input("strength", default=0.6, min=0.0, max=1.0, step=0.05, advanced=True,
                               tooltip="Opacity of the heat map over the picture."),
            ],
            outputs=[io.Image.Output("overlay", display_name="overlay", tooltip="One image per picture of the batch and step.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, maps: AttentionRecord, steps: str, strength: float, image=None) -> io.NodeOutput:
        check_numbers(strength=strength)
        if not maps.steps or not maps.phrases:
            caption = "; ".join(("nothing to show", *maps.notes))
            drawn = [captioned(picture, caption) for picture in ([None] if image is None else image)]
        else:
            drawn = [overlay(None if image is None else image[min(index, len(image) - 1)], picture_maps, maps.phrases, caption,
                             strength)
                     for caption, step_maps in _chosen(maps, steps) for index, picture_maps in enumerate(step_maps)]
        pictures = torch.stack(drawn)
        return io.NodeOutput(pictures, ui=ui.PreviewImage(pictures, cls=cls))


def _chosen(maps: AttentionRecord, steps: str) -> list[tuple[str, torch.Tensor]]:
    """(caption, [B, words, h, w]) of each picture to draw."""
    if steps == "average":
        return [(f"average over {len(maps.steps)} steps", maps.average())]
    chosen = maps.steps if steps == "each step" else maps.steps[-1:]
    return [(f"step {step.step}, sigma {step.sigma:.2f}", step.average) for step in chosen]


NODES = [AttentionCapture, AttentionMapsNode, AttentionOverlay]
