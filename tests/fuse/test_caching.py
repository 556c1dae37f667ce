"""What was read or looked at once does not reach the daemon again; a second mount finds it all."""

from __future__ import annotations

import mmap
import os

import pytest

from tests.fuse.mounting import local_mount, scratch


def test_warm_reads_and_stats_make_no_requests(mounted, place):
    """Re-reading 16 MiB and statting 2000 files: no request at all."""
    data = os.urandom(16 << 20)
    (place / "big").write_bytes(data)
    names = [place / f"f{number}" for number in range(2000)]
    for name in names:
        name.touch()
    assert (place / "big").read_bytes() == data
    for name in names:
        os.stat(name)
    fd = os.open(place / "big", os.O_RDONLY)
    before = mounted.counters()
    assert os.pread(fd, len(data) + 1, 0)[: 1 << 20] == data[: 1 << 20]
    for start in range(0, len(data), 1 << 20):
        assert os.pread(fd, 1 << 20, start) == data[start : start + (1 << 20)]
    for name in names:
        os.stat(name)
        os.path.exists(f"{name}.absent")
    between = mounted.counters()
    for name in names:
        assert not os.path.exists(f"{name}.absent")
    after = mounted.counters()
    os.close(fd)
    changed = {k: between[k] - before.get(k, 0) for k in between if between[k] != before.get(k, 0)}
    assert changed.pop("requests", 0) == sum(changed.values()), changed
    assert changed.keys() <= {"lookup", "getattr", "read"}, changed
    assert changed.get("read", 0) <= 1, changed  # the one beyond the end
    assert changed.get("getattr", 0) <= 2, changed
    assert changed.get("lookup", 0) <= len(names), changed  # absent names, the first time
    assert {k: v for k, v in after.items() if v != between[k]} == {}


def test_everything_is_there_after_a_new_mount():
    """Unmount and mount again: the same names, bytes and attributes."""
    with scratch() as directory:
        with local_mount(directory) as mount:
            (mount.path / "d").mkdir()
            for number in range(300):
                (mount.path / "d" / f"{number}").write_bytes(b"%d" % number * number)
            os.link(mount.path / "d" / "7", mount.path / "seven")
            os.chmod(mount.path / "d" / "8", 0o400)
            before = {
                name: os.stat(mount.path / "d" / name) for name in os.listdir(mount.path / "d")
            }
        with local_mount(directory) as mount:
            for name, old in before.items():
                new = os.stat(mount.path / "d" / name)
                fields = ("st_ino", "st_mode", "st_size", "st_mtime_ns", "st_ctime_ns", "st_nlink")
                assert [getattr(new, f) for f in fields] == [getattr(old, f) for f in fields]
            for number in range(300):
                found = (mount.path / "d" / f"{number}").read_bytes()
                assert found == b"%d" % number * number
            assert (mount.path / "seven").read_bytes() == b"7" * 7


def test_unmount_command_waits_for_the_last_write():
    """SIGTERM unmounts by itself; a busy mount goes on until it is free."""
    with scratch() as directory, local_mount(directory) as mount:
        (mount.path / "f").write_bytes(b"x" * 100_000)
        file = (mount.path / "f").open("rb")
        mount.process.terminate()
        mount.wait_for("is busy")
        assert file.read() == b"x" * 100_000
        file.close()
        assert mount.process.wait(60) == 0


def test_mmap_off_refuses_shared_writable_mappings():
    """Then no store can dirty a page unasked; reading through a mapping stays possible."""
    with scratch() as directory, local_mount(directory, "mmap=off") as mounted:
        path = mounted.path / "f"
        path.write_bytes(b"a" * 8192)
        with path.open("r+b") as file:
            for protection in (mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE):
                with pytest.raises(OSError, match="No such device"):
                    mmap.mmap(file.fileno(), 8192, mmap.MAP_SHARED, protection)
            private = mmap.mmap(file.fileno(), 8192, mmap.MAP_PRIVATE)
            private[0:1] = b"p"
            with path.open("rb") as reader:
                view = mmap.mmap(reader.fileno(), 8192, mmap.MAP_SHARED, mmap.PROT_READ)
                assert view[:2] == b"aa"
                os.pwrite(file.fileno(), b"b", 1)
                assert (view[:2], private[:2]) == (b"ab", b"pa")
                view.close()
            private.close()
