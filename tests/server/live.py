"""The real ComfyUI server that all tests of a session share (imported by the conftest files that need it)."""
from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from dev.client import Client
from dev.server import Server

RUNNING = pytest.StashKey[Server]()


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Server:
    """A running ComfyUI with this pack; its folder is `server.base`. Kept in the stash, because two folders import this."""
    if RUNNING not in request.config.stash:
        if "COMFYUI_PATH" not in os.environ:
            pytest.fail("COMFYUI_PATH is not set; start the tests with `python dev.py test`")
        started = Server(Path(sys.executable), Path(os.environ["COMFYUI_PATH"]))
        request.config.add_cleanup(started.stop)
        started.start()
        request.config.stash[RUNNING] = started
    return request.config.stash[RUNNING]


@pytest.fixture(scope="session")
def client(server: Server) -> Client:
    return server.client


@pytest.fixture(scope="session")
def object_info(client: Client) -> dict:
    """All node types of the running server, as its `/object_info` describes them."""
    return client.object_info()
