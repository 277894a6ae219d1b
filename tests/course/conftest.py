"""The course's notebooks as lessons, and a site built once."""

from pathlib import Path

import pytest

from fmn_nb.course.lessons import Lesson, lessons_of


@pytest.fixture(scope="session")
def lessons() -> list[Lesson]:
    """All notebooks of the course."""
    return lessons_of()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole site in both languages, with a demo's place filled, without the reference (which CI builds as well)."""
    pytest.importorskip("myst_nb", reason="pip install '.[course]'")
    from fmn_nb.course.site import SiteRequest, build_site

    demo = tmp_path_factory.mktemp("demo")
    (demo / "index.html").write_text('<!DOCTYPE html><html lang="en"><title>x</title><p>touch me</p>', encoding="utf-8")
    out = tmp_path_factory.mktemp("course") / "site"
    request = SiteRequest(demo=demo, repository="https://github.com/someone/kit", branch="dev", reference=False)
    return build_site(out, request).parent
