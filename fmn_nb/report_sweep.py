"""What a sweep's page shows, as plain values: its rows, its points with intervals, and a card for each run."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fmn_nb.files import read_json
from fmn_nb.report_parts import MEASURES, REPORT_FILE, description_of, executed
from fmn_nb.results import METRICS_FILE

MOST_CARDS = 40  # runs shown with their images; all are in the table
MOST_FIGURES = 6  # of a run
WIDEST = 560  # pixels of an image in a card
#: of Okabe and Ito's palette; more values than colours share one
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_KEPT = ("ira", "cra")
_SHOWN = ("before", "after", "attention")


def sweep_view(folder: Path) -> dict[str, Any]:
    """Everything the page of the sweep in `folder` shows. SweepReadingError where there is none."""
    from fmn_nb.sweep_reading import FRACTIONS, read_sweep, readable

    results = read_sweep(folder)
    measures = _by_run(results.measures())
    columns = [(key, short) for key, short, _, _ in MEASURES if any(key in one for one in measures.values())]
    colours = _colours(results)
    rows = [{
        "folder": run, "varied": [readable(row.get(name)) for name in results.varied], "status": row["status"],
        "measures": [measures.get(run, {}).get(key) for key, _ in columns], "seconds": _number(row["seconds"]),
        "error": row["error"], "has_report": (folder / run / REPORT_FILE).exists(), "label": results.label(run),
        "colour": colours.get(run, COLOURS[0]),
    } for run, row in results.runs.iterrows()]
    points = [row | {"at": measures[row["folder"]]} for row in rows
              if all(key in measures.get(row["folder"], {}) for key in FRACTIONS[:3])]
    states = {row["folder"]: _state(folder / row["folder"]) for row in rows[:MOST_CARDS]}
    return {
        "name": folder.resolve().name, "planned": results.planned, "notebooks": results.notebooks,
        "varied": results.varied, "columns": columns, "rows": rows, "points": points, "kept": _KEPT,
        "legend": _legend(results, colours), "notes": results.notes,
        "failed": [row for row in rows if row["status"] == "failed"],
        "unfinished": [row for row in rows if row["status"] == "unfinished"],
        "cards": [_card(folder / row["folder"], row, states[row["folder"]]) for row in rows[:MOST_CARDS]],
        "common": _common(results), "versions": _versions(states),
    }


def _by_run(measures: Any) -> dict[str, dict[str, tuple[float, float | None, float | None]]]:
    """run -> measure -> (value after forgetting, lower and upper end of its interval, None where there is none)."""
    found: dict[str, dict] = {}
    for row in measures[measures["when"] == "after"].itertuples():
        found.setdefault(row.run, {})[row.measure] = (row.value, _number(row.low), _number(row.high))
    return found


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)  # NaN is not itself


def _colours(results: Any) -> dict[str, str]:
    """A colour for each value of what is varied first."""
    if not results.varied:
        return {}
    values = results.runs[results.varied[0]]
    order = {value: number for number, value in enumerate(values.dropna().unique())}
    return {run: COLOURS[order.get(value, 0) % len(COLOURS)] for run, value in values.items()}


def _legend(results: Any, colours: Mapping[str, str]) -> list[tuple[str, str]]:
    if not results.varied:
        return []
    names = {str(value): colours[run] for run, value in results.runs[results.varied[0]].items()}
    return list(names.items()) if 1 < len(names) <= len(COLOURS) else []


def _state(run: Path) -> dict[str, Any]:
    """The run's own file; empty where it can't be read."""
    try:
        state = read_json(run / "run.json")
        return state if isinstance(state, dict) else {}
    except (OSError, ValueError):
        return {}


def _card(run: Path, row: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
    try:
        metrics = read_json(run / METRICS_FILE)
    except (OSError, ValueError):
        metrics = {}
    shown = [path for prefix in _SHOWN for path in sorted((run / "images").glob(f"{prefix}*.png"))]
    names = state.get("notebooks") or {}
    return row | {
        "figures": [figure for path in shown[:MOST_FIGURES] if (figure := _figure(path))],
        "settings": {**state.get("settings", {}), **state.get("parameters", {})},
        "cost": _cost(metrics.get("forgetting", {}), metrics.get("cost", {})),
        "notebooks": [file for name in names if (file := executed(run, name))],
    }


def _cost(forgetting: Mapping[str, Any], measuring: Mapping[str, Any]) -> dict[str, Any]:
    """What the fine-tune and its measuring took; notebook 04 repeats some of what notebook 03 says."""
    own = {name: forgetting[name] for name in ("steps", "trainable_parameters", "patch_bytes") if name in forgetting}
    spent = {f"forgetting_{name}": forgetting[name] for name in ("seconds", "peak_memory_bytes") if name in forgetting}
    return own | spent | {name: value for name, value in measuring.items() if not isinstance(value, dict)}


def _figure(path: Path) -> dict[str, str] | None:
    """An image as a data URI no wider than `WIDEST`; None where it can't be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
        alt = description_of(path)
    except (OSError, ValueError, SyntaxError):
        return None
    small.thumbnail((WIDEST, WIDEST))
    buffer = io.BytesIO()
    small.quantize(128, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return {"alt": alt, "uri": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"}


def _common(results: Any) -> dict[str, Any]:
    """Settings that are the same in all runs."""
    from fmn_nb.plans import SETTINGS

    names = [name for name in SETTINGS if name in results.runs and name not in results.varied]
    return {name: results.runs[name].iloc[0] for name in names if len(results.runs)}


def _versions(states: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """Package -> its version, or all that the runs say, where they differ."""
    said: dict[str, list[str]] = {}
    for state in states.values():
        for name, version in state.get("versions", {}).items():
            if version not in said.setdefault(name, []):
                said[name].append(version)
    return {name: ", ".join(versions) for name, versions in said.items()}
