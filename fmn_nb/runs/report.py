"""The pages: a run's own, its notebooks', and notebook 07 on a sweep. Each is one file that loads nothing else."""

from __future__ import annotations

import base64
import tempfile
from functools import cache
from html import escape
from itertools import zip_longest
from pathlib import Path
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fmn_nb.concepts.concept import Concept
from fmn_nb.files import read_json, write_text
from fmn_nb.runs.folder import REPORT_FILE, SWEEP_FILE, RunFolder, SweepReadingError, SweepResults, read_sweep
from fmn_nb.runs.metrics import MEASURED, METRICS, PROBE_METRICS, Metric, comparison, validate
from fmn_nb.runs.notebook import execute_notebook
from fmn_nb.runs.plan import Notebook, course_notebooks

if TYPE_CHECKING:
    from jinja2 import Environment
    from nbformat import NotebookNode

NOT_ON_A_PAGE = "not-on-a-page"  # tag of notebook 07's cells that need a reader: exercises, the explorer
WIDGET = "application/vnd.jupyter.widget-view+json"  # needs a kernel; a sentence beside it doesn't
CHANGED, ATTENDED, OTHERS = "Before and after", "Where the concept's attention goes", "More figures"
#: nbconvert's colours have too little contrast, and its links are told apart from text by colour alone
READABLE = """
:root { --jp-mirror-editor-comment-color: #2f6565; --jp-mirror-editor-operator-color: #8a0fd6;
        --jp-mirror-editor-number-color: #006b00; --jp-cell-prompt-not-active-opacity: 1;
        --jp-cell-inprompt-font-color: #2a5b86;
        --jp-cell-outprompt-font-color: #a3402a; }
.jp-RenderedHTMLCommon a { text-decoration: underline !important; }
"""
#: nbconvert's own page without the scripts that it would load from elsewhere; formulas stay as they were typed
_PAGE_ALONE = """{% extends 'lab/index.html.j2' %}{% block html_head_js %}{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}{% block html_head_js_mermaidjs %}{% endblock %}
{% block html_head_css %}<style>""" + READABLE + "</style>{% endblock %}"


class ReportError(ValueError):
    """A folder holds neither a run nor a sweep, or a sweep without anything to show."""


def write_report(folder: Path, notebooks: bool = False) -> Path:
    """Write the page for the run or the sweep in `folder` and return its path.

    Args:
        notebooks: also write each of a run's executed notebooks as a page beside it; that takes seconds.

    Raises:
        ReportError: the folder holds neither, or a sweep without a measured run.
        StateError, MetricsError: the run's run.json or metrics.json isn't what a run leaves.
        RunError: notebook 07 failed on the sweep.
    """
    folder = Path(folder)
    if RunFolder(folder).state_file.is_file():
        run = RunFolder(folder)
        view = run_view(run)  # before anything is written: it tells what is broken
        if notebooks:
            _write_notebooks(run)
            view = run_view(run)
        page = _templates().get_template("run.html.j2").render(view)
    elif (folder / SWEEP_FILE).is_file():
        page = _sweep_page(folder)
    else:
        raise ReportError(f"{folder} holds no {RunFolder.STATE} and no {SWEEP_FILE}; give the folder of a run or a "
                          "sweep")
    return write_text(folder / REPORT_FILE, page)


def _sweep_page(folder: Path) -> str:
    """Notebook 07, executed on the sweep, as a page."""
    try:
        results = read_sweep(folder)
    except SweepReadingError as error:
        raise ReportError(str(error)) from error
    shown = [f"after.{one.name}" for one in METRICS if one.is_fraction]
    if not set(shown) <= set(results.runs) or not len(results.done.dropna(subset=shown)):
        raise ReportError(f"no finished run in {folder} has UA, IRA, CRA and H to show; notebook 04 measures them")
    notebook = course_notebooks().get("07")
    if notebook is None:
        raise ReportError("notebook 07, which makes the page, is not there; reinstall from a complete checkout")
    with tempfile.TemporaryDirectory() as figures:
        values = {"sweep": str(folder.resolve()), "out": figures}
        executed = execute_notebook(Notebook(notebook, values), folder.resolve())
    return _as_page(executed, results)


def _as_page(executed: Path, results: SweepResults) -> str:
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    exporter = HTMLExporter(
        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True,
        config=Config({"TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": {NOT_ON_A_PAGE}}}),
    )
    body, _ = exporter.from_notebook_node(for_a_page(_read(executed)))
    runs = [(results.label(run), f"{quote(run)}/{REPORT_FILE}") for run in results.done.index]
    return _templates().get_template("sweep.html.j2").render(
        name=results.folder.resolve().name, body=body, runs=runs, notebook=quote(executed.name))


def _read(executed: Path) -> NotebookNode:
    import nbformat

    return nbformat.read(executed, as_version=4)


def for_a_page(content: NotebookNode) -> NotebookNode:
    """Remove from an executed notebook what only a kernel can show, and give each picture words; return it.

    Not all of nbconvert's templates write an alt text, so the picture becomes HTML that has one.
    """
    content.metadata.pop("widgets", None)
    for cell in content.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            data.pop(WIDGET, None)
            if image := data.pop("image/png", None):
                said = output.metadata.get("image/png", {}).get("alt") or data.get("text/plain", "")
                data["text/html"] = f'<img alt="{escape(said)}" src="data:image/png;base64,{image}">'
    return content


def _write_notebooks(run: RunFolder) -> None:
    """Each executed notebook of a run as a page beside it; links between them lead from page to page."""
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(raw_template=_PAGE_ALONE)
    executed = [name for name in map(run.executed, run.checked_state()["notebooks"]) if name]
    for name in executed:
        content = for_a_page(_read(run.path / name))
        content.metadata["title"] = Path(name).stem
        page, _ = exporter.from_notebook_node(content)
        for other in executed:
            page = page.replace(f'href="{other}', f'href="{Path(other).with_suffix(".html")}')
        write_text(_page_of(run, name), page)


def _page_of(run: RunFolder, executed: str) -> Path:
    return (run.path / executed).with_suffix(".html")


def _to_read(run: RunFolder, notebook: str) -> str | None:
    """The file that shows an executed notebook best: its page, unless the page is older than the notebook."""
    if (executed := run.executed(notebook)) is None:
        return None
    page = _page_of(run, executed)
    return page.name if page.exists() and page.stat().st_mtime >= (run.path / executed).stat().st_mtime else executed


@cache  # a compiled template serves all pages of a sweep
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("fmn_nb.runs"), autoescape=True, undefined=StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": format_figure, "size": format_size}
    return environment


def run_view(run: RunFolder) -> dict[str, Any]:
    """Everything the run's page shows, as plain values."""
    state, metrics = run.checked_state(), {}
    settings = state["settings"]
    if run.metrics_file.exists():
        validate(metrics := read_json(run.metrics_file))
    return {
        "state": state,
        "metrics": metrics,
        "prompt": Concept(settings["concept"], kind=settings["kind"]).prompt,
        "patch": _patch_kind(run.path / "patch"),
        "verdict": verdict(settings["concept"], metrics.get("before", {}), metrics.get("after", {})),
        "cost": {name: value for name, value in metrics.get("cost", {}).items() if "forgetting" not in metrics
                 or not name.startswith(("forgetting", "patch"))},  # the fine-tune's own section has those
        "rows": _rows(metrics, METRICS),
        "probes": _rows(metrics, PROBE_METRICS),
        "ceiling": metrics.get("before", {}).get("ceiling"),
        "skipped": _skipped(metrics),
        "figures": grouped_figures(run.images()),
        "notebooks": [(name, _to_read(run, name), entry) for name, entry in sorted(state["notebooks"].items())],
    }


def _patch_kind(patch: Path) -> str | None:
    """"lora" or "weights"; None if the folder holds no readable patch."""
    try:
        return read_json(patch / "fmn.json")["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def verdict(concept: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """What was forgotten and what was kept, in a sentence with 95% intervals; empty if UA wasn't measured."""
    if "ua" not in after:
        return ""

    def share(side: dict[str, Any], name: str) -> str:
        low, high = side.get("ci95", {}).get(name, (None, None))
        return f"{side[name]:.0%}" + ("" if low is None else f" (95% interval {low:.0%} to {high:.0%})")

    said = f"The judge no longer sees “{concept}” in {share(after, 'ua')} of its images"
    kept = [f"{what} in {share(after, name)} of theirs" + (f", {before[name]:.0%} before" if name in before else "")
            for name, what in (("ira", "the other concepts of its kind"), ("cra", "what is of another kind"))
            if name in after]
    return said + (f"; it still sees {', and '.join(kept)}." if kept else ".")


def _rows(metrics: dict[str, Any], wanted: tuple[Metric, ...]) -> list[dict[str, Any]]:
    """A row for every metric that either side has: itself, its values, and their 95% intervals."""
    before, after = metrics.get("before", {}), metrics.get("after", {})
    return [{"metric": one, "before": was, "after": now, "before_ci": before.get("ci95", {}).get(one.name),
             "after_ci": after.get("ci95", {}).get(one.name)} for one, was, now in comparison(before, after, wanted)]


def _skipped(metrics: dict[str, Any]) -> dict[str, str]:
    reasons = dict(metrics.get("skipped", {}))
    for section in (*MEASURED, "oracle"):
        for name, reason in metrics.get(section, {}).get("skipped", {}).items():
            reasons[f"{section}: {name}"] = reason
    return reasons


def grouped_figures(images: dict[str, Path]) -> list[dict[str, Any]]:
    """A run's images under their headings, each with its description and its bytes as a data URI.

    "Before and after" is the one figure that pairs them, if there is one; otherwise one of each, side by side.
    """
    by_name = {prefix: [path for name, path in images.items() if name.startswith(prefix)]
               for prefix in ("pairs", "before", "after", "attention")}
    paired = [path for both in zip_longest(by_name["before"], by_name["after"]) for path in both if path]
    named = {path for paths in by_name.values() for path in paths}
    groups = {CHANGED: by_name["pairs"] or paired, ATTENDED: by_name["attention"],
              OTHERS: [path for path in images.values() if path not in named]}
    return [{"title": title, "figures": [_shown(path) for path in paths],
             "beside": title == CHANGED and not by_name["pairs"]} for title, paths in groups.items() if paths]


def _shown(path: Path) -> dict[str, Any]:
    """A PNG as a data URI, its description (or else its name), its width, and whether it has few pixels."""
    from PIL import Image

    content = base64.b64encode(path.read_bytes()).decode("ascii")

    with Image.open(path) as image:
        image.load()  # text may stand after the pixels
        said = str(getattr(image, "text", {}).get("Description", "")).strip()
        # Samples of the miniature are 64 pixels wide: enlarged without smoothing they stay what they are.
        return {"uri": f"data:image/png;base64,{content}", "alt": said or path.stem.replace("_", " "),
                "width": image.width, "pixelated": image.width <= 128}


def format_figure(value: Any) -> str:
    """A number as a reader wants it: three digits after the point for small ones, thousands set apart."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
        return str(value) if isinstance(value, str) else shortened(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"


def format_size(count: Any) -> str:
    """A number of bytes in kB or MB (powers of 1000); what isn't a number stays as it is."""
    if isinstance(count, bool) or not isinstance(count, int | float) or abs(count) > 1e15:
        return format_figure(count)
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
