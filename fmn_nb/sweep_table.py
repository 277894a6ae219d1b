"""What a person sees of a sweep while it works: a live table in a terminal, else a line a run, and the time left."""

import sys
import time
from typing import Any, Self, TextIO

from fmn_nb.report_parts import FRACTIONS

LAST_ROWS = 15  # what fits a small terminal


class Pace:
    """How far a sweep is and how long the rest will take, from the runs that ended since it started."""

    def __init__(self, total: int, done: int, workers: int) -> None:
        self.total, self.before, self.done = total, done, done
        self.enough = max(3, workers)  # runs to see before the time left means anything
        self.started = time.monotonic()

    def tick(self) -> None:
        """One more run ended."""
        self.done += 1

    def seconds_left(self) -> float | None:
        """An estimate in seconds; None until a few runs have ended."""
        ended = self.done - self.before
        if ended < self.enough:
            return None
        return (time.monotonic() - self.started) / ended * (self.total - self.done)

    def __str__(self) -> str:
        left = self.seconds_left()
        said = "" if left is None or self.done == self.total else f", about {readable_time(left)} left"
        return f"{self.done} of {self.total} runs{said}"


class Watch:
    """Receives a sweep's rows as they come. This one keeps quiet."""

    pace: Pace

    def start(self, total: int, done: int, workers: int) -> None:
        """The sweep begins: `done` of `total` runs were finished earlier."""
        self.pace = Pace(total, done, workers)

    def row(self, row: dict[str, Any]) -> None:
        """A run ended; `row` is its line of the results table."""
        self.pace.tick()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        return None


class PlainLines(Watch):
    """A line when the sweep begins and one for every run that ends, for logs and places without a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream

    def start(self, total: int, done: int, workers: int) -> None:
        super().start(total, done, workers)
        self._say(f"{total} runs, {done} of them through already")

    def row(self, row: dict[str, Any]) -> None:
        super().row(row)
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f} s, "
        self._say(f"{row['folder']}: {seconds}{_state(row)} ({self.pace})")

    def _say(self, line: str) -> None:
        print(line, file=self.stream or sys.stderr, flush=True)


class LiveTable(Watch):
    """The last rows and the time left, redrawn in place on standard error."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.rows: list[dict[str, Any]] = []
        self.live = Live(console=console or Console(stderr=True), auto_refresh=False)

    def start(self, total: int, done: int, workers: int) -> None:
        super().start(total, done, workers)
        self._draw()

    def row(self, row: dict[str, Any]) -> None:
        super().row(row)
        self.rows = [*self.rows, row][-LAST_ROWS:]
        self._draw()

    def _draw(self) -> None:
        from rich.table import Table

        table = Table("run", *(name.upper() for name in FRACTIONS), "seconds", "state", title=str(self.pace), box=None)
        for row in self.rows:
            table.add_row(row["folder"], *(_figure(row.get(f"after.{name}"), 2) for name in FRACTIONS),
                          _figure(row["seconds"], 1), _state(row))
        self.live.update(table, refresh=True)

    def __enter__(self) -> Self:
        self.live.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.live.__exit__(*error)


def readable_time(seconds: float) -> str:
    """Seconds up to a minute and a half, then minutes, then hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _state(row: dict[str, Any]) -> str:
    """"done", or the first line of the run's error."""
    return "done" if row["status"] == "done" else (row["error"].splitlines() or ["failed"])[0]


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
