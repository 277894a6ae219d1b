"""JupyterLab in a real browser: notebook 02 runs there from top to bottom, and its explorer answers the reader.

    pip install -c constraints.txt ".[test,browser]" && apt-get install chromium && pytest -m browser tests

Playwright drives the system's own Chromium, so nothing is downloaded. Without one of them the test is skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest

from fmn_nb.files import notebooks_dir

NOTEBOOK = "02_concept_attention_maps.ipynb"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]
START, RUN, ANSWER = 120, 600, 60  # seconds at most: for JupyterLab, for all cells, for one move of a control
#: JupyterLab's own model of the open notebook, which also has the cells that are scrolled out of the page
CELLS = "[...window.jupyterapp.shell.currentWidget.content.model.cells].map(cell => cell.toJSON())"
IDLE = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
PICTURE = ".jp-OutputArea-output .widget-image"

pytestmark = pytest.mark.browser


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, its token and its log."""

    address: str
    token: str
    log: Path

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/api/status?token={self.token}", timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, OSError):
            return False


@pytest.fixture(scope="module")
def chromium() -> str:
    for package in ("playwright", "jupyterlab"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install '.[browser]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium here: apt-get install chromium")
    return found


@pytest.fixture(scope="module")
def lab(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab on a free port with a token, in a folder of its own that holds notebook 02 without its outputs."""
    home = tmp_path_factory.mktemp("lab")
    notebook = nbformat.read(notebooks_dir() / NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (home / "course").mkdir()
    nbformat.write(notebook, home / "course" / NOTEBOOK)
    silent = home / "settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    silent.parent.mkdir(parents=True)
    silent.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}), encoding="utf-8")

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    running = Lab(f"http://127.0.0.1:{port}", secrets.token_hex(16), home / "lab.log")
    places = {name: str(home / name.lower()) for name in (
        "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")}
    places |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTER_TOKEN": running.token}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
               f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               f"--ServerApp.root_dir={home / 'course'}", "--LabApp.expose_app_in_browser=True"]
    with running.log.open("w", encoding="utf-8") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **places})
    try:
        until = time.monotonic() + START
        while not running.answers():
            if server.poll() is not None or time.monotonic() > until:
                pytest.fail(f"JupyterLab did not start:\n{running.log.read_text(encoding='utf-8')[-3000:]}")
            time.sleep(0.2)
        yield running
    finally:
        server.terminate()
        try:
            server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture
def page(lab: Lab, chromium: str) -> Iterator[Any]:
    """A page of the browser with the notebook open and its kernel waiting; it remembers the scripts' errors."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        try:
            opened = browser.new_page(viewport={"width": 1400, "height": 1000})
            opened.errors = []
            opened.on("pageerror", lambda error: opened.errors.append(str(error)))
            opened.goto(f"{lab.address}/lab/tree/{NOTEBOOK}?token={lab.token}")
            opened.wait_for_function(IDLE, timeout=1000 * START)
            yield opened
        finally:
            browser.close()


def test_notebook_02_runs_in_jupyterlab_and_its_explorer_answers(page):
    from playwright.sync_api import expect

    page.locator("#jp-MainMenu").get_by_text("Run", exact=True).click()
    page.locator("li[data-command='runmenu:run-all']").click()
    page.wait_for_function(  # until every code cell has run, or one has failed
        f"""() => {{
            const code = {CELLS}.filter(cell => cell.cell_type === 'code');
            const failed = code.some(cell => cell.outputs.some(output => output.output_type === 'error'));
            return failed || (code.every(cell => cell.execution_count) && {IDLE});
        }}""", timeout=1000 * RUN, polling=500)
    cells = page.evaluate(CELLS)
    assert not _failures(cells)
    number = next(n for n, cell in enumerate(cells) if "AttentionExplorer(" in "".join(cell["source"]))
    # JupyterLab draws only what is near
    page.evaluate(f"window.jupyterapp.shell.currentWidget.content.scrollToItem({number}, 'start')")
    page.wait_for_selector(PICTURE)
    seen = [_picture(page)]
    for control, choice in (("step", 1), ("step", 2), ("step", 20), ("head", 1), ("layer", 1), ("token", 0),
                            ("branch", 1)):
        row = page.locator(".jp-OutputArea-output .widget-dropdown", has=page.locator("label", has_text=control)).first
        row.locator("select").select_option(index=choice)
        seen.append(_changed(page, seen[-1]))
    assert len(set(seen)) == len(seen), "two settings of the explorer show the same picture"
    sentence = page.locator(".jp-OutputArea-output .widget-html", has_text="of the attention on average")
    sentence.first.scroll_into_view_if_needed()
    # inner text is what is shown; a cell that comes into view shows its own a frame later (content-visibility)
    expect(sentence.first).to_contain_text("at its peak", use_inner_text=True)

    after = page.evaluate(CELLS)
    assert not _failures(after) and not page.errors
    twin = after[number + 1]
    assert any("image/png" in output.get("data", {}) for output in twin["outputs"]), "the explorer's static twin"


def _failures(cells: list[dict]) -> list[str]:
    """Each error that a cell shows, with the cell's first line; also a widget's that could not be drawn."""
    return [f"{''.join(cell['source']).partition(chr(10))[0]}: {output.get('ename')}: {output.get('evalue')}"
            for cell in cells for output in cell.get("outputs", [])
            if output["output_type"] == "error" or output.get("name") == "stderr"]


def _picture(page: Any) -> str:
    """A digest of the explorer's picture: of the bytes that are shown, not of their address."""
    data = page.locator(PICTURE).first.evaluate(
        "async image => [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())]")
    return hashlib.sha256(bytes(data)).hexdigest()


def _changed(page: Any, before: str) -> str:
    """The picture's digest as soon as it is another one."""
    until = time.monotonic() + ANSWER
    while (now := _picture(page)) == before:
        assert time.monotonic() < until, "the picture did not change"
        page.wait_for_timeout(100)
    return now
