"""What a node keeps in its state directory.

| file | holds |
|---|---|
| node.toml | cluster id, name, key, profile; this node's id, name, addresses (mode 0600) |
| incarnation | the last incarnation used, decimal; raised durably before every start |
| acceptor | the register's acceptor, if this node is or was a voter |
| fencing.toml | fence methods and their levels (fencing/settings.py), if the site has any |
| fences | how putting nodes out went (fencing/records.py) |
| mounts | what is mounted here and is to be mounted again after a failure (node/wanted.py), JSON |
| known | the newest value of the register seen: says where the voters are, nothing more |

A life begins with the incarnation, whose write makes all names in the directory durable: also those
of files that an earlier life was killed over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cluster.config import NodeConfig, decode_config, encode_node_config, read_config_text
from cluster.errors import (
    ConfigError,
    CorruptionError,
    ForeignError,
    ProtocolError,
    RefusedError,
    os_failure,
)
from cluster.ids import Incarnation
from cluster.paths_io import read_store, state_dir, write_durable, write_store
from cluster.register import decode_record_untrusted
from cluster.state import ClusterState, decode_state_untrusted, encode_state
from fencing.records import FenceBook, decode_book_untrusted
from fencing.settings import FencingConfig, decode_fencing
from node.wanted import WantedMount, decode_wanted_untrusted, encode_wanted


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise os_failure(error, f"cannot write {path}") from error


class NodeFiles:
    """The files of one node. What writes raises StackError (NoSpaceError, ...); then a start finds
    the old content or the new."""

    def __init__(self, directory: Path | str | None = None) -> None:
        self.directory = state_dir(directory)
        self.acceptor = self.directory / "acceptor"
        self._config = self.directory / "node.toml"
        self._incarnation = self.directory / "incarnation"
        self._known = self.directory / "known"
        self._wanted = self.directory / "mounts"
        self._fencing = self.directory / "fencing.toml"
        self._fences = self.directory / "fences"

    def config(self) -> NodeConfig:
        """node.toml. Raises ConfigError."""
        if not self._config.exists():
            raise ConfigError(
                f"{self._config} does not exist: this node is in no cluster",
                hint="clusterctl init, or clusterctl invite there and clusterctl join here",
            )
        return decode_config(read_config_text(self._config), NodeConfig, str(self._config))

    def check(self, config: NodeConfig) -> None:
        """Refuse what must be refused before a life begins. Raises StackError."""
        known, record = self.known(), self.acceptor_record()
        accepted = decode_record_untrusted(record).value if record is not None else None
        for state in (known, accepted):
            if state is not None and state.cluster_id != config.cluster.id:
                raise ForeignError(
                    f"{self.directory} holds the state of another cluster than node.toml names",
                    hint="bring back the right node.toml, or join again in an empty directory",
                )
        for info in known.nodes:
            if (info.id == config.node.id) != (info.name == config.node.name):
                raise ConfigError(
                    f"{self._config}: this is {config.node.name} with id {config.node.id}, but the "
                    f"cluster knows {info.name} with id {info.id}",
                    hint="ids and names are given by clusterctl invite; join again for another",
                )

    def create(self, config: NodeConfig, known: ClusterState, acceptor: bytes | None) -> None:
        """Make the files of a new member (init, join). node.toml comes last: it makes the node."""
        if self._config.exists():
            present = self.config()
            raise RefusedError(
                f"this node is already {present.node.name} of cluster {present.cluster.name}",
                hint=f"remove {self.directory} if that cluster is gone",
            )
        self.save_known(known)
        if acceptor is not None:
            self.save_acceptor(acceptor)
        with _writing(self._config):
            write_durable(self._config, encode_node_config(config).encode(), 0o600)

    def next_incarnation(self) -> Incarnation:
        """Raise the counter durably and return it."""
        found = Incarnation(self._last_incarnation() + 1)
        self.set_incarnation(found)
        return found

    def _last_incarnation(self) -> int:
        try:
            return int(self._incarnation.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            # The register knows the highest incarnation and will tell us (TakeIncarnation).
            return 0

    def set_incarnation(self, incarnation: Incarnation) -> None:
        """Store the counter."""
        with _writing(self._incarnation):
            write_durable(self._incarnation, f"{incarnation}\n".encode())

    def known(self) -> ClusterState:
        """The newest value of the register seen here. Raises CorruptionError, ConfigError."""
        data = read_store(self._known)
        if data is None:
            raise ConfigError(f"{self._known} is missing", hint="join the cluster again")
        try:
            return decode_state_untrusted(data)
        except ProtocolError as error:
            raise CorruptionError(f"{self._known} makes no sense: {error}") from error

    def save_known(self, state: ClusterState) -> None:
        """Store the newest value."""
        with _writing(self._known):
            write_store(self._known, encode_state(state))

    def wanted(self) -> list[WantedMount]:
        """The mounts to have. A file that makes no sense is only a convenience less."""
        try:
            return decode_wanted_untrusted(self._wanted.read_bytes())
        except (OSError, CorruptionError):
            return []

    def save_wanted(self, mounts: list[WantedMount]) -> None:
        """Store the mounts to have."""
        with _writing(self._wanted):
            write_durable(self._wanted, encode_wanted(mounts))

    def fencing(self) -> FencingConfig:
        """fencing.toml; without one the block servers are the only method. Raises ConfigError."""
        text = read_config_text(self._fencing) if self._fencing.exists() else b""
        return decode_fencing(text, str(self._fencing))

    def fences(self) -> FenceBook:
        """The history of fences. Raises CorruptionError, ProtocolError."""
        data = read_store(self._fences)
        return FenceBook() if data is None else decode_book_untrusted(data)

    def save_fences(self, book: FenceBook) -> None:
        """Store the history of fences."""
        with _writing(self._fences):
            write_store(self._fences, book.encode())

    def save_acceptor(self, record: bytes) -> None:
        """Store what the acceptor shall begin with."""
        with _writing(self.acceptor):
            write_store(self.acceptor, record)

    def acceptor_record(self) -> bytes | None:
        """The acceptor's store, None without one. Raises CorruptionError."""
        return read_store(self.acceptor)
