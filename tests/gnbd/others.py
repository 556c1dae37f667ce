"""Other people's NBD servers for tests, on a port of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.block_server import keep_port, wait_for

SIZE_BYTES = 64 << 20


class Other:
    """One server of one disk: may be killed and started again at the same place."""

    def __init__(self, directory: Path, *, uri: str = "") -> None:
        self.directory = directory
        self.port = keep_port(self)
        self.image = directory / "disk.img"
        if not self.image.exists():
            self.image.touch()
            os.truncate(self.image, SIZE_BYTES)
        self.uri = uri or f"nbd://127.0.0.1:{self.port}/"
        self.process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def start(self) -> None:
        with (self.directory / "other.log").open("ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=log, stderr=log)
        wait_for(self._answers, f"{type(self).__name__} listens")

    def _answers(self) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


class Nbdkit(Other):
    """`words`: filters, plugin and parameters; without any, the image."""

    def __init__(self, directory: Path, *words: str) -> None:
        super().__init__(directory)
        self.words = words or ("file", str(self.image))

    def command(self) -> list[str]:
        return ["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(self.port), *self.words]


class QemuNbd(Other):
    """qemu-nbd with room for several clients."""

    def command(self) -> list[str]:
        return [
            "qemu-nbd", "-f", "raw", "-t", "-e", "8", "-b", "127.0.0.1", "-p", str(self.port),
            str(self.image),
        ]  # fmt: skip


class NbdServer(Other):
    """nbd-server. It can only run in the background; `options`: of the export."""

    def __init__(self, directory: Path, *options: str) -> None:
        super().__init__(directory)
        self.uri += "disk"
        self.options = options
        self.pids = directory / "nbd-server.pid"

    def command(self) -> list[str]:
        config = self.directory / "nbd-server.conf"
        lines = ["[generic]", f"port = {self.port}", "listenaddr = 127.0.0.1", "[disk]",
                 f"exportname = {self.image}", *self.options]  # fmt: skip
        config.write_text("\n".join(lines) + "\n")
        return ["nbd-server", "-C", str(config), "-p", str(self.pids)]

    def start(self) -> None:
        self.pids.unlink(missing_ok=True)
        super().start()
        wait_for(lambda: self.pids.exists() and bool(self.pids.read_text()), "nbd-server's pid")

    def kill(self) -> None:
        """With the children that serve connections."""
        super().kill()
        pid = int(self.pids.read_text())
        try:
            words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            for number in [pid, *map(int, words)]:
                os.kill(number, signal.SIGKILL)
        except (ProcessLookupError, FileNotFoundError):
            pass  # it has ended
        wait_for(lambda: not self._answers(), "nbd-server is gone")


@contextmanager
def serving(other: Other) -> Iterator[Other]:
    other.start()
    try:
        yield other
    finally:
        other.kill()
