"""Process settings for daemons that the kernel's memory reclaim may have to wait for."""

from __future__ import annotations

import errno
import os

from native._native import lib


def set_io_flusher(on: bool = True) -> bool:
    """PR_SET_IO_FLUSHER: this thread's allocations never wait for file system writeback.

    Threads started later inherit it: call it before the first one. False without
    CAP_SYS_RESOURCE (containers): a mount goes on, with a warning.
    """
    error = lib.native_set_io_flusher(int(on))
    if error == errno.EPERM:
        return False
    _check(error)
    return True


def lock_memory() -> None:
    """mlockall of what is and will be touched (MCL_ONFAULT: untouched memory stays unallocated)."""
    _check(lib.native_lock_memory())


def keep_memory(free_bytes: int) -> None:
    """Memory that was freed stays with this process until so much of it is free in one piece: what
    moves large data gets warm pages again instead of faults."""
    _check(lib.native_keep_memory(free_bytes))


def set_parent_death_signal(signal: int) -> None:
    """This process gets `signal` when the thread that started it ends (0: nothing)."""
    _check(lib.native_parent_death_signal(signal))


def fatal_signal_pending(thread_id: int) -> bool:
    """Whether the thread has a SIGKILL pending, or is gone."""
    try:
        with open(f"/proc/{thread_id}/status", "rb") as file:
            status = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return True
    for line in status.splitlines():
        if line.startswith((b"SigPnd:", b"ShdPnd:")) and int(line.split()[1], 16) & 1 << 8:
            return True
    return False


def _check(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))
