"""Build up a picture in turns: say what should be there, move boxes by mouse, keyboard or numbers, draw, undo."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import ipywidgets
from PIL import Image

from fmn_nb.control import InteractionError, draw_interactions
from fmn_nb.control.picture import COLOURS, boxes_picture, boxes_table
from fmn_nb.control.turns import Turns, changed, things_of
from fmn_nb.models import STEPS
from fmn_nb.plots import as_png
from fmn_nb.widgets.explorers import _Explorer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SIDES = ("left", "top", "right", "bottom")


class Composer(_Explorer):
    """Turns in, picture out: a line for turns, boxes on a canvas and as numbers, and a table in words.

    The canvas needs `anywidget`; without it, numbers move the boxes, and a drawing shows them.

    Args:
        pipe: a grounded model.
        prompt: what the prompt says besides the boxes, such as the style.
        turns: the turns to begin with.
        steps: the sampling steps of each image.

    Attributes:
        turn, say, undo, draw: the line, and the buttons.
        thing, numbers: which box, and its four sides.
        canvas: where boxes are moved, or None.
        plan: a drawing of the boxes, as PNG, if there is no canvas.
        picture: the image as PNG; empty until `draw`, and after each change of the boxes.
        words: the table, and the list of turns.
        trouble: why a turn could not be taken.
    """

    without_kernel = "A picture built up in turns. It needs a running kernel; the figure above is the same in print."

    def __init__(self, pipe: DiffusionPipeline, prompt: str = "a photo", turns: Sequence[str] = (), *, seed: int = 0,
                 steps: int = STEPS) -> None:
        self.pipe, self.seed, self.steps, self.state = pipe, seed, steps, Turns()
        for turn in turns:
            self.state.say(turn)
        self.prompt = ipywidgets.Text(prompt, description="prompt")
        self.turn = ipywidgets.Text(placeholder="add a frog chasing it", description="turn", continuous_update=False)
        self.say, self.undo, self.draw = (ipywidgets.Button(description=name) for name in ("say", "undo", "draw"))
        self.thing = ipywidgets.Dropdown(description="box of")
        self.numbers = {side: ipywidgets.BoundedFloatText(0.0, min=0.0, max=1.0, step=0.02, description=side)
                        for side in SIDES}
        self.picture, self.plan = (ipywidgets.Image(format="png", width=256, height=256) for _ in range(2))
        self.words, self.trouble = ipywidgets.HTML(), ipywidgets.HTML()
        self.canvas = _canvas()
        self.image: Image.Image | None = None
        self._quiet = False
        self.say.on_click(lambda _button: self.take(self.turn.value))
        self.turn.observe(lambda _change: self.take(self.turn.value), "value")  # when the line is left, or on Enter
        self.undo.on_click(lambda _button: self.take_back())
        self.draw.on_click(lambda _button: self.show_image())
        self.thing.observe(lambda _change: self._show_numbers(), "value")
        for number in self.numbers.values():
            number.observe(lambda _change: self._from_numbers(), "value")
        if self.canvas is not None:
            self.canvas.observe(lambda _change: self._from_canvas(), "moved")
            self.canvas.observe(lambda change: self._select(change["new"]), "selected")
        self._show()
        controls = ipywidgets.VBox([self.prompt, self.turn, ipywidgets.HBox([self.say, self.undo, self.draw]),
                                    self.thing, *self.numbers.values(), self.trouble])
        board = self.canvas if self.canvas is not None else self.plan
        super().__init__([ipywidgets.HBox([controls, board, self.picture]), self.words])

    # ---- what a reader does ------------------------------------------------------------------------------------------

    def take(self, turn: str) -> None:
        """Take a turn, or say why it can't be taken; an empty line isn't a turn."""
        before = self.thing.value
        if not turn.strip():
            return
        try:
            self.state.say(turn)
        except InteractionError as error:
            self.trouble.value = html.escape(str(error))
            return
        self.turn.value, added = "", [name for name in things_of(self.state.interactions) if name != before]
        self._show(added[-1] if added else before)

    def take_back(self) -> None:
        """Undo the last turn or move."""
        self.state.undo()
        self._show(self.thing.value)

    def show_image(self) -> None:
        """Draw the current interactions."""
        self.draw.disabled, self.trouble.value = True, "drawing ..."
        try:
            self.image = draw_interactions(self.pipe, self.prompt.value, self.state.interactions, [self.seed],
                                           steps=self.steps)[0]
            self.trouble.value = ""
            self.picture.value = as_png(self.image.resize((256, 256), Image.Resampling.NEAREST))
        except BaseException as error:
            self.trouble.value = html.escape(f"not drawn: {error or type(error).__name__}")
            if not isinstance(error, (InteractionError, ValueError)):
                raise
        finally:
            self.draw.disabled = False

    # ---- what the reader sees ----------------------------------------------------------------------------------------

    def _show(self, chosen: str | None = None) -> None:
        """Show everything after a change; `chosen` is the thing whose numbers are shown."""
        interactions, self._quiet = self.state.interactions, True
        things, objects = things_of(interactions), {one.object for one in interactions}
        self.thing.options = list(things)
        self.thing.value = chosen if chosen in things else next(iter(things), None)
        self.trouble.value, self.picture.value, self.image = "", b"", None
        self.plan.value = as_png(boxes_picture(interactions))
        if self.canvas is not None:
            self.canvas.boxes = [{"name": name, "box": list(box), "colour": COLOURS[
                "object" if name in objects else "subject"]} for name, box in things.items()]
            self.canvas.selected = max(0, list(things).index(self.thing.value)) if things else 0
        turns = "".join(f"<li>{html.escape(turn)}</li>" for turn in self.state.said)
        self.words.value = f"<ol>{turns}</ol>{boxes_table(interactions).to_html(index=False, border=0)}"
        self._quiet = False
        self._show_numbers()

    def _show_numbers(self) -> None:
        box = things_of(self.state.interactions).get(self.thing.value)
        self._quiet = True
        for side, number in enumerate(self.numbers.values()):
            number.disabled = box is None
            number.value = 0.0 if box is None else box[side]
        if self.canvas is not None and self.thing.value is not None:
            self.canvas.selected = list(self.thing.options).index(self.thing.value)
        self._quiet = False

    def _select(self, number: int) -> None:
        if not self._quiet and number < len(self.thing.options):
            self.thing.value = self.thing.options[number]

    def _from_numbers(self) -> None:
        if not self._quiet and self.thing.value is not None:
            self._put(self.thing.value, [number.value for number in self.numbers.values()])

    def _from_canvas(self) -> None:
        if self._quiet or not self.canvas.boxes:
            return
        one = self.canvas.boxes[self.canvas.selected]
        self._put(one["name"], one["box"])

    def _put(self, name: str, box: Sequence[float]) -> None:
        """Put a thing's box somewhere else, as a turn of its own."""
        if things_of(self.state.interactions).get(name) == tuple(box):
            return
        try:
            interactions = changed(self.state.interactions, name, lambda _: tuple(box))
        except InteractionError as error:
            self.trouble.value = html.escape(str(error))
            return
        self.state.put(interactions, f"move the {name} to {', '.join(f'{side:g}' for side in box)}")
        self._show(name)


def _canvas() -> ipywidgets.DOMWidget | None:
    """A canvas, if its library is installed."""
    try:
        from fmn_nb.widgets.canvas import BoxCanvas
    except ImportError:
        return None
    return BoxCanvas()
