"""What a fine-tune measured, as a figure and in words. Nothing is shown by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from fmn_nb.plots_figure import new_figure

MEASURED = {"losses": "re-steering loss", "masses": "concept mass", "anchor": "anchor term", "retain": "retain term",
            "towards": "pull to the reading"}


def curves(report: Mapping[str, Any], over: int = 5) -> Figure:
    """What a fine-tune measured in each step (thin, with dots), and its mean over the last `over` steps (thick).

    Args:
        report: a patch's `info["forgetting"]`: lists of numbers under "losses", "masses" and, where the fine-tune had
            these terms, "anchor", "retain" and "towards".
    """
    shown = _measured(report)
    figure = new_figure(3.4 * len(shown), 2.6)
    for axes, (name, values) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        steps = np.arange(1, len(values) + 1)
        smooth = [values[max(0, step - over) : step].mean() for step in steps]
        axes.plot(steps, values, color="#a69d75", linewidth=1, marker=".", markersize=4, label="each step")
        axes.plot(steps, smooth, color="#00224e", linewidth=2, label=f"mean of {over}")
        axes.set(title=MEASURED[name], xlabel="step", ylim=(0, None))
        axes.legend(fontsize=8)
    return figure


def beginning_and_end(report: Mapping[str, Any]) -> pd.DataFrame:
    """The means over the first and the last fifth of the steps, to two digits, a row for each thing measured."""
    rows = {}
    for name, values in _measured(report).items():
        fifth = max(1, len(values) // 5)
        parts = {"first fifth": values[:fifth], "last fifth": values[-fifth:]}
        rows[MEASURED[name]] = {when: f"{part.mean():.2g}" for when, part in parts.items()}
    return pd.DataFrame(rows).T


def _measured(report: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.asarray(report[name], float) for name in MEASURED if len(report.get(name, ()))}
