"""The progress of a run or a sweep: live lines in a terminal, plain lines in a log."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from glob import escape
from pathlib import Path
from typing import Any, Self, TextIO

from fmn_nb.runs.folder import Row

TOO_LITTLE = 3.0  # seconds of an earlier run's cells that are too few to tell the pace
QUIET = 30.0  # seconds without a line, after which a log gets one for the next section


@dataclass
class Position:
    """Where an executing notebook is; its executor's thread sets it. `cell` counts from 1, `section` is a heading."""

    cell: int = 0
    cells: int = 0
    section: str = ""
    first: float = 0.0  # when its first cell began, by time.monotonic, and the present one
    since: float = 0.0

    def begin(self, cell: int, cells: int, section: str) -> None:
        """A cell begins."""
        self.since = time.monotonic()
        self.first = self.first or self.since
        self.cell, self.cells, self.section = cell, cells, section

    def seconds_left(self, earlier: list[float]) -> float | None:
        """The time left, judging by the seconds of an earlier run's cells and by the pace so far; None if unknown."""
        if not self.cell or len(earlier) != self.cells:
            return None
        before, rest = sum(earlier[:self.cell - 1]), sum(earlier[self.cell:])
        pace = (self.since - self.first) / before if before > TOO_LITTLE else 1.0
        return pace * rest + max(0.0, pace * earlier[self.cell - 1] - (time.monotonic() - self.since))


@dataclass(frozen=True)
class Where:
    """A moment of a run: which notebook, where in it, for how long, and, if known, how much longer."""

    number: int
    notebooks: int
    name: str
    seconds: float = 0.0
    position: Position = field(default_factory=Position)
    left: float | None = None
    state: str = "running"  # or done, failed, stopped

    @property
    def title(self) -> str:
        """ "[3/4] 03_forget_me_not". """
        return f"[{self.number}/{self.notebooks}] {self.name}"

    def __str__(self) -> str:
        if self.state != "running":
            return f"{self.title} " + (f"{self.seconds:.1f} s" if self.state == "done" else self.state)
        at = self.position
        place = f"  cell {at.cell}/{at.cells}" + (f": {at.section}" if at.section else "") if at.cell else ""
        left = "" if self.left is None else f", about {clock(self.left)} left"
        return f"{self.title}{place}  {clock(self.seconds)}{left}"


Tell = Callable[[Where], None]


def earlier_seconds(out: Path, notebook: str) -> list[float]:
    """Seconds of each of the notebook's cells at its last execution in `out` or a folder beside it; empty if none."""
    found: list[tuple[float, Path]] = []
    for path in out.parent.glob(f"*/{escape(notebook)}"):
        with suppress(OSError):
            found.append((path.stat().st_mtime, path))
    try:
        cells = json.loads(max(found)[1].read_text(encoding="utf-8"))["cells"]
        return [float(cell["metadata"]["papermill"]["duration"] or 0) for cell in cells]
    except (ValueError, KeyError, TypeError, OSError):  # ValueError: there is none
        return []


class RunProgress:
    """A run's moments on `stream`: one live line in a terminal; in a log, lines as notebooks start and end.

    In a log that has been quiet for `QUIET` seconds, a new section gets a line, too.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream, self.bar = stream or sys.stderr, None
        self._said = self._title = self._section = ""
        self._when = 0.0

    def __call__(self, where: Where) -> None:
        """Tell where the run is; may be called any number of times."""
        if where.state != "running":
            self._say(str(where))
        elif self.stream.isatty():
            self._show(str(where))
        elif where.title != self._title:
            self._say(f"{where.title} ...")
        elif where.position.section != self._section and time.monotonic() > self._when + QUIET:
            self._say(str(where))
        self._title, self._section = where.title, where.position.section

    def _show(self, text: str) -> None:
        if self.bar is None:
            self.bar = _line(self.stream)
        if text != self._said:
            self.bar.set_description_str(text)
            self._said = text

    def _say(self, line: str) -> None:
        self._when = time.monotonic()
        self.close()
        print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Remove the live line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class SweepProgress:
    """The progress of a sweep: a line per run on `stream` (none if it is None).

    In a terminal, the current runs are below them, each with its clock, and a bar at the end.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream, self.bar, self._running = stream, None, {}
        self._over = threading.Event()

    @classmethod
    def shown(cls) -> Self:
        """On standard error."""
        return cls(sys.stderr)

    def start(self, total: int, finished: list[Row], workers: int) -> None:
        """The sweep begins: `finished` holds the rows of those of its `total` runs that are done already."""
        done = len(finished)
        self.total, self.before, self.done = total, done, done
        self.enough = max(3, workers)  # runs to see before the time left means anything
        self.started = time.monotonic()
        self.say(f"{total} runs, {done} of them done already")
        if self.stream is not None and self.stream.isatty():
            from tqdm import tqdm

            for row in finished:
                self.say(_told(row))
            self.bar = tqdm(total=total, initial=done, file=self.stream, unit="run", dynamic_ncols=True)
            threading.Thread(target=self._tick, daemon=True).start()

    def begun(self, run: str) -> None:
        """A worker got the run."""
        if self.bar is not None:
            taken = {-bar.pos for bar in self._running.values()}
            place = next(number for number in range(1, len(taken) + 2) if number not in taken)
            self._running[run] = _line(self.stream, "{desc}  {elapsed}", desc=f"  {run}", position=place)

    def ended(self, row: Row) -> None:
        """A run ended; `row` is its line of the results table."""
        self.done += 1
        if row["folder"] in self._running:
            self._running.pop(row["folder"]).close()
        self.say(f"{_told(row)} ({self})")
        if self.bar is not None:
            self.bar.update()

    def say(self, line: str) -> None:
        """A line of its own, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(line, file=self.stream)
        elif self.stream is not None:
            print(line, file=self.stream, flush=True)

    def seconds_left(self) -> float | None:
        """An estimate from the runs that ended since the start; None until a few have."""
        ended = self.done - self.before
        return (time.monotonic() - self.started) / ended * (self.total - self.done) if ended >= self.enough else None

    def __str__(self) -> str:
        left = self.seconds_left()
        said = "" if left is None or self.done == self.total else f", about {readable_time(left)} left"
        return f"{self.done} of {self.total} runs{said}"

    def _tick(self) -> None:
        while not self._over.wait(1):
            for bar in (*self._running.values(), self.bar):
                bar.refresh()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        for bar in (*self._running.values(), *([self.bar] if self.bar is not None else [])):
            bar.close()


def _line(stream: TextIO, shown: str = "{desc}", **options: Any) -> Any:
    """A line of text at a terminal's end that can be rewritten, cut at the terminal's width."""
    from tqdm import tqdm

    return tqdm(file=stream, bar_format=shown, dynamic_ncols=True, leave=False, **options)


def _told(row: Row) -> str:
    """A run that ended, in one line."""
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f} s, "
    state = "done" if row["status"] == "done" else (row["error"].splitlines() or ["failed"])[0]
    return f"{row['folder']}: {seconds}{state}"


def clock(seconds: float) -> str:
    """Minutes and seconds, "1:12", with hours before them if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def readable_time(seconds: float) -> str:
    """Seconds up to a minute and a half, then minutes, then hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
