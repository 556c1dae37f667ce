"""Many reads or writes of a file at once, by io_submit or by io_uring.

Both wait until all have ended. What a killed caller had in flight by io_submit ends before its
descriptors are closed and its locks go; by io_uring it may end later.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import select
import struct
from collections.abc import Callable, Sequence

from native.ring import Ring

Part = tuple[int, mmap.mmap]
"""An offset in the file and a whole buffer."""

PARTS_MAX = 16
_IOCB = struct.Struct("<QIiHhIQQqQII")
_EVENT = struct.Struct("<QQqq")
_READ, _WRITE = 0, 1


@functools.cache
def _libaio() -> ctypes.CDLL:
    return ctypes.CDLL("libaio.so.1")


@functools.cache
def _context() -> ctypes.c_void_p:
    context = ctypes.c_void_p()
    _raise(_libaio().io_setup(PARTS_MAX, ctypes.byref(context)))
    return context


@functools.cache
def _ring() -> Ring:
    return Ring(PARTS_MAX, engine="io_uring")


def _raise(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _submit(command: int, descriptor: int, parts: Sequence[Part]) -> list[int]:
    """io_submit(2): what each part gave, bytes or -errno."""
    blocks = []
    for number, (offset, buffer) in enumerate(parts):
        place = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        fields = (number, 0, 0, command, 0, descriptor, place, len(buffer), offset, 0, 0, 0)
        blocks.append(ctypes.create_string_buffer(_IOCB.pack(*fields), _IOCB.size))
    pointers = (ctypes.c_void_p * len(blocks))(*map(ctypes.addressof, blocks))
    started = _libaio().io_submit(_context(), len(blocks), pointers)
    results = [started if started < 0 else 0] * len(parts)
    ended = 0
    while ended < started:
        events = ctypes.create_string_buffer(_EVENT.size * PARTS_MAX)
        count = _raise(_libaio().io_getevents(_context(), 1, PARTS_MAX, events, None))
        for number, _block, result, _ in list(_EVENT.iter_unpack(events.raw))[:count]:
            results[number] = result
        ended += count
    return results


def _enter(command: int, descriptor: int, parts: Sequence[Part]) -> list[int]:
    """io_uring: what each part gave, bytes or -errno."""
    ring = _ring()
    for number, (offset, buffer) in enumerate(parts):
        start: Callable[..., None] = ring.readv if command == _READ else ring.writev
        start(number, descriptor, offset, [memoryview(buffer)])
    ring.submit()
    results: dict[int, int] = {}
    while ring.in_flight:
        select.select([ring.fileno()], [], [])
        results.update(ring.reap())
    return [results[number] for number in range(len(parts))]


_ENGINES = {"submit": _submit, "uring": _enter}


def write_many(how: str, descriptor: int, parts: Sequence[tuple[int, bytes]]) -> None:
    """Write (offset, data) parts, all in flight at once. Raises OSError."""
    buffers: list[Part] = []
    for offset, data in parts:
        buffer = mmap.mmap(-1, len(data))
        buffer[:] = data
        buffers.append((offset, buffer))
    done = [_raise(result) for result in _ENGINES[how](_WRITE, descriptor, buffers)]
    wanted = [len(data) for _, data in parts]
    if done != wanted:
        raise OSError(f"{how}: wrote {done} of {wanted}")


def read_many(how: str, descriptor: int, parts: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read (offset, size) parts, all in flight at once. Raises OSError."""
    buffers = [(offset, mmap.mmap(-1, size)) for offset, size in parts]
    done = [_raise(result) for result in _ENGINES[how](_READ, descriptor, buffers)]
    return [buffer[:count] for (_, buffer), count in zip(buffers, done, strict=True)]
