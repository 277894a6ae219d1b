"""Execute one notebook as papermill does, with less overhead and one error for everything that can fail."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb.files import replacing
from fmn_nb.runs.parameters import literal
from fmn_nb.runs.progress import Position
from fmn_nb.runs.stopping import Stopped, asked_to_stop

if TYPE_CHECKING:
    from fmn_nb.runs.plan import Notebook

ENGINE = "fmn-nb"
LOOK_EVERY = 0.1  # seconds between two checks of whether a running notebook was asked to stop
SAVE_EVERY = 5.0  # seconds; papermill saves twice per cell, which takes longer than many a cell
#: Python's last collection of a kernel full of models takes a second and frees what the system frees anyway. What
#: notebooks and libraries registered to be done at the end is still done.
QUICK_END = "--IPKernelApp.exec_lines=__import__('atexit').register(__import__('gc').freeze)"

#: A kernel that is ended while it waits says so as an error; so does one whose sockets close before its last flush.
QUIET = "--IPKernelApp.log_level=50"
QUIET_END = ("--IPKernelApp.exec_lines=__import__('atexit').register("
             "__import__('logging').getLogger('tornado.general').setLevel, 'CRITICAL')")
KERNEL_OPTIONS = [QUICK_END, QUIET_END, QUIET]


class RunError(RuntimeError):
    """A notebook failed: which, in which cell, with what error, and where the executed notebook is.

    It survives pickling (its fields are its arguments), so that a sweep's worker can hand it back.
    """

    def __init__(self, notebook: str, cell: int | None, error: str, executed: str | None) -> None:
        super().__init__(notebook, cell, error, executed)
        self.notebook, self.cell, self.error, self.executed = notebook, cell, error, executed

    def __str__(self) -> str:
        where = f"{self.notebook} failed" + (f" in cell [{self.cell}]" if self.cell is not None else "")
        return f"{where}: {self.error}" + (f"\n  executed notebook: {self.executed}" if self.executed else "")


def execute_notebook(notebook: Notebook, out: Path, position: Position | None = None,
                     look: Callable[[], None] = lambda: None) -> Path:
    """Execute one notebook with its values in a kernel of its own, whose working directory is `out`.

    Meanwhile `position` says where it is, and `look` is called every `LOOK_EVERY` seconds.

    The result is `out/NAME.ipynb`. After an error it is `out/NAME.failed.ipynb` instead, and a RunError is raised; if a
    signal or `ask_to_stop` ends it, a KeyboardInterrupt.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    from fmn_nb.runs.kernel import OwnKernel, end_kernel, kernel_transport

    target = out / notebook.path.name
    failed = target.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    with kernel_transport() as (folder, settings), replacing(target) as temporary:
        execution = partial(
            papermill.execute_notebook, literal(notebook.path), literal(temporary), notebook.values,
            kernel_name="python3", progress_bar=False, engine_name=engine(), config=Config(settings),
            kernel_manager_class=OwnKernel, resources={"metadata": {"path": str(out)}}, position=position or Position(),
        )
        try:
            _interruptibly(execution, partial(asked_to_stop, out), partial(end_kernel, folder), look)
        except PapermillExecutionError as error:
            os.replace(temporary, failed)
            raise RunError(target.name, error.exec_count, f"{error.ename}: {error.evalue}", str(failed)) from None
        except KeyboardInterrupt:
            _keep(temporary, failed)
            raise
        except Exception as error:  # a dead kernel, a full disk: whatever stopped papermill itself
            executed = _keep(temporary, failed)
            raise RunError(target.name, None, f"{type(error).__name__}: {error}", executed) from error
    return target


def _interruptibly(work: Callable[[], Any], asked: Callable[[], bool], end: Callable[[float], None],
                   look: Callable[[], None]) -> None:
    """Do `work` in a thread of its own and `look` now and then. On KeyboardInterrupt, once `asked`, or if `look` fails,
    `end` it, see it through, and raise.

    In the main thread nbclient would take the signals for itself, and an interrupt would strike it in its middle.
    """
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        try:
            while not future.done():
                look()
                wait([future], timeout=LOOK_EVERY)
                if asked():
                    raise Stopped
        except BaseException:
            began, waited = time.monotonic(), 0.0
            while not future.done():
                end(waited)
                wait([future], timeout=LOOK_EVERY)
                waited = time.monotonic() - began
            raise
        future.result()


def _keep(temporary: Path, failed: Path) -> str | None:
    """Save what was executed before papermill itself stopped, if it wrote anything."""
    if not temporary.exists() or temporary.stat().st_size == 0:
        return None
    os.replace(temporary, failed)
    return str(failed)


@cache
def engine() -> str:
    """The name of an engine that papermill knows from now on: nbclient, whose notebook is saved now and then."""
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):
        """The running notebook is saved at most every `SAVE_EVERY` seconds, and when it ends; `position` follows it."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, position: Position, **options: Any) -> Any:
            """Execute the notebook that `nb_man` manages; papermill calls this."""
            save, start, sections = nb_man.save, nb_man.cell_start, _sections(nb_man.nb.cells)

            def save_seldom(**changed: Any) -> None:
                nb_man.nb = changed.get("nb", nb_man.nb)
                if (nb_man.now() - nb_man.last_save_time).total_seconds() >= SAVE_EVERY:
                    save(**changed)

            def start_cell(cell: Any, cell_index: int, **more: Any) -> None:
                position.begin(cell_index + 1, len(sections), sections[cell_index])
                start(cell, cell_index, **more)

            nb_man.save, nb_man.cell_start = save_seldom, start_cell
            try:
                return super().execute_managed_notebook(nb_man, kernel_name, extra_arguments=KERNEL_OPTIONS, **options)
            finally:
                del nb_man.save  # the class's own is back, by which papermill saves the end, also after an error

    papermill_engines.register(ENGINE, Engine)
    logging.getLogger("papermill").addHandler(logging.NullHandler())  # its errors are raised, and told once
    return ENGINE


def _sections(cells: list[Any]) -> list[str]:
    """The heading of the section that each cell is in; empty above the first."""
    sections, heading = [], ""
    for cell in cells:
        found = re.match(r"#{2,} +(.+)", cell.source) if cell.cell_type == "markdown" else None
        heading = found[1].strip() if found else heading
        sections.append(heading)
    return sections


def without_slow_formats() -> None:
    """Keep jsonschema, which papermill imports, from preparing formats that no notebook has.

    Compiling grammars of internationalised addresses for them takes 1.4 s. This is only for the package's own
    processes: its command and a sweep's workers.
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  as if it were not installed
