"""Everyone can read the notebooks: rules on the files themselves, and on the pages of text beside them."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pytest

from fmn_nb.files import notebooks_dir

ROOT = notebooks_dir().parent
NOTEBOOKS = sorted(notebooks_dir().glob("[0-9][0-9]_*.ipynb"))
PAGES = sorted([*ROOT.glob("README*.md"), *notebooks_dir().glob("*.md"), *ROOT.glob("data/README.md"),
                *ROOT.glob("data/*/README.md")])
SAYS_NOTHING = {"here", "this", "link", "click here", "more", "read more"}
NO_WORDS = re.compile(r"^(?:<.*>|\s*|image|figure|plot|\S+\.(?:png|jpg|svg))$", re.IGNORECASE)
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
every_text = pytest.mark.parametrize(
    "path", [*NOTEBOOKS, *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix().replace("/", "-"))


def markdown_of(path: Path) -> str:
    """A file's prose: of a notebook, its Markdown cells."""
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def without_code(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def wordless_pictures(path: Path) -> list[str]:
    """The outputs of a notebook that show a picture without saying what it shows."""
    return [cell.id for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", ())
            for kind in output.get("data", {}) if kind.startswith("image/") and kind != "image/jpeg"
            if NO_WORDS.match(output.metadata.get(kind, {}).get("alt", ""))]


def faults_of_headings(text: str) -> list[str]:
    """Headings that skip a rank, and more or fewer than one of the first."""
    ranks = [len(found) for found in re.findall(r"^(#+) ", without_code(text), re.MULTILINE)]
    faults = [] if ranks.count(1) == 1 and ranks[0] == 1 else [f"{ranks.count(1)} headings of the first rank"]
    return faults + [f"{one} after {before}" for before, one in zip(ranks, ranks[1:], strict=False) if one > before + 1]


class Tables(HTMLParser):
    """The rows of the first line of each HTML table: how many of their cells are headers."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.first: list[list[str]] = []
        self.row = 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag == "table":
            self.first.append([])
            self.row = 0
        self.row += tag == "tr"
        if tag in ("th", "td") and self.row == 1:
            self.first[-1].append(tag)


def headless_tables(html: str) -> int:
    """Tables in whose first row no cell is a header, of its column or of its row."""
    return sum("th" not in cells for cells in Tables(html).first)


@every_notebook
def test_every_figure_has_words(path):
    assert not wordless_pictures(path)


@every_text
def test_every_picture_in_prose_has_words_and_every_link_says_where_it_leads(path):
    text = without_code(markdown_of(path))
    assert not [alt for alt in re.findall(r"!\[(.*?)\]\(", text) if len(alt.split()) < 3 and not re.search(
        "[\u4e00-\u9fff]{6}", alt)]
    assert not re.search(r"<img(?![^>]*alt=\"[^\"]+\")", text)
    said = [words.strip().lower() for words in re.findall(r"(?<!!)\[([^\]]*)\]\(", text)]
    assert all(said) and not SAYS_NOTHING & set(said)


@every_text
def test_headings_go_down_one_rank_at_a_time(path):
    assert not faults_of_headings(markdown_of(path))


@every_notebook
def test_every_table_that_was_put_out_has_headers(path):
    cells = nbformat.read(path, as_version=4).cells
    tables = ["".join(output.data["text/html"]) for cell in cells for output in cell.get("outputs", ())
              if "text/html" in output.get("data", {})]
    assert not sum(map(headless_tables, tables))


@every_text
def test_every_table_in_prose_names_its_columns(path):
    heads = re.findall(r"^(\|.*\|)\n\|[-:| ]+\|$", markdown_of(path), re.MULTILINE)
    # a last column without a name repeats what the row says in words, such as "met"
    assert all(cell.strip() for head in heads for cell in head.strip("|").split("|")[:-1])


def test_the_rules_notice_what_they_forbid(tmp_path):
    assert faults_of_headings("# a\n\n### b") == ["3 after 1"] and faults_of_headings("## a")
    assert headless_tables("<table><tr><td>1</td></tr></table>") == 1
    assert headless_tables("<table><tr><th scope='row'>a</th><td>1</td></tr></table>") == 0
    assert headless_tables("<table><tr><th></th><th>a</th></tr><tr><td>1</td></tr></table>") == 0
    for alt, faulty in (("<PIL.Image.Image image mode=RGB>", True), ("figure", True), ("", True), ("A cat.", False)):
        output = nbformat.v4.new_output("display_data", {"image/png": "x"}, metadata={"image/png": {"alt": alt}})
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(outputs=[output])])
        nbformat.write(notebook, tmp_path / "x.ipynb")
        assert bool(wordless_pictures(tmp_path / "x.ipynb")) == faulty
