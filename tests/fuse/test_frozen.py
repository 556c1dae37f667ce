"""A frozen lock stops whom it must and nobody else (rule G6)."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

from tests.fuse.mounting import DEADLINE_S, Mounted, local_mount, scratch

IOCB = struct.Struct("=QIiHhIQQqQII")
IOCB_CMD_PWRITE = 1


@pytest.fixture
def frozen():
    """A mount on which `f` waits for a lock, and the process that serves it."""
    with scratch() as directory:
        path = directory / "mnt"
        path.mkdir()
        words = ["-m", "tests.fuse.frozen_mount", str(path), str(directory)]
        mounted = Mounted(words, path, directory / "log")
        try:
            yield mounted
        finally:
            mounted.destroy()


def stuck(mounted, *command, counters=("getattr", "lookup")):
    """A client that waits in a request."""

    def count():
        now = mounted.counters()
        return sum(now.get(name, 0) for name in counters)

    before = count()
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + DEADLINE_S
    while count() == before:
        assert time.monotonic() < end
    return client


def kill(client):
    """kill -9 ends it, although what it waits for does not come."""
    assert client.poll() is None
    client.kill()
    client.wait(DEADLINE_S)


PAST_THE_CACHE = "import os; os.pread(os.open('{path}/slow', os.O_RDWR | os.O_APPEND), 4096, 0)"
"""An open file with O_APPEND has no task."""
WAITS = {
    "lock": (["cat", "{path}/f"], ("getattr", "lookup")),
    "storage": (["cat", "{path}/slow"], ("read",)),
    "storage, without a task": (["python3", "-c", PAST_THE_CACHE], ("read",)),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_killed_caller_ends(frozen, what):
    """kill -9 of a reader that waits for a lock that nobody gives, or whose blocks are away, ends
    it; when they come, the late answer hurts nobody."""
    command, counters = WAITS[what]
    kill(stuck(frozen, *(w.format(path=frozen.path) for w in command), counters=counters))
    assert (frozen.path / "free").read_bytes() == b"data", "others go on"
    if what != "lock":
        (frozen.log.parent / "thaw").touch()
        assert (frozen.path / "slow").read_bytes() == b"data"
    assert frozen.close() == 0


@pytest.mark.parametrize("operation", ["os.preadv(f, [b], 0)", "os.pwrite(f, b, 0)"])
def test_direct_io_waits_for_storage(frozen, operation):
    """It ends well when the storage is back."""
    program = (
        "import os, mmap\nb = mmap.mmap(-1, 4096); b[:4] = b'data'\n"
        f"f = os.open('slow', os.O_RDWR | os.O_DIRECT)\nassert {operation} in (4, 4096)"
    )
    counter = "read" if "pread" in operation else "write"
    client = stuck(frozen, "env", "-C", frozen.path, "python3", "-c", program, counters=(counter,))
    assert client.poll() is None
    assert (frozen.path / "free").read_bytes() == b"data"
    (frozen.log.parent / "thaw").touch()
    assert client.wait(DEADLINE_S) == 0
    assert (frozen.path / "slow").read_bytes()[:4] == b"data"
    assert frozen.close() == 0


class Submitted:
    """A write at the start of a file that nobody waits for."""

    def __init__(self, fd, buffer):
        self.library = ctypes.CDLL("libaio.so.1")
        self.context = ctypes.c_void_p()
        assert self.library.io_setup(1, ctypes.byref(self.context)) == 0
        place = ctypes.addressof(ctypes.c_char.from_buffer(buffer))
        block = IOCB.pack(0, 0, 0, IOCB_CMD_PWRITE, 0, fd, place, len(buffer), 0, 0, 0, 0)
        self.block = ctypes.create_string_buffer(block, len(block))
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.block))
        assert self.library.io_submit(self.context, 1, pointers) == 1

    def result(self):
        event = ctypes.create_string_buffer(32)
        assert self.library.io_getevents(self.context, 1, 1, event, None) == 1
        return struct.unpack_from("<q", event.raw, 16)[0]


def test_pages_read_beside_a_write_that_nobody_waits_for_are_dropped(frozen):
    """The kernel itself drops them only behind writes that their caller waits for."""
    path = frozen.path / "late"
    path.write_bytes(b"old!" * 2048)
    direct, cached = os.open(path, os.O_RDWR | os.O_DIRECT), os.open(path, os.O_RDONLY)
    buffer = mmap.mmap(-1, 4096)
    buffer[:] = b"new!" * 1024
    before = frozen.counters()["write"]
    submitted = Submitted(direct, buffer)
    end = time.monotonic() + DEADLINE_S
    while frozen.counters()["write"] == before:
        assert time.monotonic() < end
    assert os.pread(cached, 8192, 0) == b"old!" * 2048
    (frozen.log.parent / "thaw").touch()
    assert submitted.result() == 4096
    assert os.pread(cached, 8192, 0) == b"new!" * 1024 + b"old!" * 1024
    os.close(direct)
    os.close(cached)
    assert frozen.close() == 0


CHANGES = {
    "mkdir": ("os.mkdir('slowdir')", "os.path.isdir('slowdir')"),
    "create": ("open('slowfile', 'x')", "os.path.exists('slowfile')"),
    "symlink": ("os.symlink('x', 'slowlink')", "os.path.islink('slowlink')"),
    "link": ("os.link('free', 'slow2')", "os.stat('free').st_nlink == 2"),
    "unlink": ("os.unlink('slow')", "not os.path.exists('slow')"),
    "rename": ("os.rename('slow', 'gone')", "os.path.exists('gone')"),
    "setattr": ("os.chmod('slow', 0o600)", "os.stat('slow').st_mode & 0o777 == 0o600"),
    "write": ("os.pwrite(os.open('slow', os.O_WRONLY), b'X', 0)", "open('slow').read() == 'Xata'"),
}  # fmt: skip


def truth_of(mounted, expression):
    program = f"import os, sys; sys.exit(not ({expression}))"
    return subprocess.run(["python3", "-c", program], cwd=mounted.path).returncode == 0


@pytest.mark.parametrize("operation", CHANGES)
def test_a_killed_caller_does_not_wait_for_its_change(frozen, operation):
    """kill -9 while the change waits for storage ends the caller; the change is made all the same
    when the storage is back, and everybody sees it: no name or attribute of before is believed."""
    statement, wanted = CHANGES[operation]
    counter = "setattr" if operation == "setattr" else operation
    if operation != "write":  # it would read the file, which waits for the storage, too
        assert not truth_of(frozen, wanted)
    program = f"import os\n{statement}"
    kill(stuck(frozen, "env", "-C", frozen.path, "python3", "-c", program, counters=(counter,)))
    if operation != "write":
        assert not truth_of(frozen, wanted)
    (frozen.log.parent / "thaw").touch()
    end = time.monotonic() + DEADLINE_S
    while not truth_of(frozen, wanted):
        assert time.monotonic() < end
    assert frozen.counters()["handles"] == 0
    assert frozen.close() == 0


def test_a_harmless_signal_does_not_end_the_wait(frozen):
    """A handled signal interrupts nothing: the read succeeds once the lock comes."""
    program = (
        "import signal; signal.signal(signal.SIGUSR1, lambda *_: None)\n"
        f"print(open({str(frozen.path / 'f')!r}).read())"
    )
    client = stuck(frozen, "python3", "-c", program)
    client.send_signal(10)
    assert (frozen.path / "free").read_bytes() == b"data"
    assert client.poll() is None
    (frozen.log.parent / "thaw").touch()
    out, error = client.communicate(timeout=DEADLINE_S)
    assert out == "data\n", error
    assert frozen.close() == 0


def test_a_forced_unmount_ends_all(frozen):
    """umount -f: the waiting program gets an error, the mount process ends and leaves no mount."""
    client = stuck(frozen, "cat", frozen.path / "f")
    subprocess.run(["umount", "-i", "-f", frozen.path], capture_output=True)
    assert client.wait(DEADLINE_S) != 0
    frozen.process.wait(DEADLINE_S)
    assert f" {frozen.path} " not in Path("/proc/self/mounts").read_text()
    assert os.listdir(frozen.path) == []


def test_a_broken_process_leaves_no_mount(frozen):
    """An exception in the mount process ends its callers and takes the mount with it."""
    client = stuck(frozen, "cat", frozen.path / "f")
    (frozen.log.parent / "break").touch()
    assert frozen.process.wait(DEADLINE_S) != 0
    assert client.wait(DEADLINE_S) != 0
    assert f" {frozen.path} " not in Path("/proc/self/mounts").read_text()


def test_a_killed_process_fails_its_callers(frozen):
    """SIGKILL of the mount process ends its callers with an error."""
    client = stuck(frozen, "cat", frozen.path / "f")
    frozen.process.kill()
    frozen.process.wait(DEADLINE_S)
    assert client.wait(DEADLINE_S) != 0


def test_a_process_that_was_stopped_leaves_its_successor_alone(frozen):
    """Its mount was taken away and another one is at the place, with the same number."""
    number = frozen.path.stat().st_dev
    frozen.process.send_signal(signal.SIGSTOP)
    try:
        subprocess.run(["umount", "-i", "-l", "-f", frozen.path], check=True)
        with successor(frozen, number) as mounted:
            frozen.process.send_signal(signal.SIGCONT)
            frozen.process.wait(DEADLINE_S)
            (mounted.path / "there").write_bytes(b"still")
            assert mounted.path.stat().st_dev == number
            assert mounted.close() == 0
    finally:
        frozen.process.kill()


@contextlib.contextmanager
def successor(frozen, number):
    """The next mount at the place. The kernel gives the lowest free number; another test may have
    taken it for a while."""
    end = time.monotonic() + DEADLINE_S
    while True:
        with local_mount(frozen.log.parent) as mounted:
            if mounted.path.stat().st_dev == number:
                yield mounted
                return
        assert time.monotonic() < end
