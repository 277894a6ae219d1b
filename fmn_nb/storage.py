"""Where a sweep's results live: a folder of this machine, or an fsspec URL such as s3://bucket/x or gs://bucket/x.

At a URL a run works in a private folder of its worker's machine. Its files are uploaded when it ends, `run.json`
last, so that a half-uploaded run is never taken for whole. Credentials and endpoints come from the environment
or from fsspec's own configuration, never from a specification.
"""

import getpass
import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil
from filelock import FileLock, Timeout

from fmn_nb.files import read_json, write_json, write_text

RUN_FILE, METRICS_FILE, LEASE_FILE = "run.json", "metrics.json", ".lease.json"
LEASE_FRESH = 120.0  # seconds after which a lease nobody refreshed is free; the clocks may differ by as much
LEASE_REFRESH = 30.0  # seconds between two refreshments
LEASE_SETTLE = 1.0  # seconds after which, of two sweeps that begin together, one sees the other's lease
_PUT_WHOLE = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss", "memory"}  # a file appears when complete


class SweepError(ValueError):
    """A specification that cannot be run as it stands, or a sweep's folder or storage that cannot be used."""


class Storage(Protocol):
    """What a sweep needs of the place where its results are kept."""

    def held(self, folder: Path) -> Any:
        """A context in which no other sweep works there; SweepError if one does."""

    def fetch(self, runs: Iterable[Path]) -> None:
        """Bring what the storage knows of these runs into their local folders."""

    def keep_run(self, run: Path) -> None:
        """Store a run that ended, from its local folder."""

    def keep(self, files: Iterable[Path]) -> None:
        """Store files of the sweep itself, each appearing whole."""

    def shown(self, text: str, run: Path) -> str:
        """`text` with the run's local folder replaced by the place where its files are kept."""


@dataclass(frozen=True)
class Local:
    """The sweep's own folder: what is written there is stored."""

    def held(self, folder: Path) -> Any:
        return _locked(folder)

    def fetch(self, runs: Iterable[Path]) -> None:
        pass

    def keep_run(self, run: Path) -> None:
        pass

    def keep(self, files: Iterable[Path]) -> None:
        pass

    def shown(self, text: str, run: Path) -> str:
        return text


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise SweepError(f"another sweep is working in {folder}; wait for it or give another --out") from None


@dataclass(frozen=True)
class Remote:
    """A sweep's results at an fsspec URL. Only the URL travels to the workers; each opens it for itself."""

    url: str

    @contextmanager
    def held(self, folder: Path) -> Iterator[None]:
        """Hold the URL's lease, refreshed by a thread until the end."""
        with _Lease(self):
            yield

    def fetch(self, runs: Iterable[Path]) -> None:
        """Write `run.json` and `metrics.json` of each run to its local folder as they are at the URL, or remove them.

        A run that has a report there gets an empty stand-in, for the sweep's report to link to.
        """
        runs = list(runs)
        with self._opened() as (files, root):
            wanted = {run / file: files._strip_protocol(f"{root}/{run.name}/{file}")
                      for run in runs for file in (RUN_FILE, METRICS_FILE)}
            found = files.cat(list(wanted.values()), on_error="return") if wanted else {}
            for run in runs:
                shutil.rmtree(run, ignore_errors=True)
            for path, there in wanted.items():
                content = found[there]
                if isinstance(content, bytes):
                    write_text(path, content.decode("utf-8", "replace"))
                elif not isinstance(content, FileNotFoundError):
                    raise content
        for run in runs:
            if _status(run / RUN_FILE) == "done":
                (run / "report.html").touch()

    def keep_run(self, run: Path) -> None:
        """Upload a run in place of an earlier attempt, then remove its local folder.

        The mark `run.json` goes first and comes last; a run whose mark says neither done nor failed is not uploaded.
        """
        mark = run / RUN_FILE
        if _status(mark) not in ("done", "failed"):
            return
        _point_to(mark, self, run)
        sent = [path for path in run.rglob("*") if path.is_file() and path != mark and not path.name.startswith(".")]
        with self._opened() as (files, root):
            there = f"{root}/{run.name}"
            if files.exists(f"{there}/{RUN_FILE}"):
                files.rm_file(f"{there}/{RUN_FILE}")
            if files.exists(there):
                files.rm(there, recursive=True)
            for path in sent:
                _put(files, path, f"{there}/{path.relative_to(run).as_posix()}")
            _put_whole(files, mark, f"{there}/{RUN_FILE}")
        shutil.rmtree(run, ignore_errors=True)

    def keep(self, files: Iterable[Path]) -> None:
        """Upload files into the sweep's own folder at the URL."""
        with self._opened() as (system, root):
            for path in files:
                if path.exists():
                    _put_whole(system, path, f"{root}/{path.name}")

    def shown(self, text: str, run: Path) -> str:
        return text.replace(str(run), f"{self.url}/{run.name}")

    def read_lease(self) -> dict[str, Any] | None:
        """The lease that lies at the URL; None where there is none, or none that can be read."""
        with self._opened() as (files, root):
            try:
                lease = json.loads(files.cat_file(f"{root}/{LEASE_FILE}"))
                return lease if isinstance(lease.get("time"), int | float) else None
            except (FileNotFoundError, ValueError, AttributeError):
                return None

    def write_lease(self, lease: dict[str, Any] | None) -> None:
        """Write the lease, or remove it."""
        with self._opened() as (files, root):
            if lease is not None:
                _make_folder(files, root)
                files.pipe_file(f"{root}/{LEASE_FILE}", json.dumps(lease).encode())
            elif files.exists(f"{root}/{LEASE_FILE}"):
                files.rm_file(f"{root}/{LEASE_FILE}")

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, str]]:
        """The file system and the URL's path in it; whatever goes wrong there is one SweepError."""
        files, root = _file_system(self.url)
        files.invalidate_cache()  # other machines write there as well
        try:
            yield files, root
        except SweepError:
            raise
        except Exception as error:  # every driver has errors of its own
            cause = " ".join(str(error).split()) or "no reason given"
            raise SweepError(f"{self.url} cannot be reached or written ({type(error).__name__}: {cause}); look at "
                               "the address, the credentials in the environment and the connection") from error


def is_url(out: object) -> bool:
    """Whether a sweep's `out` names an fsspec URL rather than a local path."""
    return "://" in str(out)


def check_url(url: str) -> str:
    """The URL without a slash at its end; SweepError when fsspec has no driver for it. Nothing is reached for."""
    protocol, path = url.split("://", 1)
    if not path.strip("/"):
        raise SweepError(f"{url} names no folder; give one, as in s3://bucket/sweep")
    _file_system(url)
    return f"{protocol}://{path.rstrip('/')}"


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs
    from fsspec.registry import known_implementations

    protocol = url.split("://", 1)[0]
    try:
        return url_to_fs(url)
    except ImportError as error:
        said = known_implementations.get(protocol, {}).get("err", str(error))
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(protocol)
        todo = f"pip install {package}" if package else said
        raise SweepError(f"{protocol}:// needs a package that is not installed: {todo}") from None
    except Exception as error:  # an unknown protocol, a malformed address
        raise SweepError(f"{url} cannot be used: {error}") from None


def _status(mark: Path) -> str | None:
    try:
        return read_json(mark).get("status")
    except (OSError, ValueError, AttributeError):
        return None


def _point_to(mark: Path, storage: Remote, run: Path) -> None:
    """Let a failed run's error name the place where its notebook will lie."""
    state = read_json(mark)
    if "error" in state:
        write_json(mark, {**state, "error": storage.shown(str(state["error"]), run)})


def _is_object_store(files: Any) -> bool:
    return bool(_PUT_WHOLE & ({files.protocol} if isinstance(files.protocol, str) else set(files.protocol)))


def _make_folder(files: Any, folder: str) -> None:
    """Make a folder where there are any; in an object store a wrong name would make a new bucket."""
    if not _is_object_store(files):
        files.makedirs(folder, exist_ok=True)


def _put(files: Any, path: Path, there: str) -> None:
    _make_folder(files, files._parent(there))
    files.put_file(str(path), there)


def _put_whole(files: Any, path: Path, there: str) -> None:
    """Upload so that the file is never seen half written: object stores see to it, others rename."""
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


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return "somebody"


class _Lease:
    """One sweep's claim on a URL: an object with its owner and time, refreshed while the sweep lives.

    A lease is free when nobody refreshed it for `LEASE_FRESH` seconds, or when its owner was a process of this
    machine that has ended.
    """

    def __init__(self, storage: Remote) -> None:
        self.storage = storage
        self.owner = {
            "user": _user(), "host": socket.gethostname(), "pid": os.getpid(),
            "born": psutil.Process().create_time(), "token": secrets.token_hex(8),
        }
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._refresh, daemon=True)

    def __enter__(self) -> None:
        self._refuse_if_taken()
        self.storage.write_lease({**self.owner, "time": time.time()})
        time.sleep(LEASE_SETTLE)
        self._refuse_if_taken()
        self.thread.start()

    def __exit__(self, *error: Any) -> None:
        self.ended.set()
        self.thread.join()
        with suppress(SweepError):  # what the sweep itself met is the better message
            if self._mine(self.storage.read_lease()):
                self.storage.write_lease(None)

    def _mine(self, lease: dict[str, Any] | None) -> bool:
        return lease is not None and lease.get("token") == self.owner["token"]

    def _refuse_if_taken(self) -> None:
        lease = self.storage.read_lease()
        if lease is None or self._mine(lease):
            return
        left = lease["time"] + LEASE_FRESH - time.time()
        if left > 0 and not self._owner_is_dead(lease):
            raise SweepError(
                f"another sweep is working at {self.storage.url} ({lease.get('user')} on {lease.get('host')}, process "
                f"{lease.get('pid')}); wait for it or give another --out; if it was killed, its claim ends in "
                f"{left:.0f} s"
            )

    def _owner_is_dead(self, lease: dict[str, Any]) -> bool:
        if lease.get("host") != self.owner["host"]:
            return False
        try:
            return psutil.Process(lease["pid"]).create_time() != lease["born"]
        except (psutil.NoSuchProcess, KeyError):
            return True

    def _refresh(self) -> None:
        while not self.ended.wait(LEASE_REFRESH):
            with suppress(SweepError):  # storage may be away for a moment; what fails for long fails in the runs
                self.storage.write_lease({**self.owner, "time": time.time()})
