"""JupyterLab in a real browser: notebook 02 runs there from top to bottom, its explorer answers the reader, and boxes
that are moved by mouse and keyboard change what is drawn.

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

from fmn_nb.files import bundled_models, notebooks_dir

NOTEBOOK, BOARD = "02_concept_attention_maps.ipynb", "board.ipynb"
COMPOSER = """import fmn_nb as fmn
from fmn_nb.widgets import Composer

Composer(fmn.load("emoji-grounded"), "a photo in the style of twemoji", ["cat=left of=frog"], seed=0, steps=6)"""
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]
START, RUN, ANSWER = 120, 600, 60  # seconds at most: for JupyterLab, for all cells, for one move of a control
#: JupyterLab's own model of the open notebook, which also has the cells that are scrolled out of the page
CELLS = "[...window.jupyterapp.shell.currentWidget.content.model.cells].map(cell => cell.toJSON())"
IDLE = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"
PICTURE = ".jp-OutputArea-output .widget-image"
EMPTY = hashlib.sha256(b"").hexdigest()

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
    """JupyterLab on a free port with a token, in a folder of its own with notebook 02 without its outputs, and another
    notebook with a board for boxes."""
    home = tmp_path_factory.mktemp("lab")
    notebook = nbformat.read(notebooks_dir() / NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (home / "course").mkdir()
    nbformat.write(notebook, home / "course" / NOTEBOOK)
    board = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(COMPOSER)], metadata=notebook.metadata)
    nbformat.write(board, home / "course" / BOARD)
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
def page(request: pytest.FixtureRequest, lab: Lab, chromium: str) -> Iterator[Any]:
    """A page of the browser with a notebook open and its kernel waiting; it remembers the scripts' errors."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        try:
            opened = browser.new_page(viewport={"width": 1400, "height": 1000})
            opened.errors = []
            opened.on("pageerror", lambda error: opened.errors.append(str(error)))
            # a workspace of its own: the default one opens what an earlier page left open, on top of this notebook
            workspace = Path(request.param).stem
            opened.goto(f"{lab.address}/lab/workspaces/{workspace}/tree/{request.param}?token={lab.token}")
            shown = f"window.jupyterapp?.shell.currentWidget?.context?.path === '{request.param}'"
            opened.wait_for_function(f"{shown} && {IDLE}", timeout=1000 * START)
            yield opened
        finally:
            browser.close()


@pytest.mark.parametrize("page", [NOTEBOOK], indirect=True)
def test_notebook_02_runs_in_jupyterlab_and_its_explorer_answers(page):
    from playwright.sync_api import expect

    cells = _run_all(page)
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


@pytest.mark.skipif("emoji-grounded" not in bundled_models(), reason="fmn-nb pretrain --organism grounded")
@pytest.mark.parametrize("page", [BOARD], indirect=True)
def test_boxes_are_moved_by_mouse_and_keyboard_and_the_picture_follows(page):
    _run_all(page)
    board, draw = page.locator(".jp-OutputArea-output canvas"), page.locator("button", has_text="draw")
    board.scroll_into_view_if_needed()
    pictures, rows = [], page.locator(".jp-OutputArea-output .widget-html table")
    for move in (None, "mouse", "keyboard"):
        before, place = rows.inner_text(), board.bounding_box()
        at = [place[start] + share * place[side] for start, side, share in (("x", "width", 0.24), ("y", "height", 0.5))]
        if move == "mouse":  # the cat, to the top
            page.mouse.move(*at)
            page.mouse.down()
            page.mouse.move(at[0], at[1] - 0.25 * place["height"], steps=5)
            page.mouse.up()
        elif move == "keyboard":  # the box that was moved last is chosen
            board.focus()
            for _ in range(6):
                page.keyboard.press("ArrowDown")
        if move:
            page.wait_for_function("([row, before]) => row.innerText !== before", arg=[rows.element_handle(), before],
                                   timeout=1000 * ANSWER)
        draw.click()
        pictures.append(_changed(page, *pictures, EMPTY))
    assert len(set(pictures)) == 3 and not page.errors


def _run_all(page: Any) -> list[dict]:
    """Run all cells; the cells, none of which failed."""
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
    return cells


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


def _changed(page: Any, *before: str) -> str:
    """The picture's digest as soon as it is another one."""
    until = time.monotonic() + ANSWER
    while (now := _picture(page)) in before:
        assert time.monotonic() < until, "the picture did not change"
        page.wait_for_timeout(100)
    return now
