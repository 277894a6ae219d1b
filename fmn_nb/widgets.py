"""Explorers for notebooks: thin shells of ipywidgets around attention and plots. A static figure stands beside each."""

from __future__ import annotations

import html
from collections.abc import Callable

import ipywidgets
from PIL import Image

from fmn_nb import plots
from fmn_nb.attention import AttentionRecord, NotRecordedError
from fmn_nb.attention_tables import describe
from fmn_nb.concepts import PhraseNotFoundError

ALL = "all"


class AttentionExplorer(ipywidgets.VBox):
    """Choose token, layer, head, step, branch and image of a record, and see that map and a sentence about it.

    Args:
        attention: the record; the text of its images must be known.
        images: the generated images, to lay the maps over; may be left out.

    Attributes:
        token, layer, head, step, branch, image: the controls.
        picture: the figure as PNG.
        words: the sentence.
    """

    def __init__(self, attention: AttentionRecord, images: list[Image.Image] | None = None) -> None:
        self.attention, self.images = attention, images
        self.image = ipywidgets.BoundedIntText(0, min=0, max=len(attention.images) - 1, description="image")
        self.branch = ipywidgets.Dropdown(options=attention.branches, description="branch")
        self.token = ipywidgets.Dropdown(description="token")
        self.layer = ipywidgets.Dropdown(
            options=[(ALL, ALL), *((plots.short_name(name), name) for name in attention.layers)], description="layer")
        heads = sorted({head for there in attention.heads.values() for head in there})
        self.head = ipywidgets.Dropdown(options=[(ALL, ALL), *((str(head), head) for head in heads)],
                                        description="head")
        self.step = ipywidgets.SelectionSlider(
            options=[(ALL, ALL), *((str(step), step) for step in attention.steps)], description="step")
        self.picture = ipywidgets.Image(format="png")
        self.words = ipywidgets.HTML()
        self._offer_tokens()
        self._show()
        for control in (self.image, self.branch):
            control.observe(self._after(self._offer_tokens), "value")
        for control in (self.token, self.layer, self.head, self.step):
            control.observe(self._after(), "value")
        controls = [self.image] if len(attention.images) > 1 else []
        controls += [self.branch, self.token, self.layer, self.head, self.step]
        super().__init__([ipywidgets.HBox([ipywidgets.VBox(controls), self.picture]), self.words])

    def _after(self, *first: Callable[[], None]) -> Callable[[dict], None]:
        def changed(_change: dict) -> None:
            for action in first:
                action()
            self._show()
        return changed

    def _offer_tokens(self) -> None:
        """The tokens of the chosen image and branch, or the recorded phrases; the first word to begin with."""
        if self.attention.phrases is not None:
            options = [(phrase, phrase) for phrase in self.attention.phrases]
        else:
            text = self.attention.text(self.image.value, self.branch.value)
            columns = sorted(text.begin + text.words + text.first_eot)
            options = [(text.label(column), (column,)) for column in columns]
            if text.padding:
                options.append(("padding", text.padding))
        choices = [choice for _, choice in options]
        first_word = choices[min(1, len(choices) - 1)]
        wanted = self.token.value if self.token.value in choices else first_word
        self.token.options = _numbered(options)
        self.token.value = wanted

    def _show(self) -> None:
        """Draw what is chosen, or say why it can't be drawn."""
        label = self.token.label.partition(" ")[2]
        what = {"phrase" if isinstance(self.token.value, str) else "columns": self.token.value}
        try:
            values = self.attention.select(**what, layer=_chosen(self.layer), head=_chosen(self.head),
                                           step=_chosen(self.step), branch=self.branch.value, image=self.image.value)
        except (NotRecordedError, PhraseNotFoundError) as reason:
            self.words.value = f"Nothing to show: {html.escape(str(reason))}"
            self.picture.value = b""  # or the last choice's picture would stand beside the words
            return
        figure = plots.attention_map(values, label) if self.images is None \
            else plots.overlay(self.images[self.image.value], values, label)
        self.picture.value = plots.as_png(figure)
        self.words.value = html.escape(describe(values, label))


def _chosen(control: ipywidgets.ValueWidget) -> object:
    """A control's value, None for all."""
    return None if control.value == ALL else control.value


def _numbered(options: list[tuple[str, object]]) -> list[tuple[str, object]]:
    """Options with a number in front: tokens repeat, names in a list must not."""
    return [(f"{number} {name}", choice) for number, (name, choice) in enumerate(options)]
