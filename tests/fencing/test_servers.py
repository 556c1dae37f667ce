"""Bars and reservations of real servers: killed at any point, away, paused, slow, damaged."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading

import pytest

from cluster.errors import CorruptionError, StackError
from cluster.ids import Incarnation
from fencing.admission import Verdict, verdict_of
from fencing.reservations import Reservations, ServiceAction, Status
from fencing.store import SECTOR_BYTES, decode_file_untrusted
from fencing.store_io import StateFile
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.control.blocking_io import open_blocking
from gnbd.control.session import Peer
from lab.block_server import (
    INCARNATION,
    GnbdServer,
    export_toml,
    instance,
    member,
    running,
    wait_for,
)
from tests.fencing.killed_server import CALLS
from tests.gnbd.raw import logged_in, login_status

ME = instance(1)
OTHER = instance(2)
BOTH = {"live": (1, 2), "next_": 3}
WITHOUT_ME = {"live": (2,), "next_": 3}
BROKEN = (StackError, OSError, EOFError)


def stored(server):
    """What is on the disk of a server that does nothing at the moment."""
    return StateFile(server.state_dir / "fencing.state").load()


def stored_epoch(server):
    """Of one that runs: a look into the middle of a write is none."""
    with contextlib.suppress(CorruptionError):
        return stored(server).record.epoch
    return None


def keys(server, export="disk0"):
    with server.control() as control:
        report = control.ask(m.ReserveIn(export), m.ReserveReport)
    return {row.nexus: row.key for row in report.registrations}


def preempt(server, by, victim_key, key, export="disk0"):
    action = int(ServiceAction.PREEMPT_AND_ABORT)
    with server.control() as control:
        request = m.ReserveOut(export, by, action, key, victim_key, 7)
        return control.ask(request, m.ReserveResult).status


# --- kill -9 at every point


class KilledServer(GnbdServer):
    """Dies where `kill_at` says."""

    def command(self, *arguments):
        return [sys.executable, "-m", "tests.fencing.killed_server", *arguments, str(self.file)]

    @property
    def armed(self):
        return self.directory / "kill_at"

    def dies(self, point, work):
        """Do `work` while the server dies at `point`; whether it was answered."""
        self.armed.write_text(str(point))
        answered = False
        with contextlib.suppress(*BROKEN):
            work()
            answered = True
        self.process.wait(60)
        self.armed.unlink()
        return answered


@pytest.fixture(params=sorted(CALLS))
def mortal(tmp_path, request):
    """One that writes into its state file, one that makes a new one each time."""
    server = KilledServer(tmp_path, export_toml("disk0", tmp_path / "d.img", "cluster"))
    server.environment = {"CFS_KILL_AT": str(server.armed), "CFS_KILL_HOW": request.param}
    server.points = range(CALLS[request.param] + 1)
    server.join()
    server.start()
    try:
        yield server
    finally:
        server.kill()


def test_install_killed_at_every_point(mortal):
    """The old view or the new one, whole; what was answered is there; the bar never goes back."""
    seen = set()
    for point in mortal.points:
        epoch = 10 * point + 10
        victim = instance(1, incarnation=point + 1)
        one = member(1, (1, 2), 3, incarnation=point + 1)
        two = member(2)
        mortal.install(epoch, one, two, node=2)
        logged_in(mortal, victim).sock.close()
        without = member(1, (2,), 3, incarnation=point + 1)
        answered = mortal.dies(point, lambda: mortal.install(epoch + 1, without, two, node=2))  # noqa: B023
        assert not answered
        state = stored(mortal)
        registered = {r.nexus for r in state.exports["disk0"].reservations.registrations}
        barred = verdict_of(state.record, victim) is Verdict.BARRED
        assert (state.record.epoch, barred, victim in registered) in (
            (epoch, False, True),
            (epoch + 1, True, False),
        )
        seen.add(state.record.epoch - epoch)
        mortal.start()
        expected = m.LOGIN_BARRED if barred else m.LOGIN_NOT_SERVING
        assert login_status(mortal, victim) == expected
        mortal.install(epoch + 1, without, two, node=2)
        assert login_status(mortal, victim) == m.LOGIN_BARRED
    assert seen == {0, 1}


def test_preempt_killed_at_every_point(mortal):
    """A reservation is the old one or the new one, whole, whenever the server dies."""
    seen = set()
    for point in mortal.points:
        mortal.install(1, member(**BOTH))
        for who in (ME, OTHER):
            logged_in(mortal, who, generation=point + 1).sock.close()
        known = keys(mortal)
        assert set(known) == {ME, OTHER}
        assert not mortal.dies(point, lambda: preempt(mortal, OTHER, known[ME], known[OTHER]))  # noqa: B023
        table = Reservations(stored(mortal).exports["disk0"].reservations)
        table.check()
        assert table.keys in (known, {OTHER: known[OTHER]})
        seen.add(len(table.keys))
        mortal.start()
        mortal.install(1, member(**BOTH))
        assert keys(mortal) == table.keys
    assert seen == {1, 2}


# --- several servers


@contextlib.contextmanager
def three(tmp_path, filters=""):
    """Three servers of one cluster."""
    with contextlib.ExitStack() as stack:
        servers = []
        for number in range(3):
            directory = tmp_path / f"s{number}"
            directory.mkdir()
            toml = export_toml("disk0", directory / "d.img", "cluster", filters=filters)
            servers.append(stack.enter_context(running(directory, toml)))
        yield servers


def test_a_server_that_was_away_serves_nobody_by_its_old_list(tmp_path):
    """It missed the change: before the install nobody is served, after it the victim is barred."""
    with three(tmp_path) as servers:
        for server in servers:
            server.install(1, member(**BOTH))
        away = servers[1]
        away.kill()
        for server in (servers[0], servers[2]):
            server.install(2, member(**WITHOUT_ME))
        away.start()
        assert login_status(away, ME) == m.LOGIN_NOT_SERVING
        assert login_status(away, OTHER) == m.LOGIN_NOT_SERVING
        away.install(2, member(**WITHOUT_ME))
        for server in servers:
            assert login_status(server, ME) == m.LOGIN_BARRED
            assert login_status(server, OTHER) == m.LOGIN_OK


def test_a_paused_server_stops_before_it_believes_its_old_list(tmp_path):
    """Cut from the nodes by a pause: who returns after dead_ms serves nobody until an install."""
    with three(tmp_path) as servers:
        for server in servers:
            server.install(1, member(**BOTH), dead_ms=500)
        paused = servers[2]
        paused.process.send_signal(signal.SIGSTOP)
        for server in servers[:2]:
            server.install(2, member(**WITHOUT_ME), dead_ms=60_000)
        # The clock of the servers: the others have been silent to an idle third one this long.
        idle = servers[0]
        idle.install(3, member(**WITHOUT_ME), dead_ms=500)
        wait_for(lambda: login_status(idle, OTHER) == m.LOGIN_NOT_SERVING, "dead_ms went by")
        paused.process.send_signal(signal.SIGCONT)
        wait_for(lambda: login_status(paused, ME) == m.LOGIN_NOT_SERVING, "it serves nobody")
        paused.install(3, member(**WITHOUT_ME))
        assert login_status(paused, ME) == m.LOGIN_BARRED


def test_killed_in_the_drain_of_an_install(tmp_path):
    """The bar is durable before the drain: it holds after the restart, and the install is done
    again before anybody is served."""
    with three(tmp_path, '"delay:write_ms=0"') as servers:
        for server in servers:
            server.install(1, member(**BOTH))
        slow = servers[0]
        victim = logged_in(slow, ME)
        with slow.control() as control:
            control.ask(m.FilterCommand("disk0", "set", "delay", {"write_ms": 5000}), m.Done)
        victim.send(p.CMD_WRITE, 0, b"v" * 4096)
        answers = []

        def install():
            with contextlib.suppress(*BROKEN):
                slow.install(2, member(**WITHOUT_ME))
                answers.append(True)

        thread = threading.Thread(target=install)
        thread.start()
        wait_for(lambda: stored_epoch(slow) == 2, "the record is durable")
        slow.kill()
        thread.join()
        assert not answers
        slow.start()
        assert login_status(slow, ME) == m.LOGIN_BARRED
        assert login_status(slow, OTHER) == m.LOGIN_NOT_SERVING
        for server in servers:
            server.install(2, member(**WITHOUT_ME))
            assert login_status(server, OTHER) == m.LOGIN_OK
            assert login_status(server, ME) == m.LOGIN_BARRED


def shorter(data):
    return data[:-1]


def decayed(data):
    """The newest slot has lost its first sector."""
    where = decode_file_untrusted(data)[1].after().offset
    return data[:where] + bytes(SECTOR_BYTES) + data[where + SECTOR_BYTES :]


@pytest.mark.parametrize("damage", [shorter, decayed])
def test_a_damaged_state_file_is_told_with_its_remedy(tmp_path, damage):
    """One server refuses to serve, in a sentence and a hint; the others are not concerned. It does
    not go back to what it has stored before."""
    with three(tmp_path) as servers:
        for server in servers:
            server.install(1, member(**BOTH))
        broken = servers[1]
        broken.kill()
        path = broken.state_dir / "fencing.state"
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(AssertionError, match=r"fencing\.state is damaged"):
            broken.start()
        assert broken.process.wait() == 11
        said = broken.log.read_text()
        assert "hint: the bars of dead instances are in this file: restore it" in said
        assert "Traceback" not in said
        for server in (servers[0], servers[2]):
            server.install(2, member(**WITHOUT_ME))
            assert login_status(server, ME) == m.LOGIN_BARRED


# --- the drain


@pytest.fixture
def slow(tmp_path):
    filters = '"delay:write_ms=60"'
    with running(
        tmp_path, export_toml("disk0", tmp_path / "d.img", "cluster", filters=filters)
    ) as s:
        s.install(1, member(**BOTH))
        yield s


def flood(server, who):
    """64 writes of one nexus in flight on 8 connections; each writes its own block."""
    clients = [logged_in(server, who) for _ in range(8)]
    for index in range(64):
        clients[index % 8].send(p.CMD_WRITE, index * 4096, bytes([index + 1]) * 4096)
    return clients


def blocks(server):
    data = (server.directory / "d.img").read_bytes()[: 64 * 4096]
    for index in range(64):
        assert data[index * 4096 : (index + 1) * 4096] in (
            bytes([index + 1]) * 4096,
            bytes(4096),
        ), "a torn write"
    return data


def to_the_end(clients):
    """Answers of all clients until the server hangs up: the cookies that were acknowledged."""
    good = []
    for number, client in enumerate(clients):
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                cookie, error = client.reply()
                if error == 0:
                    good.append((cookie - 1) * 8 + number)
    return good


@pytest.mark.parametrize("how", ["install", "preempt"])
def test_64_writes_on_8_connections_are_finished_or_discarded_before_the_answer(slow, how):
    """What the disk holds when the fence is answered is what it holds ever after."""
    survivor = logged_in(slow, OTHER)
    clients = flood(slow, ME)
    wait_for(lambda: slow.report("disk0").counters["writes"] > 0, "the first write")
    if how == "install":
        slow.install(2, member(**WITHOUT_ME))
    else:
        known = keys(slow)
        assert preempt(slow, OTHER, known[ME], known[OTHER]) == Status.GOOD
    frozen = blocks(slow)
    assert survivor.request(p.CMD_WRITE, 64 * 4096, b"s" * 4096) == 0
    for client in clients if how == "preempt" else ():
        client.sock.shutdown(1)
    acknowledged = to_the_end(clients)
    assert survivor.request(p.CMD_FLUSH) == 0
    assert blocks(slow) == frozen
    for index in acknowledged:
        assert frozen[index * 4096] == index + 1, f"write {index} was acknowledged and is not there"


def test_two_preempts_at_once(tmp_path):
    """Exactly one wins, every time, and it is the one that still may write."""
    toml = "".join(export_toml(f"disk{n}", tmp_path / f"{n}.img", "cluster") for n in range(12))
    with running(tmp_path, toml) as server:
        server.install(1, member(**BOTH))
        for number in range(12):
            export = f"disk{number}"
            clients = {who: logged_in(server, who, export) for who in (ME, OTHER)}
            known = keys(server, export)
            barrier, results = threading.Barrier(2), {}

            def fight(me, victim, export=export, known=known, barrier=barrier, results=results):
                peer = Peer(1, server.identity.cluster_id_bytes, Incarnation(INCARNATION))
                with open_blocking(
                    list(server.addresses), server.port, server.identity.keys, peer
                ) as control:
                    barrier.wait()
                    action = int(ServiceAction.PREEMPT_AND_ABORT)
                    request = m.ReserveOut(export, me, action, known[me], known[victim], 7)
                    results[me] = control.ask(request, m.ReserveResult).status

            threads = [threading.Thread(target=fight, args=pair)
                       for pair in ((ME, OTHER), (OTHER, ME))]  # fmt: skip
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sorted(results.values()) == [Status.GOOD, Status.RESERVATION_CONFLICT]
            winner = ME if results[ME] == Status.GOOD else OTHER
            assert set(keys(server, export)) == {winner}
            for who, client in clients.items():
                expected = 0 if who == winner else p.EPERM
                assert client.request(p.CMD_WRITE, 0, b"w" * 512) == expected
                client.sock.close()
