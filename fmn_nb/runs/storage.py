"""Where a sweep's results live: a folder of this machine, or an fsspec URL such as s3://bucket/x or gs://bucket/x.

With a URL, a run works in a private folder of its worker's machine. Its files are uploaded when it ends, `run.json`
last, so that a half-uploaded run is never taken for whole. Credentials and endpoints come from the environment or from
fsspec's own configuration, never from a specification. In a folder, a lock keeps two sweeps apart; a URL has no lock:
start one sweep at a time there.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fmn_nb.files import write_json, write_text
from fmn_nb.runs.folder import RunFolder, alone_in

_PUT_WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"}  # a file appears when complete
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}


class SweepError(ValueError):
    """A specification cannot be run as it is, or a sweep's folder or storage cannot be used."""


@dataclass(frozen=True)
class Local:
    """The sweep's own folder: what is written there is stored. Its methods are what a sweep needs of any storage."""

    def held(self, folder: Path) -> AbstractContextManager[None]:
        """A context in which no other sweep works there; SweepError if one does."""
        return alone_in(folder, SweepError(f"another sweep is working in {folder}; wait for it or give another --out"))

    def fetch(self, runs: Iterable[Path]) -> None:
        """Bring what the storage knows of these runs into their local folders."""

    def keep_run(self, run: Path) -> None:
        """Store a run that ended, from its local folder."""

    def keep(self, files: Iterable[Path]) -> None:
        """Store files of the sweep itself, each appearing whole."""

    def shown(self, text: str, run: Path) -> str:
        """`text` with the run's local folder replaced by the place where its files are kept."""
        return text


@dataclass(frozen=True)
class Remote(Local):
    """A sweep's results at an fsspec URL. Only the URL travels to the workers; each opens it for itself."""

    url: str

    def held(self, folder: Path) -> AbstractContextManager[None]:
        """A context without a lock: nothing keeps another sweep away from a URL."""
        return nullcontext()

    def fetch(self, runs: Iterable[Path]) -> None:
        """Make `run.json` and `metrics.json` in each run's local folder the same as at the URL, or remove them."""
        runs = list(runs)
        with self._opened() as (files, root):
            wanted = {run / file: files._strip_protocol(f"{root}/{run.name}/{file}")
                      for run in runs for file in (RunFolder.STATE, RunFolder.METRICS)}
            found = files.cat(list(wanted.values()), on_error="return") if wanted else {}
            for run in runs:
                shutil.rmtree(run, ignore_errors=True)
            for path, there in wanted.items():
                content = found[there]
                if isinstance(content, bytes):
                    write_text(path, content.decode("utf-8", "replace"))
                elif not isinstance(content, FileNotFoundError):
                    raise content

    def keep_run(self, run: Path) -> None:
        """Upload a run in place of an earlier attempt, then remove its local folder.

        The mark `run.json` goes first and comes last; a run whose mark says neither done nor failed is not uploaded.
        """
        mark, state = RunFolder(run).state_file, RunFolder(run).state
        if state.get("status") not in ("done", "failed"):
            return
        if "error" in state:  # it names the place where the failed notebook will lie
            write_json(mark, {**state, "error": self.shown(str(state["error"]), run)})
        sent = [path for path in run.rglob("*") if path.is_file() and path != mark and not path.name.startswith(".")]
        with self._opened() as (files, root):
            there = f"{root}/{run.name}"
            if files.exists(f"{there}/{mark.name}"):
                files.rm_file(f"{there}/{mark.name}")
            if files.exists(there):
                files.rm(there, recursive=True)
            for path in sent:
                _put(files, path, f"{there}/{path.relative_to(run).as_posix()}")
            _put_whole(files, mark, f"{there}/{mark.name}")
        shutil.rmtree(run, ignore_errors=True)

    def keep(self, files: Iterable[Path]) -> None:
        """Upload files into the sweep's own folder at the URL."""
        with self._opened() as (system, root):
            for path in files:
                if path.exists():
                    _put_whole(system, path, f"{root}/{path.name}")

    def shown(self, text: str, run: Path) -> str:
        return text.replace(str(run), f"{self.url}/{run.name}")

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, str]]:
        """The file system and the URL's path in it; whatever goes wrong there is one SweepError."""
        files, root = _file_system(self.url)
        files.invalidate_cache()  # other machines write there as well
        try:
            yield files, root
        except Exception as error:  # every driver has errors of its own
            cause = " ".join(str(error).split()) or "no reason given"
            raise SweepError(f"{self.url} cannot be reached or written ({type(error).__name__}: {cause}); check "
                             "the address, the credentials in the environment and the connection") from error


def storage_at(out: Path | str) -> Local:
    """The storage that a sweep's `out` names: an fsspec URL or a local path. SweepError for a URL that can't be used.

    This doesn't access the storage.
    """
    if not str(out).strip():
        raise SweepError("the sweep's folder has an empty name; name one ('.' is this folder)")
    protocol, separator, path = str(out).partition("://")
    if not separator:
        return Local()
    if not protocol.strip() or not path.strip("/ "):
        raise SweepError(f"{out} names no folder; give one, as in s3://bucket/sweep")
    files, _ = _file_system(str(out))
    if not _can_change(files):
        raise SweepError(f"{protocol}:// can only be read; give a folder, or a URL such as s3://bucket/sweep")
    return Remote(f"{protocol}://{path.rstrip('/')}")


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.split("://", 1)[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        said = known_implementations.get(protocol, {}).get("err", str(error))
        todo = f"pip install {_PACKAGES[protocol]}" if protocol in _PACKAGES else said
        raise SweepError(f"{protocol}:// needs a package that is not installed: {todo}") from None
    except Exception as error:  # an unknown protocol, a malformed address
        raise SweepError(f"{url} cannot be used: {error}") from None


def _can_change(files: Any) -> bool:
    """Whether the file system can remove a file; one that only reads can't."""
    from fsspec import AbstractFileSystem
    from fsspec.asyn import AsyncFileSystem

    own = [kind for kind in type(files).__mro__ if kind not in (AbstractFileSystem, AsyncFileSystem)]
    return any(name in vars(kind) for kind in own for name in ("rm", "_rm", "rm_file", "_rm_file"))


def _is_object_store(files: Any) -> bool:
    return bool(_PUT_WHOLE & ({files.protocol} if isinstance(files.protocol, str) else set(files.protocol)))


def _put(files: Any, path: Path, there: str) -> None:
    if not _is_object_store(files):  # where there are no folders, making one would make a bucket
        files.makedirs(files._parent(there), exist_ok=True)
    files.put_file(str(path), there)


def _put_whole(files: Any, path: Path, there: str) -> None:
    """Upload so that the file is never seen half written: object stores ensure that, elsewhere it is renamed."""
    if _is_object_store(files):
        _put(files, path, there)
        return
    temporary = f"{files._parent(there)}/.{path.stem}.{secrets.token_hex(4)}.part{path.suffix}"
    try:
        _put(files, path, temporary)
        files.mv(temporary, there)
    finally:
        if files.exists(temporary):
            files.rm_file(temporary)
