"""Unix sockets at paths that are longer than their addresses may be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gnbd.exports import UNIX_PATH_BYTES_MAX


@contextmanager
def unix_address(path: Path) -> Iterator[str]:
    """What to give to bind or connect. Raises OSError."""
    if len(os.fsencode(path)) <= UNIX_PATH_BYTES_MAX:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
