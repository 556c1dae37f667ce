"""Mounts for tests: a process of its own per mount, unmounted in all cases."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEADLINE_S = 90
CLONE_NEWNS = 0x20000
ROOT = Path(__file__).resolve().parent.parent.parent


class Mounted:
    """A mount at `path`, served by `process`, which logs to `log`."""

    def __init__(
        self, command: list[str], path: Path, log: Path, environment: dict[str, str] | None = None
    ) -> None:
        self.path = path
        self.log = log
        if environment is None:
            environment = {**os.environ, "CFS_RUN_DIR": str(log.parent / "run")}
        before = log.read_text().count("is mounted at") if log.exists() else 0
        self.process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, env=environment, stderr=log.open("ab")
        )
        self.wait_for("is mounted at", before + 1)

    def wait_for(self, text: str, count: int = 1) -> str:
        """Wait until the log holds `text` that often; returns the last such line."""
        end = time.monotonic() + DEADLINE_S
        while time.monotonic() < end:
            lines = [line for line in self.log.read_text().splitlines() if text in line]
            if len(lines) >= count:
                return lines[-1]
            if self.process.poll() is not None:
                break
            time.sleep(0.02)
        raise AssertionError(f"no {text!r} in the log:\n{self.log.read_text()[-4000:]}")

    def counters(self) -> dict[str, int]:
        """Requests that have reached the process."""
        before = self.log.read_text().count("counters {")
        self.process.send_signal(signal.SIGUSR1)
        line = self.wait_for("counters {", before + 1)
        return json.loads(line[line.index("{") :])

    def close(self) -> int:
        """Unmount, gently first; the exit code of the process."""
        end = time.monotonic() + DEADLINE_S
        while subprocess.run(["umount", self.path], capture_output=True).returncode:
            if time.monotonic() > end or self.process.poll() is not None:
                break
            time.sleep(0.1)
        try:
            return self.process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGUSR2)
            self.wait_for("__main__")
            raise AssertionError(f"it does not end:\n{self.log.read_text()[-6000:]}") from None
        finally:
            self.destroy()

    def destroy(self) -> None:
        """Whatever happened: no process, no mount."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if f" {self.path} " in Path("/proc/self/mounts").read_text():
            subprocess.run(["umount", "-i", "-lf", self.path], capture_output=True)


@functools.cache
def enter_private_namespace():
    """Mounts of tests are nobody else's: a mount namespace made elsewhere in the meantime would
    take a copy along and keep the connection alive after the unmount."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


@contextlib.contextmanager
def scratch():
    """A directory outside of every mount."""
    enter_private_namespace()
    with tempfile.TemporaryDirectory(prefix="cfs-fuse-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextlib.contextmanager
def local_mount(
    directory: Path,
    *options: str,
    image_bytes: int = 1 << 30,
    name: str = "mnt",
    program: tuple[str, ...] = ("cfs.mount.cli",),
):
    """A local mount of a fresh (or, the second time, the same) image. `program`: the module that
    serves it, and what comes before the arguments of mount.cfs."""
    image = directory / "image"
    if not image.exists():
        with image.open("wb") as file:
            file.truncate(image_bytes)
        made = subprocess.run(
            [sys.executable, "-m", "cfs.mkfs", "--local", "--yes", image],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
    path = directory / name
    path.mkdir(exist_ok=True)
    command = ["-m", *program, str(image), str(path), "-f", "-o", ",".join(("local", *options))]
    mounted = Mounted(command, path, directory / f"{name}.log")
    try:
        yield mounted
        assert mounted.close() == 0, mounted.log.read_text()[-4000:]
    finally:
        mounted.destroy()
