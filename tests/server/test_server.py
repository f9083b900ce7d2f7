"""Starting and stopping: the pack loads, the host's folder does not change, nothing is left behind."""
from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from learn_to_steer.host.requirement import OLDEST_HOST

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


def older_copy(host: Path, folder: Path, version: str) -> Path:
    """A ComfyUI made of links to `host` that reports another version."""
    folder.mkdir()
    for item in host.iterdir():
        (folder / item.name).symlink_to(item)
    for name in ("main.py", "comfyui_version.py"):  # Python looks for modules beside the file that it was started with
        (folder / name).unlink()
    shutil.copy(host / "main.py", folder)
    (folder / "comfyui_version.py").write_text(f'__version__ = "{version}"\n')
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="links need a special right on Windows")
def test_comfyui_that_is_too_old_gets_one_line_in_the_log(tmp_path):
    host = older_copy(Path(os.environ["COMFYUI_PATH"]), tmp_path / "host", "0.3.40")
    with Server(Path(sys.executable), host) as server:
        log, nodes = server.log_text(), server.client.object_info()
        assert server.failed_imports() == []
    assert "ComfyUI version: 0.3.40" in log and "KSampler" in nodes
    assert not any(name.startswith("LearnToSteer") for name in nodes)
    said = [line for line in log.splitlines() if "Learn to Steer" in line]
    assert len(said) == 1 and f"needs ComfyUI {OLDEST_HOST} or newer; this is 0.3.40." in said[0]
    assert "Traceback" not in log and "Skip" not in log
