"""The canvas in a real browser: boxes are moved by mouse and by keyboard, and the model hears of it.

Needs Chromium and playwright, as `test_browser.py` does; the script runs on a page of its own, without Jupyter.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.browser
BOXES = [{"name": "cat", "colour": "#c1121f", "box": [0.1, 0.1, 0.4, 0.4]},
         {"name": "frog", "colour": "#1d4ed8", "box": [0.5, 0.5, 0.9, 0.9]}]
#: what the widget library gives the script: a model with get, set, save_changes and on
MODEL = """async ([url, state]) => {
  const heard = {};
  window.saved = 0;
  window.state = state;
  const model = {
    get: name => window.state[name],
    set: (name, value) => { window.state[name] = value; (heard[`change:${name}`] || []).forEach(one => one()); },
    save_changes: () => { window.saved += 1; },
    on: (name, one) => { (heard[name] ||= []).push(one); },
  };
  const script = (await import(url)).default;
  script.render({ model, el: document.body });
}"""


@pytest.fixture
def page() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="playwright is missing: pip install '.[browser]'")
    canvas = pytest.importorskip("fmn_nb.widgets.canvas", reason="anywidget is missing: pip install '.[browser]'")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    url = "data:text/javascript;base64," + base64.b64encode(canvas.BoxCanvas._esm.encode()
                                                            if isinstance(canvas.BoxCanvas._esm, str)
                                                            else str(canvas.BoxCanvas._esm).encode()).decode()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, headless=True, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 400, "height": 400})
        opened.set_content("<body style='margin:0'></body>")
        opened.evaluate(MODEL, [url, {"boxes": BOXES, "selected": 0, "picture": "", "moved": 0, "size": 256}])
        yield opened
        browser.close()


def boxes(page: Any) -> dict[str, list[float]]:
    return {one["name"]: one["box"] for one in page.evaluate("window.state.boxes")}


def test_the_mouse_moves_and_sizes_a_box(page):
    before = page.locator("canvas").screenshot()
    page.mouse.move(180, 180)
    page.mouse.down()
    page.mouse.move(154.4, 128.8, steps=4)
    page.mouse.up()
    assert boxes(page)["frog"] == pytest.approx([0.4, 0.3, 0.8, 0.7], abs=0.01)
    assert boxes(page)["cat"] == BOXES[0]["box"] and page.evaluate("[state.selected, state.moved]") == [1, 1]
    assert page.locator("canvas").screenshot() != before
    page.mouse.move(0.8 * 256, 0.7 * 256)  # the corner sizes it
    page.mouse.down()
    page.mouse.move(0.6 * 256, 2000, steps=3)
    page.mouse.up()
    assert boxes(page)["frog"] == pytest.approx([0.4, 0.3, 0.6, 1.0], abs=0.01) and page.evaluate("saved") > 2
    page.mouse.click(250, 5)
    assert page.evaluate("state.moved") == 2, "where no box is, nothing moves"
    page.mouse.move(50, 50)
    page.mouse.down()
    page.mouse.move(51, 51)
    page.mouse.up()
    assert page.evaluate("[state.selected, state.moved]") == [0, 2], "a click chooses"
    assert boxes(page)["cat"] == BOXES[0]["box"]


def test_the_keyboard_moves_sizes_and_chooses(page):
    page.keyboard.press("Tab")
    for key in ("ArrowRight", "ArrowDown", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    assert boxes(page)["cat"] == pytest.approx([0.12, 0.12, 0.40, 0.42])
    page.keyboard.press("n")
    for _ in range(40):
        page.keyboard.press("ArrowLeft")
    assert boxes(page)["frog"] == pytest.approx([0, 0.5, 0.4, 0.9], abs=1e-6), "the image ends there"
    said = page.locator("canvas").get_attribute("aria-label")
    assert said.startswith("Boxes. frog: left 0, top 0.5")
    assert page.evaluate("state.moved") == 3 + 25, "at the rim, a key moves nothing"
