"""A client program: reads a file of versioned pages by KIND and counts what is too old.

Arguments: FILE VERSION_FILE KIND THREADS SECONDS SEED. Prints: reads, stale, newest.
KIND: pread, mmap, direct, write (counters in our own pages), store (the same through mmap),
mmap-direct and mmap-append: mappings of descriptors whose system calls bypass the page cache.
"""

import mmap
import os
import random
import struct
import sys
import threading
import time

PAGES, OWN, PAGE = 256, 4, 4096
path, version_path, kind, threads, seconds, seed = sys.argv[1:7]
with open(version_path, "r+b") as file:
    shared = mmap.mmap(file.fileno(), PAGE)
reads = [0] * int(threads)
stale = [0] * int(threads)
newest = [0] * int(threads)
stop = time.monotonic() + float(seconds)


def read_loop(number):
    chooser = random.Random(int(seed) * 100 + number)
    flags = os.O_DIRECT if kind.endswith("direct") else 0
    flags |= os.O_APPEND if kind.endswith("append") else 0
    fd = os.open(path, os.O_RDONLY | flags)
    os.posix_fadvise(fd, 0, 0, chooser.choice([0, 1]))
    view = None
    if kind.startswith("mmap"):
        view = mmap.mmap(fd, PAGES * PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
    buffer = mmap.mmap(-1, PAGE)
    while time.monotonic() < stop:
        at = chooser.randrange(OWN, PAGES) * PAGE
        (least,) = struct.unpack_from("<Q", shared, 0)
        if view is not None:
            (seen,) = struct.unpack_from("<Q", view, at)
        elif kind == "direct":
            os.preadv(fd, [buffer], at)
            (seen,) = struct.unpack_from("<Q", buffer, 0)
        else:
            (seen,) = struct.unpack("<Q", os.pread(fd, 8, at))
        reads[number] += 1
        if seen < least:
            stale[number] += 1
        newest[number] = max(newest[number], seen)


def count_loop(number):
    """Counters in a page of our own: whatever is revoked meanwhile, none goes back."""
    fd = os.open(path, os.O_RDWR if kind == "store" else os.O_WRONLY)
    check = os.open(path, os.O_RDONLY)
    slot = number * 64 + (0 if kind == "write" else PAGE)
    view = mmap.mmap(fd, PAGES * PAGE) if kind == "store" else None
    value = 0
    while time.monotonic() < stop:
        value += 1
        if view is not None:
            (seen,) = struct.unpack_from("<Q", view, slot)
            struct.pack_into("<Q", view, slot, value)
        else:
            (seen,) = struct.unpack("<Q", os.pread(check, 8, slot))
            os.pwrite(fd, struct.pack("<Q", value), slot)
        reads[number] += 1
        if seen != value - 1:
            stale[number] += 1
    newest[number] = value


target = count_loop if kind in ("write", "store") else read_loop
workers = [threading.Thread(target=target, args=(n,)) for n in range(int(threads))]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print(sum(reads), sum(stale), max(newest))
