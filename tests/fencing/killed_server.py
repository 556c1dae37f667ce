"""A gnbd-server that kills itself at a chosen call on the way from a request to its answer.

`CFS_KILL_AT` names a file. When it appears, its content N counts: the process dies right before
call N (from 0) that making the state durable does next, or, past the last one, before the answer.
`CFS_KILL_HOW` is how the state is made durable: `slot` or `file`.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import cluster.paths_io
import fencing.store_io
from fencing.store import SECTOR_BYTES, ServerState
from fencing.store_io import StateFile
from gnbd.server.cli import server_main

COUNTED = ("open", "fchmod", "write", "fsync", "close", "replace")
CALLS = {"slot": 4, "file": 9}
"""How many calls of these, or points within one, a durable write makes: point `CALLS` is behind
the last one."""

_left: int | None = None


def _point() -> None:
    global _left
    if _left is not None:
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        _left -= 1


class CountingOs:
    """`os`, with a point before each counted call, and one within a write in place."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in COUNTED:
            return real

        def counted(*args: Any, **more: Any) -> Any:
            _point()
            return real(*args, **more)

        return counted

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        _point()
        os.pwrite(fd, data[:SECTOR_BYTES], offset)
        _point()
        return os.pwrite(fd, data, offset)


def main() -> None:
    real = StateFile.save
    how = os.environ["CFS_KILL_HOW"]

    def save(file: StateFile, state: ServerState) -> None:
        global _left
        armed = Path(os.environ["CFS_KILL_AT"])
        _left = int(armed.read_text()) if armed.exists() else None
        if how == "file":
            file._next = None
        real(file, state)
        if _left is not None:
            assert _left == 0, f"the state was made durable in {CALLS[how] - _left} calls"
            _point()

    cluster.paths_io.os = fencing.store_io.os = CountingOs()  # type: ignore[assignment]
    StateFile.save = save  # type: ignore[method-assign]
    server_main()


if __name__ == "__main__":
    main()
