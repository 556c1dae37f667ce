"""Append a record whose last page is missing until a line comes on standard input (userfaultfd(2)):
the kernel has by then handed over all that goes before it. Argument: the file."""

import ctypes
import fcntl
import mmap
import os
import struct
import sys
import threading

NR_USERFAULTFD = 323
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_COPY = 0xC018AA3F, 0xC020AA00, 0xC028AA03
MODE_MISSING = 1
PAGE = mmap.PAGESIZE
RECORD_BYTES = 1 << 20


def missing(address: int) -> int:
    """A descriptor on which the kernel waits for the page at an address."""
    descriptor = ctypes.CDLL(None, use_errno=True).syscall(NR_USERFAULTFD, os.O_CLOEXEC)
    assert descriptor >= 0, os.strerror(ctypes.get_errno())
    fcntl.ioctl(descriptor, UFFDIO_API, bytearray(struct.pack("<3Q", 0xAA, 0, 0)))
    fcntl.ioctl(
        descriptor, UFFDIO_REGISTER, bytearray(struct.pack("<4Q", address, PAGE, MODE_MISSING, 0))
    )
    return descriptor


def main() -> None:
    memory = mmap.mmap(-1, RECORD_BYTES + PAGE, flags=mmap.MAP_PRIVATE)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    memory[:RECORD_BYTES] = b"r" * RECORD_BYTES
    descriptor = missing(base + RECORD_BYTES)

    def write() -> None:
        with open(sys.argv[1], "ab", buffering=0) as file:
            assert file.write(memoryview(memory)[100 : 100 + RECORD_BYTES]) == RECORD_BYTES

    writer = threading.Thread(target=write)
    writer.start()
    os.read(descriptor, 32)  # the fault
    print("held", flush=True)
    sys.stdin.readline()
    page = ctypes.create_string_buffer(b"r" * PAGE, PAGE)
    copy = struct.pack("<4Qq", base + RECORD_BYTES, ctypes.addressof(page), PAGE, 0, 0)
    fcntl.ioctl(descriptor, UFFDIO_COPY, bytearray(copy))
    writer.join()
    print("ended", flush=True)


main()
