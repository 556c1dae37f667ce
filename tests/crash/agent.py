"""A client process on a mount: takes one command a line, answers when it is done.

A command is JSON: `{"do": [[verb, argument...], ...]}`; the answer holds the times just before the
first and just after the last system call (CLOCK_BOOTTIME, as the servers' logs) and an errno. This
module imports nothing of the project but the content of files.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import sys
import time

from tests.crash.content import attribute_bytes, block_bytes, commit_bytes, stream

BLOCK = 4096
AT_FDCWD = -100
AT_SYMLINK_FOLLOW = 0x400
RENAME_EXCHANGE = 2
RANGES = {"allocate": 0, "punch": 3, "zero": 16}
"""Modes of fallocate(2)."""
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)
_held: list[int] = []


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _sync(handle: int, how: str) -> None:
    if how == "fsync":
        os.fsync(handle)
    elif how == "fdatasync":
        os.fdatasync(handle)


def _write(path: str, flags: int, data: bytes, how: str) -> None:
    if how in ("dsync", "osync"):
        flags |= os.O_DSYNC if how == "dsync" else os.O_SYNC
    handle = os.open(path, flags, 0o644)
    try:
        written = os.write(handle, data)
        assert written == len(data), f"{written} of {len(data)} written"
        _sync(handle, how)
    finally:
        os.close(handle)


def append(path: str, seed: int, start: int, length: int, how: str) -> None:
    data = stream(seed, start, length)
    _write(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, data, how)


def truncate(path: str, length: int, how: str) -> None:
    handle = os.open(path, os.O_WRONLY)
    try:
        os.ftruncate(handle, length)
        _sync(handle, how)
    finally:
        os.close(handle)


def sync(path: str, how: str = "fsync") -> None:
    """Of a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        _sync(handle, how)
    finally:
        os.close(handle)


def fresh(path: str, seed: int, version: int, how: str) -> None:
    """A whole file, new or from zero length."""
    data = commit_bytes(seed, version)
    _write(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, data, how)


def block(path: str, seed: int, index: int, version: int, how: str) -> None:
    """One block of a file that has it already."""
    data = block_bytes(seed, index, version)
    flags = os.O_RDWR | {"dsync": os.O_DSYNC, "direct": os.O_DIRECT}.get(how, 0)
    handle = os.open(path, flags)
    try:
        if how == "msync":
            with mmap.mmap(handle, BLOCK, offset=index * BLOCK) as view:
                view[:] = data
                view.flush()
            return
        buffer = mmap.mmap(-1, BLOCK)
        buffer[:] = data
        assert os.pwritev(handle, [buffer], index * BLOCK) == BLOCK
        _sync(handle, "fsync" if how == "direct" else how)
    finally:
        os.close(handle)


def hold(path: str, seed: int) -> None:
    """A file without a name that stays open for a while."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(handle, stream(seed, 0, 100_000))
    os.unlink(path)
    _held.append(handle)
    while len(_held) > 4:
        os.close(_held.pop(0))


def _checked(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def change_range(path: str, kind: str, index: int, how: str) -> None:
    """Allocate, punch out or zero one block of a file."""
    handle = os.open(path, os.O_RDWR)
    try:
        _checked(_libc.fallocate(handle, RANGES[kind], index * BLOCK, BLOCK))
        _sync(handle, how)
    finally:
        os.close(handle)


def exchange(one: str, two: str) -> None:
    names = (AT_FDCWD, one.encode(), AT_FDCWD, two.encode())
    _checked(_libc.renameat2(*names, RENAME_EXCHANGE))


def attribute(path: str, seed: int, version: int, how: str) -> None:
    """Set an extended attribute; version 0 takes it away."""
    if version:
        os.setxattr(path, "user.v", attribute_bytes(seed, version))
    else:
        os.removexattr(path, "user.v")
    sync(path, how)


def nameless(path: str, seed: int, version: int) -> None:
    """A file that gets its name when all of it is on the disk."""
    handle = os.open(os.path.dirname(path) or ".", os.O_TMPFILE | os.O_RDWR, 0o644)
    try:
        os.write(handle, commit_bytes(seed, version))
        os.fsync(handle)
        place = (AT_FDCWD, f"/proc/self/fd/{handle}".encode(), AT_FDCWD, path.encode())
        _checked(_libc.linkat(*place, AT_SYMLINK_FOLLOW))
    finally:
        os.close(handle)


VERBS = {
    "range": change_range,
    "exchange": exchange,
    "attribute": attribute,
    "nameless": nameless,
    "append": append,
    "truncate": truncate,
    "sync": sync,
    "fresh": fresh,
    "block": block,
    "hold": hold,
    "touch": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)),
    "unlink": os.unlink,
    "rename": os.rename,
    "link": os.link,
    "mkdir": os.mkdir,
    "rmdir": os.rmdir,
    "symlink": os.symlink,
}


def main() -> None:
    top = sys.argv[1]
    os.chdir(top)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        begin = now_ns()
        error = 0
        text = ""
        try:
            for verb, *arguments in json.loads(line)["do"]:
                VERBS[verb](*arguments)
        except OSError as caught:
            error, text = caught.errno or 5, str(caught)
        print(json.dumps({"begin": begin, "end": now_ns(), "error": error, "text": text}),
              flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
