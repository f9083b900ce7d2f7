"""Nodes of the small world: its models, and the exact judge of its pictures."""
from __future__ import annotations

from comfy_api.latest import io, ui

from ..toyworld.detector import detect, judge_relations
from ..toyworld.models import LOADERS
from .types import CATEGORY, graph_input

TOY = f"{CATEGORY}/small world"


class SmallWorldLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerToyLoader",
            display_name="Load Small World",
            category=TOY,
            description="A tiny model that ships with this pack, for trying steering within seconds on any machine. It draws "
                        "64x64 pictures of simple objects: the right objects in the wrong places, as large models often do.",
            inputs=[io.Combo.Input("backbone", options=list(LOADERS), tooltip="The tiny model's architecture: unet "
                                   "as Stable Diffusion 2, flux as FLUX.1 schnell.")],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="Works with every stock node. Use an empty latent of "
                                                                       "64x64 pixels."),
                io.Clip.Output("clip", display_name="clip", tooltip="Its text encoder, on the real CLIP tokenizer."),
                io.Vae.Output("vae", display_name="vae", tooltip="Its VAE."),
            ],
        )

    @classmethod
    def execute(cls, backbone: str) -> io.NodeOutput:
        return io.NodeOutput(*LOADERS[backbone]())


class SmallWorldJudge(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerToyJudge",
            display_name="Judge Small World",
            category=TOY,
            description="Finds the objects in a small-world picture by exact template matching and says whether the graph's "
                        "relations hold (GenEval's rule).",
            inputs=[io.Image.Input("image", tooltip="A decoded small-world picture, 64x64, not enlarged."), graph_input()],
            outputs=[io.String.Output("text", display_name="text",
                                      tooltip="The objects with their places, and which relations hold.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, graph) -> io.NodeOutput:
        text = "\n".join(describe(found, graph) for found in detect(image))
        return io.NodeOutput(text, ui=ui.PreviewText(text))


def describe(found, graph) -> str:
    """What is in one picture and whether each relation of the graph holds."""
    seen = ", ".join(f"{item.noun} at ({item.centre[0]:.0f}, {item.centre[1]:.0f})" for item in found) or "nothing known"
    relations = [(relation.subject, " and ".join(relation.predicates), relation.object) for relation in graph.relations]
    verdict = judge_relations(found, relations)
    lines = [f"{'yes' if holds else 'NO '}  {relation}" for relation, holds in
             zip(graph.relations, verdict.relations, strict=True)]
    return "\n".join([f"seen: {seen}", *lines])


NODES = [SmallWorldLoader, SmallWorldJudge]
