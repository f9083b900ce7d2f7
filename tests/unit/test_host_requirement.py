"""The oldest ComfyUI: one number for the registry, the log and the tests, and a message on older hosts."""
from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest
from learn_to_steer.host.requirement import OLDEST_HOST, unmet_requirement

from dev import environment


@pytest.fixture
def running(monkeypatch):
    """Simulates a ComfyUI of a version; None: one that does not name its version."""
    def version(text: str | None) -> None:
        module = None if text is None else SimpleNamespace(__version__=text)
        monkeypatch.setitem(sys.modules, "comfyui_version", module)
    return version


def test_the_same_number_everywhere():
    project = (environment.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'^requires-comfyui = "(.*)"$', project, re.MULTILINE) == [f">={OLDEST_HOST}"]
    assert environment.OLDEST_HOST == OLDEST_HOST  # the tests run on the oldest one that is promised
    assert f"ComfyUI {OLDEST_HOST}" in (environment.ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("version", [*environment.HOSTS, "0.100.0", "1.0", "1.2.3.4", "0.31.0-rc1", "unknown", ""])
def test_versions_that_do(running, version: str):
    running(version)
    assert unmet_requirement() is None


@pytest.mark.parametrize("version", ["0.16.2", "0.9.10", "0.3.76", "0.16", "0.2", "0.16.2+local"])
def test_versions_that_are_too_old(running, version: str):
    running(version)
    said = unmet_requirement()
    assert f"ComfyUI {OLDEST_HOST} or newer" in said and f"this is {version}." in said and "\n" not in said


def test_a_comfyui_from_before_it_named_its_version(running):
    running(None)
    assert f"ComfyUI {OLDEST_HOST} or newer" in unmet_requirement()
