"""The kernel's sockets have short paths, wherever temporary files lie."""

import os
import tempfile
from pathlib import Path

import pytest

from fmn_nb.runs import executors, kernel
from fmn_nb.runs.kernel import LONGEST_SOCKET, ask_kernel, kernel_transport

TRANSPORT = "from ipykernel import get_connection_info as info; print(info(unpack=True)['transport'])"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="sockets with paths")


@pytest.fixture
def long_folder(tmp_path, monkeypatch):
    """A folder for temporary files whose path no socket takes."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_long_folder_of_temporary_files_is_passed_by(long_folder):
    with kernel_transport() as (folder, settings):
        assert long_folder not in folder.parents and settings["KernelManager"]["transport"] == "ipc"
        assert len(os.fsencode(folder / "kernel-ipc-5")) <= LONGEST_SOCKET
    assert not folder.exists() and ask_kernel(TRANSPORT) == "ipc"


def test_where_no_folder_is_short_enough_tcp_has_to_do(long_folder, monkeypatch):
    monkeypatch.setattr(kernel, "LONGEST_SOCKET", 5)
    assert ask_kernel(TRANSPORT) == "tcp" and not list(Path(long_folder).iterdir())


@pytest.mark.parametrize(("said", "spins"), [
    ({}, executors.SPINS), ({"OMP_NUM_THREADS": "2"}, executors.SPINS),
    ({"OMP_WAIT_POLICY": "ACTIVE"}, None), ({"GOMP_SPINCOUNT": "7"}, None)])
def test_threads_soon_sleep_while_they_wait_unless_a_user_said_how_they_wait(said, spins):
    assert executors.patient_threads(said).get("GOMP_SPINCOUNT") == spins


def test_a_kernel_is_told_how_its_threads_are_to_wait(monkeypatch):
    monkeypatch.setattr(kernel, "patient_threads", lambda environment: {"OMP_WAIT_POLICY": "PASSIVE"})
    assert ask_kernel("import os; print(os.environ.get('OMP_WAIT_POLICY'))") == "PASSIVE"
