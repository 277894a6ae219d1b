"""What the site and the slides are made of: formulas, docstrings, pages, and the look at what was built."""

from __future__ import annotations

import re

import pytest

from fmn_nb.course.docstrings import as_rst, of_data
from fmn_nb.course.lessons import CourseError, lessons_of
from fmn_nb.course.links import problems_of
from fmn_nb.course.pages import Half, table_rows, write_pages
from fmn_nb.course.slides import copy_reveal, deck, write_slides
from fmn_nb.files import data_dir, notebooks_dir

RUN = next(data_dir().glob("sweep-example/cat-*"))


@pytest.fixture
def source(tmp_path):
    """The English pages as Sphinx gets them."""
    write_pages(tmp_path, Half("en", {}, lessons_of(), demo=True, run=RUN))
    return tmp_path


def test_each_formula_of_the_course_becomes_mathml():
    pytest.importorskip("latex2mathml", reason="pip install '.[course]'")
    from fmn_nb.course.formulas import to_mathml, with_mathml

    found = 0
    for lesson in lessons_of():
        for cell in lesson.read().cells:
            if cell.cell_type == "markdown":
                text = with_mathml(cell.source)
                found += text.count("<math ")
                assert "$" not in re.sub(r"```.*?```|`[^`\n]*`|alttext=\"[^\"]*\"", "", text, flags=re.DOTALL)
    assert found > 40
    assert with_mathml("`$x$` costs $5") == "`$x$` costs $5"
    assert 'alttext="a &lt; b"' in to_mathml("a < b") and 'display="block"' in to_mathml("a", display=True)
    with pytest.raises(ValueError, match="can't be read"):
        to_mathml(r"\begin{bmatrix} 1")


def test_docstrings_are_taken_literally_and_their_lists_become_lists():
    text = as_rst("""Does *nothing* with a|b and `code_`.

    The method:
        method: a name in `METHODS`,
            and more.
        guide: text.

        x = code(1)

    Args:
        one: as_it * is
    """)
    assert r"\*nothing\*" in text and "a\\|b" in text and "``code_``" in text
    assert "The method:\n\n* method: a name in ``METHODS``, and more.\n\n* guide: text." in text
    assert "::\n\n   x = code(1)" in text and "Args:\n    one: as_it \\* is" in text
    assert of_data({"a": 1, "b": 2}) == "Holds ``a``, ``b``." and of_data(3.0) == "" and of_data([1]) == ""


def test_there_is_a_page_for_each_error_with_symptom_cause_and_remedy(source):
    rows = table_rows((notebooks_dir() / "errors.md").read_text(encoding="utf-8"), 3, "errors.md")
    pages = list((source / "notebooks" / "errors").glob("*.md"))
    assert len(pages) == len(rows) > 10
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.findall("^## (.*)$", text, re.MULTILINE) == ["What you see", "Why", "What to do"]
        assert f"errors/{page.stem}\n" in (source / "notebooks" / "errors.md").read_text(encoding="utf-8")


def test_every_document_is_a_page_and_the_readme_is_there_once(source):
    contents = (source / "index.md").read_text(encoding="utf-8")
    for lesson in lessons_of():
        assert (source / "notebooks" / lesson.path.name).is_file() and f"\nnotebooks/{lesson.name}\n" in contents
    both = contents + (source / "kit.md").read_text(encoding="utf-8")
    readme = (notebooks_dir().parent / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", readme, re.MULTILINE)
    assert [both.count(f"\n## {heading}\n") for heading in headings] == [1] * len(headings)
    assert "README.zh-CN.md" not in contents and (source / "data" / "emoji-diffusion" / "README.md").is_file()
    assert (source / "data/emoji-diffusion/images/objects.png").is_file() and (source / "LICENSE").is_file()
    glossary = (source / "notebooks" / "glossary.md").read_text(encoding="utf-8")
    assert "```{glossary}" in glossary and "\noracle\n  " in glossary


def test_the_demo_has_its_place_on_the_front_page_only_where_there_is_one(source, tmp_path):
    assert 'src="demo/index.html"' in (source / "index.md").read_text(encoding="utf-8")
    write_pages(tmp_path / "other", Half("en", {}, lessons_of(), demo=False, run=RUN))
    assert "demo/" not in (tmp_path / "other" / "index.md").read_text(encoding="utf-8")


def test_a_table_that_lacks_a_column_is_told():
    with pytest.raises(CourseError, match="errors.md needs a table whose rows have 3 cells"):
        table_rows("| a | b | c |\n|---|---|---|\n| one | two |\n", 3, "errors.md")


def test_the_look_at_a_site_finds_what_is_broken(tmp_path):
    (tmp_path / "b.html").write_text('<h1 id="there">b</h1>', encoding="utf-8")
    page = tmp_path / "a.html"
    page.write_text('<a href="b.html#there">b</a><a href="https://x.org">x</a><img src="data:," alt="words">',
                    encoding="utf-8")
    assert problems_of(tmp_path) == []
    page.write_text('<a href="b.html#away">b</a><a href="c.html">c</a><img src="x.png"><script src="//x.org/a.js">'
                    '</script><link rel="stylesheet" href="https://x.org/a.css">', encoding="utf-8")
    assert problems_of(tmp_path) == [
        "a.html: 1 pictures without alternative text", "a.html: loads //x.org/a.js",
        "a.html: b.html#away has no such anchor", "a.html: c.html leads to nothing",
        "a.html: loads https://x.org/a.css", "a.html: x.png leads to nothing"]


def test_slides_hold_no_solutions_and_load_nothing_from_elsewhere(tmp_path):
    for package in ("sphinx_revealjs", "latex2mathml"):
        pytest.importorskip(package, reason="pip install '.[course]'")
    chosen = lessons_of()[:2]
    write_slides(tmp_path, chosen)
    page = (tmp_path / f"{chosen[0].name}.html").read_text(encoding="utf-8")
    assert "<summary>Solution" not in page and "<summary>Hint" in page and page.count("<section>") > 10
    assert not [one for one in problems_of(tmp_path) if "leads to nothing" not in one]
    kinds = [cell.metadata["slideshow"]["slide_type"] for cell in deck(chosen[1]).cells]
    assert kinds.count("slide") > 5 and {"slide", "subslide", "-", "skip"} == set(kinds)


def test_slides_without_reveal_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CourseError, match=r"pip install -c constraints.txt '.\[course\]'"):
        copy_reveal(tmp_path)


def test_a_wrong_request_for_a_site_is_refused(tmp_path):
    from fmn_nb.course.site import SiteRequest, build_site

    with pytest.raises(CourseError, match="holds no index.html"):
        SiteRequest(demo=tmp_path)
    with pytest.raises(CourseError, match="https://github.com/OWNER/NAME"):
        SiteRequest(repository="git@github.com:someone/kit")
    pytest.importorskip("myst_nb", reason="pip install '.[course]'")
    with pytest.raises(CourseError, match="holds no run.json"):
        build_site(tmp_path / "out", SiteRequest(run=tmp_path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CourseError, match="not empty"):
        build_site(tmp_path / "mine", SiteRequest())
    assert not (tmp_path / "out").exists() and (tmp_path / "mine" / "thesis.txt").is_file()
