"""Translations: code stays, what has changed is told and in English, what is committed is what the PO files say."""

from __future__ import annotations

import shutil

import nbformat
import pytest

from fmn_nb.course import translation
from fmn_nb.course.lessons import ELSEWHERE, LINK, CourseError, lessons_of
from fmn_nb.course.paragraphs import lost, paragraphs, pieces, translated
from fmn_nb.course.translation import Catalogue, catalogues, languages, readme, readme_name, translate_notebook

polib = pytest.importorskip("polib", reason="pip install '.[course]'")
FIRST = ["00", "01", "02", "03", "04"]  # the notebooks that are translated in full
TEXT = """# A title

One paragraph with `code` and a [link](00_start_here.ipynb).

<details><summary>Solution</summary>

```python
x = 1

# a comment in code
```
</details>

| a | b |
|---|---|
| one | two |
"""


def made(tmp_path, texts: list[str], *entries: tuple) -> Catalogue:
    file = polib.POFile()
    file.extend(polib.POEntry(msgid=text, msgstr=said, flags=flags) for text, said, flags in entries)
    file.save(str(tmp_path / "x.po"))
    return Catalogue("zh_CN", "x", tmp_path / "x.po", tuple(texts))


def test_a_text_is_cut_into_what_makes_it_up_again():
    assert "".join(piece for piece, _ in pieces(TEXT)) == TEXT
    assert [piece.split("\n")[0] for piece in paragraphs(TEXT)] == [
        "# A title", "One paragraph with `code` and a [link](00_start_here.ipynb).",
        "<details><summary>Solution</summary>", "| a | b |"]
    upper = translated(TEXT, lambda text: text.upper() if text.startswith("# ") else None)
    assert upper == TEXT.replace("# A title", "# A TITLE")


@pytest.mark.parametrize("lesson", lessons_of(), ids=lambda lesson: lesson.name)
def test_every_notebook_s_prose_can_be_cut_and_put_together(lesson):
    for cell in lesson.read().cells:
        assert "".join(piece for piece, _ in pieces(cell.source)) == cell.source


@pytest.mark.parametrize("wrong, what", [
    ("见[这里](01_x.ipynb)和 `x`，$a$", "links"), ("见[这里](a.md)和 `y`，$a$", "code"),
    ("见[这里](a.md)和 `x`，$b$", "formulas"),
    ("## 见[这里](a.md)和 `x`，$a$", "headings"), ("见[这里](a.md)和 `x`，$a$ {n}", "blanks")])
def test_what_a_translation_loses_is_named(wrong, what):
    original = "See [this](a.md) and `x`, $a$"
    assert lost(original, wrong) == [what] and not lost(original, "见[这里](a.md)和 `x`，$a$")


def test_a_changed_paragraph_is_stale_and_in_english(tmp_path):
    one = made(tmp_path, ["Kept.\n\nWas said so, and now it is said in another way."],
               ("Kept.", "保留。", []), ("Was said so, and now it is said otherwise.", "曾经这样说。", []))
    assert one("Kept.\n\nWas said so, and now it is said in another way.").startswith("保留。\n\nWas said so, and now")
    assert (one.done, one.stale) == (1, 1) and "1 of 2 paragraphs (50%), 1 stale: shown in English" in one.told()
    updated = one.updated()
    [fuzzy] = updated.fuzzy_entries()
    assert fuzzy.msgid.endswith("another way.") and fuzzy.msgstr == "曾经这样说。" and fuzzy.previous_msgid
    updated.save(str(tmp_path / "x.po"))
    again = Catalogue("zh_CN", "x", tmp_path / "x.po", one.texts)
    assert again.stale == 1 and again.done == 1 and "in another way" in again(one.texts[0])
    assert again.updated() == updated  # nothing more to do, nothing lost


def test_what_is_gone_is_kept_as_obsolete_and_what_is_new_is_empty(tmp_path):
    one = made(tmp_path, ["Something entirely new"], ("Quite different words here.", "别的。", []))
    updated = one.updated()
    assert [entry.msgid for entry in updated.obsolete_entries()] == ["Quite different words here."]
    assert [entry.msgid for entry in updated.untranslated_entries()] == ["Something entirely new"]


@pytest.mark.parametrize("language", languages())
def test_committed_translations_keep_code_links_and_formulas(language):
    known = catalogues(language)
    for name, catalogue in known.items():
        print(catalogue.told())
        assert not [(name, text) for text, said in catalogue.ready.items() if lost(text, said)]
    for lesson in lessons_of():
        before, after = lesson.read(), translate_notebook(lesson.read(), lesson.name, known)
        assert [cell.id for cell in before.cells] == [cell.id for cell in after.cells]
        code = [[cell for cell in one.cells if cell.cell_type == "code"] for one in (before, after)]
        assert code[0] == code[1]
        nbformat.validate(after)


@pytest.mark.parametrize("lesson", lessons_of(FIRST), ids=lambda lesson: lesson.name)
def test_the_first_notebooks_are_in_chinese_to_the_last_paragraph(lesson):
    known = catalogues("zh_CN")
    one = known[lesson.name]
    assert one.done == len(one.wanted) and not one.stale, [text for text in one.wanted if text not in one.ready]
    notebook = translate_notebook(lesson.read(), lesson.name, known)
    assert "注意力" in "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_chinese_is_there_for_the_readme_and_the_site():
    known = catalogues("zh_CN")
    assert all(known[name].done for name in ("README", "site"))


@pytest.mark.parametrize("language", languages())
def test_the_readme_in_another_language_is_what_the_po_file_says(language):
    text = readme().read_text(encoding="utf-8")
    committed = readme().with_name(readme_name(language)).read_text(encoding="utf-8")
    said = f"fmn-nb course translate --language {language} --out DIR writes it; copy it from there"
    assert catalogues(language)["README"](text) == committed, said
    assert f"]({readme_name(language)})" in text


def test_links_to_headings_lead_to_them_in_the_other_language(tmp_path, monkeypatch):
    one = made(tmp_path, ["## The course"], ("## The course", "## 课程 安排", []))
    assert one.anchor("The-course") == "课程-安排" and one.anchor("Other") == "Other"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("[x](00_start_here.ipynb#The-course)")])
    known = {"00_start_here": one, "y": Catalogue("zh_CN", "y", tmp_path / "none.po", ())}
    assert translate_notebook(notebook, "y", known).cells[0].source == "[x](00_start_here.ipynb#课程-安排)"


def test_a_wrong_request_is_refused(tmp_path):
    with pytest.raises(CourseError, match="give a language by its code"):
        translation.translate_course(tmp_path / "out", "../zh")
    with pytest.raises(CourseError, match="no notebooks/locale/de"):
        translation.translate_course(tmp_path / "out", "de")
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_is_translated(tmp_path):
    from click.testing import CliRunner

    from fmn_nb.cli import main

    result = CliRunner().invoke(main, ["course", "translate", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "00_start_here: " in result.output and "paragraphs (" in result.output
    out = tmp_path / "out"
    texts = {path: path.read_text(encoding="utf-8") for path in out.rglob("*.md")}
    texts |= {path: "\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown")
              for path in out.rglob("*.ipynb")}
    assert len(texts) > len(lessons_of()) + 5
    missing = [(path.name, target) for path, text in texts.items() for _, _, target in LINK.findall(text)
               if not ELSEWHERE.match(target) and not (path.parent / target.partition("#")[0]).exists()]
    assert missing == []
    assert CliRunner().invoke(main, ["course", "translate"]).exit_code == 2


def test_a_new_notebook_gets_a_file_and_translations_stay(tmp_path, monkeypatch):
    shutil.copytree(translation.locale_dir("zh_CN"), tmp_path / "zh_CN")
    monkeypatch.setattr(translation, "locale_dir", lambda language: tmp_path / language)
    before = catalogues("zh_CN")["00_start_here"].done
    translation.update_catalogues("zh_CN", ["05"])
    assert list((tmp_path / "zh_CN").glob("05_*.po")) and catalogues("zh_CN")["00_start_here"].done == before > 0


def test_what_is_gone_stays_for_as_long_as_it_takes_and_comes_back_translated(tmp_path):
    texts, said = ["Kept words.", "Quite different words here."], ["留。", "别的。"]
    one = made(tmp_path, texts, *zip(texts, said, [[], []], strict=True))
    one.entries.metadata = {"Last-Translator": "somebody"}
    for wanted in (texts[:1], texts[:1], texts):
        one = Catalogue(one.language, one.name, one.path, tuple(wanted))
        one.updated().save(str(one.path))
    found = Catalogue(one.language, one.name, one.path, tuple(texts))
    assert [found.ready[text] for text in texts] == said and not found.entries.obsolete_entries()
