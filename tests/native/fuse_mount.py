"""Starts tiny_fs.py in a process of its own and clients in others; always unmounts."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from native.gate import Gate, create_gate_memory
from node.fuse_connection_io import open_connections

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 60
SYS_PIDFD_GETFD = 438


def wait_for(condition, what):
    """Poll (no fixed sleeps decide a result) until `condition()` is true; returns its value."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"timed out waiting for {what}"
        time.sleep(0.002)
    return value


def blocked(thread):
    """The thread did not end within a while in which it ends if nothing holds it."""
    thread.join(0.15)
    return thread.is_alive()


class Mount:
    """A mounted tiny file system; methods named after its commands via `do`."""

    def __init__(self, path, process, hello, gate):
        self.path = path
        self.process = process
        self.connection = hello["connection"]
        self.hello = hello
        self.gate = gate
        self.clients = []

    def do(self, command, *args):
        self.process.stdin.write(json.dumps({"do": command, "args": args}).encode() + b"\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def client(self, code, *args):
        """Run Python code in the mount's directory; `sys.argv[1:]` is `args`."""
        text = "import os, sys, mmap, signal, errno, fcntl\n" + code
        command = [sys.executable, "-I", "-S", "-c", text, *map(str, args)]
        process = subprocess.Popen(
            command, cwd=self.path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.clients.append(process)
        return process

    def run(self, code, *args):
        """Run a client to its end; what it printed."""
        process = self.client(code, *args)
        output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 0, output
        return output.strip()

    def count(self, opcode):
        return self.do("state")["counts"].get(opcode, 0)

    def pending(self, opcode):
        return [row for row in self.do("state")["pending"] if row["opcode"] == opcode]

    def descriptor(self, name):
        """A duplicate of a descriptor of the daemon, as guard has it."""
        pidfd = os.pidfd_open(self.process.pid)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            result = libc.syscall(SYS_PIDFD_GETFD, pidfd, self.hello[name], 0)
            assert result >= 0, os.strerror(ctypes.get_errno())
            return result
        finally:
            os.close(pidfd)

    def control(self, name, how="r"):
        """A file of its connection in fusectl, opened."""
        return open(f"{self.connection}/{name}", how, opener=in_connections)

    def abort(self):
        with suppress(FileNotFoundError), self.control("abort", "w") as file:
            file.write("1")


def in_connections(name, flags):
    """Open a file of fusectl, which need not be mounted."""
    directory = open_connections()
    try:
        return os.open(name, flags & ~(os.O_CREAT | os.O_TRUNC), dir_fd=directory)
    finally:
        os.close(directory)


@contextmanager
def mounted(path, *, gate=False, settings=None):
    path.mkdir()
    options = {"settings": settings or {}}
    lease = -1
    page = None
    if gate:
        lease = create_gate_memory()
        page = Gate.map(lease)
        options["gate"] = lease
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/native/tiny_fs.py"), str(path), json.dumps(options)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[lease] if gate else [],
        cwd="/",
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    mount = None
    try:
        mount = Mount(path, process, json.loads(process.stdout.readline()), page)
        yield mount
    finally:
        if mount is not None:
            mount.abort()
            for client in mount.clients:
                client.kill()
                client.wait()
                client.stdout.close()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdin.close()
        process.stdout.close()
        subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)
        if lease >= 0:
            os.close(lease)
