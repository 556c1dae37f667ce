"""fallocate, lseek and copy_file_range as system calls."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import subprocess

import pytest

PAGE = mmap.PAGESIZE
KEEP_SIZE, PUNCH_HOLE, COLLAPSE, ZERO_RANGE, INSERT, UNSHARE = 1, 2, 8, 16, 32, 64
LIBC = ctypes.CDLL(None, use_errno=True)


def fallocate(fd, mode, offset, length):
    """fallocate(2); OSError if it fails. posix_fallocate of Python knows no modes."""
    where = ctypes.c_int64(offset), ctypes.c_int64(length)
    if LIBC.fallocate64(fd, mode, *where):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def regions(fd):
    """[(start, end)] of data, by lseek."""
    found, at, size = [], 0, os.fstat(fd).st_size
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO  # noqa: PT017
            break
        at = os.lseek(fd, start, os.SEEK_HOLE)
        found.append((start, at))
    return found


def test_random_ranges_match_a_model(place, chooser):
    """Every mode, with writes, stores through a mapping and truncates in between."""
    model = bytearray()
    fd = os.open(place / "f", os.O_CREAT | os.O_RDWR)
    for _ in range(300):
        at, size = chooser.randrange(300_000), chooser.randrange(1, 60_000)
        if chooser.random() < 0.3:
            at, size = at & -PAGE, (size & -PAGE) + PAGE
        kind = chooser.choice(["write", "punch", "zero", "allocate", "store", "truncate"])
        keep = chooser.random() < 0.5
        if kind == "write":
            data = chooser.randbytes(size)
            os.pwrite(fd, data, at)
            model.extend(bytes(max(0, at + size - len(model))))
            model[at : at + size] = data
        elif kind == "truncate":
            os.ftruncate(fd, at)
            model[at:] = bytes(max(0, at - len(model)))
        elif kind == "store" and model:
            view = mmap.mmap(fd, len(model))
            at = at % len(model)
            data = chooser.randbytes(min(9000, len(model) - at))
            view[at : at + len(data)] = data
            model[at : at + len(data)] = data
            view.close()
        elif kind != "store":
            mode = {"punch": PUNCH_HOLE, "zero": ZERO_RANGE, "allocate": 0}[kind]
            fallocate(fd, mode | (keep or kind == "punch"), at, size)
            if kind != "punch" and not keep:
                model.extend(bytes(max(0, at + size - len(model))))
            end = min(at + size, len(model))
            if kind != "allocate":
                model[at:end] = bytes(max(0, end - at))
        assert os.fstat(fd).st_size == len(model), kind
        at = chooser.randrange(len(model) + 1)
        assert os.pread(fd, 40_000, at) == model[at : at + 40_000], kind
        outside = bytearray(model)
        for start, end in regions(fd):
            outside[start:end] = bytes(end - start)
        assert not any(outside), kind
    os.fsync(fd)
    os.close(fd)
    assert (place / "f").read_bytes() == model


def test_modes_that_are_refused(place):
    """What the kernel or the file system cannot do is EOPNOTSUPP and changes nothing."""
    path = place / "f"
    path.write_bytes(b"x" * 10_000)
    fd = os.open(path, os.O_RDWR)
    for mode in (COLLAPSE, INSERT, UNSHARE, PUNCH_HOLE):
        with pytest.raises(OSError, match="not supported"):
            fallocate(fd, mode, 0, PAGE)
    assert path.read_bytes() == b"x" * 10_000


def test_a_mapping_is_seen_by_seek_and_copy(place):
    """Stores that the kernel has not written back are data for SEEK_DATA, and are copied."""
    fd = os.open(place / "f", os.O_CREAT | os.O_RDWR)
    os.ftruncate(fd, 100 * PAGE)
    view = mmap.mmap(fd, 100 * PAGE)
    view[50 * PAGE + 3] = 7
    covered = [span for span in regions(fd) if span[0] <= 50 * PAGE + 3 < span[1]]
    assert covered
    out = os.open(place / "g", os.O_CREAT | os.O_RDWR)
    assert os.copy_file_range(fd, out, 100 * PAGE, 0, 0) == 100 * PAGE
    assert os.pread(out, 1, 50 * PAGE + 3) == b"\7"
    view.close()


def test_copies_do_not_pass_through_the_caller(mounted, place, chooser):
    """copy_file_range and cp: the same bytes and holes, by a few requests; caches of the target
    are right, also in a mapping."""
    data = chooser.randbytes(8 << 20)
    (place / "f").write_bytes(data)
    os.truncate(place / "f", 1 << 28)
    out = os.open(place / "g", os.O_CREAT | os.O_RDWR)
    os.pwrite(out, b"old" * 5000, 0)
    view = mmap.mmap(out, 15_000)
    assert view[:3] == b"old"
    fd = os.open(place / "f", os.O_RDONLY)
    before = mounted.counters()
    done = 0
    while done < 1 << 28:
        step = os.copy_file_range(fd, out, (1 << 28) - done, done, done)
        assert step
        done += step
    after = mounted.counters()
    assert after.get("read", 0) == before.get("read", 0)
    assert after.get("write", 0) == before.get("write", 0)
    assert view[:15_000] == data[:15_000]
    view.close()
    assert os.pread(out, 8 << 20, 0) == data
    assert os.fstat(out).st_size == 1 << 28
    assert os.fstat(out).st_blocks * 512 < 10 << 20
    subprocess.run(["cp", "--sparse=auto", place / "f", place / "h"], check=True)
    assert os.stat(place / "h").st_blocks * 512 == 8 << 20
    assert subprocess.run(["cmp", place / "f", place / "h"]).returncode == 0
    os.copy_file_range(out, out, 1000, 5000, (20 << 20) + 1)
    assert os.pread(out, 1002, 20 << 20) == b"\0" + data[5000:6000] + b"\0"


def test_sparse_to_8_tebibytes(place):
    """Offsets beyond 2**42 by write, lseek, mmap and truncate."""
    end = 8 << 40
    fd = os.open(place / "f", os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"end", end - 3)
    assert os.fstat(fd).st_size == end
    assert regions(fd) == [(end - PAGE, end)]
    view = mmap.mmap(fd, PAGE, offset=end // 2)
    view[5:8] = b"mid"
    view.flush()
    view.close()
    assert os.pread(fd, 3, end // 2 + 5) == b"mid"
    os.ftruncate(fd, end // 2)
    assert os.fstat(fd).st_size == end // 2
    assert os.fstat(fd).st_blocks * 512 < 2 << 20  # what was read ahead has blocks: it was mapped


def test_privileges_go_with_fallocate(place):
    """A punch by somebody else takes set-user-id away, as a write does."""
    path = place / "f"
    path.write_bytes(b"x" * 10_000)
    os.chmod(path, 0o4777)
    os.chmod(place, 0o777)
    for parent in (place.parent, place.parent.parent):
        os.chmod(parent, 0o755)
    program = (
        "import ctypes,os\nos.setgid(65533); os.setuid(65533)\n"
        f"fd = os.open({str(path)!r}, os.O_RDWR)\n"
        "w = ctypes.c_int64(0), ctypes.c_int64(4096)\n"
        "assert not ctypes.CDLL(None).fallocate64(fd, 3, *w)\n"
    )
    subprocess.run(["python3", "-c", program], check=True)
    assert os.stat(path).st_mode & 0o7777 == 0o777


STORE = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
view = mmap.mmap(fd, os.fstat(fd).st_size)
for page in range(0, len(view), 4096):
    view[page] = 1
    print(page, flush=True)
view.flush()
"""


def test_a_store_without_space_is_a_signal(place):
    """A mapping of a hole on a full file system: SIGBUS at the store, and every store that went
    well is there. Pages of the hole that were read before do not let a store through."""
    hole = place / "hole"
    hole.touch()
    os.truncate(hole, 4 << 20)
    filler = os.open(place / "filler", os.O_CREAT | os.O_WRONLY)
    size = 1 << 30
    fallocate(filler, 0, 0, 1 << 20)
    while size >= PAGE:
        try:
            fallocate(filler, 0, os.fstat(filler).st_size, size)
        except OSError as error:
            assert error.errno == errno.ENOSPC  # noqa: PT017
            size //= 2
    os.ftruncate(filler, os.fstat(filler).st_size - 40 * PAGE)
    assert hole.read_bytes() == bytes(4 << 20)  # without a block, through a reader's handle
    done = subprocess.run(["python3", "-c", STORE, hole], capture_output=True, text=True)
    assert done.returncode == -7, done.stderr
    stored = [int(line) for line in done.stdout.split()]
    assert 0 < len(stored) <= 40
    data = hole.read_bytes()
    assert [page for page in range(0, len(data), PAGE) if data[page]] == stored
    os.unlink(place / "filler")
    os.close(filler)
    done = subprocess.run(["python3", "-c", STORE, hole], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hole.read_bytes().count(1) == 1024
