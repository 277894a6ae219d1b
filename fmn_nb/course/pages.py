"""The site's sources for Sphinx: a folder laid out like the repository, so that its own links lead to the right pages.

    index.md, kit.md         the README, cut in two
    notebooks/               the notebooks with their outputs, the glossary, a page per error, the other pages of text
    data/                    the model cards
    report.md, api/          a run's report; the reference, from docstrings
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fmn_nb.course import words
from fmn_nb.course.lessons import ELSEWHERE, LINK, CourseError, Lesson, title_of
from fmn_nb.course.translation import Catalogue, readme, translate_notebook
from fmn_nb.files import data_dir, notebooks_dir, read_json, write_text
from fmn_nb.runs.folder import RunFolder
from fmn_nb.runs.report import for_a_page

FRONT = ("Two commands", "The course")  # sections of the README for the front page; the others go into kit.md
GLOSSARY, ERRORS = "glossary.md", "errors.md"
LAB = "http://localhost:8888/lab/tree/notebooks/"  # where a JupyterLab that runs on this machine answers


@dataclass(frozen=True)
class Half:
    """The site in one language: what translates each document into it, and what goes with it."""

    language: str
    known: dict[str, Catalogue]  # empty for English
    lessons: list[Lesson]
    demo: bool  # whether the front page shows the demo
    run: Path  # the run whose report is shown

    def said(self, text: str) -> str:
        """Words of the site in this language."""
        return self.known["site"](text) if self.known else text


def write_pages(source: Path, half: Half) -> None:
    """Write all that Sphinx reads, without the reference.

    Raises:
        CourseError: a link to a file that isn't there, a table without its columns, no run.
    """
    copied = _Copied(source)
    _front(source, half, copied)
    for lesson in half.lessons:
        _notebook(source / "notebooks" / lesson.path.name, lesson, half, copied)
    for path in sorted(notebooks_dir().glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if path.name == GLOSSARY:
            text = _glossary(text)
        elif path.name == ERRORS:
            text = _errors(source / "notebooks" / "errors", text, half)
        write_text(source / "notebooks" / path.name, copied.linked(text, path))
    for path in _cards():
        text = path.read_text(encoding="utf-8")
        write_text(source / "data" / path.relative_to(data_dir()), copied.linked(text, path))
    write_text(source / "report.md", _report(half))


class _Copied:
    """Copies files of the repository that pages link to, and that aren't pages, to the same place in the sources."""

    def __init__(self, source: Path) -> None:
        self.source, self.root = source, notebooks_dir().parent.resolve()

    def linked(self, text: str, page: Path) -> str:
        """The page's text, once each file that it links to is there; headings' anchors are as Sphinx writes them."""
        def there(found: re.Match[str]) -> str:
            target, hash_, anchor = found[3].partition("#")
            if ELSEWHERE.match(found[3]):
                return found[0]
            file = (page.parent / target).resolve()
            if not file.is_file() or self.root not in file.parents:
                raise CourseError(f"{page.name} links to {target}, which isn't a file of this repository; fix the link")
            if file.suffix not in (".md", ".ipynb"):
                copy = self.source / file.relative_to(self.root)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
            return f"{found[1]}[{found[2]}]({target}{hash_}{_slug(anchor)})"

        return LINK.sub(there, text)


def _slug(anchor: str) -> str:
    """An anchor as Sphinx writes it, from one as Jupyter does."""
    return re.sub(r"[^\w-]", "", anchor.lower())


def _front(source: Path, half: Half, copied: _Copied) -> None:
    """index.md and kit.md from the README, in this half's language."""
    known, text = half.known.get("README"), readme().read_text(encoding="utf-8")
    parts = re.split(r"^(?=## )", re.sub(r"^<!-- .*? -->\n", "", text, flags=re.MULTILINE), flags=re.MULTILINE)
    titles = [part.partition("\n")[0].removeprefix("## ") for part in parts]
    missing = [title for title in FRONT if title not in titles]
    if missing:
        raise CourseError(f"the README has no section '{missing[0]}', which the site's front page shows")
    front = [part for part, title in zip(parts, titles, strict=True) if title in FRONT]
    rest = [part for part, title in zip(parts[1:], titles[1:], strict=True) if title not in FRONT]
    put: Callable[[str], str] = known if known else lambda text: text
    opening = _without_other_languages(parts[0])
    index = [copied.linked(put(opening), readme())]
    if half.demo:
        index.append(_demo(half))
    index += [copied.linked(put(part), readme()) for part in front]
    write_text(source / "index.md", "\n".join([*index, _contents(half)]))
    write_text(source / "kit.md", f"# {half.said(words.KIT)}\n\n" + copied.linked(put("".join(rest)), readme()))


def _without_other_languages(text: str) -> str:
    """The README's opening without the line that leads to its translations: the site has a switch."""
    return re.sub(r"^.*\]\(README\.[\w-]+\.md\).*\n+", "", text, flags=re.MULTILINE)


def _demo(half: Half) -> str:
    title = half.said(words.TOUCH)
    folder = "demo/" if half.language == "en" else "../demo/"
    return (f"## {title}\n\n{half.said(words.TOUCH_TEXT)}\n\n"
            f'<iframe class="fmn-frame fmn-demo" src="{folder}index.html" title="{escape(title)}" loading="lazy">'
            f'</iframe>\n\n<p><a href="{folder}index.html">{escape(half.said(words.TOUCH_ALONE))}</a></p>\n')


def _contents(half: Half) -> str:
    """The navigation, which Sphinx takes from the front page."""
    beside = [path.stem for path in sorted(notebooks_dir().glob("*.md")) if path.name not in (GLOSSARY, ERRORS)]
    cards = [f"{half.said(words.DATA)} <data/README>",
             *(f"{half.said(words.CARD).format(name=path.parent.name.removesuffix('-diffusion'))} "
               f"<data/{path.parent.name}/README>" for path in _cards()[1:])]
    groups = {words.COURSE: [f"notebooks/{lesson.name}" for lesson in half.lessons],
              words.READING: ["kit", "report", *(f"notebooks/{name}" for name in beside)],
              words.LOOKUP: ["notebooks/glossary", "notebooks/errors", *cards]
              + ([f"{half.said(words.API)} <api/index>"] if half.language == "en" else [])}
    return "\n".join(f"\n```{{toctree}}\n:hidden:\n:caption: {half.said(caption)}\n\n" + "\n".join(pages) + "\n```"
                     for caption, pages in groups.items()) + "\n"


def _cards() -> list[Path]:
    """data/README.md and the cards of the bundled models."""
    return [data_dir() / "README.md", *sorted(data_dir().glob("*/README.md"))]


def _notebook(path: Path, lesson: Lesson, half: Half, copied: _Copied) -> None:
    """A notebook for Sphinx: pictures with their words, links that lead to pages, how to open it, no widgets."""
    import nbformat

    notebook = for_a_page(lesson.read())
    known = half.known.get(lesson.name)
    if known:
        translate_notebook(notebook, lesson.name, half.known)
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({"tags": [tag for tag in cell.metadata.get("tags", []) if tag == "check"]})
        if cell.cell_type == "markdown":
            cell.source = copied.linked(cell.source, lesson.path)
    title_of(notebook)  # there is one
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell(_opening(lesson, half, known)))
    notebook.metadata.pop("fmn", None)
    write_text(path, nbformat.writes(notebook))


def _opening(lesson: Lesson, half: Half, known: Catalogue | None) -> str:
    file = lesson.path.name
    while_ = re.sub(r"`(.+?)`", r"<code>\1</code>", escape(half.said(words.WHILE)))
    note = ""
    if known and known.done < len(known.wanted):
        said = half.said(words.PARTLY).format(done=known.done, all=len(known.wanted))
        note = f'<p class="fmn-open">{escape(said)}</p>\n'
    return (f'{note}<p class="fmn-open"><a href="{file}" download>{escape(half.said(words.DOWNLOAD))}</a> · '
            f'<a href="{LAB}{file}">{escape(half.said(words.OPEN))}</a> ({while_})</p>')


def table_rows(text: str, columns: int, where: str) -> list[list[str]]:
    """The cells of a page's only table, without its two head lines.

    Raises:
        CourseError: a row with another number of cells; `where` says in which page.
    """
    lines = [line.strip() for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[2:]]
    wrong = next((row for row in rows if len(row) != columns), None)
    if wrong or not rows:
        raise CourseError(f"{where} needs a table whose rows have {columns} cells, not {wrong}")
    return rows


def _glossary(text: str) -> str:
    """The glossary's table as Sphinx's glossary, whose terms have anchors."""
    rows = table_rows(text, 2, GLOSSARY)
    before = text[:text.index("\n|")]
    entries = "\n\n".join(f"{term.strip('*')}\n  {meaning}" for term, meaning in rows)
    return f"{before}\n\n```{{glossary}}\n\n{entries}\n```\n"


def _errors(folder: Path, text: str, half: Half) -> str:
    """Write a page for each row of the table of errors; returns the page that lists them."""
    names = []
    for symptom, cause, remedy in table_rows(text, 3, ERRORS):
        name = re.sub(r"[^a-z0-9]+", "-", symptom.lower()).strip("-")
        if name in names:
            raise CourseError(f"{ERRORS} lists {symptom} twice")
        names.append(name)
        sections = [(words.SYMPTOM, symptom), (words.CAUSE, cause), (words.REMEDY, remedy)]
        write_text(folder / f"{name}.md", f"# {symptom}\n" + "".join(
            f"\n## {half.said(title)}\n\n{said[0].upper()}{said[1:]}\n" for title, said in sections))
    contents = "\n".join(f"errors/{name}" for name in names)
    return f"{text[:text.index(chr(10) + '|')]}\n\n```{{toctree}}\n:maxdepth: 1\n\n{contents}\n```\n"


def _report(half: Half) -> str:
    """The page around a run's report."""
    state: dict[str, Any] = read_json(half.run / RunFolder.STATE)
    settings = state.get("settings", {})
    text = half.said(words.RUN_TEXT).format(concept=settings.get("concept"), preset=settings.get("preset"))
    title = half.said(words.RUN)
    folder = "report/" if half.language == "en" else "../report/"
    return (f"# {title}\n\n{text}\n\n"
            f'<p><a href="{folder}report.html">{escape(half.said(words.RUN_ALONE))}</a></p>\n\n'
            f'<iframe class="fmn-frame" src="{folder}report.html" title="{escape(title)}"></iframe>\n')
