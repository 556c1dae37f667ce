"""A process that locks files as it is told, one JSON line per order; and how tests talk to it.

`flock`, `posix` and `ofd` wait unless `nowait`; an error comes back by its name. A signal (SIGUSR1)
that interrupts a wait is answered with EINTR, because its handler raises.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import struct
import subprocess
import sys
import time

FLOCK = struct.Struct("hhqqi4x")
OFD_GETLK, OFD_SETLK, OFD_SETLKW = 36, 37, 38
TYPES = {"r": fcntl.F_RDLCK, "w": fcntl.F_WRLCK, "u": fcntl.F_UNLCK}
FLOCKS = {"r": fcntl.LOCK_SH, "w": fcntl.LOCK_EX, "u": fcntl.LOCK_UN}
DEADLINE_S = 60


class Interrupted(Exception):
    """By SIGUSR1."""


class Orders:
    """What the process can do."""

    def __init__(self):
        self.files = {}

    def open(self, path, flags=os.O_RDWR | os.O_CREAT):
        fd = os.open(path, flags, 0o644)
        self.files[fd] = path
        return fd

    def dup(self, fd):
        return os.dup(fd)

    def close(self, fd):
        os.close(fd)

    def flock(self, fd, kind, nowait=False):
        fcntl.flock(fd, FLOCKS[kind] | (fcntl.LOCK_NB if nowait else 0))

    def posix(self, fd, kind, start=0, length=0, nowait=False):
        command = fcntl.F_SETLK if nowait else fcntl.F_SETLKW
        fcntl.fcntl(fd, command, FLOCK.pack(TYPES[kind], os.SEEK_SET, start, length, 0))

    def ofd(self, fd, kind, start=0, length=0, nowait=False):
        command = OFD_SETLK if nowait else OFD_SETLKW
        fcntl.fcntl(fd, command, FLOCK.pack(TYPES[kind], os.SEEK_SET, start, length, 0))

    def test(self, fd, kind, start=0, length=0, ofd=False):
        """F_GETLK: None if free, else [kind, start, length, pid]."""
        command = OFD_GETLK if ofd else fcntl.F_GETLK
        packed = FLOCK.pack(TYPES[kind], os.SEEK_SET, start, length, 0)
        found = FLOCK.unpack(fcntl.fcntl(fd, command, packed))
        if found[0] == fcntl.F_UNLCK:
            return None
        kind = "w" if found[0] == fcntl.F_WRLCK else "r"
        return [kind, found[2], found[3], found[4]]

    def exclusive(self, path):
        """A lock file as O_EXCL makes it: whether we were the one."""
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444))
        except FileExistsError:
            return False
        return True

    def dot_lock(self, path):
        """A lock file as mail software makes it, by a link to a file of our own: whether link(2)
        says that we were the one, and whether our file has two names then."""
        mine = f"{path}.{os.getpid()}"
        os.close(os.open(mine, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o444))
        try:
            os.link(mine, path)
            linked = True
        except FileExistsError:
            linked = False
        names = os.stat(mine).st_nlink
        os.unlink(mine)
        return [linked, names == 2]

    def unlink(self, path):
        os.unlink(path)

    def read(self, fd, size=100, offset=0):
        return os.pread(fd, size, offset).decode()

    def write(self, fd, text, offset=0):
        return os.pwrite(fd, text.encode(), offset)


def interrupted(_number, _frame):
    raise Interrupted


def obey():
    """Carry out the orders on standard input."""
    signal.signal(signal.SIGUSR1, interrupted)
    orders = Orders()
    while line := sys.stdin.readline():
        order = json.loads(line)
        name = order.pop("do")
        try:
            answer = {"value": getattr(orders, name)(**order)}
        except Interrupted:
            answer = {"error": "EINTR"}
        except OSError as error:
            name = errno.errorcode[error.errno]
            answer = {"error": "EDEADLK" if name == "EDEADLOCK" else name}
        print(json.dumps(answer), flush=True)


class Client:
    """The test's side."""

    def __init__(self, place):
        self.place = place
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def start(self, name, *words, **order):
        """Give an order; `end` takes the answer."""
        names = {"open": ("path",), "flock": ("fd", "kind"), "posix": ("fd", "kind")}
        names |= {"ofd": ("fd", "kind"), "test": ("fd", "kind"), "close": ("fd",)}
        names |= {"read": ("fd",), "write": ("fd", "text"), "dup": ("fd",)}
        names |= dict.fromkeys(("exclusive", "dot_lock", "unlink"), ("path",))
        order |= dict(zip(names[name], words, strict=True))
        if "path" in order:
            order["path"] = str(self.place / order["path"])
        self.process.stdin.write(json.dumps({"do": name, **order}) + "\n")
        self.process.stdin.flush()

    def end(self):
        """The answer to the last order: its value, or its error's name."""
        assert self.answered(DEADLINE_S), "no answer"
        answer = json.loads(self.process.stdout.readline())
        return answer["error"] if "error" in answer else answer["value"]

    def answered(self, within_s=0.0):
        """Whether the last order has been carried out."""
        return bool(select.select([self.process.stdout], [], [], within_s)[0])

    def do(self, name, *words, **order):
        self.start(name, *words, **order)
        return self.end()

    def interrupt(self):
        self.process.send_signal(signal.SIGUSR1)

    def kill(self):
        self.process.kill()
        self.process.wait(DEADLINE_S)
        self.process.stdin.close()
        self.process.stdout.close()


@contextlib.contextmanager
def clients(*places):
    """A client per directory; they end in any case."""
    made = []
    try:
        for place in places:
            made.append(Client(place))
        yield made
    finally:
        for client in made:
            with contextlib.suppress(BrokenPipeError):
                client.kill()


def eventually(condition, what):
    """Wait until a condition holds."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


if __name__ == "__main__":
    obey()
