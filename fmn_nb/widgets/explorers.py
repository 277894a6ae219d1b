"""Explorers: attention maps by token, layer, head and step; a patch's scale; a sweep's measures and images.

Each is a thin shell of ipywidgets, with a static figure beside it in its notebook.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ipywidgets
from PIL import Image

from fmn_nb.attention import AttentionRecord, NotRecordedError
from fmn_nb.concepts import Concept, PhraseNotFoundError, find_phrase
from fmn_nb.models import generate
from fmn_nb.plots import as_png, describe, image_grid, map_picture, measure_along, short_name

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from fmn_nb.patches import Patch
    from fmn_nb.runs.folder import SweepResults

ALL, NOTHING = "all", "nothing"


def _natural_size() -> ipywidgets.Image:
    """A place for a picture in its own size, but never wider than the page."""
    return ipywidgets.Image(format="png", layout=ipywidgets.Layout(align_self="flex-start", max_width="100%"))


class _Explorer(ipywidgets.VBox):
    """An explorer that shows a sentence of at most 110 characters to those who read the notebook without a kernel."""

    without_kernel = ""

    def __repr__(self) -> str:
        return self.without_kernel


class AttentionExplorer(_Explorer):
    """Choose token, layer, head, step, branch and image of a record, and see that map and a sentence about it.

    Args:
        attention: the record; the text of its images must be known.
        images: the generated images, to lay the maps over; may be left out. As many as were recorded.
        phrase: a concept or words of the prompt to begin with; by default the first word.

    Attributes:
        token, layer, head, step, branch, image: the controls.
        picture: the map over the image and alone, from its lowest to its highest value, as PNG.
        words: the sentence.

    Raises:
        ValueError: another number of images than the record has.
    """

    without_kernel = "An explorer of attention maps. It needs a running kernel; the figure below is what it opens with."

    def __init__(self, attention: AttentionRecord, images: list[Image.Image] | None = None,
                 phrase: str | Concept | None = None) -> None:
        if images is not None and len(images) != len(attention.images):
            raise ValueError(f"the record has {len(attention.images)} images, and {len(images)} are given: give all, "
                             "in order, or none")
        self.attention, self.images = attention, images
        self.phrase = phrase.phrase if isinstance(phrase, Concept) else phrase
        self.image = ipywidgets.BoundedIntText(0, min=0, max=len(attention.images) - 1, description="image")
        self.branch = ipywidgets.Dropdown(options=attention.branches, description="branch")
        self.token = ipywidgets.Dropdown(description="token")
        heads = sorted({head for there in attention.heads.values() for head in there})
        layers, heads, steps = ([(ALL, ALL), *((name(one), one) for one in those)] for name, those in (
            (short_name, attention.layers), (str, heads), (str, attention.steps)))
        self.layer = ipywidgets.Dropdown(options=layers, description="layer")
        self.head = ipywidgets.Dropdown(options=heads, description="head")
        self.step = ipywidgets.Dropdown(options=steps, description="step")  # a slider would have no name to read out
        self.picture, self.words = _natural_size(), ipywidgets.HTML()
        self._choose()
        for control in (self.image, self.branch):
            control.observe(lambda _change: self._choose(), "value")
        for control in (self.token, self.layer, self.head, self.step):
            control.observe(lambda _change: self._show(), "value")
        controls = [*([self.image] if len(attention.images) > 1 else []),
                    self.branch, self.token, self.layer, self.head, self.step]
        super().__init__([ipywidgets.HBox([ipywidgets.VBox(controls), self.picture]), self.words])

    def _choose(self) -> None:
        """Offer what the chosen image and branch have, and show it, or say why there is nothing."""
        try:
            self._offer_tokens()
        except (NotRecordedError, PhraseNotFoundError) as reason:
            self.token.options = []
            self._say_nothing(reason)
            return
        self._show()

    def _say_nothing(self, reason: Exception) -> None:
        self.words.value = f"Nothing to show: {html.escape(str(reason))}"
        self.picture.value = b""  # or the last choice's picture would stand beside the words

    def _offer_tokens(self) -> None:
        """Offer the tokens of the chosen image and branch, or the recorded phrases; begin with the one asked for."""
        first = None
        if self.attention.phrases is not None:
            options, first = [(phrase, phrase) for phrase in self.attention.phrases], self.phrase
        else:
            text = self.attention.text(self.image.value, self.branch.value)
            columns = sorted(text.begin + text.words + text.first_eot)
            options = [(text.label(column), (column,)) for column in columns]
            if text.padding:
                options.append(("padding", text.padding))
            if self.phrase and find_phrase(text.prompt, self.phrase):
                first = tuple(text.find(self.phrase).columns)
                options += [] if len(first) == 1 else [(self.phrase, first)]
        choices = [choice for _, choice in options]
        wanted = next((one for one in (self.token.value, first) if one in choices), choices[min(1, len(choices) - 1)])
        # with a number in front: tokens repeat, names in a list must not
        self.token.options = [(f"{number} {name}", choice) for number, (name, choice) in enumerate(options)]
        self.token.value = wanted

    def _show(self) -> None:
        """Show the map of what is chosen, or why there is none."""
        if self.token.value is None:
            return
        label = self.token.label.partition(" ")[2]
        what = {"phrase" if isinstance(self.token.value, str) else "columns": self.token.value}
        for name in ("layer", "head", "step"):
            if (value := getattr(self, name).value) != ALL:
                what[name] = value
        try:
            values = self.attention.select(**what, branch=self.branch.value, image=self.image.value)
        except (NotRecordedError, PhraseNotFoundError) as reason:
            self._say_nothing(reason)
            return
        shown = map_picture(values, None if self.images is None else self.images[self.image.value])
        self.picture.value, self.words.value = as_png(shown), html.escape(describe(values, label))


class PatchScale(_Explorer):
    """Images of some prompts under a patch at a chosen scale: 0 is the base model, 1 the patch as trained.

    Each scale is drawn once, and the patch as trained at the start. The pipeline carries the patch only while it draws.

    Args:
        pipe: the base model.
        patch: what to apply.
        prompts: one image each; image n has the seed `seed` + n.
        drawn: scale -> the prompts' images, if some were drawn before.
        scales: what can be chosen; above 1 the patch is stronger than it was trained.
        options: options of `generate`, such as `steps` and `guidance`.

    Attributes:
        scale: the control.
        picture: the images as PNG.
        state: whether it is drawing, or why it couldn't.
    """

    without_kernel = "A choice of the patch's scale. It needs a running kernel; the rows below show four scales."

    def __init__(self, pipe: DiffusionPipeline, patch: Patch, prompts: list[str], seed: int = 0, *,
                 drawn: Mapping[float, Sequence[Image.Image]] | None = None,
                 scales: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5), **options: Any) -> None:
        self.pipe, self.patch, self.seed, self.options = pipe, patch, seed, options
        self.prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self._drawn = {float(scale): self._grid(images) for scale, images in (drawn or {}).items()}
        choices = sorted({1.0, *map(float, scales)})
        self.scale = ipywidgets.Dropdown(options=choices, value=1.0, description="scale")  # as the explorer's step
        self.picture, self.state = _natural_size(), ipywidgets.HTML()
        self.scale.observe(lambda change: self.show(change["new"]), "value")
        self.show(1.0)
        super().__init__([ipywidgets.HBox([self.scale, self.state]), self.picture])

    def show(self, scale: float) -> None:
        """Draw the prompts at a scale, or show them again."""
        if scale not in self._drawn:
            self.state.value, self.picture.value = "drawing ...", b""
            seeds = range(self.seed, self.seed + len(self.prompts))
            try:
                with self.patch.applied(self.pipe, scale=scale):
                    self._drawn[scale] = self._grid(generate(self.pipe, self.prompts, seeds, **self.options))
            except BaseException as error:
                self.state.value = html.escape(f"not drawn: {error or type(error).__name__}")
                raise
        self.state.value, self.picture.value = "", self._drawn[scale]

    def _grid(self, images: Sequence[Image.Image]) -> bytes:
        return as_png(image_grid(images, columns=len(images), titles=self.prompts))


class SweepExplorer(_Explorer):
    """A measure along one varied parameter, with colours for another; below, a run's images before and after.

    Args:
        results: what `read_sweep` returned; at least one run must be finished and measured.

    Attributes:
        measure, along, by, run: the controls.
        picture: the figure as PNG.
        words: what it shows, in a sentence.
        before, after: the chosen run's images as PNG, empty if it has none.

    Raises:
        ValueError: no finished run was measured.
    """

    without_kernel = "An explorer of the sweep. It needs a running kernel; the figures show the same measures."

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
        self.words, self.about = ipywidgets.HTML(), ipywidgets.HTML()
        self.picture, self.before, self.after = (_natural_size() for _ in range(3))
        for control in (self.measure, self.along, self.by):
            control.observe(lambda _change: self._show_measure(), "value")
        self.run.observe(lambda _change: self._show_run(), "value")
        self._show_measure()
        self._show_run()
        controls = ipywidgets.VBox([self.measure, self.along, self.by, self.run])
        super().__init__([ipywidgets.HBox([controls, self.picture]), self.words, self.about,
                          ipywidgets.HBox([self.before, self.after])])

    def _show_measure(self) -> None:
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
        for when in ("before", "after"):
            path = next((path for name, path in images.items() if name.startswith(when)), None)
            getattr(self, when).value = b"" if path is None else path.read_bytes()
        said = f"{self.results.label(run)}: {row['status']}" + (f". {row['error']}" if row["error"] else "")
        self.about.value = html.escape(said if images else f"{said} (no images kept)")
