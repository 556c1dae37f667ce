"""A small file system that can be filled to the last byte."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PAGE_BYTES = 4096


class SmallDisk:
    """Mounted at `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def fill(self) -> None:
        """Leave no byte free."""
        with (self.place / "filling").open("ab", buffering=0) as file:
            for size in (PAGE_BYTES, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(size))
        with pytest.raises(OSError, match="space") as caught:
            (self.place / "more").write_bytes(bytes(PAGE_BYTES))
        assert caught.value.errno == errno.ENOSPC
        (self.place / "more").unlink()

    def make_room(self) -> None:
        """Take away what `fill` put there."""
        (self.place / "filling").unlink()


@contextlib.contextmanager
def small_disk(place: Path, size: str = "1m") -> Iterator[SmallDisk]:
    """A file system of this size at a directory, which is made."""
    place.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], check=True)
    try:
        yield SmallDisk(place)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@contextlib.contextmanager
def loop_device(image: Path) -> Iterator[Path]:
    """A block device over a file."""
    done = subprocess.run(
        ["losetup", "--find", "--show", image], check=True, capture_output=True, text=True
    )
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
