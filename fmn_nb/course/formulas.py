"""Formulas as MathML, which browsers show without a script or a download, and which screen readers read."""

from __future__ import annotations

import re
from html import escape

_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$(?![\w$])", re.DOTALL)


def to_mathml(tex: str, display: bool = False) -> str:
    """TeX as a `<math>` element, with the TeX itself as what screen readers may say instead.

    Raises:
        ValueError: latex2mathml can't read it; the message quotes the formula.
    """
    from latex2mathml.converter import convert

    try:
        element = convert(" ".join(tex.split()), display="block" if display else "inline")
    except Exception as error:  # its errors have no common class
        raise ValueError(f"the formula {tex!r} can't be read ({error!r}); write it in plainer TeX") from error
    return element.replace("<math ", f'<math alttext="{escape(tex.strip())}" ', 1)


def with_mathml(markdown: str) -> str:
    """Markdown whose `$...$` and `$$...$$` outside of code are MathML."""
    parts = _CODE.split(markdown)  # text and code in turn
    parts[::2] = [_FORMULA.sub(lambda found: to_mathml(found[1] or found[2], display=found[1] is not None), part)
                  for part in parts[::2]]
    return "".join(parts)
