"""The built site: whole, the same notebooks in it, nothing from elsewhere; in a real browser as well.

    pip install -c constraints.txt ".[test,course,browser]" && pytest -m browser tests/course
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fmn_nb.course.links import problems_of
from fmn_nb.course.slides import write_slides
from fmn_nb.files import data_dir, notebooks_dir

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]
PATIENCE = 120  # seconds at most, for one step in the browser on a busy machine
PAGES = ["index.html", "notebooks/03_forget_me_not.html", "notebooks/01_qkv_cross_attention.html", "report.html",
         "notebooks/errors.html", "notebooks/glossary.html", "data/emoji-diffusion/README.html",
         "zh_CN/notebooks/00_start_here.html"]


@pytest.mark.slow
def test_the_site_is_whole_and_holds_the_notebooks_in_both_languages(site):
    assert problems_of(site) == []
    for path in notebooks_dir().glob("[0-9][0-9]_*.ipynb"):
        page = (site / "notebooks" / f"{path.stem}.html").read_text(encoding="utf-8")
        assert (site / "notebooks" / path.name).read_bytes() == path.read_bytes()
        assert f"https://mybinder.org/v2/gh/someone/kit/dev?urlpath=tree/notebooks/{path.name}" in page
        assert f"https://colab.research.google.com/github/someone/kit/blob/dev/notebooks/{path.name}" in page
        assert 'src="data:image/png;base64,' in page
    assert "<math " in (site / "notebooks" / "01_qkv_cross_attention.html").read_text(encoding="utf-8")
    chinese = (site / "zh_CN" / "notebooks" / "00_start_here.html").read_text(encoding="utf-8")
    assert "交叉注意力" in chinese and 'lang="zh-CN"' in chinese
    assert (site / "report" / "report.html").is_file() and (site / "demo" / "index.html").is_file()


@pytest.mark.slow
def test_the_reference_has_an_entry_for_each_public_name_and_sphinx_has_nothing_to_remark(tmp_path):
    pytest.importorskip("myst_nb", reason="pip install '.[course]'")
    import fmn_nb
    from fmn_nb.course.site import SiteRequest, build_site

    site = build_site(tmp_path / "site", SiteRequest()).parent
    reference = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    missing = [name for name in fmn_nb.__all__ if not name.startswith("_") and f".{name}\"" not in reference]
    assert not missing and "mybinder" not in (site / "index.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install '.[browser]'")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium here: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=found, headless=True, args=FLAGS)
        yield opened
        opened.close()


class Visit:
    """A page of files in the browser, what it asked for, and its scripts' errors."""

    def __init__(self, browser: Any, path: Path, query: str = "", **options: Any) -> None:
        self.page = browser.new_context(**options).new_page()
        self.page.set_default_timeout(1000 * PATIENCE)
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: said.type == "error" and self.errors.append(said.text))
        self.page.goto(path.resolve().as_uri() + query)
        self.page.wait_for_timeout(500)  # "networkidle" never comes to a page full of data: addresses

    @property
    def elsewhere(self) -> list[str]:
        return [url for url in self.asked if not url.startswith(("file:", "data:", "blob:"))]

    def serious(self) -> list[str]:
        """What axe calls serious or critical, with the first element that it is about."""
        axe = pytest.importorskip("axe_playwright_python.base", reason="pip install '.[browser]'")
        self.page.evaluate((Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8"))
        found = self.page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]
        print({one["impact"]: one["id"] for one in found})
        return [f"{one['id']} ({len(one['nodes'])}): {one['nodes'][0]['html'][:200]}" for one in found
                if one["impact"] in ("serious", "critical")]


@pytest.mark.browser
@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_nobody_and_axe_finds_nothing_serious(site, browser, name):
    visit = Visit(browser, site / name)
    assert len(visit.asked) > 3 and not visit.elsewhere and not visit.errors
    assert not visit.serious()


@pytest.mark.browser
@pytest.mark.parametrize("name", ["index.html", "notebooks/03_forget_me_not.html"])
def test_it_is_dark_and_fits_a_phone(site, browser, name):
    visit = Visit(browser, site / name, color_scheme="dark", viewport={"width": 390, "height": 844})
    assert visit.page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not visit.serious()


@pytest.mark.browser
@pytest.mark.parametrize("place, word, hit", [
    ("", "re-steering", "03 Forget-Me-Not"), ("zh_CN", "注意力", "00 从这里开始")])
def test_search_finds_without_a_server(site, browser, place, word, hit):
    visit = Visit(browser, site / place / "search.html", f"?q={word}")
    visit.page.get_by_role("main").get_by_role("link", name=hit).first.wait_for()
    assert not visit.elsewhere and not visit.errors


@pytest.mark.browser
def test_one_walks_through_it_by_keyboard_from_page_to_page_and_from_language_to_language(site, browser):
    page = Visit(browser, site / "notebooks" / "00_start_here.html").page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent").strip() == "Skip to main content"
    page.locator("a.right-next").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/01_qkv_cross_attention.html")
    page.locator("a.left-prev").click()
    page.locator("a.fmn-language").click()
    page.wait_for_url("**/zh_CN/notebooks/00_start_here.html")
    assert page.locator("h1").first.inner_text().startswith("00 从这里开始")
    page.locator("a.fmn-language").click()
    page.wait_for_url("**/site/notebooks/00_start_here.html")


@pytest.mark.browser
def test_a_run_s_report_and_an_exported_notebook_have_no_serious_fault(tmp_path, browser):
    from fmn_nb.runs.report import write_report

    run = next(data_dir().glob("sweep-example/cat-*"))
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(notebooks_dir() / "03_forget_me_not.ipynb", tmp_path / "run")
    write_report(tmp_path / "run", notebooks=True)
    for name in ("report.html", "03_forget_me_not.html"):
        visit = Visit(browser, tmp_path / "run" / name)
        assert not visit.elsewhere and not visit.serious()


@pytest.mark.browser
def test_slides_turn_and_ask_nobody(tmp_path, browser, lessons):
    from playwright.sync_api import expect

    write_slides(tmp_path, [one for one in lessons if one.number == "01"])
    visit = Visit(browser, tmp_path / "01_qkv_cross_attention.html", viewport={"width": 1200, "height": 800})
    assert not visit.elsewhere and not visit.errors
    shown = visit.page.locator("section.present:not(.stack)")
    first = shown.inner_text()
    visit.page.keyboard.press("ArrowRight")
    expect(shown).not_to_have_text(first)
    assert not visit.serious()
