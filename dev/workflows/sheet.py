"""Writes workflow files of the ComfyUI page (litegraph JSON, version 0.4) from Python.

A `Sheet` holds columns of groups; a `Group` holds columns of nodes. Positions follow from the sizes of the nodes. Names of inputs
and outputs are checked against the server's `/object_info`.
"""
from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dev.workflow import Spec, input_specs

NOTES = Path(__file__).resolve().parents[2] / "workflows" / "notes"
PACK, PACK_VERSION = "learn-to-steer", "0.1.0"
TITLE, SLOT, WIDGET, TEXT, GAP, PADDING = 30, 20, 24, 120, 30, 20
GROUP_TITLE, GROUP_GAP = 40, 60
PREVIEWED = {"SaveImage": 300, "PreviewImage": 300, "LearnToSteerOverlay": 300, "LearnToSteerReport": 420,
             "LearnToSteerToyJudge": 120, "LearnToSteerGraph": 100, "LearnToSteerDatasetBuilder": 110,
             "LearnToSteerTrain": 110, "LearnToSteerSaveClassifier": 80}
"""Height of the preview in these nodes, in pixels."""


@dataclass(frozen=True)
class Output:
    """An output of a node on the sheet, to be passed as an input of another node."""

    node: Node
    slot: int
    type: str


@dataclass
class Node:
    """A node on the sheet. fields: values of its widgets; sources: outputs connected to its sockets, by input name."""

    type: str
    info: Mapping[str, Any]
    title: str
    width: int
    fields: dict[str, Any]
    sources: dict[str, Output]
    grown: dict[str, int]
    color: str
    extra_height: int
    collapsed: bool
    id: int = 0
    pos: tuple[int, int] = (0, 0)

    def __getitem__(self, name: str) -> Output:
        names = list(self.info["output_name"])
        if name not in names:
            raise KeyError(f"{self.type} has no output {name!r}; it has {', '.join(names)}")
        slot = names.index(name)
        return Output(self, slot, self.info["output"][slot])

    @property
    def specs(self) -> list[Spec]:
        return input_specs(self.info["input"], self.info.get("input_order"))

    def sockets(self) -> list[tuple[str, str, bool]]:
        """(name, type, optional) of the inputs without a field. A growing list has one socket more than connections."""
        optional = self.info["input"].get("optional") or {}
        found = []
        for spec in self.specs:
            if spec.type == "COMFY_AUTOGROW_V3":
                template = spec.options["template"]
                kind = next(iter(template["input"]["required"].values()))[0]
                found += [(f"{spec.name}.{template['prefix']}{index}", kind, index >= template["min"])
                          for index in range(self.grown.get(spec.name, 0) + 1)]
            elif not spec.is_widget:
                found.append((spec.name, spec.type, spec.name in optional))
        return found

    def widget_values(self) -> list[Any]:
        values = []
        for spec in self.specs:
            if spec.is_widget:
                values.append(self.fields.get(spec.name, spec.default))
                if spec.has_control:
                    values.append(self.fields.get("control_after_generate", "fixed"))
        return values

    @property
    def height(self) -> int:
        """Height as on the page, including the preview below the fields."""
        slots = max(len(self.sockets()), len(self.info["output"]), 0)
        texts = sum(bool(spec.options.get("multiline")) for spec in self.specs if spec.is_widget)
        return (slots * SLOT + (len(self.widget_values()) - texts) * WIDGET + texts * TEXT + 18
                + PREVIEWED.get(self.type, 0) + self.extra_height)


@dataclass
class Note:
    """A MarkdownNote."""

    text: str
    width: int
    height: int
    title: str = "Note"
    id: int = 0
    pos: tuple[int, int] = (0, 0)


@dataclass
class Group:
    title: str
    columns: Sequence[Sequence[Node | Note]]
    color: str = "#3f789e"
    bounding: list[int] = field(default_factory=list)

    @property
    def width(self) -> int:
        return sum(max(node.width for node in column) + GAP for column in self.columns) - GAP + 2 * PADDING

    @property
    def height(self) -> int:
        return GROUP_TITLE + max(stacked(column) for column in self.columns) + PADDING

    def place(self, x: int, y: int) -> None:
        self.bounding = [x, y, self.width, self.height]
        left = x + PADDING
        for column in self.columns:
            top = y + GROUP_TITLE
            for node in column:
                node.pos = (left, top + TITLE)
                top += room(node)
            left += max(node.width for node in column) + GAP


def stacked(column: Sequence[Node | Note]) -> int:
    return sum(map(room, column)) - GAP


def room(node: Node | Note) -> int:
    """Height that a node takes up in its column, including the gap below."""
    return TITLE + (0 if isinstance(node, Node) and node.collapsed else node.height) + GAP


class Sheet:
    """A workflow that is built node by node. `document` returns the file's content."""

    def __init__(self, name: str, object_info: Mapping[str, Any]):
        self.name = name
        self.object_info = object_info
        self.columns: list[list[Group]] = []

    def node(self, type: str, /, title: str = "", width: int = 300, color: str = "", extra_height: int = 0,
             collapsed: bool = False, **inputs: Any) -> Node:
        """Makes a node. inputs: values of fields, outputs of other nodes, or lists of outputs for growing lists.

        An input with the name of a parameter (width) takes a trailing underscore. Raises KeyError for unknown names.
        """
        if type not in self.object_info:
            raise KeyError(f"the server has no node {type!r}")
        info = self.object_info[type]
        node = Node(type, info, title or info.get("display_name") or type, width, {}, {}, {}, color, extra_height,
                    collapsed)
        specs = {spec.name: spec for spec in node.specs}
        for name, value in inputs.items():
            name = name.removesuffix("_")
            if name not in specs and name != "control_after_generate":
                raise KeyError(f"{type} has no input {name!r}; it has {', '.join(specs)}")
            if isinstance(value, Output):
                node.sources[name] = value
            elif isinstance(value, list):
                prefix = specs[name].options["template"]["prefix"]
                node.grown[name] = len(value)
                node.sources |= {f"{name}.{prefix}{index}": source for index, source in enumerate(value)}
            else:
                node.fields[name] = value
        return node

    def column(self, *groups: Group) -> None:
        """Adds a column of groups, from top to bottom."""
        self.columns.append(list(groups))

    def document(self) -> dict[str, Any]:
        self._place()
        groups = [group for column in self.columns for group in column]
        boxes = [box for group in groups for column in group.columns for box in column]
        for number, box in enumerate(boxes, 1):
            box.id = number
        nodes = [box for box in boxes if isinstance(box, Node)]
        wires = [(node, name, source) for node in nodes for name, _, _ in self._inputs(node)
                 if (source := node.sources.get(name))]
        links = [[number, source.node.id, source.slot, node.id,
                  [entry[0] for entry in self._inputs(node)].index(name), source.type]
                 for number, (node, name, source) in enumerate(wires, 1)]
        if any(source.node.id == 0 for _, _, source in wires):
            raise ValueError(f"{self.name}: a node is connected but in no group")
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK}/{self.name}")), "revision": 0,
            "last_node_id": len(boxes), "last_link_id": len(links),
            "nodes": [self._node(box, order, links) if isinstance(box, Node) else note(box, order)
                      for order, box in enumerate(running_order(boxes))],
            "links": links,
            "groups": [{"id": number, "title": group.title, "bounding": group.bounding, "color": group.color,
                        "font_size": 24, "flags": {}} for number, group in enumerate(groups, 1)],
            "config": {}, "extra": {"ds": {"scale": 0.5, "offset": [60, 80]}}, "version": 0.4,
        }

    def _place(self) -> None:
        x = 0
        for column in self.columns:
            y = 0
            for group in column:
                group.place(x, y)
                y += group.height + GROUP_GAP
            x += max(group.width for group in column) + GROUP_GAP

    @staticmethod
    def _inputs(node: Node) -> list[tuple[str, str, bool]]:
        """All inputs in the page's order of saving: sockets, then fields, each of which has a socket."""
        return node.sockets() + [(spec.name, spec.type, False) for spec in node.specs if spec.is_widget]

    def _node(self, node: Node, order: int, links: list[list[Any]]) -> dict[str, Any]:
        widgets = {spec.name for spec in node.specs if spec.is_widget}
        inputs = []
        for slot, (name, kind, optional) in enumerate(self._inputs(node)):
            link = next((link[0] for link in links if link[3:5] == [node.id, slot]), None)
            entry: dict[str, Any] = {"localized_name": name, "name": name, "type": kind, "link": link}
            if "." in name:
                entry["label"] = name.partition(".")[2]
            if optional:
                entry["shape"] = 7
            if name in widgets:
                entry["widget"] = {"name": name}
            inputs.append(entry)
        outputs = [{"localized_name": name, "name": name, "type": kind, "slot_index": slot,
                    "links": [link[0] for link in links if link[1:3] == [node.id, slot]] or None}
                   for slot, (name, kind) in enumerate(zip(node.info["output_name"], node.info["output"], strict=True))]
        core = not node.info["python_module"].startswith("custom_nodes")
        entry = {
            "id": node.id, "type": node.type, "pos": list(node.pos), "size": [node.width, node.height],
            "flags": {"collapsed": True} if node.collapsed else {}, "order": order, "mode": 0, "inputs": inputs,
            "outputs": outputs, "title": node.title,
            "properties": {"cnr_id": "comfy-core" if core else PACK, "ver": "0.30.0" if core else PACK_VERSION,
                           "Node name for S&R": node.type},
            "widgets_values": node.widget_values(),
        }
        if node.color:
            entry |= {"color": node.color, "bgcolor": node.color}
        return entry


def read_note(name: str, **fields: str) -> str:
    """The text of workflows/notes/NAME.md with its {fields} filled in."""
    return (NOTES / f"{name}.md").read_text(encoding="utf-8").strip().format(**fields)


def note(box: Note, order: int) -> dict[str, Any]:
    return {"id": box.id, "type": "MarkdownNote", "pos": list(box.pos), "size": [box.width, box.height], "flags": {},
            "order": order, "mode": 0, "inputs": [], "outputs": [], "title": box.title, "properties": {},
            "widgets_values": [box.text], "color": "#432", "bgcolor": "#000"}


def running_order(boxes: Sequence[Node | Note]) -> list[Node | Note]:
    """The nodes in order of execution: sources first, ties in the order of the sheet."""
    depths: dict[int, int] = {}

    def depth(box: Node | Note) -> int:
        if box.id not in depths:
            sources = box.sources.values() if isinstance(box, Node) else ()
            depths[box.id] = 1 + max((depth(source.node) for source in sources), default=-1)
        return depths[box.id]

    return sorted(boxes, key=lambda box: (depth(box), box.id))
