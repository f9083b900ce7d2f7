"""Starting and stopping: the pack loads, the host's folder stays as it was, nothing is left behind."""
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dev.client import ServerError
from dev.server import Server, free_port


def test_pack_is_loaded(server: Server):
    assert server.failed_imports() == []
    assert (server.base / "custom_nodes" / "learn-to-steer").resolve() == Path(__file__).resolve().parents[2]


def test_host_folder_is_not_written_to(server: Server):
    host = Path(os.environ["COMFYUI_PATH"])
    assert not list((host / "custom_nodes").glob("learn*"))
    assert (server.base / "user" / "comfyui.db").exists()


def test_start_that_fails_shows_the_log_and_leaves_nothing():
    server = Server(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]), extra=("--no-such-option",))
    with pytest.raises(ServerError, match="no-such-option") as caught, server:
        pass
    assert caught.value.kind == "start"
    assert not server.base.exists() and not server.alive()


def test_port_in_use(server: Server):
    with pytest.raises(ServerError, match=f"Port {server.port} is in use"), \
            Server(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]), port=server.port):
        pass


def test_free_port_is_free():
    assert 1024 < free_port() < 65536
