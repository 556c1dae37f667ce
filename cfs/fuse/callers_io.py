"""What the machine tells of the callers for whom the kernel asks: what they may do and do."""

from __future__ import annotations

import os
from pathlib import Path

from native.requests import Request

CAP_FSETID = 4
"""Keep set-user-id and set-group-id of a file that one changes."""
CAP_SYS_ADMIN = 21
"""See trusted attributes."""


def has_capability(request: Request, capability: int) -> bool:
    """Whether the caller of this request has a capability. Where its process cannot be seen (it is
    in another PID namespace, or gone) root has it and nobody else."""
    try:
        with open(f"/proc/{request.pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("CapEff:"):
                    return bool(int(line.split()[1], 16) >> capability & 1)
    except OSError:
        pass
    return request.uid == 0


WRITE_CALLS = {
    # write, pwrite64, writev, sendfile, io_submit, splice, pwritev, copy_file_range, pwritev2,
    # io_uring_enter (a worker truncates for it), and those of 32-bit programs: none has the number
    # of an open or truncate of the others.
    "x86_64": frozenset({1, 18, 20, 40, 209, 275, 296, 326, 328, 426})
    | frozenset({4, 181, 146, 187, 239, 248, 313, 334, 377, 379}),
    "aarch64": frozenset({64, 68, 66, 71, 2, 76, 70, 285, 287, 426}),
}.get(os.uname().machine, frozenset())
"""Numbers of system calls (linux/unistd.h)."""


def write_calls(thread: int) -> int | None:
    """How many calls of write(2) and its kin a thread has ended; None if that cannot be seen (it is
    gone, or of another process namespace)."""
    try:
        lines = Path(f"/proc/{thread}/task/{thread}/io").read_text().splitlines()
        return next(int(line[6:]) for line in lines if line.startswith("syscw:"))
    except (OSError, StopIteration):
        return None


def is_writing(thread: int) -> bool | None:
    """Whether a thread that waits is inside of write(2) or one of its kin; None if that cannot be
    seen (it is gone, of another process namespace, or a worker of io_uring)."""
    try:
        number, *_, stack, _place = Path(f"/proc/{thread}/syscall").read_text().split()
    except (OSError, ValueError):
        return None
    return int(number) in WRITE_CALLS if int(stack, 16) else None
