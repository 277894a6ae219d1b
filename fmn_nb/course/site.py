"""The course's site: Sphinx builds it from the notebooks as they are, executes nothing and fetches nothing."""

from __future__ import annotations

import io
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fmn_nb import __version__
from fmn_nb.course import words
from fmn_nb.course.lessons import CourseError, empty_folder, lessons_of
from fmn_nb.course.links import problems_of
from fmn_nb.course.pages import Half, write_pages
from fmn_nb.course.translation import catalogues, languages, translate_notebook
from fmn_nb.files import data_dir, replacing_folder, write_json, write_text
from fmn_nb.runs.folder import REPORT_FILE, RunFolder

TITLE = "Forget-Me-Not Notebooks"
MARK = "site.json"  # names what was built, and says that this command built it
THEME = Path(__file__).resolve().parent / "theme"
LABELS = {"en": "English", "zh_CN": "中文"}
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_REPOSITORY = re.compile(r"https://[\w.-]*(github|gitlab|bitbucket)[\w.-]*/[\w.-]+/[\w.-]+/?")
TELLING = ("WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True)
class SiteRequest:
    """What a site should hold.

    Args:
        run: a run's folder, whose report is shown; None for the bundled example.
        demo: a folder with an index.html that runs the model in the browser; None for none.
        repository: the address of the repository, for launch buttons; none is invented.
        branch: the repository's branch that the buttons lead to.
        reference: whether to write the reference, for which the whole package is imported.
    """

    run: Path | None = None
    demo: Path | None = None
    repository: str | None = None
    branch: str = "main"
    reference: bool = True

    def __post_init__(self) -> None:
        if self.demo is not None and not (self.demo / "index.html").is_file():
            raise CourseError(f"{self.demo} holds no index.html; 'fmn-nb course demo --out {self.demo}' makes it")
        if self.repository is not None and not _REPOSITORY.fullmatch(self.repository):
            raise CourseError("a repository's address looks like https://github.com/OWNER/NAME (or GitLab's or "
                              f"Bitbucket's), not like '{self.repository}'")


def build_site(out: Path, request: SiteRequest, log: Callable[[str], object] = lambda line: None) -> Path:
    """Build the site into `out`, which is replaced as a whole, check it, and return the path of its front page.

    Raises:
        CourseError: Sphinx warns, a link or a picture is missing, a folder holds something else; `out` stays as it was.
    """
    lessons = lessons_of()
    out = empty_folder(out, MARK)
    _sphinx_is_there()
    with tempfile.TemporaryDirectory() as scratch, replacing_folder(out) as site:
        run = _report(request.run, Path(scratch) / "run")
        halves = [Half("en", {}, lessons, request.demo is not None, run),
                  *(Half(one, catalogues(one), lessons, request.demo is not None, run) for one in languages())]
        for half in halves:
            place = site if half.language == "en" else site / half.language
            _build(half, halves, request, Path(scratch) / half.language, place)
            _beside(half, place)
            log(f"{LABELS.get(half.language, half.language)}: {len(list(place.rglob('*.html')))} pages")
        (site / "report").mkdir()
        shutil.copyfile(run / REPORT_FILE, site / "report" / REPORT_FILE)
        if request.demo is not None:
            shutil.copytree(request.demo, site / "demo")
        if problems := problems_of(site):
            raise CourseError("the site has broken links or pictures:\n  " + "\n  ".join(problems))
        write_json(site / MARK, {"version": __version__, "languages": [half.language for half in halves]})
    return out / "index.html"


def _sphinx_is_there() -> None:
    try:
        import myst_nb  # noqa: F401
        import sphinx_book_theme  # noqa: F401
    except ImportError as error:
        raise CourseError(f"the site needs {error.name}: pip install -c constraints.txt '.[course]'") from None


def _report(run: Path | None, copy: Path) -> Path:
    """A copy of the run's folder with its report written anew; the run itself is left as it is."""
    from fmn_nb.runs.report import write_report

    if run is None:
        run = next(path.parent for path in sorted((data_dir() / "sweep-example").glob(f"*/{RunFolder.STATE}")))
    if not (run / RunFolder.STATE).is_file():
        raise CourseError(f"{run} holds no {RunFolder.STATE}; give the folder of a run")
    copy.mkdir()
    for name in (RunFolder.STATE, "metrics.json", "images", "patch/fmn.json"):
        target = copy / name
        target.parent.mkdir(exist_ok=True)
        if (run / name).is_dir():
            shutil.copytree(run / name, target)
        elif (run / name).is_file():
            shutil.copyfile(run / name, target)
    write_report(copy)
    return copy


def _build(half: Half, halves: list[Half], request: SiteRequest, scratch: Path, place: Path) -> None:
    """One language's pages, from sources in `scratch`."""
    from sphinx.application import Sphinx
    from sphinx.errors import SphinxError
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    source, warnings = scratch / "source", io.StringIO()
    write_pages(source, half)
    if half.language == "en" and request.reference:
        from fmn_nb.course.reference import write_reference

        write_reference(source / "api")
    else:
        _without_reference(source / "index.md")
    settings = _settings(half, halves, request, source)
    kept = sys.getrecursionlimit()
    try:
        with patch_docutils(), docutils_namespace():
            app = Sphinx(source, None, place, scratch / "doctrees", "html", settings, status=None, warning=warnings)
            app.build(force_all=True)
    except SphinxError as error:
        raise CourseError(f"Sphinx stops: {error}") from error
    finally:
        sys.setrecursionlimit(kept)
    told = [_COLOUR.sub("", line).replace(f"{source}/", "") for line in warnings.getvalue().splitlines()
            if any(word in line for word in TELLING)]
    if told or app.statuscode:
        raise CourseError("Sphinx warns, which counts as an error:\n  " + "\n  ".join(told or ["see above"]))
    (place / ".buildinfo").unlink(missing_ok=True)
    _name_toggles(place, half)


def _name_toggles(place: Path, half: Half) -> None:
    """Name the theme's toggles in the navigation: they show only an arrow, but a screen reader needs words."""
    said = f'<summary aria-label="{escape(half.said(words.TOGGLE))}"><span class="toctree-toggle"'
    for page in place.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        if (named := text.replace('<summary><span class="toctree-toggle"', said)) != text:
            write_text(page, named)


def _without_reference(index: Path) -> None:
    write_text(index, re.sub(r"\n.*<api/index>", "", index.read_text(encoding="utf-8")))


def _settings(half: Half, halves: list[Half], request: SiteRequest, source: Path) -> dict[str, Any]:
    """Sphinx's configuration."""
    others = [(LABELS.get(one.language, one.language), one.language.replace("_", "-"),
               ("" if half.language == "en" else "../") + ("" if one.language == "en" else f"{one.language}/"))
              for one in halves if one.language != half.language]
    shared = {path.relative_to(source).with_suffix("").as_posix() for path in source.rglob("*")
              if path.suffix in (".md", ".ipynb") and "api" not in path.relative_to(source).parts}
    theme: dict[str, Any] = {
        "show_navbar_depth": 1, "navbar_persistent": [], "navbar_end": [], "home_page_in_toc": True,
        "use_download_button": False, "use_fullscreen_button": True,
        "article_header_end": ["language.html", "article-header-buttons.html"],
    }
    if request.repository:
        theme |= {"repository_url": request.repository.rstrip("/"), "repository_branch": request.branch,
                  "use_repository_button": True, "path_to_docs": "",
                  "launch_buttons": {"binderhub_url": "https://mybinder.org",
                                     "colab_url": "https://colab.research.google.com"}}
    return {
        "project": TITLE, "author": f"The {TITLE} authors", "copyright": f"the {TITLE} authors, MIT licence",
        "version": __version__, "release": __version__, "language": half.language,
        "extensions": ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "fmn_nb.course.sphinx_parts"],
        "nb_execution_mode": "off", "nb_merge_streams": True,
        "myst_enable_extensions": ["dollarmath"], "myst_heading_anchors": 4, "myst_dmath_double_inline": True,
        "default_role": "code", "napoleon_use_rtype": False, "autodoc_member_order": "bysource",
        "python_use_unqualified_type_names": True, "toc_object_entries": False,
        "html_theme": "sphinx_book_theme", "html_title": TITLE, "html_theme_options": theme,
        "templates_path": [str(THEME)], "html_static_path": [str(THEME / "fmn.css")], "html_css_files": ["fmn.css"],
        "html_math_renderer": "mathml", "html_copy_source": False, "html_show_sphinx": False,
        "html_show_search_summary": False,  # it would fetch each page, which browsers forbid to files
        "html_context": {"fmn_halves": others, "fmn_pages": sorted(shared), "default_mode": "auto"},
        "suppress_warnings": [],
    }


def _beside(half: Half, place: Path) -> None:
    """Put the notebooks themselves into the site, to download from their pages."""
    import nbformat

    for lesson in half.lessons:
        target = place / "notebooks" / lesson.path.name
        if half.known:
            notebook = translate_notebook(lesson.read(), lesson.name, half.known)
            write_text(target, nbformat.writes(notebook) + "\n")
        else:
            shutil.copyfile(lesson.path, target)
