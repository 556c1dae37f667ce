"""The register's acceptor inside a gnbd-server, and the echoes of a server with a vote (R1, R8).

Without a store the acceptor answers `Uninitialised` and counts for nothing, so it is always there;
it becomes a voter when the cluster initialises it. Echoes come from a thread of this process.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import structlog

from cluster.actions import Notify, Persist, Received, Send
from cluster.errors import StackError
from cluster.guard_events import Vouch
from cluster.ids import Epoch, Incarnation
from cluster.messages import Heartbeat, Message, decode_message_untrusted, encode_message
from cluster.paths_io import boottime_ns, read_store, write_store
from cluster.register import Acceptor
from cluster.timing import timing_of
from cluster.voter import VoterEcho
from cluster.wire import Frame, seal, unseal_untrusted
from gnbd.identity import ServerIdentity

DATAGRAM_BYTES_MAX = 65536
log = structlog.get_logger("gnbd")


class Voter:
    """Acceptor and echo of one server process."""

    def __init__(self, identity: ServerIdentity, state_dir: Path) -> None:
        self._identity = identity
        self._path = state_dir / "acceptor"
        self._lock = threading.Lock()
        self.boot = secrets.randbits(62) | 1
        self._acceptor = Acceptor(self.boot, read_store(self._path))
        self._start_ns = boottime_ns()
        self._echo: VoterEcho | None = None
        self._sequence = 0
        self._unsaved: bytes | None = None
        with self._lock:
            self._perform(self._acceptor.start())

    def _profile(self) -> str:
        record = self._acceptor.record
        return record.value.profile if record is not None and record.value is not None else "fast"

    def _echoes(self) -> VoterEcho:
        """Made when first needed: only a decided value tells the profile."""
        if self._echo is None:
            self._echo = VoterEcho(
                self._identity.server_id, timing_of(self._profile()), self._start_ns
            )
        return self._echo

    @property
    def is_voter(self) -> bool:
        return self._acceptor.record is not None

    def call(self, source: int, message: Message) -> list[Message]:
        """One message for the acceptor; what it wants to send back. Raises OSError: the store
        cannot be written, and nothing is answered before it can."""
        with self._lock:
            if self._unsaved is not None:
                self._save(self._unsaved)
            return self._perform(self._acceptor.step(boottime_ns(), Received(source, message)))

    def _perform(self, actions: Sequence[object]) -> list[Message]:
        answers: list[Message] = []
        queue = list(actions)
        while queue:
            action = queue.pop(0)
            if isinstance(action, Persist):
                self._save(action.record)
            elif isinstance(action, Send):
                answers.append(action.message)
            elif isinstance(action, Notify) and isinstance(action.event, Vouch):
                now_ns = boottime_ns()
                vouched = self._echoes().vouch(now_ns, action.event)
                queue += self._acceptor.step(now_ns, vouched)
        return answers

    def _save(self, record: bytes) -> None:
        """Make a record durable. The acceptor has it in memory already: until it is on disk too,
        whatever the acceptor says next could be forgotten."""
        self._unsaved = record
        write_store(self._path, record)
        self._unsaved = None

    # -- echoes ----------------------------------------------------------------------------

    def serve_echoes(self, sock: socket.socket, stopped: threading.Event) -> None:
        """Answer heartbeats until the server stops. `sock` has a time-out."""
        while not stopped.is_set():
            try:
                data, address = sock.recvfrom(DATAGRAM_BYTES_MAX)
            except TimeoutError:
                continue
            except OSError:
                return
            answer = self._answer_datagram(data)
            if answer is not None:
                try:
                    sock.sendto(answer, address)
                except OSError as error:
                    log.debug("echo not sent", error=str(error))

    def _answer_datagram(self, data: bytes) -> bytes | None:
        identity = self._identity
        try:
            frame = unseal_untrusted(identity.keys, identity.cluster_id_bytes, data)
            message = decode_message_untrusted(frame.payload)
        except StackError:
            return None
        if not isinstance(message, Heartbeat) or message.node != frame.sender:
            return None
        with self._lock:
            record = self._acceptor.record
            if record is None or record.value is None:
                return None  # no vote: nobody's lease counts us
            echo = self._echoes().heartbeat(boottime_ns(), message)
            self._sequence += 1
            answer = Frame(
                sender=identity.server_id,
                cluster_id=identity.cluster_id_bytes,
                incarnation=Incarnation(self.boot),
                epoch=Epoch(0),
                config_epoch=echo.config_epoch,
                sequence=self._sequence,
                payload=encode_message(echo),
            )
        return seal(identity.keys, answer)
