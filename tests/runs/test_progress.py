"""Where a run or a sweep is: a live line in a terminal, plain lines in a log, and an honest guess of the time left."""

import io
import json
import os
import re
import select
import subprocess
import sys
import time

import pytest
import yaml

from fmn_nb.runs.progress import (
    Position,
    RunProgress,
    SweepProgress,
    Where,
    clock,
    earlier_seconds,
    readable_time,
)

CELL = 'concept: str = "cat"  # what\nout: str = ""  # folder'


def row(folder, error="", seconds=None):
    return {"folder": folder, "status": "failed" if error else "done", "seconds": seconds, "error": error}


def test_a_line_a_run_and_the_time_left_after_a_few(monkeypatch):
    now = iter([0.0, 30.0, 30.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    shown = io.StringIO()
    with SweepProgress(shown) as progress:
        progress.start(33, [row("cat-0")], workers=1)
        progress.ended(row("cat-1", seconds=12.34))
        progress.ended(row("cat-2", "it broke\nlong story"))
        progress.ended(row("cat-3", seconds=1.0))
    assert shown.getvalue().splitlines() == [
        "33 runs, 1 of them done already",
        "cat-1: 12.3 s, done (2 of 33 runs)",
        "cat-2: it broke (3 of 33 runs)",
        "cat-3: 1.0 s, done (4 of 33 runs, about 5 min left)",
    ]
    assert [readable_time(seconds) for seconds in (5, 600, 9000)] == ["5 s", "10 min", "2.5 h"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_the_finished_runs_those_under_way_and_a_bar():
    shown = Terminal()
    with SweepProgress(shown) as progress:
        progress.start(3, [row("cat-0", seconds=7.0)], workers=1)
        progress.begun("cat-1")
        progress.begun("cat-2")
        progress.ended(row("cat-1", seconds=12.34))
        progress.begun("cat-3")
    said = shown.getvalue()
    assert "cat-0: 7.0 s, done" in said and "cat-1: 12.3 s, done (2 of 3 runs)" in said and "2/3" in said
    assert all(re.search(rf"  {name}  00:0\d", said) for name in ("cat-1", "cat-2", "cat-3"))


def test_a_live_line_names_cell_section_and_times():
    at = Position(27, 60, "Forgetting")
    assert str(Where(3, 4, "03_forget", 72.2, at, 50.4)) == (
        "[3/4] 03_forget  cell 27/60: Forgetting  1:12, about 0:50 left")
    assert str(Where(1, 4, "01_qkv", 0.4)) == "[1/4] 01_qkv  0:00"
    assert str(Where(1, 4, "01_qkv", 36.26, at, state="done")) == "[1/4] 01_qkv 36.3 s"
    assert (clock(3725.2), clock(59.6)) == ("1:02:05", "1:00")


def test_time_left_comes_from_an_earlier_run_and_the_pace(tmp_path, monkeypatch):
    """10, 4 and 6 s were taken before; this time the first cell took 20, and the second has run for 3."""
    monkeypatch.setattr(time, "monotonic", lambda: 123.0)
    at = Position(2, 3, first=100.0, since=120.0)
    assert at.seconds_left([10.0, 4.0, 6.0]) == 2 * 6 + 2 * 4 - 3
    assert at.seconds_left([10.0, 4.0]) is None and Position(cells=1).seconds_left([1.0]) is None

    cells = [{"metadata": {"papermill": {"duration": seconds}}} for seconds in (1.5, None)]
    (tmp_path / "frog").mkdir()
    (tmp_path / "frog" / "03.ipynb").write_text(json.dumps({"cells": cells}))
    assert earlier_seconds(tmp_path / "cat", "03.ipynb") == [1.5, 0.0]
    assert earlier_seconds(tmp_path / "cat", "04.ipynb") == []


def test_a_log_gets_no_line_a_cell_and_a_section_only_after_a_quiet_while(monkeypatch):
    now, shown = [0.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    tell = RunProgress(shown)
    for cell, section, now[0] in ((1, "One", 1), (2, "One", 2), (3, "Two", 3), (4, "Two", 50), (5, "Three", 60)):
        tell(Where(1, 1, "03", now[0], Position(cell, 5, section)))
    tell(Where(1, 1, "03", 61.0, state="done"))
    assert shown.getvalue().splitlines() == ["[1/1] 03 ...", "[1/1] 03  cell 5/5: Three  1:00", "[1/1] 03 61.0 s"]


def at_terminal(*words, cwd) -> str:
    """What the command writes to a terminal of 100 columns."""
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen([sys.executable, "-m", "fmn_nb.cli", *map(str, words)], cwd=cwd, stdin=theirs,
                               stdout=theirs, stderr=theirs)
    os.close(theirs)
    said, end = b"", time.monotonic() + 200
    while time.monotonic() < end:
        ready = select.select([ours], [], [], 1)[0]
        try:
            said += os.read(ours, 65536) if ready else b""
        except OSError:  # the other side is closed
            break
    os.close(ours)
    assert process.wait(timeout=20) == 0, said
    return said.decode()


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_at_a_terminal_a_run_shows_its_cell_and_a_sweep_its_runs(write_notebook, stub_sweep, tmp_path):
    path = write_notebook("03_stub.ipynb", CELL, "import time; time.sleep(1.5)")
    content = json.loads(path.read_text())
    content["cells"].insert(1, {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "## A section\n\ntext"})
    path.write_text(json.dumps(content))
    said = at_terminal("run", "--notebooks", path, "--out", "out", cwd=tmp_path)
    assert re.search(r"\r\[1/1\] 03_stub  cell \d/\d: A section  0:0\d", said)
    assert re.search(r"\[1/1\] 03_stub \d+\.\d s\r\n", said) and "[1/1] 03_stub ..." not in said

    spec = stub_sweep("import time; time.sleep(1.5)", grid={"seed": [0]})
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    said = at_terminal("sweep", "spec.yaml", "--out", "sweep", cwd=tmp_path)
    assert re.search(r"  model-cat-balanced-seed0-\w+  00:0[1-9]", said), "a row with a clock that goes"
    said = at_terminal("sweep", "spec.yaml", "--out", "sweep", cwd=tmp_path)
    assert re.search(r"model-cat-balanced-seed0-\w+: \d+\.\d s, done\r\n", said), "finished earlier"
