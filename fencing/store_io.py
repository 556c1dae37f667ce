"""The state file of a gnbd-server: the old or the new content, durable before `save` returns."""

from __future__ import annotations

from pathlib import Path

from cluster.errors import CorruptionError
from cluster.paths_io import write_durable
from fencing.store import ServerState, decode_state_untrusted, encode_state


class StateFile:
    """Bars and reservations of one gnbd-server on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> ServerState:
        """The stored state, or a fresh one if the server never stored any."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return ServerState()
        try:
            return decode_state_untrusted(data)
        except CorruptionError as error:
            raise CorruptionError(
                f"{self.path} is damaged: {error.message}",
                hint="the bars of dead instances are in this file: restore it, or, only when no "
                "node of the cluster runs, move it away",
            ) from error

    def save(self, state: ServerState) -> None:
        """Make a state durable. Raises OSError; then the old state stands."""
        write_durable(self.path, encode_state(state))
