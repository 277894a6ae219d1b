"""The page of a run and of a sweep: self-contained, described in words, whole in a real browser."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pandas
import pytest
from PIL import Image

from fmn_nb.files import write_json
from fmn_nb.report import ReportError, comparison, write_report
from fmn_nb.report_parts import format_figure, format_size
from fmn_nb.report_sweep import MOST_CARDS, WIDEST
from fmn_nb.results import record, save_image

PROBE = """<script>document.title = JSON.stringify({
  overflow: document.documentElement.scrollWidth > document.documentElement.clientWidth,
  images: document.images.length,
  broken: [...document.images].filter(image => !image.naturalWidth).length,
  undescribed: [...document.images].filter(image => !image.alt).length,
  headings: [...document.querySelectorAll("h1, h2")].map(one => one.textContent),
  loaded: performance.getEntriesByType("resource").filter(one => !one.name.startsWith("data:")).length,
})</script>"""


@pytest.fixture
def run_folder(tmp_path):
    """A finished run's folder, written through the functions that notebooks use."""
    out = tmp_path / "<cat> & co"
    settings = {"model": "emoji", "concept": "cat", "kind": "object", "preset": "balanced", "seed": 1234}
    side = {"ua": 0.04, "ira": 0.98, "cra": 0.9, "h": 0.11, "ceiling": 0.96, "images": 144, "frechet": 3.2,
            "kernel": -0.012, "paraphrase_ua": 0.125}
    record(out, {
        "model": "emoji", "concept": {"name": "cat", "kind": "object"}, "preset": "balanced", "seed": 1234,
        "versions": {"python": "3.11"},
        "before": {**side, "ci95": {"ua": [0.0, 0.2]}},
        "after": {**side, "ua": 1.0, "skipped": {"clip_score": "no CLIP model for this one"}},
        "cost": {"evaluation_seconds": 12.5},
        "forgetting": {"steps": 35, "seconds": 9.1, "stopped_because": "all steps done", "patch_bytes": 182_344},
    })
    for number, colour in enumerate(("orange", "tan")):
        save_image(out, f"before_{number}", Image.new("RGB", (64, 64), colour), alt=f"before, a {colour} square")
        save_image(out, f"after_{number}", Image.new("RGB", (64, 64), "gray"), alt="after, a gray square")
    save_image(out, "attention_cat", Image.new("RGB", (1600, 400), "navy"), alt="the map of <cat>")
    write_json(out / "run.json", {
        "status": "done", "key": "0", "settings": settings, "parameters": {"learning_rate": 1e-4},
        "versions": {"python": "3.11"}, "started": "2026-01-01T00:00:00+00:00",
        "notebooks": {"03_forget.ipynb": {"status": "done", "seconds": 9.5}},
    })
    (out / "03_forget.ipynb").write_text("{}")
    return out


@pytest.fixture
def sweep_folder(tmp_path):
    folder = tmp_path / "sweep"
    write_json(folder / "sweep.json", {"runs": 3, "varied": ["concept"], "notebooks": ["03", "04"], "workers": 1})
    pandas.DataFrame([
        {"folder": "cat-1", "concept": "cat", "status": "done", "seconds": 9.0, "error": "",
         "after.ua": 1.0, "after.ira": 0.9, "after.cra": 0.7, "after.ci95.ua.0": 0.86, "after.ci95.ua.1": 1.0},
        {"folder": "frog-2", "concept": "frog", "status": "failed", "seconds": None, "error": "no <such> luck"},
    ]).to_csv(folder / "results.csv", index=False)
    return folder


def test_a_runs_page_says_what_was_measured_and_what_was_not(run_folder):
    page = write_report(run_folder).read_text()
    text = html.unescape(re.sub(r"<[^>]+>", " ", page))
    for said in ("Forgetting “cat”", "1.000", "0.000 to 0.200", "H can reach 0.960", "182.3 kB", "all steps done",
                 "after: clip_score : no CLIP model for this one", "1.00e-04", "seed 1234", "03_forget.ipynb",
                 "Kernel", "-0.012", "paraphrase UA", "0.125", "asked for in other words",
                 "evaluation seconds", "12.5"):
        assert re.sub(r"\s+", " ", said) in re.sub(r"\s+", " ", text), said
    assert "<cat>" not in page and 'alt="the map of &lt;cat&gt;"' in page


def test_before_and_after_stand_side_by_side(run_folder):
    alts = re.findall(r'alt="([^"]+)"', write_report(run_folder).read_text())
    assert [alt.split()[0] for alt in alts[:4]] == ["before,", "after,", "before,", "after,"]
    assert "orange" in alts[0] and "tan" in alts[2]


def test_nothing_is_loaded_from_elsewhere(run_folder, sweep_folder):
    for folder in (run_folder, sweep_folder):
        page = write_report(folder).read_text()
        assert not re.search(r"<script|<link|@import|url\(|src=\"(?!data:)", page)


def test_a_failed_run_says_so_first(run_folder):
    state = json.loads((run_folder / "run.json").read_text())
    write_json(run_folder / "run.json", {**state, "status": "failed", "error": "03 failed in cell [4]: <KeyError>"})
    page = write_report(run_folder).read_text()
    assert "03 failed in cell [4]: &lt;KeyError&gt;" in page and page.index("did not finish") < page.index("Cost")


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))


def test_a_sweeps_page_has_a_row_a_run_and_a_point_a_measured_one(sweep_folder):
    page = write_report(sweep_folder).read_text()
    assert page.count("<circle") == 2, "one in each panel"
    assert "concept cat: UA 1.000, IRA 0.900" in page and "concept cat: UA 1.000, CRA 0.700" in page
    assert 'x1="369.6" x2="420.0"' in page and "0.860 to 1.000" in words_of(page), "the interval"
    assert "2 of 3 runs begun, 1 failed" in page and "no &lt;such&gt; luck" in page


def test_a_sweeps_page_shows_each_runs_images_settings_cost_and_notebooks(sweep_folder, run_folder):
    shutil.copytree(run_folder, sweep_folder / "cat-1")
    write_report(sweep_folder / "cat-1")
    page = write_report(sweep_folder).read_text()
    assert [alt.split(",")[0] for alt in re.findall(r'alt="([^"]+)"', page)] == [
        "before", "before", "after", "after", "the map of &lt;cat&gt;"]
    words = words_of(page)
    for said in ("learning rate 1.00e-04", "patch 182.3 kB", "evaluation seconds 12.5", "python 3.11", "seed 1234"):
        assert said in words, said
    assert 'href="cat-1/03_forget.ipynb"' in page and 'href="cat-1/report.html"' in page
    assert "No images are beside this page" in words, "of the other run"
    widest = max(Image.open(io.BytesIO(base64.b64decode(found))).width
                 for found in re.findall(r"data:image/png;base64,([^\"]+)", page))
    assert widest == WIDEST


def test_a_sweeps_page_bears_with_damaged_parts(sweep_folder, run_folder):
    shutil.copytree(run_folder, sweep_folder / "cat-1")
    (sweep_folder / "cat-1" / "metrics.json").write_text("{")
    (sweep_folder / "cat-1" / "images" / "before_0.png").write_bytes(b"no image")
    (sweep_folder / "results.csv").write_bytes(b"")
    page = words_of(write_report(sweep_folder).read_text())
    assert "results.csv can't be read" in page and "cat-1 can't be read" in page
    (sweep_folder / "sweep.json").write_text("[]")
    with pytest.raises(ReportError, match="sweep.json can't be read"):
        write_report(sweep_folder)


def test_a_large_sweeps_page_stays_small(tmp_path):
    write_json(tmp_path / "sweep.json", {"runs": 500, "varied": ["seed"], "notebooks": ["03"], "workers": 1})
    pandas.DataFrame([{"folder": f"cat-{seed}", "seed": seed, "status": "done", "seconds": 1.0, "error": "",
                       "after.h": 0.5} for seed in range(500)]).to_csv(tmp_path / "results.csv", index=False)
    page = write_report(tmp_path).read_text()
    assert page.count("<details") == MOST_CARDS and f"The first {MOST_CARDS} of 500 runs" in page
    assert page.count('<tr><th scope="row">cat-') == 500 and len(page) < 500_000


def test_a_measure_that_is_missing_on_one_side_is_no_zero():
    (row,) = comparison({}, {"ua": 0.5})
    assert row["before"] is None and row["after"] == 0.5


def test_figures_are_written_for_readers():
    assert [format_figure(value) for value in (0.12345, 41984, 1e-5, 0.0, "text", True)] == [
        "0.123", "41,984", "1.00e-05", "0.000", "text", "True",
    ]
    assert (format_size(182_344), format_size(4_200_000)) == ("182.3 kB", "4.2 MB")


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_pages_whole(run_folder, sweep_folder, tmp_path, width):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "install chromium, or leave this test out"
    seen = _in_browser(chromium, write_report(run_folder), width, tmp_path)
    assert seen["images"] == 5 and seen["broken"] == seen["undescribed"] == seen["loaded"] == 0
    assert not seen["overflow"], "the page is wider than its window"
    assert seen["headings"][:3] == ["Forgetting “cat”", "Before and after", "Where the concept's attention goes"]
    seen = _in_browser(chromium, write_report(sweep_folder), width, tmp_path)
    assert not seen["overflow"] and seen["loaded"] == 0


def _in_browser(chromium: str, report: Path, width: int, tmp_path: Path) -> dict:
    """What a script at the page's end sees once everything is laid out."""
    page = report.with_name("probed.html")
    page.write_text(report.read_text().replace("</body>", PROBE + "</body>"))
    result = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}",
         f"--window-size={width},900", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120,
    )
    title = re.search(r"<title>(\{.*?\})</title>", result.stdout, re.DOTALL)
    assert title, result.stderr
    return json.loads(html.unescape(title[1]))
