"""What a mount answers on a spoiled disk."""

from __future__ import annotations

from cfs.attributes import MountOptions
from cfs.errors import CorruptionError, FsError
from cfs.filesystem import FileSystem
from cluster.device_memory import MemoryDevice
from tests.cfs.harness import QUIET, mounted
from tests.corrupter.world import Found, look_by_name


class Answers:
    """What was found at the paths, and what was told."""

    def __init__(self) -> None:
        self.found: dict[str, Found] = {}
        self.told: list[tuple[int, str]] = []
        self.refused = ""
        """Why it could not be mounted."""
        self.written = True
        """Whether new files could be made."""


async def probe(device: MemoryDevice, paths: list[str], options: MountOptions = QUIET) -> Answers:
    """Mount, look at every path, make new files, unmount."""
    answers = Answers()
    try:
        async with mounted(device, options) as fs:
            answers.found = await look_by_name(fs, paths)
            answers.written = await _write(fs)
            answers.told = list(fs.core.environment.told)  # type: ignore[attr-defined]
    except* CorruptionError as group:
        error = group.exceptions[0]
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        answers.refused = f"{error.message}; {error.hint}"
    return answers


async def _write(fs: FileSystem) -> bool:
    """New files and directories can be made, written and removed."""
    try:
        made = await fs.mkdir(fs.root_ino, b"new place", 0o755, 0, 0)
        for number in range(3):
            name = b"new file %d" % number
            file = await fs.create(made.ino, name, 0o644, 0, 0)
            await fs.write(file.ino, 0, b"new" * 40_000)
            await fs.fsync(file.ino)
            assert await fs.read(file.ino, 0, 200_000) == b"new" * 40_000
            await fs.unlink(made.ino, name)
        await fs.rmdir(fs.root_ino, b"new place")
        await fs.sync()
    except FsError:
        return False
    return True
