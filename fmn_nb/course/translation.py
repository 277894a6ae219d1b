"""Other languages: each document's paragraphs go into a PO file, `notebooks/locale/LANGUAGE/NAME.po`, and back.

A paragraph without a translation, or whose original has changed since, stays in English. `update_catalogues` writes the
PO files anew from the documents: a changed paragraph keeps its old translation, marked fuzzy, until a translator has
looked at it.
"""

from __future__ import annotations

import difflib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fmn_nb.course.lessons import ELSEWHERE, LINK, CourseError, begun_folder, lessons_of
from fmn_nb.course.paragraphs import lost, paragraphs, translated
from fmn_nb.files import notebooks_dir, replacing, write_json, write_text

if TYPE_CHECKING:
    from nbformat import NotebookNode
    from polib import POEntry, POFile

README, SITE = "README", "site"
MARK = "translation.json"
ALIKE = 0.6  # the least difflib ratio of a paragraph that counts as a changed old one
WIDTH = 110
#: a line's end between Chinese characters, which would be shown as a blank
_BETWEEN_CHINESE = re.compile(r"(?<=[\u3000-\u9fff\uff00-\uffef])\n *(?=[\u3000-\u9fff\uff00-\uffef])")


@dataclass(frozen=True)
class Catalogue:
    """One document's translations into one language."""

    language: str
    name: str
    path: Path
    texts: tuple[str, ...] = field(repr=False)  # the document's Markdown, piece by piece

    @cached_property
    def entries(self) -> POFile:
        """What the PO file holds; nothing if there is no file."""
        polib = _polib()
        try:
            return polib.pofile(str(self.path), wrapwidth=WIDTH) if self.path.is_file() else polib.POFile()
        except (OSError, UnicodeDecodeError) as error:
            raise CourseError(f"{self.path} is not a readable PO file: {error}") from None

    @cached_property
    def wanted(self) -> list[str]:
        """The document's paragraphs, each once, in order."""
        return list(dict.fromkeys(one for text in self.texts for one in paragraphs(text)))

    @cached_property
    def ready(self) -> dict[str, str]:
        """Paragraph -> translation, for those that need no check first."""
        return {entry.msgid: _BETWEEN_CHINESE.sub("", entry.msgstr) for entry in self.entries.translated_entries()}

    @property
    def done(self) -> int:
        """How many of the document's paragraphs are translated."""
        return sum(text in self.ready for text in self.wanted)

    @property
    def stale(self) -> int:
        """How many translations belong to a paragraph that is gone, or are marked fuzzy."""
        there = set(self.wanted)
        return sum(entry.fuzzy or entry.msgid not in there for entry in self.entries
                   if entry.msgstr and not entry.obsolete)

    def told(self) -> str:
        """One line: the share that is translated, and what is stale."""
        share = self.done / len(self.wanted) if self.wanted else 1.0
        stale = f", {self.stale} stale: shown in English" if self.stale else ""
        return f"{self.name}: {self.done} of {len(self.wanted)} paragraphs ({share:.0%}){stale}"

    def __call__(self, text: str) -> str:
        """Markdown of the document in the language."""
        return translated(text, self.ready.get)

    def anchor(self, anchor: str) -> str:
        """Where a heading's link leads in the language: Jupyter makes anchors of headings, with dashes for blanks."""
        for text in self.wanted:
            rank, _, title = text.partition(" ")
            if set(rank) == {"#"} and title.replace(" ", "-") == anchor:
                return self(text).partition(" ")[2].replace(" ", "-")
        return anchor

    def updated(self) -> POFile:
        """The entries for the document as it is now; translations of paragraphs that are gone stay, as obsolete."""
        polib = _polib()
        known = {entry.msgid: entry for entry in sorted(self.entries, key=lambda entry: -entry.obsolete)}
        left = {text: entry for text, entry in known.items() if text not in self.wanted and entry.msgstr}
        file = polib.POFile(wrapwidth=WIDTH)
        file.metadata = self.entries.metadata | {
            "Project-Id-Version": "forget-me-not-notebooks", "Language": self.language,
            "Content-Type": "text/plain; charset=UTF-8", "Content-Transfer-Encoding": "8bit", "MIME-Version": "1.0"}
        for text in self.wanted:
            entry = known.get(text) or _renewed(text, left)
            entry.obsolete = False
            file.append(entry)
        for entry in left.values():
            entry.obsolete = True
            file.append(entry)
        return file


def _renewed(text: str, left: dict[str, POEntry]) -> POEntry:
    """A new paragraph's entry, with the translation of the most similar one that is gone, marked fuzzy, or empty."""
    polib = _polib()
    nearest = max(left, key=lambda old: difflib.SequenceMatcher(None, old, text).ratio(), default=None)
    if nearest is None or difflib.SequenceMatcher(None, nearest, text).ratio() < ALIKE:
        return polib.POEntry(msgid=text)
    return polib.POEntry(msgid=text, msgstr=left.pop(nearest).msgstr, previous_msgid=nearest, flags=["fuzzy"])


def locale_dir(language: str) -> Path:
    """The folder of a language's PO files.

    Raises:
        CourseError: it isn't a language's code.
    """
    if not re.fullmatch(r"[a-z]{2,3}(_[A-Z]{2})?", language):
        raise CourseError(f"give a language by its code, such as zh_CN or de, not as '{language}'")
    return notebooks_dir() / "locale" / language


def languages() -> list[str]:
    """The languages that have a folder."""
    return sorted(path.name for path in notebooks_dir().glob("locale/*") if path.is_dir())


def catalogues(language: str) -> dict[str, Catalogue]:
    """Document's name -> catalogue: the README, each notebook ("03_forget_me_not"), the site's own words ("site")."""
    return {name: Catalogue(language, name, locale_dir(language) / f"{name}.po", texts)
            for name, texts in _documents()}


def _documents() -> Iterator[tuple[str, tuple[str, ...]]]:
    from fmn_nb.course.words import WORDS

    yield README, (readme().read_text(encoding="utf-8"),)
    for lesson in lessons_of():
        yield lesson.name, tuple(cell.source for cell in lesson.read().cells if cell.cell_type == "markdown")
    yield SITE, WORDS


def readme() -> Path:
    """The README, beside the notebooks' folder in a checkout and in the installed package."""
    return notebooks_dir().parent / "README.md"


def translate_notebook(notebook: NotebookNode, name: str, known: Mapping[str, Catalogue]) -> NotebookNode:
    """Put the prose of the notebook `name` into the catalogues' language, in place; code and outputs stay as they are.

    A link to a notebook's heading leads to the heading in that language.
    """
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(\d\d_\w+)\.ipynb#([^)\s]+)", lambda found: (
                f"{found[1]}.ipynb#{known[found[1]].anchor(found[2]) if found[1] in known else found[2]}"),
                known[name](cell.source))
    notebook.metadata["language"] = known[name].language
    return notebook


def translate_course(out: Path, language: str, log: Callable[[str], object] = lambda line: None) -> Path:
    """Write the README and the notebooks in another language into `out`, with the pages and pictures that they link to,
    and say how much of each is translated; the rest stays in English.

    Raises:
        CourseError: no such language, a PO file that can't be read, a translation that lost a link, code, a formula.
    """
    known = _checked(language)
    out = begun_folder(out, MARK)
    for catalogue in known.values():
        log(catalogue.told())
    texts = {readme_name(language): known[README](readme().read_text(encoding="utf-8"))}
    write_text(out / readme_name(language), texts[readme_name(language)])
    for lesson in lessons_of():
        import nbformat

        notebook, name = translate_notebook(lesson.read(), lesson.name, known), f"notebooks/{lesson.path.name}"
        texts[name] = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        write_text(out / name, nbformat.writes(notebook) + "\n")
    _copy_linked(texts, out)
    write_json(out / MARK, {"language": language, "paragraphs": {
        name: {"translated": one.done, "stale": one.stale, "all": len(one.wanted)} for name, one in known.items()}})
    return out


def _copy_linked(texts: Mapping[str, str], out: Path) -> None:
    """Copy into `out` what the texts, by their path in it, link to besides each other, and what those pages link to."""
    left, seen, here = dict(texts), set(texts), readme().parent.resolve()
    while left:
        name, text = left.popitem()
        for _, _, target in LINK.findall(text):
            source = (here / name).parent / target.partition("#")[0]
            if ELSEWHERE.match(target) or not source.is_file() or not source.resolve().is_relative_to(here):
                continue
            linked = source.resolve().relative_to(here).as_posix()
            if linked not in seen:
                seen.add(linked)
                with replacing(out / linked) as temporary:
                    shutil.copyfile(source, temporary)
                left |= {linked: source.read_text(encoding="utf-8")} if source.suffix == ".md" else {}


def readme_name(language: str) -> str:
    """The file's name as readers know it: README.zh-CN.md."""
    return f"README.{language.replace('_', '-')}.md"


def _checked(language: str) -> dict[str, Catalogue]:
    if not locale_dir(language).is_dir():
        raise CourseError(f"no notebooks/locale/{language}; there are {', '.join(languages()) or 'none'}, and "
                          "--update starts a new one")
    known = catalogues(language)
    for catalogue in known.values():
        for text, said in catalogue.ready.items():
            if gone := lost(text, said):
                raise CourseError(f"{catalogue.path.name}: the translation of {text[:60]!r} has other "
                                  f"{' and '.join(gone)} than the original; keep them as they are")
    return known


def update_catalogues(language: str, begin: Sequence[str] = (),
                      log: Callable[[str], object] = lambda line: None) -> None:
    """Write a language's PO files anew from the documents; what was translated stays, what has changed is fuzzy.

    The README and the site's words always get a file, a notebook if it has one already or is in `begin`.

    Raises:
        CourseError: a number in `begin` that no notebook has, or a PO file that can't be read; nothing was changed.
    """
    chosen = {lesson.name for lesson in lessons_of(list(begin))} | {README, SITE}
    known = [one for name, one in catalogues(language).items() if name in chosen or one.path.is_file()]
    for catalogue, file in [(one, one.updated()) for one in known]:
        with replacing(catalogue.path) as temporary:
            file.save(str(temporary))
        fuzzy, missing = len(file.fuzzy_entries()), len(file.untranslated_entries())
        log(f"{catalogue.name}: {fuzzy} to check, {missing} to translate")


def _polib():  # noqa: ANN202  the module
    try:
        import polib
    except ImportError:
        raise CourseError("translations need polib: pip install -c constraints.txt '.[course]'") from None
    return polib
