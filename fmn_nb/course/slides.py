"""Slides: nbconvert's reveal.js page for each notebook, without anything from elsewhere.

A heading begins a slide to the right; the cells below it follow there as long as there is room, then on slides further
down. What only readers need (parameters, the exercises' checks) is left out. A cell with its own
`slideshow.slide_type` keeps it.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fmn_nb.course.exercises import CHECK, TASK, tags_of, without_solutions
from fmn_nb.course.formulas import with_mathml
from fmn_nb.course.lessons import ELSEWHERE, LINK, CourseError, Lesson, title_of
from fmn_nb.files import write_text
from fmn_nb.runs.report import READABLE, for_a_page

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOM, PICTURE = 27, 14  # lines on a slide, and how many of them a picture takes
_LEFT_OUT = {"parameters", CHECK}
_REVEAL = ("LICENSE", "dist/reset.css", "dist/reveal.css", "dist/reveal.js", "dist/theme/white.css",
           "dist/theme/fonts/source-sans-pro")
#: nbconvert's template asks a CDN for jQuery, RequireJS, MathJax and mermaid; a plain script does for reveal.js
_PAGE = """{% extends 'reveal/index.html.j2' %}
{% block html_head_js %}<meta name="viewport" content="width=device-width, initial-scale=1">{% endblock %}
{% block html_head_js_mathjax %}{% endblock %}
{% block html_head_css %}<style>""" + READABLE + """
:root { --jp-content-font-size1: 19px; --jp-code-font-size: 13px; }
.reveal .slides { text-align: left; }
.reveal .slides section > section, .reveal .slides > section:not(.stack) { max-height: 680px; overflow-y: auto; }
.reveal h1, .reveal h2, .reveal h3 { font-size: 1.5em !important; text-transform: none !important; }
.reveal h1 { font-size: 2em !important; }
.reveal pre { width: 100%; box-shadow: none; font-size: 13px; }
.reveal img { max-height: 520px; margin: 0; }
.reveal table { font-size: 15px; }
.reveal .slide-number, .reveal .slide-number a { color: #222 !important; background: #eee !important; }
.reveal a { text-decoration: underline; color: #1f5fbf; }
</style>{% endblock %}
{% block footer_js %}
<script src="reveal/dist/reveal.js"></script>
<script>
for (const slide of document.querySelectorAll('.slides section:not(:has(section))')) slide.tabIndex = 0;
Reveal.initialize({hash: true, slideNumber: 'c/t', width: 960, height: 700, center: false, transition: 'none'});
</script>
{% endblock %}"""


def write_slides(out: Path, chosen: list[Lesson]) -> None:
    """Write `out/NAME.html` for each notebook, and reveal.js beside them in `out/reveal/`."""
    from nbconvert import SlidesExporter

    copy_reveal(out / "reveal")
    exporter = SlidesExporter(raw_template=_PAGE, reveal_url_prefix="reveal", reveal_theme="white",
                              exclude_input_prompt=True, exclude_output_prompt=True)
    for lesson in chosen:
        page, _ = exporter.from_notebook_node(deck(lesson))
        write_text(out / f"{lesson.name}.html", page)


def copy_reveal(folder: Path) -> None:
    """Copy reveal.js with its white theme from the package `sphinx-revealjs`, which contains it."""
    found = importlib.util.find_spec("sphinx_revealjs")
    if found is None or not found.submodule_search_locations:
        raise CourseError("slides need reveal.js: pip install -c constraints.txt '.[course]'")
    source = Path(found.submodule_search_locations[0]) / "_static" / "revealjs"
    for name in _REVEAL:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target, dirs_exist_ok=True)
        else:
            shutil.copyfile(source / name, target)


def deck(lesson: Lesson) -> NotebookNode:
    """The notebook cut into slides, with pictures that say what they show, formulas as MathML, and no solutions."""
    notebook = for_a_page(lesson.read())
    notebook.metadata["title"] = title_of(notebook)
    last = max(place for place, cell in enumerate(notebook.cells) if cell.cell_type == "code")
    notebook.cells[last].metadata["tags"] = [*tags_of(notebook.cells[last]), CHECK]  # it says that all is well
    notebook.cells = [part for cell in notebook.cells for part in _parts(cell)]
    used = 0.0  # lines used on the slide
    for cell in notebook.cells:
        kind = "-"
        if _LEFT_OUT & set(tags_of(cell)):
            kind = "skip"
        elif cell.cell_type == "markdown" and cell.source.startswith("#"):
            kind, used = "slide", _lines(cell)
        elif (used := used + _lines(cell)) > ROOM:
            kind, used = "subslide", _lines(cell)
        cell.metadata.setdefault("slideshow", {}).setdefault("slide_type", kind)
        if cell.cell_type == "markdown":
            cell.source = with_mathml(_led(cell.source))
    return notebook


def _lines(cell: NotebookNode) -> float:
    """About how many lines of a slide a cell takes, its outputs included."""
    lines = [max(1, len(line) / 95) * (1.5 if cell.cell_type == "markdown" else 1) for line in cell.source.split("\n")]
    shown = [output.get("data", {}) for output in cell.get("outputs", ())]
    pictures = sum("<img " in data.get("text/html", "") for data in shown)
    tables = sum(1.5 * data.get("text/html", "").count("<tr") for data in shown)
    texts = sum(output.get("text", "").count("\n") for output in cell.get("outputs", ()))
    return sum(lines) + PICTURE * pictures + tables + texts


def _parts(cell: NotebookNode) -> list[NotebookNode]:
    """A Markdown cell cut before each heading and each exercise; any other cell as it is."""
    from nbformat.v4 import new_markdown_cell

    if cell.cell_type != "markdown":
        return [cell]
    text = without_solutions(cell.source) if TASK in tags_of(cell) else cell.source
    texts = [part.strip() for part in re.split(r"^(?=##? )|^(?=\*\*\d+\. )", text, flags=re.MULTILINE)]
    whole: list[str] = []
    for part in filter(None, texts):  # a heading alone goes on the slide of what follows
        alone = whole and whole[-1].startswith("#") and "\n" not in whole[-1]
        whole[-1:] = [f"{whole[-1]}\n\n{part}"] if alone else [*whole[-1:], part]
    return [new_markdown_cell(one, metadata=cell.metadata.copy()) for one in whole]


def _led(text: str) -> str:
    """Markdown whose links to other notebooks lead to their slides; other links keep only their words."""
    def led(found: re.Match[str]) -> str:
        file, hash_, _ = found[3].partition("#")
        if file.endswith(".ipynb"):
            return f"[{found[2]}]({file.removesuffix('.ipynb')}.html)"
        return found[0] if ELSEWHERE.match(found[3]) or hash_ and not file else found[2]

    return LINK.sub(led, text)
