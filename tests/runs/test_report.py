"""The page of a run, and notebook 07 as a sweep's: self-contained, described in words, whole in a real browser."""

import html
import io
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pandas
import pytest
from PIL import Image

from fmn_nb.files import data_dir, write_json
from fmn_nb.runs.folder import StateError, record, save_image
from fmn_nb.runs.metrics import comparison
from fmn_nb.runs.progress import SweepProgress
from fmn_nb.runs.report import WIDGET, ReportError, format_figure, format_size, verdict, write_report
from fmn_nb.runs.spec import plan_sweep
from fmn_nb.runs.sweep import run_sweep

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


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory):
    """The bundled example of a sweep with its page; one more run in it failed."""
    folder = tmp_path_factory.mktemp("sweep") / "example"
    shutil.copytree(data_dir() / "sweep-example", folder)
    table = pandas.read_csv(folder / "results.csv")
    failed = {**table.iloc[0][["concept", "seed", "steps"]], "folder": "cat-9", "status": "failed", "seconds": None,
              "error": "03_forget.ipynb failed in cell [4]: ValueError: no <such> luck, and many more words on it"}
    pandas.concat([table, pandas.DataFrame([failed])]).to_csv(folder / "results.csv", index=False)
    write_json(folder / "sweep.json", json.loads((folder / "sweep.json").read_text()) | {"runs": 7})
    write_report(folder)
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


def test_a_page_tells_floors_and_distances_where_an_oracle_was_given(run_folder):
    assert "never taught" not in write_report(run_folder).read_text()
    attack = {"attack": "relearning", "budget": "half", "steps": 10, "success": 0.75, "floor": 0.5, "unchanged": 1.0,
              "excess": 0.25, "low": -0.011, "high": 0.512, "withstood": True, "images": 24}
    record(run_folder, {"oracle": {
        "attacks": [attack, {**attack, "attack": "concept inversion", "residual": 0.625, "withstood": False}],
        "budgets": "fixed on a day", "distance": {"kernel": {"value": 0.123, "unchanged": 0.5, "scaled": 0.246}},
        "steps_to_revive": {"relearning": {"forgetting model": 40}},
        "skipped": {"adversarial prompt": "no whole words"}}})
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", write_report(run_folder).read_text())))
    for said in ("relearning, half 10 0.750 0.500 1.000 0.250 -0.011 to 0.512 – yes 40; the oracle: none tried",
                 "0.625 no –", "Budgets fixed on a day", "Distance to it: kernel", "0.123",
                 "oracle: adversarial prompt : no whole words"):
        assert said in text, said


def test_before_and_after_stand_side_by_side(run_folder):
    alts = re.findall(r'alt="([^"]+)"', write_report(run_folder).read_text())
    assert [alt.split()[0] for alt in alts[:4]] == ["before,", "after,", "before,", "after,"]
    assert "orange" in alts[0] and "tan" in alts[2]


def test_one_figure_that_pairs_before_and_after_stands_for_both(run_folder):
    save_image(run_folder, "pairs_cats", Image.new("RGB", (700, 400), "tan"), alt="before over after")
    page = write_report(run_folder).read_text()
    alts = re.findall(r'alt="([^"]+)"', page)
    assert alts == ["before over after", "the map of &lt;cat&gt;"] and page.count("Before and after</h2>") == 1


def test_a_page_says_how_to_use_its_patch(run_folder):
    assert "How to use this patch" not in write_report(run_folder).read_text(), "there is none"
    for kind, plain in (("lora", True), ("weights", False)):
        write_json(run_folder / "patch" / "fmn.json", {"kind": kind})
        words = words_of(write_report(run_folder).read_text())
        assert 'fmn.load("emoji"), fmn.Patch.load("patch")' in words and 'pipe("a photo of a cat")' in words
        assert ("pipe.load_lora_weights" in words) == plain
    (run_folder / "patch" / "fmn.json").write_text("{")
    assert "How to use this patch" not in write_report(run_folder).read_text()


def test_what_the_fine_tune_cost_stands_there_once(run_folder):
    record(run_folder, {"cost": {"evaluation_seconds": 12.5, "forgetting_seconds": 9.1, "patch_bytes": 182_344}})
    words = words_of(write_report(run_folder).read_text())
    assert words.count("182.3 kB") == words.count("9.100") == 1


@pytest.fixture
def executed(run_folder) -> str:
    """The run's notebook with a formula, a link to itself, a picture with words and a widget."""
    import nbformat
    from nbformat import v4

    png = {"image/png": "iVBORw0KGgo=", "text/plain": "words"}
    outputs = [v4.new_output("display_data", png, metadata={"image/png": {"alt": "a <picture>"}}),
               v4.new_output("display_data", {WIDGET: {"model_id": "x"}, "text/plain": "It needs a kernel."})]
    cells = [v4.new_markdown_cell("$x^2$ and [itself](03_forget.ipynb)"), v4.new_code_cell("1 + 1", outputs=outputs)]
    notebook = v4.new_notebook(cells=cells, metadata={"widgets": {"application/vnd.jupyter.widget-state+json": {}}})
    nbformat.write(notebook, run_folder / "03_forget.ipynb")
    return "03_forget"


def test_executed_notebooks_are_pages_that_load_nothing(run_folder, executed):
    report = write_report(run_folder, notebooks=True).read_text()
    assert f'href="{executed}.html"' in report and f'href="{executed}.ipynb"' not in report
    page = (run_folder / f"{executed}.html").read_text()
    assert not re.search(r"<script|<link|@import|import\(|src=\"(?!data:)", page) and "<title>03_forget</title>" in page
    assert 'alt="a &lt;picture&gt;"' in page and "It needs a kernel." in page and f'href="{executed}.html"' in page


def test_a_notebook_that_was_executed_again_is_linked_itself(run_folder, executed):
    write_report(run_folder, notebooks=True)
    os.utime(run_folder / f"{executed}.html", (0, 0))
    assert f'href="{executed}.ipynb"' in write_report(run_folder).read_text()


def test_nothing_is_loaded_from_elsewhere(run_folder, sweep_folder):
    for page in (write_report(run_folder).read_text(), (sweep_folder / "report.html").read_text()):
        assert not re.search(r"<script|<link|@import|url\(|src=\"(?!data:)", page)


def test_a_failed_run_says_so_first(run_folder):
    state = json.loads((run_folder / "run.json").read_text())
    write_json(run_folder / "run.json", {**state, "status": "failed", "error": "03 failed in cell [4]: <KeyError>"})
    page = write_report(run_folder).read_text()
    assert "03 failed in cell [4]: &lt;KeyError&gt;" in page and page.index("did not finish") < page.index("Cost")


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", page)))


def test_a_sweeps_page_is_notebook_07(sweep_folder):
    page = (sweep_folder / "report.html").read_text()
    words = words_of(page)
    for said in ("7 runs planned: 6 done, 1 failed", "no <such> luck, and many more words", "H tells",
                 "Forgetting against keeping", "costs that the runs report", "The sweep example"):
        assert said in words, said
    assert 'href="07_a_sweep.ipynb"' in page and (sweep_folder / "07_a_sweep.ipynb").is_file()
    assert len(re.findall(r'href="[\w-]+/report.html"', page)) == 6
    alts = [html.unescape(alt) for alt in re.findall(r'<img[^>]*alt="([^"]+)"', page, re.DOTALL)]
    assert len(alts) == page.count("<img") == 4 and alts[0].startswith("6 runs. UA from")
    assert "Exercises" not in page and "SweepExplorer" not in page, "they need a reader"


def test_a_sweep_of_which_nothing_was_measured_has_no_page_and_ends_well(tmp_path, write_notebook):
    write_json(tmp_path / "sweep.json", {"runs": 1, "varied": [], "notebooks": ["03"]})
    with pytest.raises(ReportError, match="no finished run in .* has UA, IRA, CRA and H"):
        write_report(tmp_path)
    (tmp_path / "sweep.json").write_text("[]")
    with pytest.raises(ReportError, match="sweep.json can't be read"):
        write_report(tmp_path)
    cell = 'concept: str = "cat"  # what\nseed: int = 0  # seed\nout: str = ""  # folder'
    spec = {"notebook": str(write_notebook("03_stub.ipynb", cell)), "grid": {"seed": [0]}}
    shown = io.StringIO()
    folder, failed = run_sweep(plan_sweep(spec, tmp_path / "out"), progress=SweepProgress(shown))
    assert failed == [] and "\nno report.html: no finished run" in shown.getvalue()
    assert (folder / "results.csv").is_file() and not (folder / "report.html").exists()


def test_a_measure_that_is_missing_on_one_side_is_no_zero():
    ((metric, before, after),) = comparison({}, {"ua": 0.5})
    assert metric.name == "ua" and before is None and after == 0.5


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
    seen = _in_browser(chromium, sweep_folder / "report.html", width, tmp_path)
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


def _nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("change", [
    {"notebooks": []}, {"settings": None}, {"settings": {}}, {"versions": []}, {"started": 5}, {"parameters": [1]},
    {"notebooks": {"a": None}}, {"notebooks": {"a": {"status": "done", "seconds": "x"}}}, {"status": {}}, {"error": []},
])
def test_a_state_that_is_none_is_told_in_one_line(run_folder, change):
    state = json.loads((run_folder / "run.json").read_text())
    write_json(run_folder / "run.json", state | change)
    with pytest.raises(StateError, match=f"run.json is not a run's state: {next(iter(change))}") as caught:
        write_report(run_folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["run.json", "metrics.json"])
@pytest.mark.parametrize("text", ["[]", "null", "{", '{"before": {"ua": "x"}}', '{"seed": 1e400}', _nested(20_000)])
def test_files_that_are_broken_are_told_as_such(run_folder, file, text):
    (run_folder / file).write_text(text)
    with pytest.raises(ValueError) as caught:
        write_report(run_folder)
    assert "\n" not in str(caught.value) and type(caught.value).__module__.startswith(("fmn_nb", "builtins"))


def test_the_page_begins_with_what_came_of_it(run_folder):
    page = write_report(run_folder).read_text()
    said = ("The judge no longer sees “cat” in 100% of its images; it still sees the other concepts of its kind in 98% "
            "of theirs, 98% before, and what is of another kind in 90% of theirs, 90% before.")
    assert page.index("<main>") < page.index(said) < page.index('class="cards"') < page.index("</main>")


def test_a_verdict_has_its_interval_and_says_no_more_than_was_measured():
    assert verdict("cat", {}, {"ua": 0.96, "ci95": {"ua": [0.9, 1.0]}}) == (
        "The judge no longer sees “cat” in 96% (95% interval 90% to 100%) of its images.")
    assert verdict("cat", {}, {"ira": 1.0}) == ""


def test_the_page_of_a_stopped_run_says_so(run_folder):
    state = json.loads((run_folder / "run.json").read_text())
    write_json(run_folder / "run.json", state | {"status": "stopped"})
    assert "This run was stopped." in write_report(run_folder).read_text()
