"""Artefacts that are whole or absent: everything is written under a temporary name and then renamed."""

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes `path`'s place, on an exception it vanishes.

    The temporary name keeps the suffix (so that libraries which choose a format by suffix work) and starts
    with a dot. Missing parent folders are made. `path` itself is never seen half written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Like `replacing`, for a folder: yields an empty temporary folder that then takes `path`'s place.

    A folder that stood at `path` is moved aside first and removed last, so a crash in between leaves
    either the old or the new folder whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = _beside(path), _beside(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def one_at_a_time(path: str | os.PathLike[str], patience: float) -> Iterator[None]:
    """Hold the lock file `path` of work that several processes share; parent folders are made.

    The system frees the lock of a process that dies. After `patience` seconds in vain go on without it, so it may only
    guard work that, done twice, is wasted and not wrong.
    """
    from filelock import FileLock, Timeout

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    with suppress(Timeout):
        lock.acquire(timeout=patience)
    try:
        yield
    finally:
        lock.release()


def without_slow_formats() -> None:
    """Keep jsonschema, which papermill imports, from preparing formats that no notebook has.

    It takes 1.4 s for them, to compile grammars of internationalised addresses. Only for processes that are this
    package's own: its command and a sweep's workers.
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  as if it were not installed


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` (UTF-8, "\\n" line ends on every system) as a whole file and return its path."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
    return Path(path)


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write `value` as indented JSON. NaN and infinities are refused: JSON has no word for them."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; a broken one is a ValueError that names the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); delete it or restore it") from error


def _beside(path: Path) -> Path:
    # Not tempfile: its files are private to their owner, and artefacts are shared.
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part{path.suffix}")
