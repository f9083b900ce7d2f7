"""Tests in this folder open the page of a real ComfyUI server in a real, headless browser."""
from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from live import client, object_info, server  # noqa: F401

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "msedge", "microsoft-edge",
            "chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
STOCK_ERRORS = ("ComfyApp graph accessed before initialization",)  # the stock page writes this by itself,
STOCK_RACE = ("NotFoundError: Failed to execute 'removeChild'", "/vendor-vue-core", "/extensions/learn-to-steer")
"""Seen once on a loaded machine: the page's own framework removed a part of itself twice, with none of our script on its
stack (begin of the error, its file, and what must not be on its stack)."""
STOCK_MISSING = ("/user.css",)  # and asks for this, which no server has


@dataclass
class BrowserPage:
    """One tab at the server's page. `errors`: console errors and uncaught exceptions."""

    page: Any  # playwright.sync_api.Page
    address: str
    errors: list[str] = field(default_factory=list)

    def open(self) -> None:
        """Loads the page and waits until its canvas has the graph that a visitor sees first."""
        self.page.goto(self.address, wait_until="domcontentloaded")
        self.page.wait_for_function("() => window.app?.rootGraph?.nodes?.length > 0", timeout=180_000)

    def load(self, workflow: dict) -> None:
        """Puts a workflow on the canvas, as dropping its file does."""
        self.page.evaluate("workflow => window.app.loadGraphData(workflow)", workflow)

    def prompt(self) -> dict[str, Any]:
        """What the page would post for the graph on its canvas, in API format."""
        return self.page.evaluate("async () => (await window.app.graphToPrompt()).output")

    def node_types(self) -> list[str]:
        return self.page.evaluate("() => window.app.rootGraph.nodes.map(node => node.type)")

    def note_console(self, message: Any) -> None:
        """Keeps an error unless it is about another host, which a machine without internet cannot reach."""
        url = message.location.get("url", "")
        known = url.removeprefix(self.address) in STOCK_MISSING or message.text.startswith(STOCK_ERRORS)
        elsewhere = url.startswith("http") and not url.startswith(self.address)
        begin, file, ours = STOCK_RACE
        known = known or (message.text.startswith(begin) and file in url and ours not in message.text)
        if message.type == "error" and not elsewhere and not known:
            self.errors.append(f"{message.text} [{url}]")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=executable, headless=True, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def browser_page(browser: Any, server: Any) -> Iterator[BrowserPage]:  # noqa: F811
    """A fresh visitor's tab, 1600 x 1000."""
    context = browser.new_context(viewport={"width": 1600, "height": 1000})
    context.set_default_timeout(120_000)  # a busy machine is no failure
    tab = BrowserPage(context.new_page(), server.address)
    tab.page.on("console", tab.note_console)
    tab.page.on("pageerror", lambda error: tab.errors.append(f"uncaught: {error}"))
    yield tab
    context.close()
