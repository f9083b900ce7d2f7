"""The demonstration: runs a shipped workflow on a real server, saves its pictures, and prints what they show."""
from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from .client import PromptProgress, Result, ServerError
from .environment import Failure, say
from .server import Server
from .workflow import get_text, set_seeds, set_text, to_prompt

PREFIX = "learn_to_steer/"  # of the file names that the workflow's SaveImage nodes use


class ProgressPrinter:
    """Prints progress: one line per node, with a bar in a terminal, else in quarters."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self.began = time.monotonic()
        self.node_id = ""
        self.quarter = 0
        self.open_line = False

    def __call__(self, progress: PromptProgress) -> None:
        if progress.node_id != self.node_id:
            self.node_id, self.quarter = progress.node_id, 0
            self._line(f"{progress.finished_nodes + 1:3d}/{progress.all_nodes} {progress.title}")
        if progress.value is None or not progress.maximum:
            return
        text = f"        {progress.title}: {progress.value:.0f}/{progress.maximum:.0f}"
        quarter = int(4 * progress.value / progress.maximum)
        if self.terminal:
            print(f"\r{text}", end="", flush=True)
            self.open_line = True
        elif quarter > self.quarter:
            self.quarter = quarter
            self._line(text)

    def _line(self, text: str) -> None:
        self.close()
        print(f"[{time.monotonic() - self.began:5.1f} s] {text}", flush=True)

    def close(self) -> None:
        if self.open_line:
            print(flush=True)
            self.open_line = False


def start(server: Server) -> None:
    """Starts a server and prints its state. Raises Failure if the server did not load this pack."""
    say("starting ComfyUI")
    began = time.monotonic()
    server.start(waiting=lambda seconds: say(f"    {seconds:.0f} s") if seconds % 15 < 0.5 and seconds > 1 else None)
    failed = server.failed_imports()
    if failed:
        raise Failure("ComfyUI runs, but this pack did not load:\n" + "\n".join(failed) + "\n" + server.log_tail(60))
    say(f"ComfyUI is up after {time.monotonic() - began:.0f} s at {server.address}")


def make_pictures(server: Server, workflow: Path, out: Path, prompt_text: str | None,
                  seed: int | None) -> tuple[str, dict[str, Path]]:
    """Runs the workflow and saves its pictures into `out`; returns the prompt's text and the file of each picture.

    Raises ServerError or WorkflowError.
    """
    printer = ProgressPrinter()
    try:
        prompt, text = read_workflow(server, workflow, prompt_text, seed)
        say(f'running {workflow.name} with the prompt "{text}"')
        result = server.client.run(prompt, printer)
    except ServerError as error:
        if error.kind == "connection" and not server.alive():
            raise ServerError("connection", "ComfyUI died.\n" + server.log_tail()) from None
        raise
    finally:
        printer.close()
    say(f"ran for {result.seconds:.1f} s")
    return text, save_pictures(server, result, out)


def read_workflow(server: Server, workflow: Path, prompt_text: str | None, seed: int | None) -> tuple[dict, str]:
    """The workflow in API format, with the given prompt and seed, if any, and the prompt's text."""
    object_info = server.client.object_info()
    prompt = to_prompt(json.loads(workflow.read_text(encoding="utf-8")), object_info)
    if prompt_text is not None:
        set_text(prompt, object_info, "Prompt", prompt_text)
    if seed is not None:
        set_seeds(prompt, seed)
    return prompt, get_text(prompt, object_info, "Prompt")


def save_pictures(server: Server, result: Result, out: Path) -> dict[str, Path]:
    """Writes the pictures of the workflow's SaveImage nodes as `NAME.png`; NAME is the last part of the file name prefix."""
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    for node_id, node in result.prompt.items():
        prefix = node["inputs"].get("filename_prefix")
        if not isinstance(prefix, str) or not prefix.startswith(PREFIX):
            continue
        for number, record in enumerate(result.images(node_id), 1):
            name = prefix.removeprefix(PREFIX) + (f"_{number}" if number > 1 else "")
            files[name] = out / f"{name}.png"
            files[name].write_bytes(server.client.image(record))
    return files
