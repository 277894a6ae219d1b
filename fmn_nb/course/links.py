"""Check a built site, file by file: every link, anchor and picture is there, and no page would contact another host."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

#: attributes by which a page loads something at once
_LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src"), ("video", "src"), ("audio", "src")}
_LOADING_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "manifest"}


class _Page(HTMLParser):
    """What one page links to and loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.anchors: set[str] = set()
        self.wordless = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the tag's addresses, its id, and whether a picture has words."""
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        self.wordless += tag == "img" and not (given.get("alt") or "").strip()
        for name in ("href", "src"):
            address = given.get(name)
            if not address or address.startswith("data:"):
                continue
            ranks = set((given.get("rel") or "").split())
            loads = (tag, name) in _LOADED or (tag == "link" and ranks & _LOADING_LINKS)
            if loads or tag == "a":
                (self.loaded if loads else self.links).add(address)


def problems_of(site: Path) -> list[str]:
    """Each broken link, missing anchor, picture that is missing or has no words, and anything fetched elsewhere."""
    pages = {path: _Page(path) for path in sorted(site.rglob("*.html"))
             if "_static" not in path.relative_to(site).parts}  # there lie a theme's templates
    found = []
    for path, page in pages.items():
        where = path.relative_to(site).as_posix()
        if page.wordless:
            found.append(f"{where}: {page.wordless} pictures without alternative text")
        for address in sorted(page.links | page.loaded):
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.loaded:
                    found.append(f"{where}: loads {address}")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            if not target.is_file():
                found.append(f"{where}: {address} leads to nothing")
            elif parts.fragment and (other := pages.get(target)) and unquote(parts.fragment) not in other.anchors:
                found.append(f"{where}: {address} has no such anchor")
    return found
