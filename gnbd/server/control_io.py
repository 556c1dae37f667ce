"""CONTROL at the server: authenticated requests to the service, one at a time per connection."""

from __future__ import annotations

import secrets
from typing import assert_never

import msgspec

from cluster.errors import ProtocolError, StackError, UsageError, os_failure
from cluster.ids import Epoch, Incarnation, NodeId
from cluster.messages import (
    ACCEPTOR_MESSAGES,
    Install,
    Installed,
    Message,
    decode_message_untrusted,
    encode_message,
)
from cluster.paths_io import boottime_ns
from cluster.wire import Frame
from fencing.admission import DEAD_MS_DEFAULT
from gnbd import messages as m
from gnbd.control.session import ControlSession, Peer
from gnbd.exports import checked_filter
from gnbd.identity import ServerIdentity
from gnbd.server.catalogue_io import Catalogue
from gnbd.server.filters.stack_io import filters_of
from gnbd.server.protection_io import steer_scrub
from gnbd.server.service_io import Service
from gnbd.server.voter_io import Voter


class ControlServer:
    """The server's end of one CONTROL connection."""

    def __init__(
        self,
        service: Service,
        catalogue: Catalogue,
        voter: Voter | None,
        identity: ServerIdentity,
        local: bool = False,
    ) -> None:
        """`local`: not a member of the cluster asks, but root on this machine."""
        self._service = service
        self._catalogue = catalogue
        self._voter = voter
        self._identity = identity
        self._local = local
        self._session: ControlSession | None = None
        self._damages_told = service.damages.count
        self.trusted = False

    def handle_untrusted(self, data: bytes) -> bytes:
        """The data of one CONTROL option; gives the answer. Raises ProtocolError: hang up."""
        if self._session is None:
            return self._hello(data)
        frame = self._session.open_untrusted(data)
        self.trusted = True
        request = m.decode_request_untrusted(frame.payload)
        try:
            if not self._local:
                self._service.heard(NodeId(frame.sender), frame.incarnation)
            elif not isinstance(request, m.LOCAL_REQUESTS):
                raise UsageError("only a member of the cluster may ask that")
            answer = self._perform(frame, request)
        except ProtocolError:
            raise
        except (StackError, OSError) as error:
            reason = os_failure(error) if isinstance(error, OSError) else error
            answer = m.Refused(_kind_of(reason), reason.message, hint=reason.hint)
        return self._session.seal(msgspec.msgpack.encode(answer), self._service.admission.epoch)

    def _hello(self, data: bytes) -> bytes:
        hello = m.decode_opening_untrusted(data)
        if not isinstance(hello, m.ControlHello) or len(hello.nonce) != m.NONCE_BYTES:
            raise ProtocolError("a control session begins with a nonce")
        identity = self._identity
        nonce = secrets.token_bytes(m.NONCE_BYTES)
        boot = Incarnation(self._voter.boot if self._voter else 0)
        me = Peer(identity.server_id, identity.cluster_id_bytes, boot)
        self._session = ControlSession(identity.keys, me, hello.nonce, nonce)
        welcome = m.ControlWelcome(nonce, identity.server_id, identity.name)
        return msgspec.msgpack.encode(welcome)

    def _perform(self, frame: Frame, request: m.Request) -> m.Answer:
        service = self._service
        match request:
            case m.Ping():
                damaged, self._damages_told = service.damages.after(self._damages_told)
                return m.Done(service.admission.epoch, damaged=damaged)
            case m.Install():
                return service.install(NodeId(frame.sender), frame.incarnation, request)
            case m.ClusterCall(payload):
                return self._cluster(frame, payload)
            case m.ReserveOut():
                return service.reserve(request)
            case m.ReserveIn(name):
                return self._reserve_in(name)
            case m.StatusRequest():
                return self._status()
            case m.ExportsRequest():
                return m.ExportsReport(self._exports())
            case m.ConnectionsRequest():
                return m.ConnectionsReport(self._connections())
            case m.PathsRequest():
                return m.PathsReport(self._paths())
            case m.ExportAdd(export):
                self._catalogue.add(export)
            case m.ExportRemove(name, force):
                self._catalogue.remove(name, force)
            case m.ExportResize(name, size_bytes):
                self._catalogue.resize(name, size_bytes)
            case m.Reload():
                return m.Done(service.admission.epoch, self._catalogue.reload())
            case m.FilterCommand(name, action, kind, parameters):
                spec = checked_filter(kind, parameters, whole=action == "add")
                self._catalogue.change_filter(name, action, spec)
            case m.IntegrityCommand(name, on):
                return m.Done(service.admission.epoch, self._catalogue.set_integrity(name, on))
            case m.ScrubCommand(name, action, rate_bytes_s):
                return steer_scrub(service.export(name), action, rate_bytes_s)
            case m.SequenceMinimum():
                return service.raise_minimum(request)
            case m.Leave(instance):
                service.leave(instance)
            case _:
                assert_never(request)
        return m.Done(service.admission.epoch)

    def _cluster(self, frame: Frame, payload: bytes) -> m.Answer:
        message = decode_message_untrusted(payload)
        answers: list[Message]
        if isinstance(message, Install):
            answers = [self._install(frame, message)]
        elif isinstance(message, ACCEPTOR_MESSAGES):
            assert self._voter is not None
            answers = self._voter.call(frame.sender, message)
        else:
            raise UsageError("that message is not for a server")
        return m.ClusterAnswer([encode_message(a) for a in answers])

    def _install(self, frame: Frame, message: Install) -> Installed:
        """`Installed.epoch` equals the asked one only on success."""
        tombstones = {t.node: t.incarnation for t in message.tombstones}
        request = m.Install(
            message.epoch, message.members, tombstones, message.dead_ms or DEAD_MS_DEFAULT
        )
        done = self._service.install(NodeId(frame.sender), frame.incarnation, request)
        if isinstance(done, m.Done):
            return Installed(message.request, done.epoch)
        epoch = done.epoch if done.epoch > message.epoch else Epoch(message.epoch - 1)
        return Installed(message.request, epoch, done.message)

    def _reserve_in(self, name: str) -> m.ReserveReport:
        table = self._service.export(name).reservations
        held = table.read_reservation()
        generation, registrations = table.read_full_status()
        return m.ReserveReport(
            generation, registrations, held[2] if held else 0, held[1] if held else 0,
            table.report_capabilities(),
        )  # fmt: skip

    def _exports(self) -> list[m.ExportReport]:
        return [
            m.ExportReport(
                name=e.name,
                size_bytes=e.size_bytes,
                access=e.access,
                filters=[str(f.spec) for f in filters_of(e.backend)],
                filter_reports={f.kind: f.report() for f in filters_of(e.backend) if f.report()},
                connections=len(e.connections),
                connections_max=e.config.connections_max,
                sequence_min=e.sequence_min,
                cache_generation=e.cache_generation,
                counters=e.counters(),
                integrity=e.integrity_counters(),
            )
            for e in list(self._service.exports.values())
        ]

    def _connections(self) -> list[m.ConnectionReport]:
        now_ns = boottime_ns()
        found = []
        for export in list(self._service.exports.values()):
            for c in list(export.connections):
                session = c.session
                found.append(
                    m.ConnectionReport(
                        export=export.name,
                        peer=c.peer,
                        instance=str(session.instance) if session else "",
                        path=session.path if session else 0,
                        generation=session.generation if session else 0,
                        age_s=(now_ns - c.since_ns) // 1_000_000_000,
                        certificate=c.client,
                        state="ending" if c.closing else "resting" if c.resting else "open",
                    )
                )
        return sorted(found, key=lambda c: (c.export, c.instance, c.peer))

    def _paths(self) -> list[m.PathReport]:
        found = [
            m.PathReport(export, str(instance), number, path.generation, len(path.connections))
            for (instance, export, number), path in self._service.paths()
        ]
        return sorted(found, key=lambda p: (p.export, p.instance, p.path))

    def _status(self) -> m.StatusReport:
        service = self._service
        record = service.admission.record
        return m.StatusReport(
            server_id=self._identity.server_id,
            name=self._identity.name,
            epoch=service.admission.epoch,
            serving=service.admission.serving,
            members=record.members if record else [],
            tombstones=record.tombstones if record else {},
            start_count=service.start_count,
            voter=self._voter is not None and self._voter.is_voter,
            attentions=[(a.nexus, name, a.code) for a, name in list(service.attentions.last)],
        )


def _kind_of(error: StackError) -> str:
    return next((k for k, kind in m.REFUSALS.items() if isinstance(error, kind)), "failed")
