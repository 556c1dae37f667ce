"""The state file of a gnbd-server: the old or the new content, durable before `save` returns."""

from __future__ import annotations

import os
from pathlib import Path

from cluster.errors import CorruptionError
from cluster.paths_io import read_durable, write_durable
from fencing.store import (
    Place,
    ServerState,
    decode_file_untrusted,
    encode_file,
    encode_slot,
    encode_state,
)


class StateFile:
    """Bars and reservations of one gnbd-server on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._next: Place | None = None
        self._unsure = b""
        """What was read, while it may be in the kernel's cache only."""

    def load(self) -> ServerState:
        """The stored state, or a fresh one if the server never stored any. Nothing may be answered
        by it before a `save`: the slot that counts may be what a killed server has left in the
        kernel's cache, and what the disk has refused looks no other."""
        data = read_durable(self.path)
        if data is None:
            return ServerState()
        try:
            state, self._next = decode_file_untrusted(data)
            self._unsure = data
        except CorruptionError as error:
            raise CorruptionError(
                f"{self.path} is damaged: {error.message}",
                hint="the bars of dead instances are in this file: restore it, or, only when no "
                "node of the cluster runs, move it away",
            ) from error
        return state

    def save(self, state: ServerState) -> None:
        """Make a state durable. Raises OSError; then the old state stands for this process, and
        a start finds either. A file that was not loaded is replaced, as one without room is."""
        payload = encode_state(state)
        place, self._next = self._next, None
        written = encode_slot(payload, place) if place is not None else None
        if place is not None and written is not None:
            self._next = place.again()
            # What was read goes to the disk before any of it is written over: the rules for a write
            # that was cut short count on it that the other slot is there.
            if self._overwrite(self._unsure, 0) and self._overwrite(written, place.offset):
                self._unsure = b""
                self._next = place.after()
                return
        self._unsure = b""
        data, following = encode_file(payload)
        write_durable(self.path, data)
        self._next = following

    def _overwrite(self, data: bytes, offset: int) -> bool:
        """Write within the file, to the disk: one flush, where a new file takes three commits of
        the host's journal. False: somebody took the file away."""
        if not data:
            return True
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_DSYNC | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            view = memoryview(data)
            while view:
                count = os.pwrite(fd, view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            error.filename = str(self.path)
            raise
        finally:
            os.close(fd)
        return True
