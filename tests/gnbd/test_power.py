"""A server is killed at any call, the next one answers, the power goes: nothing of it is gone."""

from __future__ import annotations

import contextlib
import random

import pytest

import cluster.paths_io
import fencing.store_io
import gnbd.server.backends_io
import gnbd.server.integrity_io
from cluster.ids import Epoch, NodeId, ServerId
from cluster.messages import (
    Accept,
    Accepted,
    Ballot,
    Current,
    Initialise,
    Prepare,
    Promised,
    Query,
)
from cluster.paths_io import lock_directory, write_durable
from cluster.state import NodeInfo, initial_state
from fencing.store import ServerState
from fencing.store_io import StateFile
from gnbd import messages as m
from gnbd.exports import decode_exports
from gnbd.identity import ServerIdentity
from gnbd.server.grown_io import GrownSizes
from gnbd.server.protection_io import convert
from gnbd.server.server_io import join_cluster, load_identity
from gnbd.server.service_io import Service
from gnbd.server.voter_io import Voter
from lab.block_server import INCARNATION, member
from tests.gnbd.power_model import CALLS_MAX, Killed, Machine, kill_everywhere

SIZE = 64 << 10
IDENTITY = ServerIdentity("11" * 16, "demo", "22" * 32, ServerId(129), "s1")
STATE = initial_state("11" * 16, "demo", "fast", NodeInfo(NodeId(1), "n1", ["127.0.0.1"]))
EPOCH = STATE.config_epoch
MODULES = (cluster.paths_io, fencing.store_io, gnbd.server.backends_io, gnbd.server.integrity_io)


@pytest.fixture
def everywhere(tmp_path, monkeypatch):
    """Run a story with a kill at each call."""
    seed = random.SystemRandom().randrange(1 << 62)
    print(f"seed {seed}")

    def run(story, prompt="/", cuts=1):
        def on(machine, point, all_lost):
            for module in MODULES:
                monkeypatch.setattr(module, "os", machine)
            return story(machine, point, all_lost)

        kill_everywhere(tmp_path / "host", seed, on, prompt, cuts)

    return run


# --- the register's voter


def founded(place):
    """A voter that has a value."""
    voter = Voter(IDENTITY, place)
    voter.call(1, Initialise(1, voter.boot))
    voter.call(1, Accept(2, Ballot(1, 1, 1), EPOCH, STATE))


@pytest.mark.parametrize("repeated", ["accept", "query", "prepare"])
def test_a_voter_forgets_nothing_that_its_successor_has_said(everywhere, repeated):
    """The record whose writer was killed is there already: no Persist makes it durable again."""
    ballot = Ballot(2, 1, 1)
    first = {
        "accept": Accept(3, ballot, EPOCH, STATE),
        "query": Accept(3, ballot, EPOCH, STATE),
        "prepare": Prepare(3, ballot, EPOCH),
    }[repeated]
    again = Query(4) if repeated == "query" else first

    def story(machine: Machine, point: int, all_lost: bool) -> bool:
        place = machine.place
        machine.life(lambda: founded(place))
        killed = machine.life(lambda: Voter(IDENTITY, place).call(1, first), point) is Killed
        machine.end()
        (said,) = machine.life(lambda: Voter(IDENTITY, place).call(1, again))
        machine.cut_power(all_lost=all_lost)
        record = machine.life(lambda: Voter(IDENTITY, place))._acceptor.record
        match said:
            case Accepted():
                assert record.accepted == said.ballot == ballot
            case Current():
                assert record.accepted == said.accepted
            case Promised():
                assert record.promised == said.ballot == ballot
        return not killed

    everywhere(story)


def test_a_server_is_in_the_cluster_that_it_says_it_is_in(everywhere):
    """`gnbd-server --join` a second time: "is already in cluster"."""

    def story(machine: Machine, point: int, all_lost: bool) -> bool:
        killed = machine.life(lambda: join_cluster(machine.place, IDENTITY), point) is Killed
        machine.end()
        machine.life(lambda: join_cluster(machine.place, IDENTITY))
        machine.cut_power(all_lost=all_lost)
        assert machine.life(lambda: load_identity(machine.place)) == IDENTITY
        return not killed

    everywhere(story)


def test_a_directory_that_had_to_be_made_stays(tmp_path, monkeypatch):
    """It is in other directories."""
    (tmp_path / "host").mkdir()
    machine = Machine(tmp_path / "host", 1)
    monkeypatch.setattr(cluster.paths_io, "os", machine)
    path = machine.place / "one/two/three"
    machine.life(lambda: write_durable(path, b"data"))
    machine.cut_power(all_lost=True)
    assert path.read_bytes() == b"data"
    machine.dispose()


# --- bars


def configured(machine, exports):
    return decode_exports(f'state_dir = "{machine.place}/state"\n{exports}', "exports.toml")


def server(machine, exports=""):
    """One that has started."""
    lock_directory(machine.place / "state", "gnbd-server")
    return Service(configured(machine, exports), IDENTITY)


def installed(service, epoch):
    done = service.install(NodeId(1), INCARNATION, m.Install(Epoch(epoch), [member(1)], {}))
    assert isinstance(done, m.Done)


@pytest.mark.parametrize("how", ["first", "replaced", "slot"])
def test_a_bar_stays(everywhere, how):
    """Killed while it makes its state file (the first one, or a new one), or writes into it."""

    def before(machine):
        if how != "first":
            installed(server(machine), 1)
            machine.end()

    def dying(machine):
        service = server(machine)
        if how == "replaced":
            service._file._next = None
        installed(service, 2)

    def story(machine: Machine, point: int, all_lost: bool) -> bool:
        machine.life(lambda: before(machine))
        killed = machine.life(lambda: dying(machine), point) is Killed
        machine.end()
        machine.life(lambda: installed(server(machine), 3))
        machine.cut_power(all_lost=all_lost)
        state = machine.life(lambda: StateFile(machine.place / "state/fencing.state").load())
        assert state.record is not None
        assert state.record.epoch == 3
        return not killed

    everywhere(story)


@pytest.mark.parametrize("how", ["killed", "refused"])
def test_the_slot_that_a_killed_server_has_left_counts_for_nothing(everywhere, how):
    """Its successor begins to write over the other slot, and the power goes: then neither would be
    whole, or the oldest one would be believed. `refused`: the disk had refused the slot, and the
    one that was told of it is dead; the kernel takes it for written."""

    def of_life(machine):
        file = StateFile(machine.place / "state")
        return file, file.load().start_count

    def before(machine):
        file, _ = of_life(machine)
        for count in (1, 2, 3):
            file.save(ServerState(count))

    def saved(machine):
        file, count = of_life(machine)
        file.save(ServerState(count + 1))

    def dying(machine, point):
        """Whether its end came before its time."""
        if how == "killed":
            return machine.life(lambda: saved(machine), point) is Killed
        machine.refuse(point)
        with contextlib.suppress(OSError):
            machine.life(lambda: saved(machine))
        return machine.has_refused()

    early = [True]
    for first in range(CALLS_MAX):
        if not any(early):
            break
        early.clear()

        def story(machine: Machine, point: int, all_lost: bool, first: int = first) -> bool:
            machine.life(lambda: before(machine))
            early.append(dying(machine, first))
            machine.end()
            found = machine.life(lambda: of_life(machine))[1]
            assert found in (3, 4)
            killed = machine.life(lambda: saved(machine), point) is Killed
            machine.cut_power(all_lost=all_lost)
            count = machine.life(lambda: of_life(machine))[1]
            assert count in (3, found, found + 1) if killed else count == found + 1
            return not killed

        everywhere(story, cuts=10)
    assert first > 1


# --- disks


def disk(machine, size, integrity="kept"):
    return (
        f'[[exports]]\nname = "disk"\npath = "{machine.place}/disks/d.img"\n'
        f'size = {size}\nintegrity = "{integrity}"\naccess = "plain"\n'
    )


def write_last(service):
    """The last block of the export, made durable; its offset."""
    export = service.export("disk")
    at = export.size_bytes - 4096
    export.backend.write(at, memoryview(b"w" * 4096), False)
    service.flush(export)
    return at


def check_last(service, at):
    found = bytearray(4096)
    assert service.export("disk").size_bytes >= at + 4096
    service.export("disk").backend.read_into(at, memoryview(found))
    assert found == b"w" * 4096


@pytest.mark.parametrize("how", ["made", "made longer", "resized"])
def test_what_was_flushed_to_a_disk_stays(everywhere, how):
    """Killed while it makes the disk, or makes it longer."""

    def story(machine: Machine, point: int, all_lost: bool) -> bool:
        size = 2 * SIZE if how == "made longer" else SIZE
        toml = disk(machine, size)
        if how != "made":
            machine.life(lambda: server(machine, disk(machine, SIZE)))
            machine.end()

        def dying():
            service = server(machine, toml)
            if how == "resized":
                service.resize("disk", 2 * SIZE)

        killed = machine.life(dying, point) is Killed
        machine.end()
        at = machine.life(lambda: write_last(server(machine, toml)))
        machine.cut_power(all_lost=all_lost)
        machine.life(lambda: check_last(server(machine, toml), at))
        machine.end()
        return not killed

    everywhere(story)


def test_a_size_that_a_successor_has_told_stays(everywhere):
    """Killed while it noted that it had grown the disk."""

    def story(machine: Machine, point: int, all_lost: bool) -> bool:
        config = configured(machine, disk(machine, SIZE)).exports[0]
        path = machine.place / "grown.json"

        def noted(size):
            GrownSizes(path).note(config, size)

        machine.life(lambda: noted(2 * SIZE))
        killed = machine.life(lambda: noted(3 * SIZE), point) is Killed
        machine.end()
        told = machine.life(lambda: GrownSizes(path).size_of(config))
        machine.cut_power(all_lost=all_lost)
        assert machine.life(lambda: GrownSizes(path).size_of(config)) == told
        return not killed

    everywhere(story)


def test_an_area_is_on_when_a_server_has_said_so(everywhere):
    """`gnbdctl integrity NAME on` a second time: "is on already"."""

    def story(machine: Machine, point: int, all_lost: bool) -> bool:
        def started():
            return server(machine, disk(machine, SIZE))

        def on(service):
            return convert(service, service.export("disk"), True)

        def ended(service):
            service.export("disk").stop_upkeep()
            machine.end()

        first = machine.life(started)
        killed = machine.life(lambda: on(first), point) is Killed
        ended(first)
        second = machine.life(started)
        machine.life(lambda: on(second))
        ended(second)
        machine.cut_power(all_lost=all_lost)
        third = machine.life(started)
        assert third.export("disk").integrity is not None
        ended(third)
        return not killed

    everywhere(story, ".sums")
