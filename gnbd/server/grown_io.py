"""Sizes of exports that were grown while the server ran: STATE_DIR/grown.json.

The exports file keeps its `size`; without this a restart would cut off what lies beyond it.
JSON: {name: {"path": text, "size_bytes": number}}. It counts only for the same path.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from cluster.decoding import BROKEN
from cluster.errors import CorruptionError
from cluster.paths_io import read_durable, write_durable
from gnbd.exports import Export


class _Grown(msgspec.Struct):
    path: str
    size_bytes: int


class GrownSizes:
    """The file, and what is in it."""

    def __init__(self, path: Path) -> None:
        """Raises CorruptionError."""
        self._path = path
        self._sizes: dict[str, _Grown] = {}
        data = read_durable(path)
        if data is not None:
            try:
                self._sizes = msgspec.json.decode(data, type=dict[str, _Grown])
            except BROKEN as error:
                raise CorruptionError(
                    f"{path} is damaged: {error}",
                    hint="remove it when the exports file has the sizes of exports that were grown",
                ) from error

    def size_of(self, config: Export) -> int | None:
        """What to open the export with; None: nothing but its configuration counts."""
        grown = self._sizes.get(config.name)
        if grown is None or grown.path != config.path:
            return None
        size_bytes = config.size_bytes
        return None if size_bytes is None else max(grown.size_bytes, size_bytes)

    def note(self, config: Export, size_bytes: int) -> None:
        """Make it durable. Raises OSError."""
        sizes = self._sizes | {config.name: _Grown(config.path, size_bytes)}
        write_durable(self._path, msgspec.json.encode(sizes))
        self._sizes = sizes
