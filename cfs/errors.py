"""What a file system operation raises: one errno, as the caller of the system call sees it."""

from __future__ import annotations

import errno as _errno

from cluster.errors import CorruptionError

__all__ = ["REMEDY", "CorruptionError", "FsError"]

REMEDY = "unmount it on every node, then run fsck.cfs --repair"


class FsError(Exception):
    """An operation was refused or failed; `errno` is what the system call returns."""

    def __init__(self, errno: int, detail: str = "") -> None:
        super().__init__(errno, detail)
        self.errno = errno

    def __str__(self) -> str:
        name = _errno.errorcode.get(self.errno, str(self.errno))
        detail = self.args[1]
        return f"{name}: {detail}" if detail else name
