"""What running notebooks costs beside the notebooks themselves, each figure with its bar.

    python tests/speed/bench_runs.py [help] [bookkeeping] [overhead] [workers] [cores]   all by default, some 20 minutes

    help          seconds until `fmn-nb --help` has answered, median of nine
    bookkeeping   a sweep of 1,000 runs whose notebook is a stub: milliseconds a run of all the rest (the check of its
                  parameters, its worker's start, folder, state, report, rows and tables), and of finding it finished
                  later; seconds of a sweep's page
    overhead      seconds that `fmn-nb run` of notebooks 01 to 04 (two fine-tuning steps) takes beside its cells, as
                  papermill timed these: its own import, planning, four kernels started and ended, metrics, the report.
                  Below it, what the cells that first import fmn_nb take, which papermill counts as the notebooks'
    workers       runs an hour of an 8-run sweep with two workers against one: notebook 03 with two fine-tuning steps
                  on four concepts and two seeds, in the order 1, 2, 2, 1 workers
    cores         seconds of 24 images of 20 steps with the kit's waiting of threads: alone, against OpenMP's own, and
                  in two processes at once, against alone

Ends with exit code 1 if a bar is missed. Leave the machine alone meanwhile; `workers` needs two cores.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import supported  # noqa: F401
import yaml
from written_notebooks import write_notebook_at

import fmn_nb
from fmn_nb.runs import runner as runs
from fmn_nb.runs import sweep as sweeps
from fmn_nb.runs.executors import THREADS, patient_threads
from fmn_nb.runs.plan import Notebook, Plan
from fmn_nb.runs.report import write_report
from fmn_nb.runs.spec import plan_sweep
from fmn_nb.runs.storage import Local

COMMAND = [sys.executable, "-m", "fmn_nb.cli"]
CELL = 'concept: str = "cat"  # what\nseed: int = 0  # seed\nout: str = ""  # folder'
CONCEPTS = ["cat", "dog", "frog", "penguin", "fish", "octopus", "banana", "cactus", "car", "guitar"]
SEEDS = 100
real_attempt = sweeps.attempt


def seconds_of(*words: str, folder: str | None = None) -> float:
    """The seconds by the clock of a `fmn-nb` command; one that fails ends the benchmark with its error."""
    started = time.perf_counter()
    result = subprocess.run([*COMMAND, *words], cwd=folder, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"fmn-nb {' '.join(words)}\n{result.stdout}{result.stderr}")
    return time.perf_counter() - started


def within(what: str, found: float, bar: float, unit: str, *, least: bool = False) -> bool:
    """Print a figure beside its bar and return whether it keeps it."""
    kept = found >= bar if least else found <= bar
    print(f"{what:58} {found:7.2f} {unit:10} {'at least' if least else 'at most':8} {bar:5.1f}   "
          f"{'kept' if kept else 'MISSED'}", flush=True)
    return kept


def bench_help() -> bool:
    return within("fmn-nb --help", statistics.median(seconds_of("--help") for _ in range(9)), 0.3, "s")


def stub_notebook(notebook: Notebook, out: Path) -> Path:
    """In place of a notebook's execution: its figures and its seconds, nothing else."""
    started = time.perf_counter()
    fmn_nb.record(out, {"after": {"ua": len(notebook.values["concept"]) / 10, "ira": 0.9, "cra": 0.9, "h": 0.9}})
    (out / notebook.path.name).write_text(repr(time.perf_counter() - started), encoding="utf-8")
    return out / notebook.path.name


def stubbed_attempt(plan: Plan, storage: Local = Local()) -> str | None:  # noqa: B008  as the one it stands for
    """A sweep's attempt at a run, in its worker, with the stub in place of the notebook's execution."""
    runs.execute_notebook = stub_notebook
    return real_attempt(plan, storage)


def bench_bookkeeping() -> bool:
    sweeps.attempt, kept = stubbed_attempt, []
    with tempfile.TemporaryDirectory() as folder:
        notebook, spec, out = Path(folder, "03_stub.ipynb"), Path(folder, "spec.yaml"), Path(folder, "out")
        write_notebook_at(notebook, CELL)
        spec.write_text(yaml.safe_dump(
            {"notebook": str(notebook), "grid": {"concept": CONCEPTS, "seed": list(range(SEEDS))}}))
        for what in ("a sweep of 1,000 stub runs, each", "the same sweep again, each run found finished"):
            started = time.perf_counter()
            sweep = plan_sweep(spec, out)
            planned = time.perf_counter() - started
            _, failed = sweeps.run_sweep(sweep, page=False)
            taken = time.perf_counter() - started
            if failed:
                raise SystemExit(failed[0]["error"])
            stubs = 0.0 if kept else sum(float(one.read_text()) for one in out.glob("*/03_stub.ipynb"))
            count = len(sweep.plans)
            kept.append(within(f"{what} (planning {planned / count * 1000:.1f})", (taken - stubs) / count * 1000,
                               2 if len(kept) else 10, "ms"))
        started = time.perf_counter()
        write_report(out)
        kept.append(within("its page, notebook 07 executed", time.perf_counter() - started, 30, "s"))
    return all(kept)


def cells_of(notebook: Path) -> tuple[float, float]:
    """Seconds of an executed notebook's cells, as papermill timed them: of all, and of the one that imports fmn_nb."""
    cells = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]
    seconds = [cell.metadata.papermill.duration or 0.0 for cell in cells]
    first = next(index for index, cell in enumerate(cells) if "fmn_nb" in cell.source)
    return sum(seconds), seconds[first]


def bench_overhead() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        taken = seconds_of("run", "--notebooks", "01,02,03,04", "-p", "steps=2", "--out", "out", folder=folder)
        cells = [cells_of(path) for path in sorted(Path(folder, "out").glob("*.ipynb"))]
    own, imports = (sum(column) for column in zip(*cells, strict=True))
    kept = within(f"fmn-nb run, {len(cells)} notebooks, beside {own:.1f} s of cells", taken - own, 6, "s")
    print(f"  the first imports of fmn_nb, among these cells: {imports:.1f} s", flush=True)
    return kept


def bench_workers() -> bool:
    content = {"notebook": "03", "fixed": {"steps": 2}, "grid": {"concept": CONCEPTS[:4], "seed": [0, 1]}}
    taken: dict[int, list[float]] = {1: [], 2: []}
    for workers in (1, 2, 2, 1):
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "spec.yaml").write_text(yaml.safe_dump(content))
            taken[workers].append(seconds_of("sweep", "spec.yaml", "--workers", str(workers), folder=folder))
        print(f"  8 runs of notebook 03 with {workers} worker{'s' * (workers > 1)}: {taken[workers][-1]:.1f} s",
              flush=True)
    return within("throughput of two workers over one", sum(taken[1]) / sum(taken[2]), 1.7, "x", least=True)


DRAW = """
import sys, time, fmn_nb as fmn
pipe = fmn.load("emoji")
fmn.generate(pipe, ["a photo of a cat"] * 2, [0, 1], steps=2)
print("ready", flush=True), sys.stdin.readline()
started = time.perf_counter()
fmn.generate(pipe, ["a photo of a cat"] * 24, list(range(24)), steps=20)
print(time.perf_counter() - started)
"""


def drawing(processes: int, waiting: dict[str, str]) -> float:
    """The seconds of the slowest of so many processes that draw at once."""
    environment = {name: value for name, value in os.environ.items() if name not in THREADS} | waiting
    started = [subprocess.Popen([sys.executable, "-c", DRAW], env=environment, text=True, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(processes)]
    for one in started:  # all loaded and warm
        one.stdout.readline()
    for one in started:
        one.stdin.write("\n")
        one.stdin.flush()
    return max(float(one.communicate()[0]) for one in started)


def bench_cores() -> bool:
    kits, found = patient_threads({}), {"own": [], "alone": [], "two": []}
    for _ in range(3):
        for name, processes, waiting in (("own", 1, {}), ("alone", 1, kits), ("two", 2, kits)):
            found[name].append(drawing(processes, waiting))
    own, alone, two = (statistics.median(seconds) for seconds in found.values())
    print(f"  24 images: {own:.2f} s as OpenMP waits, {alone:.2f} s as the kit lets it, two at once {two:.2f} s")
    return all([within("alone, against OpenMP's own waiting", alone / own, 1.05, "x"),
                within("two at once, against alone", two / alone, 2.1, "x")])


BENCHES: dict[str, Callable[[], bool]] = {
    "help": bench_help, "bookkeeping": bench_bookkeeping, "overhead": bench_overhead, "workers": bench_workers,
    "cores": bench_cores,
}

if __name__ == "__main__":
    names = sys.argv[1:] or list(BENCHES)
    if unknown := [name for name in names if name not in BENCHES]:
        raise SystemExit(f"no benchmark '{unknown[0]}'; there are: {', '.join(BENCHES)}")
    print(f"fmn_nb {fmn_nb.__version__} from {Path(fmn_nb.__file__).parent}")
    results = [BENCHES[name]() for name in names]
    sys.exit(not all(results))
