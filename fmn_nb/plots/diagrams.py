"""Diagrams of what goes into what, in cross-attention, a map, re-steering, an evaluation, and other ways to forget.

A diagram is a table of boxes and arrows; `diagram` draws it on white paper, which dark pages show as a sheet.
"""

from __future__ import annotations

from typing import NamedTuple

from fmn_nb.plots.style import COLOURS, InlineFigure, new_figure

_COLUMN, _ROW = 2.05, 0.95  # inches between the centres of two boxes
_FILLS = {"given": "#eef2f6", "computed": "#ffffff", "asked": "#fdf0d5"}


class Box(NamedTuple):
    """A box at a place of the grid (column from the left, row from the top), with its content and its part."""

    column: float
    row: float
    text: str
    part: str = "computed"  # or "given" (what one begins with), "asked" (what it is all about)


class Drawing(NamedTuple):
    """Boxes by name, arrows as "from to" with their labels, and the same in words."""

    boxes: dict[str, Box]
    arrows: dict[str, str]
    words: str


_DRAWINGS = {
    "cross-attention": Drawing(
        {"x": Box(0, 0, "pixels x\n[pixels, channels]", "given"), "c": Box(0, 2, "tokens c\n[tokens, width]", "given"),
         "Q": Box(1, 0, "Q\nwhat each pixel asks"), "K": Box(1, 1, "K\nwhat each token offers"),
         "V": Box(1, 2, "V\nwhat each token gives"),
         "A": Box(2.2, 0.5, "A = softmax(Q K$^T$ / $\\sqrt{d}$)\n[pixels, tokens], rows sum to 1", "asked"),
         "map": Box(3.5, 0, "one token's column,\nlaid out as the image:\nits attention map", "asked"),
         "O": Box(2.2, 2, "O = A V"), "out": Box(3.5, 2, "the layer's output\n[pixels, channels]")},
        {"x Q": "$W_q$", "c K": "$W_k$", "c V": "$W_v$", "Q A": "", "K A": "", "A map": "", "A O": "", "V O": "",
         "O out": "$W_o$"},
        "Pixels become queries Q, tokens become keys K and values V. Q and K make the map A, whose rows sum to 1; one "
        "of its columns, laid out as the image, is a token's attention map. A and V make the layer's output, through "
        "W_o."),
    "attention map": Drawing(
        {"prompt": Box(0, 0, "a photo of a cat", "given"), "noise": Box(0, 1, "noise, 20 steps", "given"),
         "columns": Box(1.2, 0, "columns:\nbegin, a, photo, of, a,\ncat, end, padding"),
         "A": Box(1.2, 1, "A in each layer,\nhead and step\n[pixels, columns]"),
         "grid": Box(2.3, 1, "cat's column of each\nas a grid [h, w]"),
         "mean": Box(3.4, 1, "mean over steps and\nheads, one size,\nmean over layers"),
         "map": Box(4.5, 1, "the concept's\nattention map", "asked"), "mask": Box(3.4, 0, "a known mask", "given"),
         "score": Box(4.5, 0, "pointing game, IoU,\nattention inside")},
        {"prompt columns": "text\nencoder", "columns A": "", "noise A": "U-Net", "A grid": "", "grid mean": "",
         "mean map": "", "map score": "", "mask score": ""},
        "The text encoder turns the prompt into columns. While noise becomes an image, each layer, head and step has "
        "its A. The concept's columns of all of them, laid out as grids and averaged, are its attention map, which is "
        "scored against a known mask."),
    "re-steering": Drawing(
        {"image": Box(0, 0, "a reference image", "given"), "prompt": Box(0, 1, "a photo of a cat", "given"),
         "noisy": Box(1.2, 0, "noised to a random\ntimestep"),
         "columns": Box(1.2, 1, "columns; the\nconcept's are marked"),
         "A": Box(2.4, 0.5, "U-Net: A in every\ncross-attention layer"),
         "picked": Box(3.5, 0.5, "the marked columns\nof every A"),
         "loss": Box(4.6, 0.5, "their norm L:\nto go to zero", "asked"),
         "weights": Box(2.4, 1.6, "weights of\ncross-attention", "asked")},
        {"image noisy": "", "prompt columns": "text\nencoder", "noisy A": "", "columns A": "", "A picked": "",
         "picked loss": "", "loss weights": "gradient", "weights A": ""},
        "A reference image is noised to a random timestep, the prompt's columns are computed and the concept's marked. "
        "The U-Net's cross-attention layers give their maps A; the norm of the marked columns is the loss, whose "
        "gradient changes the weights of cross-attention until the loss is near zero."),
    "evaluation": Drawing(
        {"forget": Box(0, 0, "forget set:\nprompts with the concept", "given"),
         "retain": Box(0, 1, "retain set:\nprompts without it", "given"),
         "base": Box(1.3, 0, "the base model\ndraws: before"),
         "patch": Box(1.3, 1, "with the patch, from the\nsame seeds: after"),
         "judge": Box(2.5, 0.5, "the judge says\nwhat each shows"),
         "ua": Box(3.6, 0, "UA: not seen in the\nforget set"),
         "kept": Box(3.6, 1, "IRA, CRA: right in\nthe retain set"),
         "h": Box(4.7, 0.5, "H, beside its\nceiling", "asked")},
        {"forget base": "", "forget patch": "", "retain base": "", "retain patch": "", "base judge": "",
         "patch judge": "", "judge ua": "", "judge kept": "", "ua h": "", "kept h": ""},
        "Prompts with the concept (forget set) and without it (retain set) are drawn by the base model and, from the "
        "same seeds, with the patch. The judge says what each image shows. UA counts the forget set, IRA and CRA the "
        "retain set; H is the harmonic mean of the three, read beside its ceiling."),
    "other ways": Drawing(
        {"text": Box(0, 1, "a photo of a cat", "given"), "c": Box(1.1, 1, "columns c\n[columns, width]"),
         "KV": Box(2.3, 1, "keys $W_k$ c,\nvalues $W_v$ c"), "A": Box(3.4, 1, "A in every\nlayer"),
         "e": Box(4.5, 1, "the predicted\nnoise"),
         "uce": Box(2.3, 0, "UCE: what its guide's\ncolumns say", "asked"),
         "esd": Box(4.5, 0, "ESD, CA: what another\ntarget says", "asked"),
         "fmn": Box(3.7, 2, "Forget-Me-Not: no\nattention on the word", "asked"),
         "mace": Box(2.1, 2, "MACE: other columns\nfirst, then A", "asked"),
         "write": Box(3.4, 0, "redirect: what\nlayers write", "asked")},
        {"text c": "text\nencoder", "c KV": "", "KV A": "", "A e": "", "uce KV": "", "esd e": "", "fmn A": "",
         "write A": "", "mace KV": "", "mace A": ""},
        "The text encoder turns a prompt into columns c, the weights W_k and W_v turn these into keys and values. They "
        "make the attention A of every layer, and A makes the predicted noise. UCE edits keys and values, so that the "
        "concept's columns say what its guide's say. Forget-Me-Not takes the attention off the word. ESD and CA train "
        "the prediction towards another target. MACE edits keys and values of the other columns first, then takes the "
        "attention off the word. Redirected attention lets each layer write what it would write without the concept."),
}


def diagram(name: str) -> InlineFigure:
    """A diagram by its name: "cross-attention", "attention map", "re-steering", "evaluation" or
    "other ways".

    Raises:
        ValueError: no diagram of that name.
    """
    if name not in _DRAWINGS:
        raise ValueError(f"no diagram {name!r}; there are {', '.join(_DRAWINGS)}")
    boxes, arrows, words = _DRAWINGS[name]
    right, low = (max(box[axis] for box in boxes.values()) for axis in (0, 1))
    figure, (axes,) = new_figure((right + 1) * _COLUMN, (low + 1) * _ROW)
    axes.set(xlim=(-0.5, right + 0.5), ylim=(low + 0.5, -0.5))
    axes.set_axis_off()
    drawn = {}
    for key, box in boxes.items():
        style = {"boxstyle": "round,pad=0.45", "facecolor": _FILLS[box.part],
                 "edgecolor": COLOURS[1] if box.part == "asked" else "0.45"}
        drawn[key] = axes.text(box.column, box.row, box.text, ha="center", va="center", fontsize=9, bbox=style)
    for ends, said in arrows.items():
        one, other = ends.split()
        start, end = ((boxes[key].column, boxes[key].row) for key in (one, other))
        axes.annotate("", end, start, arrowprops={
            "arrowstyle": "-|>", "color": "0.25", "shrinkA": 2, "shrinkB": 2,
            "patchA": drawn[one].get_bbox_patch(), "patchB": drawn[other].get_bbox_patch()})
        middle = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axes.text(*middle, said, ha="center", va="center", fontsize=8, color=COLOURS[0],
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if said else None)
    figure.words = words
    return figure
