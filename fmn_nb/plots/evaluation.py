"""Figures of what was measured: what the judge saw, who suffered, what attacks brought back, how a fine-tune went.

Every function takes tables, or objects by their attributes alone, returns a figure and shows nothing by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from fmn_nb.attention import short_name
from fmn_nb.plots.style import BRIGHT, DARK, MATRIX_COLOURS, InlineFigure, look, new_figure

MOST_INSIDE = 6  # entries of a legend that lies among the curves; a longer one stands beside them
MOST_SAID = 5  # rows that a figure's words name
MEASURED = {"losses": "", "masses": "concept mass", "anchor": "anchor term", "retain": "retain term",
            "towards": "pull to the reading"}  # what the losses are depends on the method


# --- the evaluation ---------------------------------------------------------------------------------------------------

def confusion_figure(confusion: pd.DataFrame, title: str = "") -> InlineFigure:
    """A confusion matrix (`Report.confusion`) as shares of each row, from 0 (dark) to 1 (bright)."""
    shares = confusion.div(confusion.sum(axis=1), axis=0)
    figure, (axes,) = new_figure(2.2 + 0.19 * len(shares.columns), 1.6 + 0.19 * len(shares))
    shown = axes.imshow(shares.to_numpy(), cmap=MATRIX_COLOURS, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(shares.columns)), shares.columns, rotation=90, fontsize=7)
    axes.set_yticks(range(len(shares)), shares.index, fontsize=7)
    axes.set(title=title, xlabel="the judge saw", ylabel="the prompt asked for")
    figure.colorbar(shown, ax=axes, label="share of the row's images")
    asked = {name: shares.loc[name].get(name, 0.0) for name in shares.index}
    missed = [f"{name} {share:.0%}" for name, share in sorted(asked.items(), key=lambda one: one[1]) if share < 1]
    more = [f"{len(missed) - MOST_SAID} more not always"] if len(missed) > MOST_SAID else []
    always = ["all others always"] if missed and len(missed) < len(shares) else []
    figure.words = f"Seen as asked: {'; '.join([', '.join(missed[:MOST_SAID]) or 'every row', *more, *always])}."
    return figure


def collateral_figure(collateral: pd.DataFrame, most: int = 12) -> InlineFigure:
    """Accuracy before (hollow) and after (filled) of the names that changed most (`Report.collateral`)."""
    rows = collateral.head(most)
    figure, (axes,) = new_figure(5.2, 0.8 + 0.26 * len(rows))
    likeness = rows.get("similarity", pd.Series(np.nan, rows.index))
    names = [name if pd.isna(one) else f"{name} (similarity {one:.2f})" for name, one in likeness.items()]
    _dots(axes, names, rows["before"], rows["after"])
    axes.set(xlim=(-0.05, 1.05), xlabel="accuracy on what was asked for", title="who suffered most")
    axes.legend(loc="lower left", fontsize=8)
    lost = rows[rows["after"] < rows["before"]].itertuples()
    figure.words = _who_lost(axes, [f"{row.Index} from {row.before:.2f} to {row.after:.2f}" for row in lost])
    return figure


def _who_lost(axes: Axes, losses: Sequence[str]) -> str:
    """The losses in words. If there are none, the figure itself says so, since it would show nothing."""
    if losses:
        return f"Lost accuracy: {'; '.join(losses)}."
    axes.text(0.5, 0.6, "nobody lost anything", ha="center", va="center", transform=axes.transAxes, style="italic",
              color="0.35", bbox={"facecolor": "white", "edgecolor": "none"})
    return "Nobody lost anything."


def _dots(axes: Axes, names: Sequence[str], before: Sequence[float], after: Sequence[float] | None,
          joined: bool = True) -> None:
    """A row for each name, the first on top: a hollow dot before, a filled one after, and a line between them."""
    places = range(len(names))[::-1]
    if joined and after is not None:
        axes.hlines(places, before, after, color="0.7", zorder=0)
    axes.scatter(before, places, facecolors="none", edgecolors=DARK, label="before", zorder=3)
    if after is not None:
        axes.scatter(after, places, color=DARK, label="after", zorder=4)
    axes.set_yticks(places, names)


def similarity_figure(collateral: pd.DataFrame, concept: str) -> InlineFigure:
    """Change of accuracy of each name of the concept's domain against its similarity to the concept.

    It names up to four that lost most, or, if none lost, the most similar one. Raises ValueError if no similarity is
    known.
    """
    rows = collateral.dropna(subset=["similarity"])
    if rows.empty or "change" not in rows:
        raise ValueError("no name has a similarity and a change; evaluate with a patch and a CLIP")
    figure, (axes,) = new_figure(5.2, 3.4)
    axes.axhline(0, color="0.8", linewidth=1)
    axes.scatter(rows["similarity"], rows["change"], color=DARK, s=18)
    lost = rows[rows["change"] < 0].sort_values("change").head(4)
    named = lost if len(lost) else rows.sort_values("similarity").tail(1)  # on a flat line, say at least who is nearest
    for name, row in named.iterrows():
        axes.annotate(name, (row["similarity"], row["change"]), xytext=(4, -12), textcoords="offset points", fontsize=8,
                      ha="right")
    low = min(-0.25, 1.1 * rows["change"].min())  # a range as wide as a loss that would matter
    axes.set(ylim=(low, max(0.1, 1.1 * rows["change"].max())))
    figure.words = _who_lost(axes, [f"{name} {row['change']:+.2f}, similarity {row['similarity']:.2f}"
                                    for name, row in lost.iterrows()])
    axes.set(xlabel=f"similarity to {concept} (cosine of CLIP features)", ylabel="change of accuracy",
             title=f"what resembles {concept}, and what it lost")
    return figure


def attention_figure(by_layer: pd.DataFrame) -> InlineFigure:
    """Attention on the concept's words and on later positions in each layer, before (hollow) and after (filled).

    `by_layer` is `Report.attention_layers`; shares of all attention, in [0, 1].
    """
    figure, panels = new_figure(8, 1.0 + 0.2 * len(by_layer), 2, sharey=True)
    for axes, (part, title) in zip(panels, {"words": "its words", "later": "later positions"}.items(), strict=True):
        names = [short_name(layer) for layer in by_layer.index]
        _dots(axes, names, by_layer[f"{part}_before"], by_layer.get(f"{part}_after"))
        axes.tick_params("y", labelsize=7)
        axes.set(title=f"on {title}", xlabel="share of the attention")
        axes.set_xlim(left=0)
    panels[-1].legend(fontsize=8)
    means = by_layer.mean()
    figure.words = "Mean over the layers: " + "; ".join(
        f"on {title} {means[f'{part}_before']:.1%}" + (f" before, {means[f'{part}_after']:.1%} after"
                                                       if f"{part}_after" in by_layer else "")
        for part, title in {"words": "its words", "later": "later positions"}.items()) + "."
    return figure


# --- attacks, several concepts ----------------------------------------------------------------------------------------

def success_figure(attacks: Sequence[Any]) -> InlineFigure:
    """A row for each attack: the share before it (hollow) and after it (filled), with the latter's 95% interval.

    A skipped attack's row says so and has no dots. `attacks` are `fmn_nb.attacks.Attack`; ValueError if there are
    none.
    """
    if not attacks:
        raise ValueError("no attacks to show")
    figure, (axes,) = new_figure(6.2, 1.1 + 0.42 * len(attacks))
    shares = [(np.nan, np.nan) if one.skipped else (one.before.value, one.after.value) for one in attacks]
    _dots(axes, [one.name for one in attacks], *zip(*shares, strict=True), joined=False)
    said = []
    for place, one in zip(range(len(attacks))[::-1], attacks, strict=True):
        if one.skipped:
            axes.text(0.5, place, "skipped", ha="center", va="center", color="0.35", style="italic")
            said.append(f"{one.name}: skipped, {one.skipped}")
        else:
            axes.hlines(place, one.after.low, one.after.high, color=BRIGHT, linewidth=5)
            said.append(f"{one.name}: {one.before.value:.2f} before, {one.after.value:.2f} after")
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.6, len(attacks) - 0.4), title="images in which the judge sees the concept",
             xlabel="share of images, with 95% interval")
    if not all(one.skipped for one in attacks):
        axes.legend(fontsize=8, loc="best")
    figure.words = ". ".join(said) + "."
    return figure


def relearning_figure(tables: Mapping[str, pd.DataFrame], title: str = "fine-tuned back") -> InlineFigure:
    """The share of images with the concept against training steps, with 95% intervals; a line for each name in
    `tables`, which hold the columns steps, share, low, high."""
    figure, (axes,) = new_figure(6.2, 3.4)
    said = []
    for number, (name, table) in enumerate(tables.items()):
        colour, marker = look(number)
        axes.fill_between(table["steps"], table["low"], table["high"], color=colour, alpha=0.15)
        axes.plot(table["steps"], table["share"], color=colour, marker=marker, label=name)
        last = table.iloc[-1]
        said.append(f"{name}: {last['share']:.2f} after {int(last['steps'])} steps")
    axes.set(ylim=(-0.03, 1.03), xlabel="training steps", ylabel="share of images with the concept", title=title)
    axes.legend(fontsize=8, loc="best")
    figure.words = ". ".join(said) + "."
    return figure


def floor_figure(attacks: pd.DataFrame) -> InlineFigure:
    """What attacks achieve on the forgetting model (filled), an oracle (hollow) and the unchanged model (a stroke).

    `attacks` is `OracleReport.attacks`: a row for each attack and budget. Raises ValueError if it is empty.
    """
    if attacks.empty:
        raise ValueError("no attacks to show")
    figure, (axes,) = new_figure(6.0, 0.8 + 0.32 * len(attacks))
    places, names = range(len(attacks))[::-1], [f"{attack}, {int(row.steps)} steps ({budget})" if budget else attack
                                                for (attack, budget), row in attacks.iterrows()]
    axes.hlines(places, attacks["floor"], attacks["success"], color="0.7", zorder=0)
    axes.scatter(attacks["floor"], places, facecolors="none", edgecolors=DARK, label="oracle: the floor", zorder=3)
    axes.scatter(attacks["success"], places, color=DARK, label="forgetting model", zorder=4)
    axes.scatter(attacks["unchanged"], places, color=DARK, marker="|", s=90, label="unchanged model", zorder=2)
    axes.set_yticks(places, names)
    axes.set(xlim=(-0.03, 1.03), xlabel="share of images with the concept after the attack")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    said = (f"{name}: {row.success:.2f}, floor {row.floor:.2f}, unchanged {row.unchanged:.2f}"
            for name, (_, row) in zip(names, attacks.iterrows(), strict=True))
    figure.words = "; ".join(said) + "."
    return figure


def m_score_figure(scores: Mapping[str, Any]) -> InlineFigure:
    """M of the original (left) and of the forgetting model (right), a line for each seed; a panel for each name.

    The values of `scores` are `fmn_nb.attacks.MScore`.
    """
    figure, panels = new_figure(0.6 + 2.2 * len(scores), 3.0, len(scores), sharey=True)
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
    figure, panels = new_figure(1.0 + 2.9 * len(tables), 3.4, len(tables), sharey=True)
    names = dict.fromkeys(name for table in tables.values() for name in table.query("state != 'retained'")["concept"])
    looks, said, shown = {name: look(number) for number, name in enumerate(names)}, [], {}
    for axes, (way, table) in zip(panels, tables.items(), strict=True):
        kept = table["state"] == "retained"
        for name in table.loc[~kept, "concept"].unique():
            rows, (colour, marker) = table[table["concept"] == name], looks[name]
            axes.plot(rows["forgotten"], rows["value"], color=colour, marker=marker, label=f"{name}: UA")
        for measure, line in (("label", "--"), ("style", ":")):
            rows = table[kept & (table["measure"] == measure)]
            if len(rows):
                axes.plot(rows["forgotten"], rows["value"], color="0.35", linestyle=line, label=f"kept: {measure}")
        axes.set_xticks(sorted(table["forgotten"].unique()))
        axes.set(title=way, xlabel="concepts forgotten", ylim=(-0.03, 1.05))
        last = table[table["stage"] == table["stage"].max()].itertuples()
        said.append(f"{way}: " + ", ".join(f"{row.concept} {row.measure} {row.value:.2f}" for row in last))
        shown |= {name: line for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    panels[0].set_ylabel("share of images")
    if len(shown) <= MOST_INSIDE:
        panels[0].legend(shown.values(), shown, fontsize=7, loc="best")
    else:  # it would lie on the curves
        figure.legend(shown.values(), shown, fontsize=7, loc="outside right center")
    figure.words = ". ".join(said) + "."
    return figure


# --- the fine-tune ----------------------------------------------------------------------------------------------------

def curves(report: Mapping[str, Any], over: int = 5, method: str = "fmn") -> InlineFigure:
    """What a fine-tune measured in each step (thin, with dots), and its mean over the last `over` steps (thick).

    Args:
        report: a patch's `info["forgetting"]`: lists of numbers under "losses", "masses" and, if the fine-tune had
            these terms, "anchor", "retain" and "towards".
        over: how many steps the thick line averages.
        method: the patch's (`info["settings"]["method"]`), which names its loss.
    """
    shown = _measured(report, method)
    figure, panels = new_figure(3.4 * len(shown), 2.6, len(shown))
    for axes, (name, values) in zip(panels, shown.items(), strict=True):
        steps = np.arange(1, len(values) + 1)
        smooth = [values[max(0, step - over) : step].mean() for step in steps]
        axes.plot(steps, values, color=BRIGHT, linewidth=1, marker=".", markersize=4, label="each step")
        axes.plot(steps, smooth, color=DARK, linewidth=2, label=f"mean of {over}")
        axes.set(title=name, xlabel="step", ylim=(0, None))
        axes.legend(fontsize=8)
    figure.words = "From the first fifth of the steps to the last: " + "; ".join(
        f"{name} {row.iloc[0]} to {row.iloc[1]}" for name, row in beginning_and_end(report, method).iterrows()) + "."
    return figure


def beginning_and_end(report: Mapping[str, Any], method: str = "fmn") -> pd.DataFrame:
    """The means over the first and the last fifth of the steps, to two digits, a row for each thing measured."""
    fifths = {name: (values, max(1, len(values) // 5)) for name, values in _measured(report, method).items()}
    return pd.DataFrame({"first fifth": {name: f"{values[:n].mean():.2g}" for name, (values, n) in fifths.items()},
                         "last fifth": {name: f"{values[-n:].mean():.2g}" for name, (values, n) in fifths.items()}})


def _measured(report: Mapping[str, Any], method: str) -> dict[str, np.ndarray]:
    """What was measured in each step, by its name in figures."""
    names = MEASURED | {"losses": "re-steering loss" if method == "fmn" else f"loss of {method}"}
    return {said: np.asarray(report[name], float) for name, said in names.items() if len(report.get(name, ()))}
