"""Notifications to a FUSE kernel module: written on a given descriptor, without the GIL.

Any process with a duplicate of the mount's /dev/fuse descriptor may call these, also when the
mount process hangs; libfuse is not involved. They **may block** until requests of the same inode
or directory are answered: call them from threads of their own, never from the thread that answers
requests. Each returns 0 or an errno: ENOENT (the kernel does not know the inode or name), ENODEV
or ENOTCONN (the connection is gone), EINVAL (this kernel does not know the notification).

| code | notification | body after the 16-byte header {u32 length, i32 code, u64 0} |
|---|---|---|
| 2 | INVAL_INODE | u64 inode, i64 offset (-1: attributes only), i64 length (0: to the end) |
| 3 | INVAL_ENTRY | u64 parent, u32 name length, u32 flags (1: EXPIRE_ONLY, Linux 6.2), name, NUL |
| 6 | DELETE | u64 parent, u64 child, u32 name length, u32 0, name, NUL |
| 8 | INC_EPOCH | nothing (Linux 6.16) |
| 9 | PRUNE | u32 count, u32 0, u64 0, u64 inode... (Linux 6.18) |
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from native._native import ffi, lib

MINOR_EXPIRE_ONLY = 38
MINOR_INC_EPOCH = 44
MINOR_PRUNE = 45
"""The first protocol minor (`native.fuse.SessionInfo.kernel_minor`) that knows a notification."""

PRUNE_MAX = 4096
"""Inodes in one PRUNE."""
SWEEP_SLOTS = 64
"""Threads of one `InodeSweep`."""


def invalidate_inode(descriptor: int, inode: int, offset: int = 0, length: int = 0) -> int:
    """Drop the pages of a byte range (length 0: to the end) and the attributes and ACLs."""
    return int(lib.native_notify_inode(descriptor, inode, offset, length))


def invalidate_attributes(descriptor: int, inode: int) -> int:
    """Drop the attributes and ACLs only; never blocks."""
    return int(lib.native_notify_inode(descriptor, inode, -1, 0))


def invalidate_entry(
    descriptor: int, parent: int, name: bytes, *, expire_only: bool = False
) -> int:
    """Drop (or only expire) a name of a directory."""
    return int(
        lib.native_notify_entry(descriptor, parent, name, len(name), 1 if expire_only else 0)
    )


def delete_entry(descriptor: int, parent: int, child: int, name: bytes) -> int:
    """The name was removed elsewhere: drop it and tell watchers."""
    return int(lib.native_notify_delete(descriptor, parent, child, name, len(name)))


def increment_epoch(descriptor: int) -> int:
    """Every cached name and directory listing of the mount is looked up again; never blocks."""
    return int(lib.native_notify_epoch(descriptor))


def prune(descriptor: int, inodes: Sequence[int]) -> int:
    """Let the kernel forget these inodes if nobody uses them."""
    for start in range(0, len(inodes), PRUNE_MAX):
        part = array("Q", inodes[start : start + PRUNE_MAX])
        error = lib.native_notify_prune(descriptor, ffi.from_buffer("uint64_t[]", part), len(part))
        if error:
            return int(error)
    return 0


class InodeSweep:
    """Whole invalidation of many inodes, shared by several threads that each call `run`.

    A thread takes the next inode until none is left or a fatal error came; an inode the kernel
    does not know counts as done. The table may be any buffer of u64 (0 = skip), also shared memory.
    """

    def __init__(
        self, descriptor: int, inodes: bytes | bytearray | memoryview | array[int]
    ) -> None:
        self._descriptor = descriptor
        self._inodes = ffi.from_buffer("uint64_t[]", inodes)
        self._state = ffi.new("struct native_sweep *")

    def run(self, slot: int = 0) -> int:
        """Invalidate until nothing is left to take; 0 or the first fatal errno of any thread.
        Each thread needs a `slot` of its own below `SWEEP_SLOTS`."""
        count = len(self._inodes)
        return int(
            lib.native_notify_sweep(self._descriptor, self._inodes, count, self._state, slot)
        )

    def at(self, slot: int) -> int:
        """The inode that the thread of a slot is busy with; 0: none."""
        return int(lib.native_notify_sweep_at(self._state, slot))

    @property
    def exhausted(self) -> bool:
        """Whether every row has been taken by some thread."""
        return int(lib.native_notify_sweep_taken(self._state)) >= len(self._inodes)

    @property
    def done(self) -> int:
        """Rows that are finished."""
        return int(lib.native_notify_sweep_done(self._state))

    @property
    def complete(self) -> bool:
        """Whether every row is finished without a fatal error."""
        return self.done == len(self._inodes)
