"""An orderly stop: Ctrl-C and the signals with which terminals and schedulers end a command become one exception.

A run works in one process and its kernel in another, a sweep's runs in more of them. The process that gets the signal
asks the run to stop by its folder (`ask_to_stop`). The run ends its kernel, keeps what it did and raises `Stopped`.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

EXIT_CODE = 130  # what a shell expects of a command that Ctrl-C ended
_PATIENCE = 5.0  # seconds for the work to end; a signal within them changes nothing, a later one ends it at once
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP

_under_way: dict[Path, threading.Event] = {}
_struck: list[float] = []  # when the signals that were heeded came


class Stopped(KeyboardInterrupt):
    """The work was asked to end; the message says in one line what is finished and how to continue."""


@contextmanager
def telling(what_is_finished: Callable[[], str]) -> Iterator[None]:
    """A context whose KeyboardInterrupt becomes Stopped, which says what is finished by then.

    So does any error after a signal: an interrupt during the import of compiled code comes out as another error.
    """
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not isinstance(error, KeyboardInterrupt) and not _struck:
            raise
        raise Stopped(what_is_finished()) from None


def _signals() -> list[signal.Signals]:
    return [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


@contextmanager
def signals_stop() -> Iterator[None]:
    """A context of the main thread in which the first of the signals that end a command raises KeyboardInterrupt.

    More signals don't disturb the cleaning up. Signals that the process was started to ignore (nohup, a shell's "&")
    are still ignored.
    """
    _struck.clear()

    def strike(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not _struck or now > _struck[-1] + _PATIENCE:
            _struck.append(now)
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in _signals()}
    replaced = {one: handler for one, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for one in replaced:
        signal.signal(one, strike)
    try:
        yield
    except Exception:
        if not _struck:
            raise
        raise KeyboardInterrupt from None  # what it became in compiled code that was being imported
    finally:
        for one, handler in replaced.items():
            signal.signal(one, handler)
        _struck.clear()  # errors of whatever comes later in this process are its own


def leave_signals_to_parent() -> None:
    """Ignore what a terminal or a scheduler sends to a whole process group, in a process that its parent ends.

    SIGTERM still counts if the parent has not done so after `_PATIENCE` seconds.
    """

    def pass_over(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            late = threading.Timer(_PATIENCE, os._exit, [128 + number])
            late.daemon = True
            late.start()

    if threading.current_thread() is threading.main_thread():
        for one in _signals():
            signal.signal(one, pass_over)  # not SIG_IGN, which kernels would inherit
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _signals())


@contextmanager
def signals_held() -> Iterator[None]:
    """A context in which the signals wait: they reach this thread at its end, and processes started in it once they
    have called `leave_signals_to_parent`.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_at_once() -> None:
    """End this process, after what is registered for its end, without waiting for its threads.

    Python itself would wait, and would take an interrupt in code made from text, as dataclasses are, for unhandled.
    """
    with suppress(BaseException):
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(EXIT_CODE)


def keep_semaphores_tracked() -> None:
    """Start the process that tracks multiprocessing's semaphores; it ignores two of the signals, and so all three.

    It removes what a killed process left, without a warning.
    """
    from multiprocessing import resource_tracker

    if hasattr(signal, "SIGHUP") and threading.current_thread() is threading.main_thread():
        before, warnings = signal.signal(signal.SIGHUP, signal.SIG_IGN), os.environ.get("PYTHONWARNINGS")
        os.environ["PYTHONWARNINGS"] = "ignore"
        resource_tracker.ensure_running()
        signal.signal(signal.SIGHUP, before)
        del os.environ["PYTHONWARNINGS"]
        os.environ.update({} if warnings is None else {"PYTHONWARNINGS": warnings})


@contextmanager
def stoppable(folders: Iterable[Path]) -> Iterator[None]:
    """A context in which the runs of this process that work in `folders` can be asked to stop."""
    events = {folder: _under_way.get(folder) or threading.Event() for folder in folders}
    new = [folder for folder in events if folder not in _under_way]
    _under_way.update(events)
    try:
        yield
    finally:
        for folder in new:
            _under_way.pop(folder, None)


def ask_to_stop(folders: Iterable[Path]) -> None:
    """Ask those of the runs in `folders` that this process executes to stop; they do in about a second."""
    for folder in folders:
        if folder in _under_way:
            _under_way[folder].set()


def asked_to_stop(folder: Path) -> bool:
    """Whether the run in `folder` was asked to stop."""
    return folder in _under_way and _under_way[folder].is_set()
