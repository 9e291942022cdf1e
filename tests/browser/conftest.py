"""A real browser, driven through the WebDriver protocol: Chromium and its driver, as Debian packages them.

These tests are no part of `make test`; `make test-browser` runs them, and fails where there is no browser.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1400,1000"
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key under which the protocol names an element


class Browser:
    """One window. What a person does goes through `press`, `point` and `click`: real keys and a real pointer."""

    def __init__(self, port: int, profile: Path):
        self.port, self.session = port, ""
        options = {"args": [*FLAGS.split(), f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = self.ask("POST", "", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        where = f"/session/{self.session}{path}" if self.session else f"/session{path}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = None if method != "POST" else json.dumps(body or {})
        connection.request(method, where, data, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())["value"]
        connection.close()
        if isinstance(answer, dict) and "error" in answer:
            raise AssertionError(f"{path}: {answer['message']}")
        return answer

    def open(self, url: str) -> None:
        self.ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the JavaScript function body returns."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": arguments})

    def find(self, selector: str) -> dict[str, str]:
        return self.ask("POST", "/element", {"using": "css selector", "value": selector})

    def text(self, selector: str) -> str:
        return self.run("return document.querySelector(arguments[0]).textContent", selector)

    def count(self, selector: str) -> int:
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    def point(self, selector: str, *more: dict[str, Any]) -> None:
        """Move the pointer to the middle of an element."""
        move = {"type": "pointerMove", "duration": 0, "x": 0, "y": 0, "origin": self.find(selector)}
        self.run("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", self.find(selector))
        action = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move, *more]}
        self.ask("POST", "/actions", {"actions": [action]})

    def click(self, selector: str) -> None:
        self.point(selector, {"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0})

    def press(self, *keys: str) -> None:
        """Keys as the protocol writes them: a character, or one of its private code points (\\ue004: Tab)."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def log(self) -> list[str]:
        """What the page wrote to the console since the last call, errors with it."""
        return [entry["message"] for entry in self.ask("POST", "/se/log", {"type": "browser"})]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    driver = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
    assert driver, "chromedriver is not on the PATH: install it (Debian: apt install chromium chromium-driver)"
    port, profile = free_port(), tmp_path_factory.mktemp("profile")
    process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    window = None
    try:
        deadline = time.monotonic() + 60
        while window is None:
            try:
                window = Browser(port, profile)
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, "chromedriver did not come up within a minute"
                time.sleep(0.1)
        yield window
    finally:
        if window is not None:
            window.ask("DELETE", "")
        process.terminate()
        process.wait(20)
