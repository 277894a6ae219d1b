"""`report.html`: one self-contained page for a run or a sweep, with nothing to load from anywhere else."""

import base64
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb.files import read_json, write_text
from fmn_nb.probes import PROBES
from fmn_nb.report_parts import (
    FRACTIONS,
    MEASURES,
    REPORT_FILE,
    Measure,
    description_of,
    executed,
    format_figure,
    format_size,
)
from fmn_nb.report_sweep import sweep_view
from fmn_nb.results import METRICS_FILE

if TYPE_CHECKING:
    from jinja2 import Environment

_GROUPS = (("before", "Before"), ("after", "After"), ("attention", "Where the concept's attention goes"))


class ReportError(ValueError):
    """A folder that holds neither a run nor a sweep."""


def write_report(folder: Path) -> Path:
    """Write the page for the run or the sweep in `folder` and return its path. ReportError if it holds neither."""
    folder = Path(folder)
    if (folder / "run.json").is_file():
        page = _render("run.html.j2", run_view(folder))
    elif (folder / "sweep.json").is_file():
        try:
            view = sweep_view(folder)
        except ValueError as error:
            raise ReportError(str(error)) from error
        page = _render("sweep.html.j2", view)
    else:
        raise ReportError(f"{folder} holds no run.json and no sweep.json; give the folder of a run or a sweep")
    return write_text(folder / REPORT_FILE, page)


def _render(template: str, view: dict[str, Any]) -> str:
    return _templates().get_template(template).render(view)


@cache  # a compiled template serves all pages of a sweep
def _templates() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fmn_nb"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": format_figure, "size": format_size}
    return environment


def run_view(folder: Path) -> dict[str, Any]:
    """Everything the run's page shows, as plain values."""
    state = read_json(folder / "run.json")
    metrics = read_json(folder / METRICS_FILE) if (folder / METRICS_FILE).exists() else {}
    return {
        "state": state,
        "metrics": metrics,
        "rows": comparison(metrics.get("before", {}), metrics.get("after", {})),
        "probes": comparison(metrics.get("before", {}), metrics.get("after", {}), _probes()),
        "ceiling": metrics.get("before", {}).get("ceiling"),
        "skipped": _skipped(metrics),
        "figures": grouped_figures(folder / "images"),
        "notebooks": [(name, executed(folder, name), entry) for name, entry in sorted(state["notebooks"].items())],
    }


def _probes() -> tuple[Measure, ...]:
    return tuple((name, name.replace("_", " ").replace("ua", "UA"), probe.meaning, True)
                 for name, probe in PROBES.items())


def comparison(before: dict[str, Any], after: dict[str, Any],
               measures: tuple[Measure, ...] = MEASURES) -> list[dict[str, Any]]:
    """A row for every measure that either side has: values, 95% intervals and what they mean."""
    rows = []
    for key, short, meaning, more_is_better in measures:
        if key in before or key in after:
            rows.append({
                "short": short, "meaning": meaning, "more_is_better": more_is_better, "fraction": key in FRACTIONS,
                "before": before.get(key), "after": after.get(key),
                "before_ci": before.get("ci95", {}).get(key), "after_ci": after.get("ci95", {}).get(key),
            })
    return rows


def _skipped(metrics: dict[str, Any]) -> dict[str, str]:
    reasons = dict(metrics.get("skipped", {}))
    for section in ("forgetting", "before", "after", "attention", "m_score"):
        for name, reason in metrics.get(section, {}).get("skipped", {}).items():
            reasons[f"{section}: {name}"] = reason
    return reasons


def grouped_figures(folder: Path) -> list[dict[str, Any]]:
    """The folder's PNG files under their headings, each with its description and its bytes as a data URI."""
    groups: dict[str, list[dict[str, str]]] = {title: [] for _, title in _GROUPS} | {"More figures": []}
    for path in sorted(folder.glob("[!.]*.png")):
        title = next((title for prefix, title in _GROUPS if path.stem.startswith(prefix)), "More figures")
        content = base64.b64encode(path.read_bytes()).decode("ascii")
        groups[title].append({"alt": description_of(path), "uri": f"data:image/png;base64,{content}", **_shown(path)})
    return [{"title": title, "figures": figures} for title, figures in groups.items() if figures]


def _shown(path: Path) -> dict[str, Any]:
    from PIL import Image

    with Image.open(path) as image:
        width = image.width
    # Samples of the miniature are 64 pixels wide: enlarged without smoothing they stay what they are.
    return {"name": path.stem.replace("_", " "), "width": width, "pixelated": width <= 128}
