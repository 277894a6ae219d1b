"""Forgetting against keeping: every figure of it shows its points in the same way."""

import numpy as np
import pandas as pd
import pytest

from fmn_nb.plots.style import look
from fmn_nb.plots.tradeoff import (
    cost_of_presets,
    excess_against_keeping,
    forgetting_against_keeping,
    forgotten_and_kept,
    measure_along,
    tradeoff_figure,
)

RUNS = pd.DataFrame({"concept": ["cat", "cat", "frog"], "steps": [35, 5, 5]}, index=["a", "b", "c"])


def measured(**values):
    return pd.DataFrame([{"run": run, "measure": name, "when": "after", "value": value, "low": value - 0.1,
                          "high": np.nan if run == "c" else value + 0.2}
                         for name, column in values.items() for run, value in zip("abc", column, strict=True)])


def dots(axes):
    """What a figure's groups show: (colour, marker) -> points."""
    return {(line.get_color(), line.get_marker()): line.get_xydata().tolist() for line in axes.lines
            if line.get_marker() in ("o", "^")}


def test_groups_have_the_palettes_looks_in_every_figure():
    points = pd.DataFrame({"name": ["base", "cat"], "group": ["base", "paper"], "ua": [0.1, 0.9], "kept": [1, 0.8]})
    figure = tradeoff_figure(points, "t")
    assert dots(figure.axes[0]) == {look(0): [[0.1, 1.0]], look(1): [[0.9, 0.8]]} and figure.axes[0].get_title() == "t"
    assert [(text.get_text(), text.get_color()) for text in figure.axes[0].texts] == [("cat", look(1)[0])]
    figure = forgotten_and_kept(measured(ua=[0.9, 0.4, 0.5], ira=[0.8, 1, 1], cra=[1, 1, 1]), RUNS, "concept", "steps")
    left, right = figure.axes
    assert dots(left) == {look(0): [[0.4, 1.0], [0.9, 0.8]], look(1): [[0.5, 1.0]]}, "in the order of steps"
    assert dots(right) == {look(0): [[0.4, 1.0], [0.9, 1.0]], look(1): [[0.5, 1.0]]}
    assert [text.get_text() for text in left.texts] == ["5", "35", "5"] and left.get_legend() and not right.get_legend()


def test_only_the_furthest_concepts_of_a_preset_are_named():
    kept = np.linspace(0.2, 1.0, 9)
    table = pd.DataFrame({"preset": "paper", "concept": list("abcdefghi"), "ua": 1.0, "ira": kept, "cra": kept,
                          "base_ira": 1.0, "base_cra": 1.0})
    named = [text.get_text() for text in forgetting_against_keeping(table).axes[0].texts]
    assert named == list("abcde")
    near = forgetting_against_keeping(table[table["ira"] > 0.65]).axes[0].texts
    assert [text.get_text() for text in near] == ["f", "g"], "what is near its ceiling needs no name"
    with pytest.raises(ValueError, match="no rows"):
        forgetting_against_keeping(table[:0])


def test_every_preset_has_its_cost_and_its_interval():
    summary = [{"preset": "uce", "kind": "all", "h": 0.5, "h_ci95": [0.4, 0.8], "seconds": 0.3, "patch_bytes": 100.0},
               {"preset": "uce", "kind": "style", "h": 0.9}, {"preset": "paper", "kind": "all", "h": 0.7, "seconds": 6}]
    figure = cost_of_presets(summary)
    seconds, size = (dots(axes) for axes in figure.axes)
    assert seconds == {look(0): [[0.3, 0.5]], look(1): [[6, 0.7]]} and size[look(0)] == [[100, 0.5]]
    assert figure.words.endswith("paper: H 0.70, 6 seconds of forgetting.")
    with pytest.raises(ValueError, match="no rows"):
        cost_of_presets(summary[1:2])


def test_what_attacks_bring_back_stands_above_what_is_kept():
    rows = [{"preset": name, "attack": attack, "h_of_ceiling": h, "excess": h - 0.5, "low": h - 0.6, "high": h - 0.3}
            for attack in ("relearning", "grounding") for name, h in (("uce", 1.0), ("esd-x", 0.9))]
    alone, shared = (excess_against_keeping(pd.DataFrame(rows), groups)
                     for groups in (None, {"uce": "closed", "esd-x": "closed"}))
    for axes in alone.axes:
        assert dots(axes) == {look(0): [[1.0, 0.5]], look(1): [[0.9, 0.4]]} and not axes.texts
    for axes in shared.axes:
        assert dots(axes) == {look(0): [[1.0, 0.5], [0.9, 0.4]]}
        assert [text.get_text() for text in axes.texts] == ["uce", "esd-x"]
    assert alone.axes[0].get_legend() and not shared.axes[0].get_legend() and len(shared.legends) == 1, "below them"
    assert alone.words.startswith("relearning: uce 0.50 at H 1.00, esd-x 0.40 at H 0.90; grounding: uce")
    below = excess_against_keeping(pd.DataFrame(rows).assign(excess=-0.4, low=-0.7))
    assert below.axes[0].get_ylim()[0] < -0.7, "no point is outside"
    with pytest.raises(ValueError, match="no attack"):
        excess_against_keeping(pd.DataFrame(rows)[:0])


def test_runs_with_an_empty_setting_are_shown_too():
    """A table read from a file holds the empty text as nothing."""
    runs = RUNS.assign(references=[np.nan, "refs", np.nan])
    figure = forgotten_and_kept(measured(ua=[0.9, 0.4, 0.5], ira=[0.8, 1, 1], cra=[1, 1, 1]), runs, "references")
    assert sum(len(points) for points in dots(figure.axes[0]).values()) == 3
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == {"refs", "none"}
    along = measure_along(measured(ua=[0.9, 0.4, 0.5]), runs, "ua", "references")
    assert "0.90 at none" in along.words and "0.40 at refs" in along.words


def test_names_and_numbers_never_cover_one_another():
    rows = [{"preset": preset, "concept": f"{name} of {preset}", "ua": ua + 0.01 * number, "ira": 1.0, "cra": 1.0,
             "base_ira": 1.0, "base_cra": 1.0} for preset, ua in (("a", 0.0), ("b", 0.0), ("c", 0.5))
            for number, name in enumerate(("first", "second"))]
    figure = forgetting_against_keeping(pd.DataFrame(rows))
    assert {text.get_text() for text in figure.axes[0].texts} == {"first of a", "first of c"}
    costs = cost_of_presets([{"preset": name, "kind": "all", "h": 0.5, "seconds": seconds, "patch_bytes": size}
                             for name, seconds, size in (("a", 1.3, 1.5e4), ("b", 18.0, 2e5), ("c", 55.0, 6e6))])
    for axes, texts in ((figure.axes[0], figure.axes[0].texts),
                        *((axes, axes.get_xticklabels(which="both")) for axes in costs.axes)):
        axes.figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
        assert boxes and not any(box.overlaps(other) for number, box in enumerate(boxes) for other in boxes[:number])


def test_a_long_legend_stands_below_the_points():
    rows = [{"preset": f"variant-{n}", "kind": "all", "h": 0.5, "seconds": 1 + n, "patch_bytes": 100.0 + n}
            for n in range(20)]
    figure = cost_of_presets(rows)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert len(legend.get_texts()) == 20 and not figure.axes[1].get_legend()
    assert legend.get_window_extent().y1 < min(axes.get_tightbbox().y0 for axes in figure.axes)


def test_a_legend_of_long_names_has_fewer_columns_rather_than_lose_its_ends():
    presets = [f"a-preset-with-a-name-of-many-letters-{number}" for number in range(14)]
    table = pd.DataFrame({"preset": presets, "concept": "cat", "ua": 0.5, "ira": 0.9, "cra": 0.9, "base_ira": 1.0,
                          "base_cra": 1.0})
    figure = forgetting_against_keeping(table)
    figure.canvas.draw()
    (legend,) = figure.legends
    assert legend.get_window_extent().x0 >= 0 and legend.get_window_extent().x1 <= figure.bbox.width
    assert legend.get_window_extent().y1 < figure.axes[0].get_tightbbox().y0
