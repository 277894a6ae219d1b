"""Figures of attacks, of the M-Score and of sequences. Every function returns a Figure and shows nothing by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes

from fmn_nb.attacks import Attack
from fmn_nb.m_score import MScore
from fmn_nb.plots_figure import InlineFigure, new_figure
from fmn_nb.sequence import OTHERS

DARK, BRIGHT = "#00224e", "#a69d75"  # of cividis, as in the other figures
#: of Okabe and Ito's palette, with a marker each
LOOKS = (("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"), ("#CC79A7", "D"), ("#56B4E9", "v"), ("#E69F00", "P"))


def success_figure(attacks: Sequence[Attack], title: str = "images in which the judge sees the concept"
                   ) -> InlineFigure:
    """A row for each attack: the share before it (hollow) and after it (filled), with the latter's 95% interval.

    A skipped attack's row says so and has no dots. Raises ValueError for no attacks.
    """
    if not attacks:
        raise ValueError("no attacks to show")
    figure = new_figure(6.2, 1.1 + 0.42 * len(attacks))
    axes = figure.subplots()
    places = list(enumerate(reversed(attacks)))
    shown = [(place, attack) for place, attack in places if not attack.skipped]
    for place, attack in shown:
        after, first = attack.after, place == shown[0][0]
        axes.hlines(place, after.low, after.high, color=BRIGHT, linewidth=5)
        axes.scatter(attack.before.value, place, facecolors="none", edgecolors=DARK, s=46, zorder=3,
                     label="before" if first else None)
        axes.scatter(after.value, place, color=DARK, s=46, zorder=4, label="after" if first else None)
    for place in (place for place, attack in places if attack.skipped):
        axes.text(0.5, place, "skipped", ha="center", va="center", color="0.35", style="italic")
    axes.set_yticks(range(len(attacks)), [attack.name for attack in reversed(attacks)])
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.6, len(attacks) - 0.4), title=title)
    axes.set_xlabel("share of images, with 95% interval")
    if shown:
        axes.legend(fontsize=8, loc="best")
    figure.words = ". ".join(_success_words(attack) for attack in attacks) + "."
    return figure


def _success_words(attack: Attack) -> str:
    if attack.skipped:
        return f"{attack.name}: skipped, {attack.skipped}"
    return f"{attack.name}: {attack.before.value:.2f} before, {attack.after.value:.2f} after"


def relearning_figure(tables: Mapping[str, pd.DataFrame], title: str = "fine-tuned back") -> InlineFigure:
    """The share of images with the concept against training steps (`fine_tuned_back`), with 95% intervals; a line for
    each name in `tables`."""
    figure = new_figure(6.2, 3.4)
    axes = figure.subplots()
    for (name, table), (colour, marker) in zip(tables.items(), LOOKS, strict=False):
        axes.fill_between(table["steps"], table["low"], table["high"], color=colour, alpha=0.15)
        axes.plot(table["steps"], table["share"], color=colour, marker=marker, label=name)
    axes.set(ylim=(-0.03, 1.03), xlabel="training steps", ylabel="share of images with the concept", title=title)
    axes.legend(fontsize=8, loc="lower right")
    last = {name: table.iloc[-1] for name, table in tables.items()}
    figure.words = ". ".join(f"{name}: {row['share']:.2f} after {int(row['steps'])} steps"
                             for name, row in last.items()) + "."
    return figure


def m_score_figure(scores: Mapping[str, MScore]) -> InlineFigure:
    """M of the original (left) and of the forgetting model (right), a line for each seed; a panel for each name."""
    figure = new_figure(0.6 + 2.2 * len(scores), 3.0)
    panels = figure.subplots(1, len(scores), squeeze=False, sharey=True)[0]
    said = []
    for axes, (name, score) in zip(panels, scores.items(), strict=True):
        for before, after in zip(score.original, score.forgetting, strict=True):
            axes.plot([0, 1], [before, after], color=BRIGHT, marker=".")
        means = [sum(values) / len(values) for values in (score.original, score.forgetting)]
        axes.plot([0, 1], means, color=DARK, marker="o", linewidth=2)
        axes.set(xlim=(-0.3, 1.3), ylim=(-1.05, 1.05), title=name)
        axes.set_xticks([0, 1], ["original", "forgetting"])
        axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        said.append(f"{name}: {means[0]:.2f} to {means[1]:.2f}")
    panels[0].set_ylabel("M-Score")
    figure.words = "; ".join(said) + "."
    return figure


def sequence_figure(tables: Mapping[str, pd.DataFrame]) -> InlineFigure:
    """UA of each concept and what is kept of all others after each stage (`sequence_table`); a panel for each way."""
    figure = new_figure(1.0 + 2.9 * len(tables), 3.4)
    panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
    for axes, (way, table) in zip(panels, tables.items(), strict=True):
        _stages(axes, table)
        axes.set(title=way, xlabel="concepts forgotten", ylim=(-0.03, 1.05))
    panels[0].set_ylabel("share of images")
    panels[0].legend(fontsize=7, loc="best")
    figure.words = ". ".join(_last_stage(way, table) for way, table in tables.items()) + "."
    return figure


def _stages(axes: Axes, table: pd.DataFrame) -> None:
    concepts = [name for name in table["concept"].unique() if name != OTHERS]
    for name, (colour, marker) in zip(concepts, LOOKS, strict=False):
        rows = table[table["concept"] == name]
        axes.plot(rows["forgotten"], rows["value"], color=colour, marker=marker, label=f"{name}: UA")
    for measure, line in (("label", "--"), ("style", ":")):
        rows = table[(table["concept"] == OTHERS) & (table["measure"] == measure)]
        if len(rows):
            axes.plot(rows["forgotten"], rows["value"], color="0.35", linestyle=line, label=f"kept: {measure}")
    axes.set_xticks(sorted(table["forgotten"].unique()))


def _last_stage(way: str, table: pd.DataFrame) -> str:
    last = table[table["stage"] == table["stage"].max()]
    return f"{way}: " + ", ".join(f"{row.concept} {row.measure} {row.value:.2f}" for row in last.itertuples())
