"""The look of every figure: figures that a notebook shows by themselves, one palette, grids of images, names of layers.

Groups have the colours of Okabe and Ito's palette, which colour-blind readers can tell apart, and each its own marker.
Maps and matrices use viridis and cividis, which keep their order for every kind of colour vision and in grey.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

DPI = 100
PANEL = 1.25  # inches, width of one image in a grid
LETTER = 0.068  # inches, about the width of a letter of a row's name
MAP_COLOURS, MATRIX_COLOURS = "viridis", "cividis"
DARK, BRIGHT = "#00224e", "#a69d75"  # of cividis, for two things that belong together
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "^", "s", "D", "v", "P")
LOOKS = len(COLOURS) * len(MARKERS)  # pairs of these, before `look` repeats itself


class InlineFigure(Figure):
    """A Figure that Jupyter shows as a PNG when it is a cell's last value.

    Plain figures are shown only once pyplot's inline backend runs, which also keeps every figure open and changes
    settings for the whole session.

    Attributes:
        words: what the figure shows, in a sentence or two, for those who can't see it; "" if the function that made it
            leaves that to a table.
    """

    words: str = ""

    def __repr__(self) -> str:
        """The words: what a notebook keeps beside the picture, and what is shown without pictures."""
        return self.words or super().__repr__()

    def _repr_png_(self) -> tuple[bytes, dict[str, str] | None]:
        """The figure with few colours, a quarter of the bytes in a notebook, and the words as nbconvert's alt text."""
        buffer = io.BytesIO()
        with Image.open(io.BytesIO(as_png(self))) as full:
            few_colours(full, 128).save(buffer, format="PNG", optimize=True)
        return buffer.getvalue(), {"alt": self.words} if self.words else None


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1,
               **shared: object) -> tuple[InlineFigure, list[Axes]]:
    """An empty figure of this size in inches and its axes row by row; nothing overlaps, and pyplot keeps no trace.

    `shared` goes to `Figure.subplots`.
    """
    figure = InlineFigure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **shared).flat)


def as_png(picture: Figure | Image.Image) -> bytes:
    """A figure or an image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, format="PNG")
    else:
        picture.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def few_colours(image: Image.Image, most: int = 256) -> Image.Image:
    """The image with at most that many colours, spread so that rare ones stay true (colour bars)."""
    return image.convert("RGB").quantize(most, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)


def look(number: int) -> tuple[str, str]:
    """(colour, marker) of a figure's group, another pair for each of the first `LOOKS`."""
    return COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def image_grid(images: Sequence[Image.Image], columns: int, titles: Sequence[str] = (), row_names: Sequence[str] = (),
               width: float = PANEL) -> InlineFigure:
    """Images row by row, each under its title; `row_names` stand left of the rows, upright where all fit their height.

    Args:
        width: inches of each image; a row is as high as its highest image.

    Raises:
        ValueError: no images, or titles that are not one for each image.
    """
    if not images:
        raise ValueError("no images to show")
    if titles and len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles for {len(images)} images; give one for each")
    heights = [width * max(image.height / image.width for image in images[start : start + columns])
               for start in range(0, len(images), columns)]
    upright = all(LETTER * len(name) <= height for name, height in zip(row_names, heights, strict=False))
    margin = 0.0 if upright else LETTER * max(map(len, row_names)) + 0.1
    figure, panels = new_figure(columns * width + margin, sum(heights) + (0.22 * len(heights) if titles else 0.0),
                                columns, len(heights), gridspec_kw={"height_ratios": heights})
    for axes in panels:
        axes.set_axis_off()
    for index, (axes, image) in enumerate(zip(panels, images, strict=False)):
        smaller = image.width > width * DPI  # without smoothing, thin lines would drop out
        axes.imshow(image.convert("RGB"), interpolation="antialiased" if smaller else "nearest")
        axes.set_title(titles[index] if titles else "", fontsize=8)
    for axes, name in zip(panels[::columns], row_names, strict=False):
        axes.text(-0.08, 0.5, name, rotation=90 if upright else 0, ha="right", va="center", transform=axes.transAxes,
                  fontsize=9)
    named = "; ".join(row_names or titles)
    figure.words = f"{len(images)} images in rows of {columns}" + (f": {named}." if named else ".")
    return figure
