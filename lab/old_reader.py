"""A program that reads one version of a block again and again, for as long as it gets it.

`python -m lab.old_reader PATH REPORT HOW`: HOW is `pread` or `mapped`. What it has got stands in
REPORT, a file outside of the mount, so that it survives a SIGBUS and a SIGKILL:

| u64 | meaning |
|---|---|
| 0 | reads |
| 1 | version that the first read gave |
| 2 | CLOCK_MONOTONIC ns at which the last read began that gave it |
| 3 | CLOCK_MONOTONIC ns at which the last read that gave it ended |
| 4 | 1: a read gave another version; then it ends |
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from collections.abc import Callable

REPORT = struct.Struct("<5Q")
WORD = struct.Struct("<Q")
PAGE_BYTES = 4096


def reader(path: str, how: str) -> Callable[[], int]:
    """A function that gives the version that is read now."""
    handle = os.open(path, os.O_RDONLY)
    if how == "pread":
        return lambda: int(WORD.unpack(os.pread(handle, WORD.size, 0))[0])
    view = mmap.mmap(handle, PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
    return lambda: int(WORD.unpack_from(view)[0])


def main(path: str, report: str, how: str) -> None:
    """Read until something else comes: another version, an error, a SIGBUS."""
    read = reader(path, how)
    with open(report, "r+b") as file:
        shared = mmap.mmap(file.fileno(), PAGE_BYTES)
    version, reads = read(), 0
    while True:
        began = time.monotonic_ns()
        found = read()
        if found != version:
            REPORT.pack_into(shared, 0, reads, version, began, began, 1)
            return
        reads += 1
        REPORT.pack_into(shared, 0, reads, version, began, time.monotonic_ns(), 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
