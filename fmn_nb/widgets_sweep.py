"""An explorer of a sweep: choose a measure, an axis, a colour and a run. A static figure stands beside it."""

from __future__ import annotations

import html

import ipywidgets

from fmn_nb.plots_figure import as_png
from fmn_nb.plots_sweep import measure_along
from fmn_nb.sweep_reading import SweepResults

NOTHING = "nothing"
PICTURES = ("before", "after")


class SweepExplorer(ipywidgets.VBox):
    """A measure along one of the varied parameters, colours for another; below, a run's images before and after.

    Args:
        results: what `read_sweep` read; at least one run must be finished and measured.

    Attributes:
        measure, along, by, run: the controls.
        picture: the figure as PNG.
        words: what it shows, in a sentence.
        before, after: the chosen run's images as PNG, empty where it has none.

    Raises:
        ValueError: no finished run was measured.
    """

    def __init__(self, results: SweepResults) -> None:
        self.results, self.measures = results, results.measures()
        names = sorted(self.measures.loc[self.measures["when"] == "after", "measure"].unique())
        if not names:
            raise ValueError(f"no finished run in {results.folder.name} was measured; notebook 04 does that")
        axes = list(results.varied) or ["seed"]
        first = "h" if "h" in names else names[0]
        self.measure = ipywidgets.Dropdown(options=names, value=first, description="measure")
        self.along = ipywidgets.Dropdown(options=axes, value=axes[-1], description="along")
        self.by = ipywidgets.Dropdown(options=[NOTHING, *axes], value=axes[0] if len(axes) > 1 else NOTHING,
                                      description="colour")
        self.run = ipywidgets.Dropdown(options=[(results.label(run), run) for run in results.runs.index],
                                       description="run")
        self.picture, self.words = ipywidgets.Image(format="png"), ipywidgets.HTML()
        self.before, self.after = ipywidgets.Image(format="png"), ipywidgets.Image(format="png")
        self.about = ipywidgets.HTML()
        for control in (self.measure, self.along, self.by):
            control.observe(lambda _change: self._draw(), "value")
        self.run.observe(lambda _change: self._show_run(), "value")
        self._draw()
        self._show_run()
        controls = ipywidgets.VBox([self.measure, self.along, self.by, self.run])
        super().__init__([ipywidgets.HBox([controls, self.picture]), self.words, self.about,
                          ipywidgets.HBox([self.before, self.after])])

    def _draw(self) -> None:
        by = None if self.by.value in (NOTHING, self.along.value) else self.by.value
        try:
            figure = measure_along(self.measures, self.results.done, self.measure.value, self.along.value, by)
        except ValueError as reason:
            self.picture.value, self.words.value = b"", f"Nothing to show: {html.escape(str(reason))}"
            return
        self.picture.value, self.words.value = as_png(figure), html.escape(figure.words)

    def _show_run(self) -> None:
        run = self.run.value
        row, images = self.results.runs.loc[run], self.results.images(run)
        for when in PICTURES:
            path = next((path for name, path in images.items() if name.startswith(when)), None)
            getattr(self, when).value = b"" if path is None else path.read_bytes()
        said = f"{self.results.label(run)}: {row['status']}" + (f". {row['error']}" if row["error"] else "")
        self.about.value = html.escape(said if images else f"{said} (no images kept)")
