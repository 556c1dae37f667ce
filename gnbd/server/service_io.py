"""What a gnbd-server decides: logins, installs, bars, reservations, minimum sequence numbers.

One lock (`_lock`) guards every decision and is held while it is made durable; it is never held
while requests are drained. The data path takes it only to look up a gate that was replaced.
Gates that were revoked stay in `_draining` until they are idle, and *every* install and abort
waits for all of them: a second, repeated install must not answer before the first one's drain.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import structlog

from cluster.errors import NotFoundError, StackError, UsageError, os_failure
from cluster.ids import Incarnation, Instance, NodeId
from cluster.paths_io import boottime_ns
from cluster.wire import instance_secret, login_proof
from fencing import admission as a
from fencing.reservations import Attention, Request, Reservations, Status
from fencing.store import ExportState, ServerState
from fencing.store_io import StateFile
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.exports import SECTOR_BYTES, Export, ServerConfig
from gnbd.identity import ServerIdentity
from gnbd.server.attentions_io import Attentions
from gnbd.server.damages_io import Damages
from gnbd.server.export_io import (
    CACHE_GENERATION_ERRORS,
    Connection,
    ExportRuntime,
    NexusPath,
    Session,
    wait_finished,
)
from gnbd.server.grown_io import GrownSizes
from gnbd.server.handshake import Denied, Offer
from gnbd.tls_io import server_context
from native import nbd as g

PATHS_MAX = 1 << 16
STOP_S = 10.0
"""For a client that does not take its last answers."""
log = structlog.get_logger("gnbd")
PathKey = tuple[Instance, str, int]


class Service:
    """The state of one server process."""

    def __init__(self, config: ServerConfig, identity: ServerIdentity | None) -> None:
        self.identity = identity
        self.config = config
        self.lock = self._lock = threading.RLock()
        self.stopping = False
        self.tls = server_context(config.tls) if config.tls else None
        self._file = StateFile(Path(config.state_dir) / "fencing.state")
        state = self._file.load()
        self.start_count = state.start_count + 1
        self._exports_stored = dict(state.exports)
        self.exports: dict[str, ExportRuntime] = {}
        self.damages = Damages()
        self.admission = a.Admission(state.record, boottime_ns())
        self._grown = GrownSizes(Path(config.state_dir) / "grown.json")
        for export in config.exports:
            self.open_export(export)
        self._paths: dict[PathKey, NexusPath] = {}
        self._draining: list[g.Access] = []
        self.attentions = Attentions()
        self.serving_changed: Callable[[], None] = lambda: None
        # A start invalidates what clients believe to be in our cache: durable before we serve.
        self._file.save(self._state(self.admission.record))

    # -- exports ---------------------------------------------------------------------------

    def open_export(self, config: Export) -> None:
        """Serve one more. One change at a time; no decision waits for the disk. Raises StackError,
        OSError."""
        stored = self._exports_stored.get(config.name, ExportState())
        table = Reservations(stored.reservations)
        size_bytes = self._grown.size_of(config)
        directory = Path(self.config.state_dir)
        export = ExportRuntime(config, table, stored.sequence_min, directory, size_bytes)
        # Random as well: a lost state directory begins to count anew.
        life = secrets.randbits(30) << 16 | self.start_count & 0xFFFF
        export.cache_generation = life * CACHE_GENERATION_ERRORS
        with self._lock:
            self.exports[config.name] = export
        export.keep(lambda: self.flush(export), self.damages)

    def _state(
        self, record: a.InstallRecord | None, tables: dict[str, Reservations] | None = None
    ) -> ServerState:
        exports = dict(self._exports_stored)
        for name, export in self.exports.items():
            table = (tables or {}).get(name, export.reservations)
            exports[name] = ExportState(table.stored_state(), export.sequence_min)
        return ServerState(self.start_count, record, exports)

    def _save(self, tables: dict[str, Reservations]) -> None:
        """Make changed tables durable, then use them."""
        self._file.save(self._state(self.admission.record, tables))
        for name, table in tables.items():
            self.exports[name].reservations = table

    def names(self, session: Session | None) -> list[tuple[str, str]]:
        """What LIST shows."""
        with self._lock:
            return [
                (e.name, e.config.description)
                for e in self.exports.values()
                if e.access == "plain" or (session is not None and session.export == e.name)
            ]

    def find(self, name: str, session: Session | None) -> Offer | Denied:
        """What INFO, GO and EXPORT_NAME may use."""
        with self._lock:
            if self.stopping:
                return Denied(p.REP_ERR_SHUTDOWN, "the server is about to end")
            export = self.exports.get(name)
            if export is None and name == "" and len(self.exports) == 1:
                export = next(iter(self.exports.values()))
            if export is None:
                return Denied(p.REP_ERR_UNKNOWN, f"there is no export {name!r}")
            if export.access == "cluster" and (session is None or session.export != name):
                return Denied(p.REP_ERR_POLICY, f"export {name!r} is for logged-in instances")
            if export.is_full:
                text = f"export {name!r} has {len(export.connections)} connections, its limit"
                return Denied(p.REP_ERR_POLICY, text)
            return export.offer()

    def export(self, name: str) -> ExportRuntime:
        """An export by name. Raises NotFoundError."""
        export = self.exports.get(name)
        if export is None:
            raise NotFoundError(f"there is no export {name!r}", hint="see: gnbdctl exports")
        return export

    def withdraw(self, name: str) -> tuple[ExportRuntime, list[Connection]]:
        """The export is found by nobody any more and its clients are cut off; gives those that may
        still execute something. What it remembered is kept for an export of that name."""
        with self._lock:
            export = self.exports.pop(name)
            self._exports_stored[name] = ExportState(
                export.reservations.stored_state(), export.sequence_min
            )
            connections = set(export.connections)
            for (_, of, _), path in self._paths.items():
                connections |= path.connections if of == name else set()
            for nexus in list(export.gates):
                self._revoke(export, nexus, g.NOBODY)
            for connection in connections:
                connection.shut()
            return export, list(connections)

    def resize(self, name: str, size_bytes: int) -> None:
        """Grow an export, also for its clients; a restart does not forget it. One change at a time
        (Catalogue); no decision waits for the disk. Raises StackError, OSError."""
        export = self.export(name)
        step = max(SECTOR_BYTES, export.backend.alignment)
        if size_bytes < export.size_bytes or size_bytes % step:
            raise UsageError(f"an export only grows, by multiples of {step} bytes")
        export.grow(size_bytes)
        self._grown.note(export.config, size_bytes)
        with self._lock:
            export.use(export.backend, size_bytes)

    def paths(self) -> list[tuple[PathKey, NexusPath]]:
        """All that are known."""
        with self._lock:
            return list(self._paths.items())

    # -- gates -----------------------------------------------------------------------------

    def _word(self, export: ExportRuntime, nexus: Instance | None) -> int:
        if export.access == "plain":
            return export.reservations.access(nexus)
        if nexus is None or not self.admission.serving:
            return g.NOBODY
        if self.admission.verdict(nexus) is not a.Verdict.ADMITTED:
            return g.NOBODY
        if export.is_stale(nexus):
            return g.STALE
        return export.reservations.access(nexus)

    def gate(self, export: ExportRuntime, nexus: Instance | None) -> g.Access:
        """The gate that counts now."""
        with self._lock:
            gate = export.gates.get(nexus)
            if gate is None:
                gate = export.gates[nexus] = g.Access(self._word(export, nexus))
            return gate

    def _revoke(self, export: ExportRuntime, nexus: Instance | None, word: int) -> None:
        gate = export.gates[nexus]
        export.gates[nexus] = g.Access(word)
        gate.close()
        self._draining = [old for old in self._draining if not old.is_idle()]
        if not gate.is_idle():
            self._draining.append(gate)

    def _refresh(self, exports: Iterable[ExportRuntime]) -> None:
        """Store every access word anew after a decision; whoever may do nothing is cut off."""
        for export in exports:
            for nexus, gate in list(export.gates.items()):
                word = self._word(export, nexus)
                if word != gate.word:
                    self._revoke(export, nexus, word)
            for connection in list(export.connections):
                nexus = connection.session.instance if connection.session else None
                if self._word(export, nexus) == g.NOBODY:
                    if nexus and self.admission.verdict(nexus) is a.Verdict.BARRED:
                        connection.refuse()
                    else:
                        connection.shut()

    def renew_gates(self, export: ExportRuntime) -> None:
        """`wait_drained` waits for everything that executes now; nobody's rights change."""
        for nexus, gate in list(export.gates.items()):
            self._revoke(export, nexus, gate.word)

    def wait_drained(self) -> None:
        with self._lock:
            waiting = list(self._draining)
        for gate in waiting:
            gate.wait_idle()

    # -- connections -----------------------------------------------------------------------

    def attach(self, connection: Connection, offer: Offer) -> ExportRuntime | None:
        """The connection begins transmission, unless the export has gone or filled up."""
        with self._lock:
            export = self.exports.get(offer.name)
            if connection.closing or export is None or export.life != offer.life:
                return None
            if export.is_full or self.stopping:
                return None
            connection.export = export
            export.connections.add(connection)
            return export

    def detach(self, connection: Connection) -> None:
        """The connection has ended; nothing of it executes any more."""
        with self._lock:
            if connection.export is not None:
                connection.export.connections.discard(connection)
            session = connection.session
            if session is not None:
                path = self._paths.get((session.instance, session.export, session.path))
                if path is not None:
                    path.connections.discard(connection)
            connection.finished.set()

    # -- LOGIN (R6) ------------------------------------------------------------------------

    def login(
        self, connection: Connection, hello: m.LoginHello, nonce: bytes, proof: bytes
    ) -> m.LoginResult:
        """Bind a connection to an instance. Answers after older generations are drained."""
        identity = self.identity
        if identity is None:
            return self._result(m.LOGIN_REFUSED, "this server has not joined a cluster")
        own_proof = b""
        for key in identity.keys.by_id.values():
            secret = instance_secret(key, identity.cluster_id_bytes, hello.instance)
            if secrets.compare_digest(
                login_proof(secret, nonce, hello.path, hello.generation), proof
            ):
                own_proof = login_proof(secret, hello.nonce, hello.path, hello.generation)
        if not own_proof:
            return self._result(m.LOGIN_REFUSED, "the proof is wrong")
        with self._lock:
            refused = self._login_refusal(hello) or self._name_refusal(connection, hello)
            if refused is not None:
                return msgspec.structs.replace(refused, proof=own_proof)
            victims = self._bind(connection, hello)
        wait_finished(victims, connection)
        with self._lock:
            # It may have been barred, or overtaken by a newer generation, while we waited.
            refused = self._login_refusal(hello)
            if refused is None and connection.closing:
                refused = self._result(m.LOGIN_OLD_GENERATION, "overtaken by a newer connection")
            export = self.exports.get(hello.export)
            result = refused or self._result(m.LOGIN_OK, "", export, hello.generation)
            return msgspec.structs.replace(result, proof=own_proof)

    def _result(
        self, status: str, message: str, export: ExportRuntime | None = None, generation: int = 0
    ) -> m.LoginResult:
        # Not `admission.epoch`: while an install drains, what it barred may still execute (R3).
        return m.LoginResult(
            status,
            message,
            self.admission.drained_epoch,
            generation,
            export.cache_generation if export else 0,
            checksums=export is not None and export.integrity is not None,
        )

    def _login_refusal(self, hello: m.LoginHello) -> m.LoginResult | None:
        instance = hello.instance
        with self._lock:
            export = self.exports.get(hello.export)
            if export is None or export.access != "cluster":
                return self._result(m.LOGIN_NO_EXPORT, f"no cluster export {hello.export!r}")
            verdict = self.admission.verdict(instance)
            if verdict is a.Verdict.BARRED:
                text = f"{instance} is barred since epoch {self.admission.epoch} or before"
                return self._result(m.LOGIN_BARRED, text)
            if not self.admission.serving:
                return self._result(m.LOGIN_NOT_SERVING, "waiting for an install")
            if verdict is a.Verdict.UNKNOWN:
                return self._result(m.LOGIN_UNKNOWN, f"{instance} is not in the installed view")
            path = self._paths.get((instance, hello.export, hello.path))
            if path is not None and hello.generation < path.generation:
                return self._result(
                    m.LOGIN_OLD_GENERATION, "a newer connection was here", None, path.generation
                )
            if path is None and len(self._paths) >= PATHS_MAX:
                return self._result(m.LOGIN_REFUSED, "too many paths")
            return None

    def _name_refusal(self, connection: Connection, hello: m.LoginHello) -> m.LoginResult | None:
        """A certificate speaks for one node of the view: that which has its name."""
        record = self.admission.record
        for member in record.members if record else []:
            named = member.name and connection.client
            if member.node == hello.instance.node and named and member.name != connection.client:
                text = f"n{member.node} is {member.name}, the certificate {connection.client}"
                return self._result(m.LOGIN_REFUSED, text)
        return None

    def _bind(self, connection: Connection, hello: m.LoginHello) -> list[Connection]:
        instance = hello.instance
        export = self.exports[hello.export]
        table = export.reservations.copy()
        if table.hold_for_all(instance, registration_key(instance)):
            self._save({export.name: table})
        if hello.sequence > export.sequences.get(instance, 0):
            export.sequences[instance] = hello.sequence
        key = (instance, hello.export, hello.path)
        path = self._paths.setdefault(key, NexusPath())
        if connection.session is not None:
            raise AssertionError("a connection logs in once")
        path.generation = hello.generation
        path.connections.add(connection)
        connection.session = Session(instance, hello.export, hello.path, hello.generation)
        victims = path.shut(hello.generation)
        self._refresh([export])
        return victims

    # -- private commands ------------------------------------------------------------------

    def drain_path(self, connection: Connection, path_id: int, generation: int) -> bool:
        """Nothing that was sent on that path up to that generation executes after the return.
        False if the request makes no sense, or this connection was itself shut meanwhile."""
        session = connection.session
        assert session is not None
        if path_id == session.path and generation >= session.generation:
            return False
        with self._lock:
            key = (session.instance, session.export, path_id)
            path = self._paths.setdefault(key, NexusPath())
            path.generation = max(path.generation, generation + 1)
            victims = path.shut(generation + 1)
        return wait_finished(victims, connection)

    def set_sequence(self, session: Session, sequence: int) -> None:
        """The nexus works with this volume sequence number from now on."""
        with self._lock:
            export = self.exports[session.export]
            export.sequences[session.instance] = sequence
            self._refresh([export])

    def logout(self, connection: Connection) -> None:
        """A clean end: the registration goes (not durably: a left-over one harms nobody), and
        nothing of any other connection of the instance executes after the return."""
        session, export = connection.session, connection.export
        assert session is not None and export is not None  # noqa: PT018
        with self._lock:
            others = [
                other for other in export.connections - {connection}
                if other.session is not None and other.session.instance == session.instance
            ]  # fmt: skip
            for other in others:
                other.shut()
            export.reservations.drop({session.instance})
            export.sequences.pop(session.instance, None)
            self._refresh([export])
        wait_finished(others, connection)

    def flush(self, export: ExportRuntime, own: Connection | None = None) -> None:
        """Make durable what was written before. After a failure everybody but `own` is cut off.
        Raises OSError."""
        export.flushes.run(
            lambda: export.backend.flush(),
            lambda: self.flush_failed(export, own),
            lambda: own is not None and own.closing,
        )

    def flush_failed(self, export: ExportRuntime, own: Connection | None = None) -> None:
        """The store may have dropped acknowledged writes: all clients log in anew and see it, or at
        their next FLUSH. `own` is cut by the caller, after its answer."""
        with self._lock:
            export.cache_generation += 1
            connections = [c for c in export.connections if c.session is not None]
            # Also those that were told the old generation and are not in transmission yet.
            for (_, name, _), path in self._paths.items():
                connections += path.connections if name == export.name else ()
        log.error("flush failed", export=export.name)
        for connection in connections:
            if connection is not own:
                connection.shut()

    # -- CONTROL ---------------------------------------------------------------------------

    def install(
        self, sender: NodeId, incarnation: Incarnation, request: m.Install
    ) -> m.Done | m.Refused:
        """Rule R2: durable record, words, drain, flush, and only then the answer."""
        if self._repeats(sender, incarnation, request):
            return m.Done(request.epoch)
        event = a.InstallRequested(
            sender, incarnation, request.epoch, request.members, request.tombstones, request.dead_ms
        )
        with self._lock:
            (action,) = self.admission.step(boottime_ns(), event)
            if isinstance(action, a.Refuse):
                return m.Refused("epoch", action.reason, action.epoch)
            assert isinstance(action, a.Persist)
            self._record(action.record)
            self.admission.step(boottime_ns(), a.Persisted(action.record))
            self._refresh(self.exports.values())
            self._forget_barred()
        self.wait_drained()
        for export in list(self.exports.values()):
            present = self.exports.get(export.name) is export
            if present and export.access == "cluster" and not export.backend.read_only:
                self.flush(export)
        with self._lock:
            self.admission.step(boottime_ns(), a.Drained(request.epoch))
            self._refresh(self.exports.values())
            self.serving_changed()
        log.info("installed", epoch=request.epoch, sender=f"n{sender}")
        return m.Done(request.epoch)

    def _repeats(self, sender: NodeId, incarnation: Incarnation, request: m.Install) -> bool:
        """A repeated install of what is in force costs nothing; it is a sign of life."""
        with self._lock:
            if not self.admission.is_in_force(sender, incarnation, request.epoch, request.members):
                return False
            self.admission.step(boottime_ns(), a.Heard(sender, incarnation))
            return True

    def _record(self, record: a.InstallRecord) -> None:
        tables: dict[str, Reservations] = {}
        told: dict[str, list[Attention]] = {}
        for name, export in self.exports.items():
            gone = {
                nexus for nexus in export.reservations.keys
                if export.access == "cluster"
                and a.verdict_of(record, nexus) is not a.Verdict.ADMITTED
            }  # fmt: skip
            if gone:
                tables[name] = export.reservations.copy()
                told[name] = tables[name].drop(gone)
        if tables or record != self.admission.record:
            self._file.save(self._state(record, tables))
        for name, table in tables.items():
            self.exports[name].reservations = table
            self.attentions.tell(name, told[name])

    def _forget_barred(self) -> None:
        """Paths, gates and sequence numbers of barred instances are of no more use."""
        barred = a.Verdict.BARRED
        for key in [k for k in self._paths if self.admission.verdict(k[0]) is barred]:
            del self._paths[key]
        for export in self.exports.values():
            for nexus in [n for n in export.gates if n is not None]:
                if export.access == "cluster" and self.admission.verdict(nexus) is barred:
                    self._revoke(export, nexus, g.NOBODY)
                    del export.gates[nexus]
                    export.sequences.pop(nexus, None)

    def heard(self, sender: NodeId, incarnation: Incarnation) -> None:
        """An authenticated frame came."""
        with self._lock:
            self.admission.step(boottime_ns(), a.Heard(sender, incarnation))

    def tick(self) -> int | None:
        """Rule R3's second line; gives the next deadline."""
        with self._lock:
            if self.admission.step(boottime_ns(), a.Tick()):
                log.warning("no member was heard for too long: serving nobody")
                self._refresh(self.exports.values())
            return self.admission.deadline()

    def reserve(self, request: m.ReserveOut) -> m.ReserveResult | m.Refused:
        """PERSISTENT RESERVE OUT: durable, then in force, then drained if asked, then answered."""
        with self._lock:
            export = self.exports.get(request.export)
            if export is None:
                return m.Refused("not found", f"there is no export {request.export!r}")
            for nexus in (request.nexus, request.target):
                if nexus is not None and self._barred_from(export, nexus):
                    return m.Refused("barred", f"{nexus} is not admitted")
            table = export.reservations.copy()
            outcome = table.execute(
                Request(
                    request.nexus, request.action, request.key, request.service_key,
                    request.type, request.scope, request.aptpl, request.target,
                    request.unregister,
                )
            )  # fmt: skip
            if outcome.changed:
                self._save({export.name: table})
                self.attentions.tell(export.name, outcome.attentions)
                self._refresh([export])
        if outcome.drain and outcome.status is Status.GOOD:
            self.wait_drained()
        return m.ReserveResult(outcome.status, outcome.sense, table.generation)

    def _barred_from(self, export: ExportRuntime, nexus: Instance) -> bool:
        verdict = self.admission.verdict(nexus)
        if export.access == "cluster":
            return verdict is not a.Verdict.ADMITTED or not self.admission.serving
        return verdict is a.Verdict.BARRED

    def raise_minimum(self, request: m.SequenceMinimum) -> m.Done | m.Refused:
        """Refuse nexuses with an older volume map; answers when those have been drained."""
        with self._lock:
            export = self.exports.get(request.export)
            if export is None:
                return m.Refused("not found", f"there is no export {request.export!r}")
            before = export.sequence_min
            if request.sequence > before:
                export.sequence_min = request.sequence
                try:
                    self._save({})
                except OSError:
                    export.sequence_min = before
                    raise
                self._refresh([export])
        self.wait_drained()
        return m.Done(self.admission.epoch)

    def leave(self, instance: Instance) -> None:
        """The instance ended cleanly: nothing of it is kept."""
        with self._lock:
            for export in self.exports.values():
                export.reservations.drop({instance})
                export.sequences.pop(instance, None)
                for connection in list(export.connections):
                    if connection.session and connection.session.instance == instance:
                        connection.shut()
            for key in [k for k in self._paths if k[0] == instance]:
                if not self._paths[key].connections:
                    del self._paths[key]
            self._refresh(self.exports.values())  # others may do what its reservation forbade

    def stop(self) -> None:
        """Let everybody have the answers to what was received, then flush everything. Raises
        StackError when an export could not be flushed; the others are."""
        with self._lock:
            self.stopping = True
            connections = [c for e in self.exports.values() for c in e.connections]
        for connection in connections:
            connection.finish()
        end_s = time.monotonic() + STOP_S
        for connection in connections:
            connection.finished.wait(max(0.0, end_s - time.monotonic()))
        for connection in connections:
            connection.shut()
        for connection in connections:
            connection.finished.wait(STOP_S)
        failed: StackError | None = None
        for export in list(self.exports.values()):
            try:
                export.end()
            except OSError as error:
                failed = os_failure(error, f"cannot flush export {export.name!r}")
        if failed is not None:
            raise failed


def registration_key(instance: Instance) -> int:
    """The reservation key of a cluster member: readable in `read keys`, never 0."""
    low = (instance.incarnation & 0xFFFFFFFF) << 16 | instance.number
    return instance.node << 48 | low
