"""A gnbd-server that kills itself at a chosen call on the way from a request to its answer.

`CFS_KILL_AT` names a file. When it appears, its content N counts: the process dies right before
call N (from 0) that making the state durable does next, or, past the last one, before the answer.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import cluster.paths_io
import fencing.store_io
from gnbd.cli import server_main

COUNTED = ("open", "fchmod", "write", "fsync", "close", "replace")
CALLS = 9
"""How many calls of these one durable write makes: point `CALLS` is behind the last one."""

_left: int | None = None


def _point() -> None:
    global _left
    if _left is not None:
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        _left -= 1


class CountingOs:
    """`os`, with a point before each counted call."""

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in COUNTED:
            return real

        def counted(*args: Any, **more: Any) -> Any:
            _point()
            return real(*args, **more)

        return counted


def main() -> None:
    real = fencing.store_io.write_durable

    def write_durable(path: Path, data: bytes, mode: int = 0o600) -> None:
        global _left
        armed = Path(os.environ["CFS_KILL_AT"])
        _left = int(armed.read_text()) if armed.exists() else None
        real(path, data, mode)
        if _left is not None:
            assert _left == 0, f"the state was made durable in {CALLS - _left} calls"
            _point()

    cluster.paths_io.os = CountingOs()  # type: ignore[assignment]
    fencing.store_io.write_durable = write_durable
    server_main()


if __name__ == "__main__":
    main()
