"""Telling the processes of kernels from others."""

import psutil


def is_kernel(process: psutil.Process) -> bool:
    """Whether a process runs a notebook's kernel; one that has just ended does not."""
    try:
        return "ipykernel_launcher" in " ".join(process.cmdline())
    except psutil.Error:
        return False
