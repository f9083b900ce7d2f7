"""Converts a workflow saved by the ComfyUI page (nodes and links) to a prompt for the server (API format).

The page converts in the browser. This module needs only the file and the server's `/object_info`. Saved widget values have no
names; their names follow from the order of the inputs in `/object_info`.
Not supported: prompt wildcards (`{a|b}`), text replacements in file names, and fields added by a pack's own JavaScript (3D
viewers, webcam). Subgraphs and group nodes are refused.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MUTED, BYPASSED = 2, 4
NOTES = {"Note", "MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COLOR", "COLORS", "CURVE", "RANGE", "MARKDOWN",
                "TEXTAREA", "BOUNDING_BOX", "BOUNDING_BOXES", "IMAGEUPLOAD", "IMAGECOMPARE", "PAINTER", "CHART",
                "GALLERIA"}
SEEDS = ("seed", "noise_seed")
EMPTY = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False, "IMAGECOMPARE": ["", ""]}


class WorkflowError(ValueError):
    """The workflow cannot be converted to a prompt; the message names the node and says what to do."""


@dataclass(frozen=True)
class Spec:
    """One input of a node type, from `/object_info`. type: "COMBO" for both notations of a choice."""

    name: str
    type: str
    options: Mapping[str, Any]

    @property
    def is_widget(self) -> bool:
        """Whether the page shows a field for the input, not only a socket."""
        if self.options.get("forceInput"):
            return False
        return self.options.get("widgetType", self.type) in WIDGET_TYPES or self.type == "COMFY_DYNAMICCOMBO_V3"

    @property
    def has_control(self) -> bool:
        """Whether a "control after generate" field follows, which has a saved value of its own."""
        if self.type not in ("INT", "COMBO"):
            return False
        named_seed = self.type == "INT" and self.name in ("seed", "noise_seed")
        return bool(self.options.get("control_after_generate", named_seed))

    @property
    def default(self) -> Any:
        if "default" in self.options:
            return self.options["default"]
        choices = self.options.get("options") or [EMPTY.get(self.type)]
        return choices[0]


def input_specs(inputs: Mapping[str, Any], order: Mapping[str, Sequence[str]] | None = None,
                prefix: str = "") -> list[Spec]:
    """The inputs of a node type in the page's order, required ones first."""
    specs = []
    for section in ("required", "optional"):
        entries = inputs.get(section) or {}
        for name in (order or {}).get(section, entries):
            kind, *rest = entries[name]
            options = dict(rest[0]) if rest and isinstance(rest[0], Mapping) else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {**options, "options": kind}
            specs.append(Spec(prefix + name, kind, options))
    return specs


def widget_values(specs: Sequence[Spec], saved: Sequence[Any] | Mapping[str, Any] | None) -> dict[str, Any]:
    """Saved values by name. As on the page, missing values at the end get their default and surplus values are ignored."""
    if isinstance(saved, Mapping):
        return {spec.name: saved.get(spec.name, spec.default) for spec in specs if spec.is_widget}
    return _read_values(specs, iter(_without_forced(specs, list(saved or []))))


def _without_forced(specs: Sequence[Spec], saved: list[Any]) -> list[Any]:
    """The saved values without those of `forceInput` sockets, which old pages saved and the current page drops."""
    forced: list[bool] = []
    for spec in specs:
        if spec.is_widget or spec.options.get("forceInput"):
            forced.append(bool(spec.options.get("forceInput")))
            forced += [False] * bool(spec.options.get("control_after_generate"))
    if any(forced) and len(forced) == len(saved):
        return [value for value, drop in zip(saved, forced, strict=True) if not drop]
    return saved


def _read_values(specs: Sequence[Spec], saved: Iterator[Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for spec in specs:
        if not spec.is_widget:
            continue
        if spec.type == "COMFY_DYNAMICCOMBO_V3":
            options = {option["key"]: option["inputs"] for option in spec.options["options"]}
            values[spec.name] = key = next(saved, next(iter(options)))
            values |= _read_values(input_specs(options.get(key, {}), prefix=spec.name + "."), saved)
            continue
        value = next(saved, spec.default)
        if isinstance(value, list):  # a bare list would be taken for a link
            value = {"__type__": "CURVE", "__value__": value} if spec.type == "CURVE" else {"__value__": value}
        values[spec.name] = value
        if spec.has_control:
            next(saved, None)
    return values


@dataclass(frozen=True)
class Constant:
    """The source of a link that ends at a typed-in value instead of a node's output."""

    value: Any


class Graph:
    """The nodes and links of a workflow file, with the node types of a server. Raises WorkflowError for unknown nodes."""

    def __init__(self, workflow: Mapping[str, Any], object_info: Mapping[str, Any]):
        self.object_info = object_info
        self.nodes = {str(node["id"]): node for node in workflow["nodes"]}
        self.links: dict[int, tuple[str, int]] = {}
        for link in workflow.get("links") or []:
            number, origin, slot = ((link["id"], link["origin_id"], link["origin_slot"]) if isinstance(link, Mapping)
                                    else link[:3])
            self.links[number] = (str(origin), int(slot))
        self._refuse_groups(workflow)
        self._refuse_unknown()

    def _refuse_groups(self, workflow: Mapping[str, Any]) -> None:
        subgraphs = {graph["id"] for graph in (workflow.get("definitions") or {}).get("subgraphs") or []}
        for node in self.nodes.values():
            if node["type"] in subgraphs or node["type"].startswith(("workflow/", "workflow>")):
                raise WorkflowError(f"{describe(node)} is a subgraph; unpack it on the page (right click, "
                                    "Unpack subgraph), or export the workflow with File > Export (API).")

    def _refuse_unknown(self) -> None:
        unknown = [f"{describe(node)} of type {node['type']!r}" for node in self.nodes.values()
                   if self._is_run(node) and node["type"] not in self.object_info]
        if unknown:
            raise WorkflowError(f"This server does not know: {'; '.join(unknown)}. Is the pack that has these nodes in "
                                "custom_nodes, and did it load? The server's log says so.")

    @staticmethod
    def _is_run(node: Mapping[str, Any]) -> bool:
        virtual = NOTES | {"Reroute", "PrimitiveNode"}
        return node.get("mode", 0) not in (MUTED, BYPASSED) and node["type"] not in virtual

    def _widgets(self, node: Mapping[str, Any]) -> dict[str, Any]:
        info = self.object_info.get(node["type"])
        if info is None:
            return {}
        return widget_values(input_specs(info["input"], info.get("input_order")), node.get("widgets_values"))

    def _source(self, socket: Mapping[str, Any],
                seen: frozenset[tuple[str, int]] = frozenset()) -> list | Constant | None:
        """The source of an input: `[node id, slot]`, a typed-in value, or None."""
        link = self.links.get(socket.get("link"))
        if link is None or link[0] not in self.nodes:
            return None
        if link in seen:
            raise WorkflowError(f"{describe(self.nodes[link[0]])} is part of a circle of reroutes or bypassed nodes.")
        seen |= {link}
        node_id, slot = link
        node = self.nodes[node_id]
        if node.get("mode") == MUTED:
            return None
        if node.get("mode") == BYPASSED:
            through = _bypass_input(node, slot, socket.get("type", "*"))
            if through is None:
                return None
            source = self._source(through, seen)
            if source is None and through.get("link") is None:
                values = self._widgets(node)
                name = (through.get("widget") or {}).get("name")
                return Constant(values[name]) if name in values else None
            return source
        if node["type"] == "Reroute":
            return self._source(node["inputs"][0], seen)
        if node["type"] == "PrimitiveNode":
            values = node.get("widgets_values") or []
            return Constant(values[0]) if values else None
        return [node_id, slot]

    def prompt(self) -> dict[str, dict[str, Any]]:
        prompt = {}
        for node_id, node in self.nodes.items():
            if not self._is_run(node):
                continue
            inputs = self._widgets(node)
            for socket in node.get("inputs") or []:
                source = self._source(socket)
                if source is not None:
                    inputs[socket["name"]] = source.value if isinstance(source, Constant) else source
            title = node.get("title") or self.object_info[node["type"]].get("display_name") or node["type"]
            prompt[node_id] = {"inputs": inputs, "class_type": node["type"], "_meta": {"title": title}}
        return prompt


def _bypass_input(node: Mapping[str, Any], slot: int, wanted: str) -> Mapping[str, Any] | None:
    """The input of a bypassed node that replaces its output: the one at the same slot if its type fits, else the first fit."""
    inputs = node.get("inputs") or []
    given = node["outputs"][slot]["type"]
    if wanted in ("*", ""):
        return inputs[slot if slot < len(inputs) else 0] if inputs else None

    def fits(socket: Mapping[str, Any]) -> bool:
        return types_fit(socket["type"], given) and types_fit(socket["type"], wanted)

    beside = inputs[slot:slot + 1]
    same_type = [socket for socket in inputs if socket["type"] == wanted]
    return next((socket for socket in [*filter(fits, beside), *same_type, *filter(fits, inputs)]), None)


def types_fit(first: Any, second: Any) -> bool:
    """Whether a link may join sockets of these types. "*" accepts every type, "A,B" accepts A or B."""
    if {first, second} & {"*", "", 0}:
        return True
    return bool(set(str(first).lower().split(",")) & set(str(second).lower().split(",")))


def describe(node: Mapping[str, Any]) -> str:
    title = node.get("title")
    return f"node {node['id']}" + (f" ({title})" if title else "")


def is_prompt(document: Mapping[str, Any]) -> bool:
    """Whether a JSON document is already in API format."""
    return bool(document) and all(isinstance(node, Mapping) and "class_type" in node for node in document.values())


def to_prompt(workflow: Mapping[str, Any], object_info: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The content of a workflow file in API format: `{node id: {"class_type", "inputs", "_meta": {"title"}}}`.

    A document in API format is copied. Raises WorkflowError.
    """
    if is_prompt(workflow):
        return {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in workflow.items()}
    if not isinstance(workflow.get("nodes"), list):
        raise WorkflowError("This is neither a saved workflow (no list of nodes in it) nor a prompt in API format.")
    return Graph(workflow, object_info).prompt()


def text_fields(prompt: Mapping[str, Any], object_info: Mapping[str, Any],
                title: str) -> list[tuple[dict[str, Any], str]]:
    """The first text field (inputs, name) of every node with this title. Raises WorkflowError if there is none."""
    fields = []
    for node in prompt.values():
        if node.get("_meta", {}).get("title") != title:
            continue
        info = object_info[node["class_type"]]
        names = [spec.name for spec in input_specs(info["input"], info.get("input_order"))
                 if spec.type == "STRING" and isinstance(node["inputs"].get(spec.name), str)]
        fields += [(node["inputs"], name) for name in names[:1]]
    if not fields:
        raise WorkflowError(f"The workflow has no node titled {title!r} with a text field.")
    return fields


def get_text(prompt: Mapping[str, Any], object_info: Mapping[str, Any], title: str) -> str:
    """The text of the first node with this title."""
    inputs, name = text_fields(prompt, object_info, title)[0]
    return inputs[name]


def set_text(prompt: Mapping[str, Any], object_info: Mapping[str, Any], title: str, text: str) -> None:
    """Writes `text` into every node with this title."""
    for inputs, name in text_fields(prompt, object_info, title):
        inputs[name] = text


def set_seeds(prompt: Mapping[str, Any], seed: int) -> None:
    """Writes `seed` into every seed field, or into the node linked to it. Raises WorkflowError if there is none."""
    fields = [(node["inputs"], name) for node in prompt.values() for name in node["inputs"] if name in SEEDS]
    written = 0
    while fields:
        inputs, name = fields.pop()
        value = inputs.get(name)
        if isinstance(value, int):
            inputs[name] = seed
            written += 1
        elif isinstance(value, list):  # linked to a number node, such as the host's PrimitiveInt
            fields.append((prompt[value[0]]["inputs"], "value"))
    if not written:
        raise WorkflowError("The workflow has no seed field (seed, noise_seed, or the value of a number node that feeds "
                            "one), so that every picture of a prompt would be the same.")
