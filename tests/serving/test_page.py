"""The page in a real browser: three answers side by side, the heat strip, the report; nothing sticks out on a phone."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serving.conftest import KEY, Served

client = pytest.importorskip("websockets.sync.client")
CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--remote-debugging-port=0"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]


class Tab:
    """A browser tab, spoken to in the DevTools protocol."""

    def __init__(self, address: str) -> None:
        self._socket = client.connect(address, max_size=None)
        self._number = 0
        self.complaints: list[str] = []
        for domain in ("Runtime", "Log", "Page"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            told: dict[str, Any] = json.loads(self._socket.recv(timeout=60))
            if told.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.complaints.append(json.dumps(told["params"]))
            if told.get("id") == self._number:
                return told["result"]  # type: ignore[no-any-return]

    def value(self, script: str) -> Any:
        return self.send("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait_for(self, script: str) -> None:
        deadline = time.monotonic() + 60
        while not self.value(script):
            assert time.monotonic() < deadline, f"never true: {script}; {self.complaints}"
            time.sleep(0.1)


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    assert CHROMIUM is not None
    browser = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", "about:blank"], stderr=subprocess.DEVNULL)
    try:
        port_file = tmp_path / "DevToolsActivePort"
        while not (port_file.is_file() and port_file.read_text()):
            time.sleep(0.1)
        port = port_file.read_text().split()[0]
        tabs = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json"))
        yield Tab(next(found["webSocketDebuggerUrl"] for found in tabs if found["type"] == "page"))
    finally:
        browser.kill()
        browser.wait()


@pytest.mark.parametrize("width", [390, 1280])
def test_a_visitor_asks_all_models(served: Served, tab: Tab, width: int) -> None:
    tab.send("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
    tab.send("Page.navigate", url=served.url)
    tab.wait_for("document.getElementById('key-form')?.hidden === false")
    tab.complaints.clear()  # the browser notes the 401 that brought the form up
    tab.value(f"document.getElementById('key').value = '{KEY}'; document.querySelector('#key-form button').click()")
    tab.wait_for("document.getElementById('question').value !== '' && document.querySelector('.checks') !== null")
    assert tab.value("[...document.querySelectorAll('article')].map((node) => node.className).join()") == "target,unlearned,retrained"
    tab.value("document.getElementById('question').value += ' <img src=x onerror=alert(1)>'; document.getElementById('go').click()")
    tab.wait_for("document.getElementById('status').textContent.includes('3 models have answered')")
    assert tab.value("[...document.querySelectorAll('.answer')].every((node) => node.textContent.length > 0 && !node.querySelector('img'))")
    assert tab.value('document.querySelectorAll(\'.token[tabindex="0"][aria-label*="%"]\').length') > 9
    assert tab.value("document.documentElement.scrollWidth <= innerWidth")
    tab.value("document.querySelector('#report details').open = true")
    tab.wait_for("document.querySelector('iframe')?.sandbox.length === 0")
    assert tab.value("[...document.querySelectorAll('input, select, textarea')].every((node) => node.labels.length === 1)")
    assert not tab.complaints


def test_a_refused_run_shows_why(served: Served, tab: Tab) -> None:
    tab.send("Page.navigate", url=served.url)
    tab.wait_for("document.getElementById('key-form')?.hidden === false")
    tab.value(f"document.getElementById('key').value = '{KEY}'; document.querySelector('#key-form button').click()")
    tab.wait_for("document.querySelector('#run option[value=bad]') !== null")
    tab.value("document.getElementById('run').value = 'bad'; document.getElementById('run').dispatchEvent(new Event('change'))")
    tab.wait_for("document.querySelectorAll('.checks .failed').length === 2")
    assert "does not pass" in tab.value("document.querySelector('article.unlearned').textContent").lower()
