"""One notebook executed: papermill's own way, with less beside the cells and one error for all that can fail."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmn_nb.files import replacing

if TYPE_CHECKING:
    from fmn_nb.runs.plan import Notebook

ENGINE = "fmn-nb"
SAVE_EVERY = 5.0  # seconds; papermill saves twice a cell, which takes longer than many a cell
#: Python's last collection of a kernel full of models takes a second and frees what the system frees anyway. What was
#: registered to be done at the end, by notebooks and libraries, is done all the same.
QUICK_END = "--IPKernelApp.exec_lines=__import__('atexit').register(__import__('gc').freeze)"


class RunError(RuntimeError):
    """A notebook failed: which, in which cell, with what error, and where the executed notebook lies.

    It survives pickling (its fields are its arguments), so that a sweep's worker can hand it back.
    """

    def __init__(self, notebook: str, cell: int | None, error: str, executed: str | None) -> None:
        super().__init__(notebook, cell, error, executed)
        self.notebook, self.cell, self.error, self.executed = notebook, cell, error, executed

    def __str__(self) -> str:
        where = f"{self.notebook} failed" + (f" in cell [{self.cell}]" if self.cell is not None else "")
        return f"{where}: {self.error}" + (f"\n  executed notebook: {self.executed}" if self.executed else "")


def execute_notebook(notebook: Notebook, out: Path) -> Path:
    """Execute one notebook with its values in a kernel of its own, whose working directory is `out`.

    The result is `out/NAME.ipynb`; after an error `out/NAME.failed.ipynb` instead, and a RunError.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    target = out / notebook.path.name
    failed = target.with_suffix(".failed.ipynb")
    failed.unlink(missing_ok=True)
    with replacing(target) as temporary, kernel_transport() as transport:
        try:
            papermill.execute_notebook(
                str(notebook.path), str(temporary), notebook.values, kernel_name="python3", progress_bar=False,
                engine_name=engine(), config=Config(transport), resources={"metadata": {"path": str(out)}},
            )
        except PapermillExecutionError as error:
            os.replace(temporary, failed)
            raise RunError(target.name, error.exec_count, f"{error.ename}: {error.evalue}", str(failed)) from None
        except Exception as error:  # a dead kernel, a full disk: whatever stopped papermill itself
            executed = _keep(temporary, failed)
            raise RunError(target.name, None, f"{type(error).__name__}: {error}", executed) from error
    return target


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
        """The running notebook is saved at most every `SAVE_EVERY` seconds, and when it ends."""

        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **options: Any) -> Any:
            """Execute the notebook that `nb_man` manages; papermill calls this."""
            save = nb_man.save

            def save_seldom(**changed: Any) -> None:
                nb_man.nb = changed.get("nb", nb_man.nb)
                if (nb_man.now() - nb_man.last_save_time).total_seconds() >= SAVE_EVERY:
                    save(**changed)

            nb_man.save = save_seldom
            try:
                return super().execute_managed_notebook(nb_man, kernel_name, extra_arguments=[QUICK_END], **options)
            finally:
                del nb_man.save  # the class's own is back, by which papermill saves the end, also after an error

    papermill_engines.register(ENGINE, Engine)
    return ENGINE


def without_slow_formats() -> None:
    """Keep jsonschema, which papermill imports, from preparing formats that no notebook has.

    It takes 1.4 s for them, to compile grammars of internationalised addresses. Only for processes that are this
    package's own: its command and a sweep's workers.
    """
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  as if it were not installed


@contextmanager
def kernel_transport() -> Iterator[dict[str, Any]]:
    """Kernel manager settings: Unix sockets in a private folder, since TCP ports can be taken by another kernel."""
    if os.name != "posix":
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="fmn-") as folder:  # short: a socket's path has about 100 bytes
        yield {"KernelManager": {"transport": "ipc", "connection_file": os.path.join(folder, "kernel.json")}}


def ask_kernel(code: str, patience: float = 60) -> str:
    """What `code` prints in a new kernel that starts in an empty folder, as a run's does; it is always ended again.

    RuntimeError or TimeoutError when it does not start, or does not answer within `patience` seconds; RuntimeError
    when the code fails there.
    """
    from jupyter_client.manager import run_kernel

    said: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with run_kernel(kernel_name="python3", cwd=folder, startup_timeout=patience) as client:
            reply = client.execute_interactive(code, allow_stdin=False, timeout=patience, output_hook=hear)["content"]
    if reply["status"] != "ok":
        raise RuntimeError(f"{reply.get('ename')}: {reply.get('evalue')}")
    return "".join(said).strip()
