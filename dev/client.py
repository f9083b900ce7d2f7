"""A client of a running ComfyUI: posts a prompt, follows its progress, fetches the results. Standard library only."""
from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .websocket import WebSocket, WebSocketClosed


@dataclass(frozen=True)
class NodeError:
    """An error of one node. input: name of the invalid input, or "" if unknown."""

    node_id: str
    node_type: str
    message: str
    input: str = ""

    def __str__(self) -> str:
        place = f"node {self.node_id} ({self.node_type})" + (f", input {self.input!r}" if self.input else "")
        return f"{place}: {self.message}"


class ServerError(Exception):
    """A request to the server failed.

    kind: "start" (the server did not start), "connection" (it cannot be reached, or it died), "validation" (it refused the
        prompt), "execution" (a node failed), "interrupted", "timeout" or "missing" (no such file or prompt).
    errors: the nodes that failed, for "validation", "execution" and "interrupted".
    """

    def __init__(self, kind: str, message: str, errors: tuple[NodeError, ...] = (), traceback: str = ""):
        super().__init__("\n".join([message, *(f"  {error}" for error in errors)]))
        self.kind = kind
        self.message = message
        self.errors = errors
        self.traceback = traceback


@dataclass(frozen=True)
class PromptProgress:
    """Progress of a running prompt: node `node_id` began (value None), or is at `value` of `maximum`."""

    node_id: str
    node_type: str
    title: str
    value: float | None = None
    maximum: float | None = None
    finished_nodes: int = 0
    all_nodes: int = 0


@dataclass(frozen=True)
class Result:
    """A finished prompt. outputs: node id -> the node's output to the page, e.g. `{"images": [...], "text": [...]}`."""

    prompt_id: str
    prompt: Mapping[str, Any]
    outputs: Mapping[str, Mapping[str, Any]]
    seconds: float

    def images(self, node_id: str | None = None) -> list[dict[str, str]]:
        """Records of the pictures, in node order. `Client.image` returns the file of a record."""
        return [image for key, output in self.outputs.items() if node_id in (None, key)
                for image in output.get("images", [])]

    def text(self, node_id: str) -> str:
        """The text a node showed on itself, or ""."""
        text = self.outputs.get(node_id, {}).get("text", [])
        return text if isinstance(text, str) else "\n".join(map(str, text))


@dataclass
class Client:
    """One client of the server at `address` ("http://127.0.0.1:8188"). All calls raise ServerError."""

    address: str
    client_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def request(self, path: str, data: Any = None, timeout: float = 60.0) -> bytes:
        """Sends a GET request or, with `data`, a POST request with JSON."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        try:
            # no proxy: the server is on this machine, or at the address the user gave
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise refusal(path, error.code, error.read()) from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError("connection", f"No answer from {self.address}{path}: {error}") from None

    def get(self, path: str, timeout: float = 60.0) -> Any:
        return json.loads(self.request(path, timeout=timeout))

    def object_info(self, node_type: str = "") -> dict[str, Any]:
        """The server's node types, `{type: description}`: all, or the named one."""
        return self.get("/object_info" + (f"/{urllib.parse.quote(node_type)}" if node_type else ""))

    def submit(self, prompt: Mapping[str, Any]) -> str:
        """Queues a prompt in API format. Returns its id. Raises ServerError of kind "validation" for a refused prompt.

        The server would run a prompt if some of its outputs are valid; here such a prompt counts as refused.
        """
        body = self.request("/prompt", {"prompt": prompt, "client_id": self.client_id})
        answer = json.loads(body)
        prompt_id = answer["prompt_id"]
        if answer.get("node_errors"):
            self.request("/queue", {"delete": [prompt_id]})
            self.request("/interrupt", {"prompt_id": prompt_id})
            raise ServerError("validation", "The server refused a part of the prompt.", node_errors(answer))
        return prompt_id

    def interrupt(self) -> None:
        """Interrupts the running prompt."""
        self.request("/interrupt", {})

    def free(self) -> None:
        """Makes the server drop all models and cached results before its next prompt."""
        self.request("/free", {"unload_models": True, "free_memory": True})

    def image(self, record: Mapping[str, str]) -> bytes:
        """Content of the file of a record in `Result.images`."""
        return self.request("/view?" + urllib.parse.urlencode(
            {key: record[key] for key in ("filename", "subfolder", "type") if key in record}))

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The server's history entry of a prompt that has ended."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def run(self, prompt: Mapping[str, Any], on_progress: Callable[[PromptProgress], None] | None = None,
            timeout: float = 3600.0) -> Result:
        """Queues a prompt and waits for its end.

        Raises ServerError: "validation", "execution", "interrupted", "connection", or "timeout" (after asking the
        server to interrupt).
        """
        began = time.monotonic()
        place = urllib.parse.urlsplit(self.address)
        try:
            websocket = WebSocket(place.hostname, place.port or 80, f"/ws?clientId={self.client_id}")
        except OSError as error:
            raise ServerError("connection", f"No answer from {self.address}: {error}") from None
        with websocket:
            prompt_id = self.submit(prompt)
            follower = Follower(prompt_id, prompt, on_progress or (lambda progress: None))
            entry = None
            while entry is None:
                if time.monotonic() - began > timeout:
                    self.interrupt()
                    raise ServerError("timeout", f"The prompt did not end within {timeout:.0f} s; it was interrupted.")
                try:
                    message = websocket.receive(5.0)
                except (WebSocketClosed, OSError) as error:
                    raise ServerError("connection", f"The server went away while the prompt ran: {error}") from None
                if message is None or (isinstance(message, str) and follower.ended(json.loads(message))):
                    entry = self.history(prompt_id)  # no message: the end may have been sent to another client
        return finished(entry, prompt_id, prompt, time.monotonic() - began)


class Follower:
    """Turns the server's messages about one prompt into `PromptProgress`."""

    def __init__(self, prompt_id: str, prompt: Mapping[str, Any], report: Callable[[PromptProgress], None]):
        self.prompt_id = prompt_id
        self.prompt = prompt
        self.report = report
        self.begun: set[str] = set()

    def ended(self, message: Mapping[str, Any]) -> bool:
        """Handles a message: reports progress. Returns True if the prompt has ended."""
        kind, data = message["type"], message.get("data") or {}
        if data.get("prompt_id") != self.prompt_id:
            return False
        node_id = data.get("node")
        if kind == "execution_cached":
            self.begun |= set(data.get("nodes", []))
        elif kind == "executing" and node_id is not None:
            self._tell(node_id)
            self.begun.add(node_id)
        elif kind == "progress" and node_id is not None:
            self._tell(node_id, data["value"], data["max"])
        return kind == "executing" and node_id is None

    def _tell(self, node_id: str, value: float | None = None, maximum: float | None = None) -> None:
        node = self.prompt.get(node_id, {})
        node_type = node.get("class_type", "")
        self.report(PromptProgress(node_id, node_type, node.get("_meta", {}).get("title") or node_type, value, maximum,
                             len(self.begun - {node_id}), len(self.prompt)))


def finished(entry: Mapping[str, Any], prompt_id: str, prompt: Mapping[str, Any], seconds: float) -> Result:
    """The result in a history entry. Raises ServerError if the prompt failed."""
    status = entry.get("status") or {}
    for kind, data in status.get("messages", []):
        if kind not in ("execution_error", "execution_interrupted"):
            continue
        if kind == "execution_interrupted":
            fault = NodeError(str(data["node_id"]), data["node_type"], "was running")
            raise ServerError("interrupted", "The prompt was interrupted.", (fault,))
        message = f"{data['exception_type']}: {data['exception_message'].strip()}"
        raise ServerError("execution", "A node failed.", (NodeError(str(data["node_id"]), data["node_type"], message),),
                          "".join(data.get("traceback") or []))
    if status.get("status_str", "success") != "success":
        raise ServerError("execution", f"The prompt ended with status {status['status_str']!r}.")
    return Result(prompt_id, prompt, entry.get("outputs") or {}, seconds)


def refusal(path: str, code: int, body: bytes) -> ServerError:
    """The ServerError for an HTTP error; for a refused prompt it lists the errors of each node."""
    try:
        answer = json.loads(body)
        error = answer["error"]
        message = error if isinstance(error, str) else join(error.get("message"), error.get("details"))
        faults = node_errors(answer)
    except (ValueError, KeyError, AttributeError, TypeError):
        kind = "missing" if code == 404 else "connection"
        return ServerError(kind, f"{path}: HTTP {code} {body[:300].decode(errors='replace')}".strip())
    return ServerError("validation", f"The server refused the prompt: {message}", faults)


def node_errors(answer: Mapping[str, Any]) -> tuple[NodeError, ...]:
    """The node errors in the server's answer to a prompt."""
    return tuple(
        NodeError(node_id, node["class_type"], join(error.get("message"), error.get("details")),
                  (error.get("extra_info") or {}).get("input_name") or "")
        for node_id, node in (answer.get("node_errors") or {}).items() for error in node["errors"])


def join(message: str | None, details: str | None) -> str:
    return ": ".join(part.strip() for part in (message, details) if part and part.strip())
