"""A disk that refuses data: who is told, by which call, how often."""

from __future__ import annotations

import errno
import mmap
import os

import pytest

from tests.fuse.mounting import local_mount, scratch

BAD = b"BAD!".ljust(4096, b"x")


@pytest.fixture(scope="module")
def refusing():
    """(directory of the mount, file whose presence makes the disk refuse)."""
    with scratch() as directory:
        program = ("tests.fuse.refusing_mount", str(directory))
        with local_mount(directory, "commit_ms=50", program=program) as mount:
            yield mount.path, directory / "refuse"
            (directory / "refuse").unlink(missing_ok=True)


def fails(call, *arguments):
    """Whether a call fails, with EIO."""
    try:
        call(*arguments)
    except OSError as error:
        assert error.errno == errno.EIO  # noqa: PT017
        return True
    return False


def test_each_handle_is_told_once(refusing):
    """Two writers and a reader of one file: fsync, fdatasync and msync, each handle once; the disk
    being well again does not make it forget."""
    path, refuse = refusing
    name = path / "f"
    name.write_bytes(b"x" * 100_000)
    first, second = (os.open(name, os.O_RDWR) for _ in range(2))
    reader = os.open(name, os.O_RDONLY)
    refuse.touch()
    os.pwrite(first, BAD, 0)
    assert fails(os.fsync, first)
    refuse.unlink()
    assert not fails(os.fsync, first)
    view = mmap.mmap(second, 4096)
    assert fails(view.flush)
    assert not fails(os.fdatasync, second)
    assert fails(os.fsync, reader)
    late = os.open(name, os.O_RDWR)
    assert not fails(os.fsync, late)
    view.close()
    for fd in (first, second, reader, late):
        assert not fails(os.close, fd)


def test_close_tells_of_what_is_known(refusing):
    """close() itself waits for nothing; a loss that has happened by then it reports."""
    path, refuse = refusing
    fd = os.open(path / "g", os.O_CREAT | os.O_RDWR)
    other = os.open(path / "g", os.O_RDONLY)
    refuse.touch()
    os.pwrite(fd, BAD, 0)
    assert fails(os.fsync, other)
    refuse.unlink()
    assert fails(os.close, fd)
    os.close(other)


def test_synchronous_writes_tell_at_once(refusing):
    """O_DSYNC, O_SYNC and O_DIRECT writes fail themselves, and nothing is told twice."""
    path, refuse = refusing
    for number, flag in enumerate((os.O_DSYNC, os.O_SYNC, os.O_DIRECT)):
        fd = os.open(path / f"s{number}", os.O_CREAT | os.O_RDWR | flag)
        buffer = mmap.mmap(-1, 4096)
        os.pwrite(fd, buffer, 0)
        refuse.touch()
        buffer[:] = BAD
        assert fails(os.pwrite, fd, buffer, 0)
        refuse.unlink()
        assert not fails(os.fsync, fd)
        os.pwrite(fd, buffer, 0)
        os.close(fd)


def written_closed_lost(path, refuse):
    """Whether whoever opens the file next to fsync it hears of it, once."""
    refuse.touch()
    while fails((path / "h").write_bytes, BAD):  # it was lost before it was closed
        pass
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)  # commits, and with it tries to write the data
    os.close(fd)
    refuse.unlink()
    fd = os.open(path / "h", os.O_RDONLY)
    try:
        heard = fails(os.fsync, fd)
        assert not fails(os.fsync, fd)
    finally:
        os.close(fd)
    return heard


def test_a_loss_is_told_to_who_opens_later_if_nobody_else_was_there(refusing):
    """Now and then somebody was: the kernel releases the handle after close() has returned."""
    assert any(written_closed_lost(*refusing) for _ in range(20))
