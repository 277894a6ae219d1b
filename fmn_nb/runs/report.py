"""The pages: a run's own, and notebook 07 on a sweep. Both are one file that loads nothing from elsewhere."""

from __future__ import annotations

import base64
import tempfile
from functools import cache
from html import escape
from pathlib import Path
from reprlib import repr as shortened
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from fmn_nb.files import read_json, write_text
from fmn_nb.runs.folder import REPORT_FILE, SWEEP_FILE, RunFolder, SweepReadingError, SweepResults, read_sweep
from fmn_nb.runs.metrics import MEASURED, METRICS, PROBE_METRICS, Metric, comparison, validate
from fmn_nb.runs.notebook import execute_notebook
from fmn_nb.runs.plan import Notebook, course_notebooks

if TYPE_CHECKING:
    from jinja2 import Environment

NOT_ON_A_PAGE = "not-on-a-page"  # tag of notebook 07's cells that need a reader: exercises, the explorer
_GROUPS = (("before", "Before"), ("after", "After"), ("attention", "Where the concept's attention goes"))


class ReportError(ValueError):
    """A folder that holds neither a run nor a sweep, or a sweep of which there is nothing to show."""


def write_report(folder: Path) -> Path:
    """Write the page for the run or the sweep in `folder` and return its path.

    Raises:
        ReportError: it holds neither, or a sweep without a measured run.
        StateError, MetricsError: the run's run.json or metrics.json isn't what a run leaves.
        RunError: notebook 07 failed on the sweep.
    """
    folder = Path(folder)
    if RunFolder(folder).state_file.is_file():
        page = _templates().get_template("run.html.j2").render(run_view(RunFolder(folder)))
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
        raise ReportError(f"no finished run in {folder} has UA, IRA, CRA and H to be shown; notebook 04 measures them")
    notebook = course_notebooks().get("07")
    if notebook is None:
        raise ReportError("notebook 07 is not there, which makes the page; reinstall from a complete checkout")
    with tempfile.TemporaryDirectory() as figures:
        values = {"sweep": str(folder.resolve()), "out": figures}
        executed = execute_notebook(Notebook(notebook, values), folder.resolve())
    return _as_page(executed, results)


def _as_page(executed: Path, results: SweepResults) -> str:
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    exporter = HTMLExporter(
        template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True,
        config=Config({"TagRemovePreprocessor": {"enabled": True, "remove_cell_tags": {NOT_ON_A_PAGE}}}),
    )
    content = nbformat.read(executed, as_version=4)
    content.metadata.pop("widgets", None)
    for cell in content.cells:
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):  # nbconvert knows no words for those who can't see it
                alt, image = escape(output.data.get("text/plain", "")), output.data["image/png"]
                output.data = {"text/html": f'<img alt="{alt}" src="data:image/png;base64,{image}">'}
    body, _ = exporter.from_notebook_node(content)
    runs = [(results.label(run), f"{quote(run)}/{REPORT_FILE}") for run in results.done.index]
    return _templates().get_template("sweep.html.j2").render(
        name=results.folder.resolve().name, body=body, runs=runs, notebook=quote(executed.name))


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
    if run.metrics_file.exists():
        validate(metrics := read_json(run.metrics_file))
    return {
        "state": state,
        "metrics": metrics,
        "verdict": verdict(state["settings"]["concept"], metrics.get("before", {}), metrics.get("after", {})),
        "rows": _rows(metrics, METRICS),
        "probes": _rows(metrics, PROBE_METRICS),
        "ceiling": metrics.get("before", {}).get("ceiling"),
        "skipped": _skipped(metrics),
        "figures": grouped_figures(run.images()),
        "notebooks": [(name, run.executed(name), entry) for name, entry in sorted(state["notebooks"].items())],
    }


def verdict(concept: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """What was forgotten and what was kept, in a sentence with its 95% intervals; empty where UA wasn't measured."""
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
    for section in MEASURED:
        for name, reason in metrics.get(section, {}).get("skipped", {}).items():
            reasons[f"{section}: {name}"] = reason
    return reasons


def grouped_figures(images: dict[str, Path]) -> list[dict[str, Any]]:
    """A run's images under their headings, each with its description and its bytes as a data URI."""
    groups: dict[str, list[dict[str, str]]] = {title: [] for _, title in _GROUPS} | {"More figures": []}
    for name, path in images.items():
        title = next((title for prefix, title in _GROUPS if name.startswith(prefix)), "More figures")
        content = base64.b64encode(path.read_bytes()).decode("ascii")
        groups[title].append({"uri": f"data:image/png;base64,{content}", **_shown(path)})
    return [{"title": title, "figures": figures} for title, figures in groups.items() if figures]


def _shown(path: Path) -> dict[str, Any]:
    """What the PNG's own text says is to be seen in it (else its name), its width, and whether to keep its pixels."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()  # text may stand after the pixels
        said = str(getattr(image, "text", {}).get("Description", "")).strip()
        # Samples of the miniature are 64 pixels wide: enlarged without smoothing they stay what they are.
        return {"alt": said or path.stem.replace("_", " "), "width": image.width, "pixelated": image.width <= 128}


def format_figure(value: Any) -> str:
    """A number as a reader wants it: three digits after the point for small ones, thousands set apart."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e15:
        return str(value) if isinstance(value, str) else shortened(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"


def format_size(count: Any) -> str:
    """A number of bytes in kB or MB (powers of 1000); what is no number stays as it is."""
    if isinstance(count, bool) or not isinstance(count, int | float) or abs(count) > 1e15:
        return format_figure(count)
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
