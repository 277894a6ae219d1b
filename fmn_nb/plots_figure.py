"""A matplotlib figure that a notebook shows by itself, and that leaves no trace in pyplot."""

from __future__ import annotations

import io

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

DPI = 100


class InlineFigure(Figure):
    """A Figure that Jupyter shows as a PNG when it is a cell's last value.

    Plain figures are shown only once pyplot's inline backend runs, which also keeps every figure open and changes
    settings for the whole session.

    Attributes:
        words: what the figure shows, in a sentence or two, for those to whom the figure says nothing; "" where the
            function that drew it leaves that to a table.
    """

    words: str = ""

    def __repr__(self) -> str:
        """The words: what a notebook keeps beside the picture, and what shows where pictures don't."""
        return self.words or super().__repr__()

    def _repr_png_(self) -> bytes:
        """With 256 colours, spread so that rare ones stay true (colour bars): a third of the bytes in a notebook."""
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(as_png(self))) as drawn:
            few = drawn.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
        few.save(buffer, format="PNG", optimize=True)
        return buffer.getvalue()


def new_figure(width: float, height: float) -> InlineFigure:
    """An empty figure of that many inches, laid out so that nothing overlaps."""
    figure = InlineFigure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def as_png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
