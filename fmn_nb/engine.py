"""Papermill's own way to execute a notebook, with less beside the cells: fewer saves on the way, and a quick end."""

from __future__ import annotations

from typing import Any

from papermill.engines import NBClientEngine, papermill_engines

NAME = "fmn-nb"
SAVE_EVERY = 5.0  # seconds; papermill saves twice a cell, which takes longer than many a cell
#: Python's last collection of a kernel full of models takes a second and frees what the system frees anyway. What was
#: registered to be done at the end, by notebooks and libraries, is done all the same.
QUICK_END = "--IPKernelApp.exec_lines=__import__('atexit').register(__import__('gc').freeze)"


class Engine(NBClientEngine):
    """nbclient, whose running notebook is saved at most every `SAVE_EVERY` seconds, and when it ends."""

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


def register() -> str:
    """Make papermill know the engine, and return the name by which to ask for it."""
    papermill_engines.register(NAME, Engine)
    return NAME
