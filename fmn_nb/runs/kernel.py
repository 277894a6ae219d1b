"""The notebooks' kernel: this very Python, whatever kernelspecs are installed, reached through a private folder."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager, KernelManager
from jupyter_client.kernelspec import KernelSpec

from fmn_nb.runs.executors import patient_threads

LONGEST_SOCKET = 100  # bytes of a Unix socket's path: systems take 103 or 107
_SOCKET = "fmn-12345678/kernel-ipc-5"  # what comes below the folder of temporary files
_SOCKETS = "kernel-ipc-*"
GRACE = 0.5  # seconds for a running cell to end by itself


class _ThisPython:
    @cached_property
    def kernel_spec(self) -> KernelSpec:
        """The spec that starts ipykernel in this process's own Python; installed kernelspecs are ignored."""
        return KernelSpec(**get_kernel_dict(), env=patient_threads(os.environ))


class OwnKernel(_ThisPython, AsyncKernelManager):
    """A manager of one kernel, as nbclient needs it."""


class _BlockingKernel(_ThisPython, KernelManager):
    """The same for code that waits."""


@contextmanager
def kernel_transport() -> Iterator[tuple[Path, dict[str, Any]]]:
    """A private folder and kernel manager settings: Unix sockets in it, since another kernel can take a TCP port.

    The length of a socket's path is limited. If no folder is short enough, TCP is used.
    """
    place = _socket_place()
    with tempfile.TemporaryDirectory(prefix="fmn-", dir=place, ignore_cleanup_errors=True) as folder:
        settings = {"connection_file": os.path.join(folder, "kernel.json"), "transport": "ipc" if place else "tcp"}
        yield Path(folder), {"KernelManager": settings}


def _socket_place() -> str | None:
    """The first folder for temporary files that is short enough for sockets; None if there is none."""
    if os.name != "posix":
        return None
    usual = [os.path.join(os.sep, *parts) for parts in (("tmp",), ("var", "tmp"), ("dev", "shm"))]
    for place in (tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), *usual):
        short = len(os.fsencode(os.path.join(place, _SOCKET))) <= LONGEST_SOCKET
        if short and os.path.isabs(place) and os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK):
            return place
    return None


def end_kernel(folder: Path, waited: float) -> None:
    """Interrupt the kernel whose connection file is in `folder`; after `GRACE` seconds, kill it and its children.

    Args:
        waited: seconds since it was first asked; call again until whoever waits for the kernel is done.
    """
    for kernel in _kernels(folder):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if waited > GRACE or not any(folder.glob(_SOCKETS)):  # one that starts, or listens at ports, is killed
                for process in (*kernel.children(recursive=True), kernel):
                    process.kill()
            elif waited == 0 and os.name == "posix":
                kernel.send_signal(signal.SIGINT)


def _kernels(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()):
                found.append(process)
    return found


def ask_kernel(code: str, patience: float = 60) -> str:
    """What `code` prints in a new kernel that starts in an empty folder, as a run's does; the kernel is always ended.

    RuntimeError or TimeoutError when it does not start, or does not answer within `patience` seconds; RuntimeError
    when the code fails there.
    """
    from traitlets.config import Config

    said: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        if message["msg_type"] == "stream":
            said.append(message["content"]["text"])

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, kernel_transport() as (_, settings):
        kernel = _BlockingKernel(kernel_name="python3", config=Config(settings))
        kernel.start_kernel(cwd=folder)
        client = kernel.client()
        try:
            client.start_channels()
            client.wait_for_ready(timeout=patience)
            reply = client.execute_interactive(code, allow_stdin=False, timeout=patience, output_hook=hear)["content"]
        finally:
            client.stop_channels()
            kernel.shutdown_kernel(now=True)
    if reply["status"] != "ok":
        raise RuntimeError(f"{reply.get('ename')}: {reply.get('evalue')}")
    return "".join(said).strip()
