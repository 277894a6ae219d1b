"""The course's notebooks as lessons, a site built once, and a demo page with two patches made in a second."""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fmn_nb.course.demo import BINARY, LOADER, RUNTIME, SCRIPT, DemoError, find_runtime, write_demo
from fmn_nb.course.lessons import Lesson, lessons_of
from fmn_nb.patches.patch import Patch

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Demo:
    """The page's folder and its patches; `can_run`: it has onnxruntime-web, and no stand-in for it."""

    folder: Path
    patches: list[Patch]
    can_run: bool

    @property
    def data(self) -> dict[str, Any]:
        """What data.js says."""
        return json.loads(re.search(r"\{ data: (.*) \};", (self.folder / "data.js").read_text(encoding="utf-8"))[1])

    def payload(self, name: str) -> bytes:
        """The content of a file in payload/."""
        packed = re.search(r'"([^"]*)"\);$', (self.folder / "payload" / f"{name}.js").read_text(encoding="ascii"))[1]
        return gzip.decompress(base64.b64decode(packed))


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory) -> Path:
    """A folder that looks like onnxruntime-web."""
    package = tmp_path_factory.mktemp("node") / "onnxruntime-web"
    (package / "dist").mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "version": RUNTIME}))
    for name in (SCRIPT, LOADER, BINARY):
        (package / "dist" / name).write_text(name)
    return package


@pytest.fixture(scope="session")
def demo(emoji, stand_in, tmp_path_factory) -> Demo:
    """The page. Its runtime is the npm package in node_modules/ or in the folder $FMN_NB_RUNTIME, or the stand-in."""
    import fmn_nb as fmn

    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is missing: pip install '.[course]'")
    whole = fmn.forget(emoji, "cat", preset="uce", seed=0)
    patches = [whole, whole.low_rank(4)]
    assert [patch.kind for patch in patches] == ["weights", "lora"]
    package, can_run = Path(os.environ.get("FMN_NB_RUNTIME", ROOT / "node_modules" / "onnxruntime-web")), True
    try:
        runtime = find_runtime(package)
    except DemoError:
        runtime, can_run = find_runtime(stand_in), False
    folder = tmp_path_factory.mktemp("demo") / "page"
    write_demo(folder, patches, runtime)
    return Demo(folder, patches, can_run)


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
