"""`report.html`: one self-contained page for a run or a sweep, with nothing to load from anywhere else."""

import base64
import csv
from pathlib import Path
from typing import Any

from fmn_nb.files import read_json, write_text
from fmn_nb.results import METRICS_FILE

REPORT_FILE = "report.html"
Measure = tuple[str, str, str, bool]  # name in metrics.json, short title, what it says, whether more is better
MEASURES: tuple[Measure, ...] = (
    ("ua", "UA", "forgotten: share of the concept's images in which the judge no longer sees it", True),
    ("ira", "IRA", "kept nearby: judge accuracy on the other concepts of the same kind", True),
    ("cra", "CRA", "kept elsewhere: judge accuracy in the other domain", True),
    ("h", "H", "harmonic mean of UA, IRA and CRA", True),
    ("frechet", "Frechet", "distance of the images' distribution to real ones", False),
    ("kernel", "Kernel", "distance to real ones as a squared maximum mean discrepancy, unbiased", False),
    ("clip_score", "CLIP score", "agreement of image and prompt", True),
)
FRACTIONS = ("ua", "ira", "cra", "h")
_GROUPS = (("before", "Before"), ("after", "After"), ("attention", "Where the concept's attention goes"))


class ReportError(ValueError):
    """A folder that holds neither a run nor a sweep."""


def write_report(folder: Path) -> Path:
    """Write the page for the run or the sweep in `folder` and return its path. ReportError if it holds neither."""
    folder = Path(folder)
    if (folder / "run.json").is_file():
        page = _render("run.html.j2", run_view(folder))
    elif (folder / "sweep.json").is_file():
        page = _render("sweep.html.j2", sweep_view(folder))
    else:
        raise ReportError(f"{folder} holds no run.json and no sweep.json; give the folder of a run or a sweep")
    return write_text(folder / REPORT_FILE, page)


def _render(template: str, view: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fmn_nb"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": format_figure, "size": format_size}
    return environment.get_template(template).render(view)


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
        "notebooks": [(name, _executed(folder, name), entry) for name, entry in sorted(state["notebooks"].items())],
    }


def _probes() -> tuple[Measure, ...]:
    from fmn_nb.evaluation_probes import PROBES

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


def description_of(path: Path) -> str:
    """What the PNG's own text says is to be seen in it, else its name."""
    from PIL import Image

    with Image.open(path) as image:
        image.load()  # text may stand after the pixels
        return str(getattr(image, "text", {}).get("Description", "")).strip() or path.stem.replace("_", " ")


def _executed(folder: Path, name: str) -> str | None:
    for candidate in (name, name.removesuffix(".ipynb") + ".failed.ipynb"):
        if (folder / candidate).exists():
            return candidate
    return None


def sweep_view(folder: Path) -> dict[str, Any]:
    """Everything the sweep's page shows: its rows, and a point for every run that has UA, IRA and CRA."""
    rows = []
    if (folder / "results.csv").exists():
        with open(folder / "results.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    sweep = read_json(folder / "sweep.json")
    varied = [name for name in sweep["varied"] if rows and name in rows[0]]
    return {
        "name": folder.resolve().name,
        "sweep": sweep,
        "rows": rows,
        "varied": varied,
        "measures": [(f"after.{key}", short) for key, short, _, _ in MEASURES if rows and f"after.{key}" in rows[0]],
        "points": [_point(row, varied) for row in rows if all(row.get(f"after.{key}") for key in ("ua", "ira", "cra"))],
        "failed": [row for row in rows if row["status"] != "done"],
        "has_report": {row["folder"] for row in rows if (folder / row["folder"] / REPORT_FILE).exists()},
    }


def _point(row: dict[str, str], varied: list[str]) -> dict[str, Any]:
    kept = (float(row["after.ira"]) + float(row["after.cra"])) / 2
    label = ", ".join(f"{name} {row[name]}" for name in varied)
    return {"forgotten": float(row["after.ua"]), "kept": kept, "label": label, "folder": row["folder"]}


def format_figure(value: Any) -> str:
    """A number as a reader wants it: three digits after the point for small ones, thousands set apart."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"


def format_size(count: int) -> str:
    """A number of bytes in kB or MB (powers of 1000)."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} kB"
