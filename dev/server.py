"""Starts and stops a real ComfyUI with this pack linked in, in its own folder. Standard library only."""
from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from .client import Client, ServerError
from .environment import ROOT, child_variables

PACK = "learn-to-steer"
FOLDERS = ("custom_nodes", "models", "input", "output", "temp", "user/default/workflows", "user/default/subgraphs")
# What the page asks for on its first visit. Without the first one it shows a window of templates over the canvas;
# without the others it writes errors to the console, in which ours would be lost.
FILES = {"user/default/comfy.settings.json": '{"Comfy.TutorialCompleted": true}',
         "user/default/comfy.templates.json": "[]", "user/default/user.css": ""}


class Server:
    """A ComfyUI process, as a context manager: it runs inside and always ends on exit.

    base: folder for models, inputs, outputs, the user's settings and the log; by default a temporary folder, removed at the end.
        Nothing is written to the host's own folder.
    host_models: also offer the models in the host's folder.
    extra: further arguments for ComfyUI's command line.
    pack: None for a ComfyUI without this pack.
    variables: further environment variables.
    """

    def __init__(self, python: Path, host: Path, base: Path | None = None, port: int | None = None,
                 host_models: bool = False, extra: tuple[str, ...] = (), pack: Path | None = ROOT,
                 variables: Mapping[str, str] | None = None):
        self.python = python
        self.host = host
        self.port = port or free_port()
        self.client = Client(f"http://127.0.0.1:{self.port}")
        self._temporary = base is None
        self.base = base or Path(tempfile.mkdtemp(prefix="learn-to-steer-"))
        self.log = self.base / "server.log"
        self._extra = extra
        self._host_models = host_models
        self._pack = pack
        self._variables = variables or {}
        self._process: subprocess.Popen | None = None

    @property
    def address(self) -> str:
        return self.client.address

    def __enter__(self) -> Server:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, timeout: float = 300.0, waiting: Callable[[float], None] = lambda seconds: None) -> None:
        """Starts the process and waits until it answers. Calls `waiting(seconds)` twice a second meanwhile.

        Raises ServerError of kind "start", with the end of the log in the message.
        """
        prepare_base(self.base, self._pack)
        if port_taken(self.port):
            raise ServerError("start", f"Port {self.port} is in use already; choose another with --port.")
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=self.base,
                env={**child_variables(), **self._variables},
                start_new_session=True)  # only we receive Ctrl-C; `stop` then ends the process cleanly
        began = time.monotonic()
        while True:
            time.sleep(0.5)
            seconds = time.monotonic() - began
            if self._process.poll() is not None:
                raise ServerError("start", f"ComfyUI ended with code {self._process.returncode} while starting.\n"
                                  + self.log_tail())
            try:
                self.client.get("/system_stats", timeout=5)
                return
            except ServerError:
                pass
            if seconds > timeout:
                raise ServerError("start", f"ComfyUI did not answer within {timeout:.0f} s.\n" + self.log_tail())
            waiting(seconds)

    def stop(self) -> None:
        """Ends the process: first asks, then kills. May be called at any time and repeatedly."""
        if self._process is not None:
            try:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(10)
            finally:  # also after another Ctrl-C
                self._process.kill()
                self._process.wait()
                self._process = None
        if self._temporary:
            unlink_pack(self.base)
            shutil.rmtree(self.base, ignore_errors=True)

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log_text(self) -> str:
        if not self.log.is_file():
            return ""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(encoding="utf-8", errors="replace"))  # no colours

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join([f"--- the end of its log ({self.log}):", *self.log_text().splitlines()[-lines:], "---"])

    def failed_imports(self) -> list[str]:
        """Lines of the log about packs that failed to load."""
        return [line for line in self.log_text().splitlines()
                if "IMPORT FAILED" in line or "Cannot import" in line]

    def _command(self) -> list[str]:
        command = [str(self.python), str(self.host / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port),
                   "--disable-auto-launch", "--base-directory", str(self.base)]
        if "--database-url" in (self.host / "comfy" / "cli_args.py").read_text(encoding="utf-8"):
            command += ["--database-url", f"sqlite:///{(self.base / 'user' / 'comfyui.db').as_posix()}"]
        if not has_accelerator(self.python):
            command.append("--cpu")
        if self._host_models:
            command += ["--extra-model-paths-config", str(write_model_paths(self.host, self.base))]
        return [*command, *self._extra]


def prepare_base(base: Path, pack: Path | None = ROOT) -> None:
    """Makes the folders that ComfyUI expects, the page's files for a first visit, and a link to the pack."""
    for name in FOLDERS:
        (base / name).mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        if not (base / name).exists():
            (base / name).write_text(content, encoding="utf-8")
    unlink_pack(base)
    if pack is None:
        return
    link = base / "custom_nodes" / PACK
    if sys.platform == "win32":
        import _winapi  # a junction needs no privileges, a symbolic link does

        _winapi.CreateJunction(str(pack), str(link))
    else:
        link.symlink_to(pack, target_is_directory=True)


def unlink_pack(base: Path) -> None:
    """Removes the link, never its target. On Windows a recursive delete would follow the junction."""
    link = base / "custom_nodes" / PACK
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        os.rmdir(link)  # a junction; os.rmdir refuses a real, non-empty folder


def write_model_paths(host: Path, base: Path) -> Path:
    """Writes a configuration that makes the models of an existing installation available from another base folder."""
    lines = ["existing_installation:", f"    base_path: {json.dumps(str(host / 'models'))}"]
    lines += [f"    {folder.name}: {json.dumps(folder.name)}" for folder in sorted((host / "models").iterdir())
              if folder.is_dir() and folder.name != "configs"]
    path = base / "model_paths.yaml"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def has_accelerator(python: Path) -> bool:
    """Whether ComfyUI runs without `--cpu`: on a Mac, or with a CUDA device that the environment's PyTorch can use."""
    if sys.platform == "darwin":
        return True
    if shutil.which("nvidia-smi") is None:
        return False
    check = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.call([str(python), "-c", check], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) == 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def port_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
