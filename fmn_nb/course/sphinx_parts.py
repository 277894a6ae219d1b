"""What the site adds to Sphinx: formulas as MathML, Chinese search, this package's docstrings."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.search import SearchLanguage

from fmn_nb.course.docstrings import as_rst, of_data
from fmn_nb.course.formulas import to_mathml


class ChinesePairs(SearchLanguage):
    """Cuts Chinese text into pairs of neighbouring characters, both in the index and in what a reader types."""

    lang, language_name = "zh", "Chinese"
    _runs = re.compile(r"[\u3400-\u9fff]+|[a-zA-Z0-9_]+")
    js_splitter_code = r"""
var splitQuery = function (query) {
  var found = query.match(/[\u3400-\u9fff]+|[a-zA-Z0-9_]+/g) || [];
  return found.flatMap(function (run) {
    if (!/[\u3400-\u9fff]/.test(run) || run.length < 2) return [run];
    return Array.from({length: run.length - 1}, function (_, n) { return run.slice(n, n + 2); });
  });
};
"""

    def split(self, text: str) -> list[str]:
        """The words of a text, for the index."""
        found = []
        for run in self._runs.findall(text):
            chinese = len(run) > 1 and "\u3400" <= run[0] <= "\u9fff"
            found += [run[n:n + 2] for n in range(len(run) - 1)] if chinese else [run]
        return found


def setup(app: Sphinx) -> dict[str, Any]:
    """What Sphinx calls."""
    app.add_html_math_renderer("mathml", (_inline, None), (_display, None))
    app.add_search_language(ChinesePairs)
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon reads the sections
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(to_mathml(node.astext()))
    raise nodes.SkipNode


def _display(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math" tabindex="0">{to_mathml(node.astext(), display=True)}</div>')
    raise nodes.SkipNode


def _docstring(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn the docstring into reStructuredText, before napoleon reads its sections."""
    lines[:] = (of_data(thing) if what == "data" else as_rst("\n".join(lines))).split("\n") + [""]
