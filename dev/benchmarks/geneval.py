"""Makes pictures of GenEval's or the paper's prompts with any running ComfyUI, in the folders that GenEval's evaluator reads.

    python dev.py bench geneval --server URL --workflow FILE --prompts FILE --out DIR

Prompts: GenEval's evaluation_metadata.jsonl (its "position" prompts, or those of --tags), or a text file with one prompt per
line, each with a relation.
Output: DIR/00000/metadata.jsonl, DIR/00000/samples/00000.png, ... The same command resumes where it stopped. Another workflow,
seed or prompt needs another DIR.
Workflow: a saved one, or one in API format. The prompt is written into the text field of every node titled --prompt-title, the
seed into every seed field. The picture is that of the SaveImage node titled --picture-title.
"""
from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from learn_to_steer.files.writing import replace_file
from learn_to_steer.prompts.graph import build_graph
from learn_to_steer.prompts.relations import RelationError, split_occurrence

from dev.client import Client, ServerError
from dev.workflow import WorkflowError, set_seeds, set_text, to_prompt

SHORT = {"to the left of": "left of", "to the right of": "right of", "above": "above", "below": "below"}
"""Relation names: ours -> GenEval's."""


class GenevalError(ValueError):
    """A file cannot be used; the message says which one and why."""


def read_prompts(path: Path, tags: tuple[str, ...]) -> list[dict[str, Any]]:
    """One metadata record per prompt, in the file's order: GenEval's own, or built from the prompt's relations.

    Raises GenevalError naming the line.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix.lower() not in (".jsonl", ".json"):
            try:
                records.append(record(line.strip()))
            except (RelationError, GenevalError) as error:
                raise GenevalError(f"{path}, line {number}: {error}") from error
            continue
        try:
            entry = json.loads(line)
            wanted = not tags or entry.get("tag") in tags
            if not isinstance(entry["prompt"], str):
                raise TypeError("its prompt is no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise GenevalError(f"{path}, line {number}: not a GenEval record ({error}). Each line must be JSON with a "
                               "prompt.") from error
        if wanted:
            records.append(entry)
    if not records:
        raise GenevalError(f"{path} has no prompt" + (f" with the tag {' or '.join(tags)}." if tags else "."))
    return records


def record(prompt: str) -> dict[str, Any]:
    """GenEval's record of a prompt: a clause for each object and each relation.

    The position of a clause refers to an earlier clause (GenEval's evaluate_images.py, `evaluate`), so an object precedes its
    subjects. Clauses of one class mean one object. Raises GenevalError for prompts that a record cannot express.
    """
    graph = build_graph(prompt)
    if not graph.relations:
        raise GenevalError(f"no relation was found in {prompt!r}; its pictures would all count as right. Write one of "
                           f"{', '.join(SHORT)}, or give GenEval's own JSONL file.")
    named: dict[str, str] = {}
    for phrase in graph.phrases:
        words = split_occurrence(phrase)[0]
        if named.setdefault(words.lower(), phrase) != phrase:
            raise GenevalError(f"{prompt!r} has two of {words!r}, which GenEval's evaluator does not tell apart. Leave the "
                               "line out.")
    include: list[dict[str, Any]] = []
    for relation in graph.relations:
        subject, target = (split_occurrence(phrase)[0] for phrase in (relation.subject, relation.object))
        classes = [clause["class"] for clause in include]
        if target not in classes:
            include.append({"class": target, "count": 1})
            classes.append(target)
        include += [{"class": subject, "count": 1, "position": [SHORT[predicate], classes.index(target)]}
                    for predicate in relation.predicates]
    return {"tag": "position", "include": include, "prompt": prompt}


def picture_node(prompt: Mapping[str, Any], title: str | None) -> str:
    """Id of the node that saves the picture. Raises WorkflowError unless there is exactly one."""
    saving = {node_id: node.get("_meta", {}).get("title") or node["class_type"] for node_id, node in prompt.items()
              if node["class_type"] in ("SaveImage", "PreviewImage")}
    found = [node_id for node_id, name in saving.items() if title in (None, name)]
    if len(found) != 1:
        named = ", ".join(repr(name) for name in saving.values()) or "none"
        raise WorkflowError(f"{len(found)} nodes save the picture{f' titled {title!r}' if title else ''}; there must be one. "
                            f"Choose with --picture-title; the workflow has: {named}.")
    return found[0]


def generate(client: Client, workflow: Mapping[str, Any], records: list[dict], out: Path, samples: int, seed: int,
             prompt_title: str, picture_title: str | None) -> tuple[int, list[str]]:
    """Makes the missing pictures. Returns the number of pictures made and a message per failed prompt.

    Sample k of every prompt has seed `seed` + k. A prompt that fails is skipped.
    Raises ServerError where the server is gone or refuses the workflow.
    """
    object_info = client.object_info()
    out.mkdir(parents=True, exist_ok=True)
    template = to_prompt(workflow, object_info)
    keep(out / "generation.json", {"workflow_sha256": hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest(),
                                   "seed": seed, "prompt_title": prompt_title, "picture_title": picture_title},
         "is of another workflow, seed or title")
    made, failed = 0, []
    for index, entry in enumerate(records):
        folder = out / f"{index:05}"
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        keep(folder / "metadata.jsonl", entry, "is of another prompt")
        for sample in range(samples):
            file = folder / "samples" / f"{sample:05}.png"
            if file.exists():
                continue
            prompt = to_prompt(template, object_info)
            set_text(prompt, object_info, prompt_title, entry["prompt"])
            set_seeds(prompt, seed + sample)
            node = picture_node(prompt, picture_title)
            try:
                pictures = client.run(prompt).images(node)
            except ServerError as error:
                if error.kind != "execution":
                    raise
                failed.append(f"{folder.name}/{file.name}: {entry['prompt']}: {error}")
                print(failed[-1], flush=True)
                break
            if not pictures:
                raise WorkflowError(f"Node {node} sent no picture; the server answers a repeated prompt from its cache "
                                    "only while it keeps its files.")
            replace_file(file, client.image(pictures[0]))
            made += 1
            print(f"{folder.name}/{file.name}: {entry['prompt']} (seed {seed + sample})", flush=True)
    return made, failed


def keep(file: Path, content: dict[str, Any], otherwise: str) -> None:
    """Writes a record if the file does not exist. Raises GenevalError if it exists with other content."""
    if not file.exists():
        replace_file(file, json.dumps(content).encode() + b"\n")
        return
    try:
        same = json.loads(file.read_bytes()) == json.loads(json.dumps(content))
    except ValueError as error:
        raise GenevalError(f"{file} is damaged ({error}). Delete it; the same command writes it again.") from error
    if not same:
        raise GenevalError(f"{file} {otherwise}. Choose another --out, or give the same as before.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python dev.py bench geneval", description=__doc__.split("\n\n")[0])
    parser.add_argument("--server", required=True, metavar="URL", help="a running ComfyUI, e.g. http://127.0.0.1:8188")
    parser.add_argument("--workflow", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=4, help="pictures per prompt (default 4, as GenEval)")
    parser.add_argument("--seed", type=int, default=42, help="seed of the first sample (default 42, as GenEval)")
    parser.add_argument("--tags", nargs="*", default=["position"], help="tags of GenEval's file to use; without any: all")
    parser.add_argument("--prompt-title", default="Prompt")
    parser.add_argument("--picture-title", help="needed if several nodes save pictures")
    given = parser.parse_args()
    try:
        records = read_prompts(given.prompts, tuple(given.tags))
        workflow = json.loads(given.workflow.read_text(encoding="utf-8"))
        made, failed = generate(Client(given.server.rstrip("/")), workflow, records, given.out, given.samples, given.seed,
                                given.prompt_title, given.picture_title)
    except (GenevalError, WorkflowError, ServerError, OSError, ValueError) as error:
        print(f"bench geneval: {error}")
        return 1
    if failed:
        print(f"bench geneval: pictures made: {made}, prompts that failed: {len(failed)}; the same command tries them again:")
        print("\n".join(failed))
        return 1
    print(f"{made} pictures made; {len(records)} prompts x {given.samples} are in {given.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
