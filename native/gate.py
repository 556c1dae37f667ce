"""The lease word of rules R5 and G2 in shared memory, with sequentially consistent atomics in C.

To act: `enter` (count in, then load the word and compare CLOCK_BOOTTIME with the lease end), act,
`leave`. To revoke: `set_word`, then wait until `in_flight` is zero. Either the actor sees the new
word or the revoker sees the actor.

| offset | field |
|---|---|
| 0 | u64 lease end, CLOCK_BOOTTIME ns |
| 8 | u32 word: 0 CLOSED (fresh, or lapsed and purged), 1 OPEN, 2 LAPSED, 3 BARRED |
| 12 | u32 in flight |
| 16 | u64 progress stamp, CLOCK_BOOTTIME ns |
| 24 | u64 generation: rises with every change of the word |
"""

from __future__ import annotations

import enum
import mmap
import os

from native._native import ffi, lib

GATE_BYTES = 64


class Word(enum.IntEnum):
    """Access of the instance that holds this lease."""

    CLOSED = 0
    OPEN = 1
    LAPSED = 2
    BARRED = 3


def create_gate_memory(name: str = "lease") -> int:
    """A new memfd of one page for `Gate.map`; the caller owns the descriptor."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(descriptor, mmap.PAGESIZE)
    return descriptor


class Gate:
    """One lease page. All methods are atomic between threads and processes."""

    __slots__ = ("_page", "_view", "address")

    def __init__(self, buffer: mmap.mmap | bytearray | memoryview) -> None:
        view = ffi.from_buffer(buffer, require_writable=True)
        self.address = int(ffi.cast("uintptr_t", view))
        if len(view) < GATE_BYTES or self.address % 8:
            raise ValueError(f"a gate needs {GATE_BYTES} bytes aligned to 8")
        self._view = view  # keeps the buffer alive and in place
        self._page = ffi.cast("struct native_gate *", view)

    @classmethod
    def map(cls, descriptor: int) -> Gate:
        """The gate in a memfd, which may be closed afterwards."""
        return cls(mmap.mmap(descriptor, mmap.PAGESIZE))

    def enter(self) -> bool:
        """Count in and check; False (and not counted) unless OPEN within the lease."""
        return bool(lib.native_gate_enter(self._page))

    def leave(self) -> None:
        """Count out, once per successful `enter`."""
        lib.native_gate_leave(self._page)

    def is_open(self) -> bool:
        """A look without counting in: only for deciding whether to wait."""
        return bool(lib.native_gate_is_open(self._page))

    def word(self) -> Word:
        return Word(lib.native_gate_word(self._page))

    def set_word(self, word: Word | int) -> None:
        """Store the word; BARRED is final."""
        lib.native_gate_set_word(self._page, int(word))

    def lease_end(self) -> int:
        return int(lib.native_gate_lease_end(self._page))

    def set_lease_end(self, end_ns: int) -> None:
        lib.native_gate_set_lease_end(self._page, end_ns)

    def in_flight(self) -> int:
        return int(lib.native_gate_in_flight(self._page))

    def stamp(self) -> None:
        """Note that this process makes progress now."""
        lib.native_gate_stamp(self._page)

    def progress(self) -> int:
        """CLOCK_BOOTTIME ns of the last `stamp`."""
        return int(lib.native_gate_progress(self._page))

    def generation(self) -> int:
        return int(lib.native_gate_generation(self._page))
