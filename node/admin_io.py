"""The methods of clusterctl: `cluster.*`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import trio

from cluster.config import ClusterSection, NodeConfig, NodeSection, Token, encode_token
from cluster.control import ServerInfo
from cluster.control_io import Handler, Session
from cluster.core_events import Leave, Stay
from cluster.errors import (
    BusyError,
    NotFoundError,
    NotQuorateError,
    RefusedError,
    StackError,
    UsageError,
)
from cluster.events import EVENTS_MAX, EventName
from cluster.ids import NodeId, ServerId, VoterId
from cluster.messages import Ballot
from cluster.paths_io import boottime_ns
from cluster.register import Record
from cluster.state import (
    AddNode,
    AddServer,
    ClusterState,
    FinishVoterChange,
    ForgetNode,
    NodeInfo,
    RemoveServer,
    StartVoterChange,
    highest_incarnation,
    member_of,
    node_of,
    recovered_state,
    votes_to_drop,
)
from cluster.wire import KEY_ID
from gnbd.identity import ServerIdentity, encode_server_token
from node.clusterd_io import FOLLOWERS_MAX, Clusterd, RestartNeeded
from node.remount_io import Remounts
from node.status import Local, build_status, node_rows
from node.waiting_io import waiting_rows

MEMBER_WAIT_S = 60.0
VOTER_WAIT_S = 30.0
LEAVE_WAIT_S = 30.0
RECOVER_COUNTER = 1_000_000


class Admin:
    """Administration of one clusterd."""

    def __init__(self, daemon: Clusterd, remounts: Remounts, stop: trio.Event) -> None:
        self._daemon = daemon
        self._remounts = remounts
        self._stop = stop

    def handlers(self, session: Session) -> Mapping[str, Handler]:
        """The methods of one session."""

        async def events(params: dict[str, Any]) -> Any:
            return await self._events(session, params)

        return {
            "cluster.status": self._status,
            "cluster.nodes": self._nodes,
            "cluster.events": events,
            "cluster.invite": self._invite,
            "cluster.forget": self._forget,
            "cluster.leave": self._leave,
            "cluster.voter": self._voter,
            "cluster.server": self._server,
            "cluster.recover": self._recover,
        }

    def local(self) -> Local:
        """What only this node knows."""
        daemon = self._daemon
        instances = []
        for instance in daemon.instances.live():
            row = instance.describe()
            row["mountpoint"] = daemon.guard.mountpoint(instance.number)
            instances.append(row)
        return Local(
            node=daemon.me,
            incarnation=daemon.incarnation,
            admitted=daemon.admitted,
            connected={int(n): daemon.transport.connected(n) for n in daemon.transport.nodes()},
            servers={int(s.id): daemon.servers.problem(s.id) for s in daemon.servers.infos()},
            instances=instances,
            voter_ready=daemon.acceptor.record is not None,
            wanted=self._remounts.wanted.rows(),
        )

    async def _status(self, _params: dict[str, Any]) -> dict[str, Any]:
        daemon = self._daemon
        local = self.local()
        waiting = await waiting_rows(daemon, local)
        status = build_status(daemon.state, daemon.view, local, daemon.sighting)
        return {**status, "waiting": waiting, "problems": daemon.problems.texts(boottime_ns())}

    async def _nodes(self, _params: dict[str, Any]) -> list[dict[str, Any]]:
        daemon = self._daemon
        return node_rows(daemon.state, daemon.view, self.local(), daemon.sighting)

    async def _events(self, session: Session, params: dict[str, Any]) -> Any:
        """The newest events; with `follow` later ones are pushed as event `event`."""
        limit = min(int(params.get("limit", EVENTS_MAX)), EVENTS_MAX)
        records = self._daemon.log.after(int(params.get("after", 0)), limit)
        if params.get("follow"):
            if len(self._daemon.followers) >= FOLLOWERS_MAX:
                raise BusyError("too many followers of the event stream")
            for record in records:
                session.event("event", record)
            self._daemon.followers.add(session)
            return []
        return records

    # --- nodes

    async def _invite(self, params: dict[str, Any]) -> dict[str, str]:
        node = NodeInfo(
            NodeId(int(params["id"])), str(params["name"]), [str(a) for a in params["addresses"]]
        )
        section = NodeSection(node.id, node.name, node.addresses)
        msgspec.convert(msgspec.to_builtins(section), NodeSection)
        await self._daemon.wait_admitted(VOTER_WAIT_S)
        state = await self._daemon.command(AddNode(node))
        mine = self._daemon.config
        config = NodeConfig(
            ClusterSection(mine.cluster.id, state.name, mine.cluster.key, state.profile),
            section,
            mine.ports,
        )
        known = msgspec.structs.replace(state, volume_groups=[], fences=[])
        return {"token": encode_token(Token(config, known))}

    async def _forget(self, params: dict[str, Any]) -> dict[str, Any]:
        node = self._find_node(str(params["name"]))
        await self._daemon.command(ForgetNode(node.id))
        return {}

    async def leave(self) -> None:
        """As `clusterctl leave`."""
        await self._leave({})

    async def _leave(self, params: dict[str, Any]) -> dict[str, Any]:
        """Clean leave of this node; clusterd ends afterwards."""
        live = self._daemon.instances.live()
        if live and not params.get("force"):
            names = ", ".join(f"{one.kind} {one.title}".strip() for one in live)
            raise BusyError(f"still running here: {names}", hint="unmount first, or say --force")
        for instance in live:
            self._daemon.end_instance(instance, clean=False, reason="the node leaves by force")
        dropped = await self._drop_votes()
        await self._decide_leave()
        self._daemon.note(EventName.NODE_LEFT, f"{self._daemon.config.node.name} leaves")
        self._stop.set()
        return {"votes_dropped": dropped}

    async def _decide_leave(self) -> None:
        """Ask until it is decided. Whoever gives up stays: a core that left later, with nobody to
        end its clusterd, would be a node that neither runs nor starts anew."""
        left = False
        try:
            with trio.move_on_after(LEAVE_WAIT_S):
                await self._daemon.ask(Leave)
                left = True
        finally:
            if not left:
                self._daemon.step(Stay())
        if not left:
            raise NotQuorateError("the cluster did not decide the leave in time")

    async def _drop_votes(self) -> list[str]:
        """The last leavers of a clean shutdown shrink the set of voters, down to one: without
        this those who stay could decide nothing any more. Gives the names of who lost a vote."""
        votes = self._votes_to_drop()
        with trio.move_on_after(LEAVE_WAIT_S):
            # A member that is not heard comes back or is put out: it may only be late.
            while votes and any(not self._voter_answers(v) for v in self._members()):
                await self._daemon.wait_changed()
                votes = self._votes_to_drop()
        for voter in votes:
            await self._change_voter(remove=voter)
        names = self._voter_names()
        return [names[voter] for voter in votes]

    def _members(self) -> list[VoterId]:
        """The voters who are members."""
        state = self._daemon.state
        return [voter for voter in state.voters if member_of(state.members, voter) is not None]

    def _votes_to_drop(self) -> list[VoterId]:
        state, mine = self._daemon.state, VoterId(self._daemon.me)
        if all(member.node == self._daemon.me for member in state.members):
            return []
        return votes_to_drop(state, mine, [v for v in state.voters if self._voter_answers(v)])

    def _voter_answers(self, voter: VoterId) -> bool:
        """A node that has left is heard of for a while as a voter: of a node the life must be a
        member, or come after all that the register has seen."""
        state, sighting = self._daemon.state, self._daemon.sighting
        if voter == VoterId(self._daemon.me):
            return True
        if sighting is None or voter not in sighting.voters:
            return False
        if node_of(state, voter) is None or member_of(state.members, voter) is not None:
            return True
        highest = highest_incarnation(state, voter)
        return any(
            int(p.node) == voter and p.alive and p.incarnation > highest for p in sighting.peers
        )

    def _find_node(self, name: str) -> NodeInfo:
        for node in self._daemon.state.nodes:
            if name in (node.name, str(node.id)):
                return node
        raise NotFoundError(f"no node is called {name}", hint="see: clusterctl nodes")

    # --- voters

    def _voter_names(self) -> dict[int, str]:
        """Of all nodes and servers, whether they have a vote or not."""
        state = self._daemon.state
        names = {int(info.id): info.name for info in state.nodes}
        return names | {int(info.id): info.name for info in state.servers}

    def _find_voter(self, name: str) -> VoterId:
        for number, called in self._voter_names().items():
            if name in (called, str(number)):
                return VoterId(number)
        raise NotFoundError(
            f"neither a node nor a server is called {name}", hint="see: clusterctl status"
        )

    async def _voter(self, params: dict[str, Any]) -> dict[str, Any]:
        """`add NAME`, `remove NAME`, `replace NAME` (its store is lost: out and in again)."""
        action = str(params["action"])
        state = await self._daemon.read_state()
        voter = self._find_voter(str(params["name"]))
        if action == "remove":
            return self._voters(await self._change_voter(remove=voter))
        if action not in ("add", "replace"):
            raise UsageError("voter add, remove or replace")
        if action == "replace" and voter in state.voters:
            await self._change_voter(remove=voter)
        if node_of(state, voter) is not None:
            await self._wait_member(NodeId(int(voter)))
        else:
            await self._wait_server(ServerId(int(voter)))
        return self._voters(await self._change_voter(add=voter))

    def _voters(self, state: ClusterState) -> dict[str, Any]:
        return {"voters": list(state.voters), "config_epoch": state.config_epoch}

    async def _change_voter(
        self, *, add: VoterId | None = None, remove: VoterId | None = None
    ) -> ClusterState:
        state = await self._daemon.read_state()
        if state.old_voters:
            state = await self._daemon.command(FinishVoterChange(), VOTER_WAIT_S)
        await self._daemon.command(StartVoterChange(add, remove), VOTER_WAIT_S)
        state = await self._daemon.command(FinishVoterChange(), VOTER_WAIT_S)
        self._daemon.note(
            EventName.VOTER_CHANGED, f"voters are now {state.voters}", voters=list(state.voters)
        )
        return state

    async def _wait_member(self, node: NodeId) -> None:
        with trio.move_on_after(MEMBER_WAIT_S):
            while member_of(self._daemon.view.members, node) is None:
                await self._daemon.wait_changed()
            return
        raise StackError(f"node {node} is not a member", hint="start clusterd there")

    async def _wait_server(self, server: ServerId) -> None:
        with trio.move_on_after(MEMBER_WAIT_S):
            while not self._daemon.servers.is_up(server):
                await self._daemon.wait_changed()
            return
        raise StackError(f"server {server} does not answer", hint="start gnbd-server there")

    # --- servers

    async def _server(self, params: dict[str, Any]) -> dict[str, Any]:
        action, name = str(params["action"]), str(params["name"])
        if action == "remove":
            found = next((s for s in self._daemon.state.servers if s.name == name), None)
            if found is None:
                raise NotFoundError(f"no server is called {name}", hint="see: clusterctl status")
            await self._daemon.command(RemoveServer(found.id, bool(params.get("force"))))
            self._daemon.note(EventName.SERVER_REMOVED, f"server {name} removed")
            return {}
        if action != "add":
            raise UsageError("server add or remove")
        server = ServerInfo(
            ServerId(int(params["id"])), name, [str(a) for a in params["addresses"]],
            int(params.get("port", 10809)),
        )  # fmt: skip
        await self._daemon.wait_admitted(VOTER_WAIT_S)
        await self._daemon.command(AddServer(server))
        self._daemon.note(EventName.SERVER_ADDED, f"server {name} added", server=server.id)
        cluster = self._daemon.config.cluster
        identity = ServerIdentity(cluster.id, cluster.name, cluster.key, server.id, name, KEY_ID)
        return {"token": encode_server_token(identity)}

    # --- recovery of a lost majority

    async def _recover(self, params: dict[str, Any]) -> dict[str, Any]:
        """New voters by the operator's word, typed with the cluster's name."""
        daemon = self._daemon
        if str(params.get("name", "")) != daemon.state.name:
            raise RefusedError(
                "the cluster's name must be typed", hint=f"clusterctl recover {daemon.state.name}"
            )
        try:
            await daemon.read_state(VOTER_WAIT_S / 5)
        except NotQuorateError:
            pass
        else:
            raise RefusedError("a majority of the voters answers", hint="there is nothing to do")
        voters = [self._find_voter(str(name)) for name in params["voters"]]
        if VoterId(daemon.me) not in voters:
            raise UsageError("this node must be among the new voters")
        record = daemon.acceptor.record
        newest = daemon.state
        if record is not None and record.value is not None:
            newest = max(newest, record.value, key=lambda state: state.version)
        promised = record.promised.counter if record is not None else 0
        ballot = Ballot(promised + RECOVER_COUNTER, int(daemon.me), int(daemon.incarnation))
        state = recovered_state(newest, voters, {}, f"recover|n{daemon.me}|{daemon.incarnation}")
        # In this order: with the record the register decides again, and this life writes `known`.
        await trio.to_thread.run_sync(daemon.files.save_known, state)
        with trio.move_on_after(VOTER_WAIT_S) as scope:
            await daemon.replace_record(Record(ballot, ballot, state))
        if scope.cancelled_caught:
            raise StackError("the register cannot be stored", hint="see: clusterctl status")
        assert daemon.nursery is not None
        daemon.nursery.start_soon(self._start_anew)
        return {"voters": list(state.voters), "epoch": state.epoch}

    async def _start_anew(self) -> None:
        await trio.sleep(self._daemon.timing.heartbeat_ms / 1000)
        raise RestartNeeded("recovered by the operator", self._daemon.guard)
