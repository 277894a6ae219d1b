"""Split Markdown into paragraphs to translate, and join them again; code and what has no words stay as they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from fmn_nb.course.lessons import LINK

_PIECE = re.compile(  # fenced code to its end, a comment, blank lines, or a run of lines up to one of these
    r"(?P<fence>^[ ]*```.*?^[ ]*```[^\n]*$)|(?P<comment>^<!--.*?-->$)|(?P<blank>(?:^[ \t]*\n|\n)+)"
    r"|(?P<text>(?:^(?![ ]*```|<!--)[^\n]*\S[^\n]*(?:\n(?=[^\n]*\S)(?![ ]*```|<!--)|$))+)", re.DOTALL | re.MULTILINE)
_WORDLESS = re.compile(r"`[^`]*`|\$[^$]*\$|<[^>]*>|https?://\S+|\]\([^)]*\)|&\w+;")
_CODE = re.compile(r"`([^`]+)`|<code>(.*?)</code>", re.DOTALL)
_FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$", re.DOTALL)
_README = re.compile(r"README(\.[\w-]+)?\.md")
_HEADING = re.compile(r"^#+ ", re.MULTILINE)


def pieces(text: str) -> list[tuple[str, bool]]:
    """The text cut into pieces that together make it up, and whether to translate each.

    A paragraph, a heading, a list or a table is one piece.
    """
    found, end = [], 0
    for match in _PIECE.finditer(text):
        if match.start() > end:  # nothing that has words is lost, whatever it is
            found.append((text[end:match.start()], False))
        found.append((match[0], match.lastgroup == "text" and _has_words(match[0])))
        end = match.end()
    return [*found, (text[end:], False)] if end < len(text) else found


def paragraphs(text: str) -> list[str]:
    """The pieces to translate."""
    return [piece for piece, wanted in pieces(text) if wanted]


def translated(text: str, known: Callable[[str], str | None]) -> str:
    """The text with each paragraph in the words that `known` has for it, or in its own if there are none."""
    return "".join((known(piece) or piece) if wanted else piece for piece, wanted in pieces(text))


def lost(original: str, translation: str) -> list[str]:
    """What a translation must keep and doesn't: links, code, formulas, {blanks}, the ranks of headings, a table's rows.

    One link always differs: the link from a README to the README in another language.
    """
    parts: dict[str, Callable[[str], object]] = {
        "links": lambda text: Counter(found[2] for found in LINK.findall(text) if not _README.fullmatch(found[2])),
        "blanks": lambda text: Counter(re.findall(r"\{\w+\}", text)),
        "code": lambda text: Counter(" ".join((one or other).split()) for one, other in _CODE.findall(text)),
        "formulas": lambda text: Counter(_FORMULA.findall(_CODE.sub("", text))),
        "headings": _HEADING.findall,
        "table rows": lambda text: sum(line.startswith("|") for line in text.split("\n")),
    }
    return [name for name, of in parts.items() if of(original) != of(translation)]


def _has_words(block: str) -> bool:
    return bool(re.search(r"[^\W\d_]{2}", _WORDLESS.sub("", block))) and not block.startswith("    ")
