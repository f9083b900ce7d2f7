"""Nodes that turn a prompt into conditioning and spatial relations."""
from __future__ import annotations

from comfy_api.latest import io, ui

from ..host.tokens import encode_prompt
from ..prompts.graph import build_graph, parse_predicate
from ..prompts.relations import RELATIONS, RelationError, RelationGraph
from ..prompts.relations import Relation as SpatialRelation
from .types import CATEGORY, Graph, Relation

DIAGONALS = tuple(f"{vertical} and {horizontal}" for vertical in RELATIONS[:2] for horizontal in RELATIONS[2:])


class SpatialRelationNode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerRelation",
            display_name="Spatial Relation",
            category=CATEGORY,
            description="One relation between two objects of the prompt, for the list of \"Multi-Relation Graph\".",
            inputs=[
                io.String.Input("subject", default="dog", tooltip="The object to place, in the words of the prompt. "
                                "\"dog#2\" is the second dog of the prompt."),
                io.Combo.Input("relation", options=[*RELATIONS, *DIAGONALS], tooltip="Where the subject should be, seen "
                               "from the object."),
                io.String.Input("object", default="cat", tooltip="The object that the relation is seen from, in the "
                                "words of the prompt."),
                io.Float.Input("weight", default=1.0, min=0.0, max=10.0, step=0.05, advanced=True,
                               tooltip="Importance among several relations. 0 switches this one off."),
            ],
            outputs=[Relation.Output("relation", display_name="relation", tooltip="For \"Multi-Relation Graph\".")],
        )

    @classmethod
    def execute(cls, subject: str, relation: str, object: str, weight: float) -> io.NodeOutput:
        return io.NodeOutput(SpatialRelation(subject.strip(), parse_predicate(relation), object.strip(), weight))


class MultiRelationGraph(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerGraph",
            display_name="Multi-Relation Graph",
            category=CATEGORY,
            description="Reads spatial relations from the prompt, or takes them as lines or inputs, and encodes the prompt. Both "
                        "outputs come from the same text, so the steered words are the encoded ones.",
            search_aliases=["spatial prompt", "left of", "relations", "learn to steer"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model, as for CLIP Text Encode."),
                io.String.Input("prompt", multiline=True, dynamic_prompts=True,
                                default="a photo of a dog to the right of a teddy bear",
                                tooltip="The prompt. Relations such as \"to the left of\", \"above\" and \"under\" are read "
                                        "from it unless you give some below. After a run the node shows what was "
                                        "understood and what was not."),
                io.String.Input("relations", multiline=True, default="", optional=True,
                                tooltip="Optional, one per line: dog | to the right of | teddy bear. A fourth field is a "
                                        "weight. The lines replace what would be read from the prompt. If the prompt is "
                                        "empty, it is written from them."),
                io.Boolean.Input("allow_no_relation", default=False, optional=True, advanced=True,
                                 tooltip="Accept a prompt without a relation; nothing is steered then. Off: such a prompt "
                                         "is an error that quotes what was not understood, so a misspelt relation is "
                                         "noticed."),
                io.Autogrow.Input("relation_list", optional=True, tooltip="Optional list of \"Spatial Relation\" nodes. It "
                                  "grows as you connect them. They replace what would be read from the prompt.",
                                  template=io.Autogrow.TemplatePrefix(
                                      Relation.Input("relation", tooltip="One relation, from \"Spatial Relation\"."),
                                      prefix="relation_", min=0, max=12)),
            ],
            outputs=[
                Graph.Output("graph", display_name="graph", tooltip="The relations, for the steering nodes."),
                io.Conditioning.Output("positive", display_name="positive",
                                       tooltip="The encoded prompt, with the positions of each word's tokens."),
                io.String.Output("text", display_name="prompt", tooltip="The prompt, for other encoders or file names."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, clip, prompt: str, relations: str = "", allow_no_relation: bool = False,
                relation_list: dict | None = None) -> io.NodeOutput:
        _need_text_encoder(clip)
        extra = tuple(relation for relation in (relation_list or {}).values() if relation is not None)
        try:
            graph: RelationGraph = build_graph(prompt, relations or "", extra)
        except RelationError as error:
            raise RelationError(f"{_source(relations, extra)}: {error}") from None
        if not graph.relations and not allow_no_relation:
            raise RelationError(f"input 'prompt': {_no_relation(graph)} Write one, such as \"a dog to the left of a cat\" (also: "
                                "right of, above, below, on top of, under), or give it in 'relations', or switch "
                                "'allow_no_relation' on.")
        if graph.relations and not graph.counted().relations and not allow_no_relation:
            raise RelationError(f"{_source(relations, extra)}: every relation has the weight 0, so nothing would be steered. "
                                "Give one a weight above 0, or switch 'allow_no_relation' on.")
        positive = encode_prompt(clip, graph.prompt)
        return io.NodeOutput(graph, positive, graph.prompt, ui=ui.PreviewText(graph.describe()))


def _need_text_encoder(clip) -> None:
    if clip is None:
        raise RuntimeError("input 'clip': it is empty. The checkpoint has no text encoder: load one with \"Load CLIP\" or "
                           "\"DualCLIPLoader\".")


def _no_relation(graph: RelationGraph) -> str:
    """What the error says of a prompt without a relation: what was not understood in it, where there is such."""
    if not graph.not_understood:
        return f"no relation found in \"{graph.prompt}\"."
    return (f"no relation understood in \"{graph.prompt}\". Not understood: "
            + "; ".join(str(one) for one in graph.not_understood) + ".")


def _source(lines: str, extra: tuple[SpatialRelation, ...]) -> str:
    """The inputs from which the relations came."""
    used = {"'relations'": bool(lines and lines.strip()), "'relation_list'": bool(extra)}
    return "input " + (" and ".join(name for name, given in used.items() if given) or "'prompt'")


class SteerableTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LearnToSteerTextEncode",
            display_name="Text Encode (Steerable)",
            category=CATEGORY,
            description="CLIP Text Encode whose conditioning also carries the positions of each word's tokens, so that the "
                        "words' attention can be recorded or steered.",
            search_aliases=["CLIPTextEncode", "prompt"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt."),
            ],
            outputs=[io.Conditioning.Output("conditioning", display_name="conditioning",
                                            tooltip="As from CLIP Text Encode, with token positions.")],
        )

    @classmethod
    def execute(cls, clip, text: str) -> io.NodeOutput:
        _need_text_encoder(clip)
        return io.NodeOutput(encode_prompt(clip, text))


NODES = [MultiRelationGraph, SpatialRelationNode, SteerableTextEncode]
