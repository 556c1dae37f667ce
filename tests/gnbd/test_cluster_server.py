"""Login, install, bars and reservations of a real server process."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from cluster.errors import AuthenticationError, StackError
from cluster.ids import Epoch
from fencing.reservations import ReservationType, ServiceAction, Status
from gnbd import messages as m
from gnbd import protocol as p
from gnbd.control.client import InstallRefusedError
from gnbd.server.service_io import registration_key
from lab.block_server import export_toml, instance, member, running, wait_for
from tests.gnbd.raw import RawClient, logged_in, login_result, login_status

ME = instance(1)
OTHER = instance(2)
DELAY = '"delay:write_ms=400"'


@pytest.fixture
def server(tmp_path):
    exports = export_toml("disk0", tmp_path / "disk0.img", "cluster", filters='"volatile"')
    exports += export_toml("slow", tmp_path / "slow.img", "cluster", filters=DELAY)
    with running(tmp_path, exports) as server:
        yield server


def replies_to_the_end(client: RawClient) -> None:
    """Take replies until the server hangs up."""
    try:
        while True:
            client.reply()
    except (EOFError, ConnectionError):
        return


def test_nothing_before_an_install(server):
    """R3: a fresh server serves nobody; afterwards the members and nobody else."""
    assert login_status(server, ME) == m.LOGIN_NOT_SERVING
    server.install(1, member(live=(1,), next_=2))
    assert login_status(server, ME) == m.LOGIN_OK
    assert login_status(server, instance(0)) == m.LOGIN_BARRED
    assert login_status(server, instance(9)) == m.LOGIN_OK  # >= next: may start any time
    assert login_status(server, instance(1, node=3)) == m.LOGIN_UNKNOWN
    assert login_status(server, ME, secret=b"x" * 32) == m.LOGIN_REFUSED


def test_without_login_nothing(server):
    """GO of a cluster export, or of another one than logged in to, is refused."""
    server.install(1, member())
    with RawClient(server) as client:
        assert client.option(p.OPT_GO, p.go_data("disk0"))[-1][0] == p.REP_ERR_POLICY
        assert client.login(ME, "disk0").status == m.LOGIN_OK
        assert client.option(p.OPT_GO, p.go_data("slow"))[-1][0] == p.REP_ERR_POLICY
        client.go("disk0")
        assert client.request(p.CMD_WRITE, 0, b"a" * 512) == 0


def test_bars_survive_kill_and_restart(server):
    """A barred instance is barred after kill -9; nobody is served before a new install."""
    server.install(1, member(live=(1, 2), next_=3))
    victim = logged_in(server, ME)
    assert victim.request(p.CMD_WRITE, 0, b"v" * 512) == 0
    server.install(2, member(live=(2,), next_=3))
    with pytest.raises((EOFError, ConnectionError)):
        victim.request(p.CMD_WRITE, 0, b"w" * 512)
    assert login_status(server, ME) == m.LOGIN_BARRED
    server.kill()
    server.start()
    assert login_status(server, ME) == m.LOGIN_BARRED
    assert login_status(server, OTHER) == m.LOGIN_NOT_SERVING
    with pytest.raises(StackError, match="older"):
        server.install(1, member(live=(1, 2), next_=3))
    with pytest.raises(StackError, match="another keep-list"):
        server.install(2, member(live=(1, 2), next_=3))
    server.install(2, member(live=(2,), next_=3))
    assert login_status(server, OTHER) == m.LOGIN_OK
    assert login_status(server, ME) == m.LOGIN_BARRED


def test_late_requests_of_the_barred_are_counted_and_not_executed(server):
    """A node that was paused does not know that it is barred, and sends what it had in mind."""
    server.install(1, member(live=(1, 2), next_=3))
    victim = logged_in(server, ME)
    assert victim.request(p.CMD_WRITE, 0, b"v" * 4096) == 0
    server.install(2, member(live=(2,), next_=3))
    before = server.report("disk0").counters
    victim.send(p.CMD_WRITE, 0, b"l" * 4096)
    victim.send(p.CMD_READ, 0, length=512)
    victim.send(p.CMD_WRITE, 4096, b"l" * (3 << 20))
    victim.send(p.CMD_FLUSH)
    wait_for(lambda: server.report("disk0").counters["refused"] == 4, "all are counted")
    after = server.report("disk0").counters
    assert after["refused_writes"] == 3
    assert {**after, "refused": 0, "refused_writes": 0} == before
    with pytest.raises((EOFError, ConnectionError)):
        victim.request(p.CMD_FLUSH)
    with logged_in(server, OTHER) as survivor:
        assert survivor.read(0, 4096) == b"v" * 4096
        assert survivor.read(4096, 4096) == bytes(4096)


def test_install_makes_accepted_writes_durable_first(server):
    """The answer of an install means: what was accepted before is durable (volatile cache!)."""
    server.install(1, member(live=(1, 2), next_=3))
    with logged_in(server, ME) as victim:
        assert victim.request(p.CMD_WRITE, 0, b"v" * 512) == 0
        server.install(2, member(live=(2,), next_=3))
    server.kill()
    assert (server.directory / "disk0.img").read_bytes()[:512] == b"v" * 512


def test_volatile_loses_unflushed_writes(server):
    """A kill loses what was not flushed and nothing that was."""
    server.install(1, member(live=(1,), next_=2))
    with logged_in(server, ME) as client:
        assert client.request(p.CMD_WRITE, 0, b"a" * 512) == 0
        assert client.request(p.CMD_FLUSH) == 0
        assert client.request(p.CMD_WRITE, 0, b"b" * 512) == 0
        assert client.request(p.CMD_WRITE, 4096, b"c" * 512, flags=p.CMD_FLAG_FUA) == 0
        assert client.read(0, 512) == b"b" * 512
        server.kill()
    data = (server.directory / "disk0.img").read_bytes()
    assert data[:512] == b"a" * 512
    assert data[4096:4608] == b"c" * 512


def test_fence_with_writes_in_flight(server):
    """The install answers only when the victim's write has left, and none lands afterwards."""
    server.install(1, member(live=(1, 2), next_=3))
    victim = logged_in(server, ME, "slow")
    for index in range(20):
        victim.send(p.CMD_WRITE, index * 4096, b"v" * 4096)
    survivor = logged_in(server, OTHER, "slow")

    def begun() -> bool:
        return survivor.read(0, 1) == b"v" or server.report("slow").counters["writes"] > 0

    wait_for(begun, "the first write")
    server.install(2, member(live=(2,), next_=3))
    image = server.directory / "slow.img"
    frozen = image.read_bytes()
    assert frozen[19 * 4096] == 0  # most of the queue was discarded
    assert survivor.request(p.CMD_WRITE, 0, b"s" * 80 * 1024) == 0
    replies_to_the_end(victim)
    after = image.read_bytes()
    assert after[: 80 * 1024] == b"s" * 80 * 1024
    assert after[80 * 1024 :] == frozen[80 * 1024 :]


def test_a_repeated_install_waits_for_the_first_drain(server):
    """Two coordinators install the same epoch: neither answer comes before the drain."""
    server.install(1, member(live=(1, 2), next_=3), member(2))
    victim = logged_in(server, ME, "slow")
    with server.control() as control:
        control.ask(m.FilterCommand("slow", "set", "delay", {"write_ms": 1500}), m.Done)
    victim.send(p.CMD_WRITE, 0, b"v" * 4096)
    with server.control() as control:
        control.ask(m.FilterCommand("slow", "set", "delay", {"write_ms": 0}), m.Done)
    image = server.directory / "slow.img"
    landed: list[bool] = []

    def coordinator(node: int) -> None:
        server.install(2, member(live=(2,), next_=3), member(2), node=node)
        landed.append(image.read_bytes()[:1] == b"v")

    threads = [threading.Thread(target=coordinator, args=(node,)) for node in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = image.read_bytes()
    assert landed in ([True, True], [False, False])
    victim.sock.close()
    with logged_in(server, OTHER, "slow") as survivor:
        assert survivor.request(p.CMD_FLUSH) == 0
    assert image.read_bytes() == before


def test_login_drains_older_generations(server):
    """R6: the answer to a newer LOGIN means that nothing of the older connection executes."""
    server.install(1, member(live=(1,), next_=2))
    old = logged_in(server, ME, "slow", generation=5)
    same = logged_in(server, ME, "slow", generation=5)
    for index in range(10):
        old.send(p.CMD_WRITE, index * 4096, b"o" * 4096)
    wait_for(lambda: server.report("slow").counters["writes"] > 0, "the first write")
    new = logged_in(server, ME, "slow", generation=6)
    frozen = (server.directory / "slow.img").read_bytes()
    assert frozen[9 * 4096] == 0
    for client in (old, same):
        replies_to_the_end(client)
    with RawClient(server) as client:
        late = client.login(ME, "slow", generation=5)
        assert (late.status, late.generation) == (m.LOGIN_OLD_GENERATION, 6)
    assert new.request(p.CMD_FLUSH) == 0
    assert (server.directory / "slow.img").read_bytes() == frozen


def test_drain_on_another_path(server):
    """R6: DRAIN(path, generation) over another path closes that path and keeps it closed."""
    server.install(1, member(live=(1,), next_=2))
    first = logged_in(server, ME, "slow", path=0, generation=5)
    second = logged_in(server, ME, "slow", path=1, generation=5)
    for index in range(10):
        first.send(p.CMD_WRITE, index * 4096, b"o" * 4096)
    wait_for(lambda: server.report("slow").counters["writes"] > 0, "the first write")
    assert second.request(p.CMD_DRAIN, 5, length=0) == 0
    frozen = (server.directory / "slow.img").read_bytes()
    assert frozen[9 * 4096] == 0
    with RawClient(server) as client:
        assert client.login(ME, "slow", path=0, generation=5).status == m.LOGIN_OLD_GENERATION
    assert second.request(p.CMD_DRAIN, 5, length=1) == p.EINVAL  # itself
    assert second.request(p.CMD_PING, length=8) == 0
    assert second.take(8) == (64 << 20).to_bytes(8, "big")
    logged_in(server, ME, "slow", path=0, generation=6)
    assert (server.directory / "slow.img").read_bytes() == frozen


def test_cache_generation_changes_with_each_life(server):
    """R7: a restart may have lost unflushed writes, and LOGIN says so."""
    server.install(1, member(live=(1,), next_=2))
    before = login_result(server, ME, generation=1).cache_generation
    assert login_result(server, ME, generation=2).cache_generation == before
    server.kill()
    server.start()
    server.install(1, member(live=(1,), next_=2))
    assert login_result(server, ME, generation=1).cache_generation not in (0, before)


def test_failed_flush_changes_the_cache_generation(tmp_path):
    """R7: after an error of fdatasync nobody may believe in what was acknowledged before."""
    exports = export_toml("disk0", tmp_path / "d.img", "cluster",
                          filters='"error:operation=flush,count=0"')  # fmt: skip
    with running(tmp_path, exports) as server:
        server.install(1, member(live=(1,), next_=2))
        before = login_result(server, ME, generation=1).cache_generation
        with logged_in(server, ME, generation=2) as client:
            with server.control() as control:
                command = {"operation": "flush", "count": 1}
                control.ask(m.FilterCommand("disk0", "set", "error", command), m.Done)
            assert client.request(p.CMD_FLUSH) == p.EIO
            with pytest.raises((EOFError, ConnectionError)):
                client.request(p.CMD_FLUSH)
        assert login_result(server, ME, generation=3).cache_generation == before + 1


def test_silence_stops_the_server(server):
    """R3's second line: without a member's message for dead_ms nobody is served."""
    server.install(1, member(live=(1,), next_=2))
    client = logged_in(server, ME)
    server.install(2, member(live=(1,), next_=2), dead_ms=300)
    wait_for(lambda: login_status(server, ME, generation=9) == m.LOGIN_NOT_SERVING, "silence")
    with pytest.raises((EOFError, ConnectionError)):
        client.request(p.CMD_PING)
    server.install(3, member(live=(1,), next_=2))
    assert login_status(server, ME, generation=10) == m.LOGIN_OK


def test_silence_stops_the_server_during_a_reload(server):
    """The reload hangs: the exports file is a pipe that nobody writes to."""
    server.install(1, member(live=(1,), next_=2), dead_ms=300)
    server.file.unlink()
    os.mkfifo(server.file)
    server.process.send_signal(signal.SIGHUP)
    writer = os.open(server.file, os.O_WRONLY)  # returns when the server reads
    try:
        wait_for(lambda: login_status(server, ME, generation=9) == m.LOGIN_NOT_SERVING, "silence")
    finally:
        os.close(writer)


def test_minimum_sequence(server):
    """A nexus with an older volume map is refused, durably."""
    server.install(1, member(live=(0, 1, 2), next_=3))
    old = logged_in(server, ME, sequence=4)
    new = logged_in(server, OTHER, sequence=4)
    assert new.request(p.CMD_SEQUENCE, 5) == 0
    with server.control() as control:
        control.ask(m.SequenceMinimum("disk0", 5), m.Done)
    assert old.request(p.CMD_WRITE, 0, b"o" * 512) == p.ESTALE
    assert new.request(p.CMD_WRITE, 0, b"n" * 512) == 0
    server.kill()
    server.start()
    server.install(1, member(live=(0, 1, 2), next_=3))
    with logged_in(server, ME, sequence=4, generation=2) as old:
        assert old.request(p.CMD_READ, 0, length=512) == p.ESTALE
        assert old.request(p.CMD_SEQUENCE, 6) == 0
        assert old.request(p.CMD_READ, 0, length=0) == 0
    with logged_in(server, instance(0)) as clusterd:
        assert clusterd.request(p.CMD_READ, 0, length=0) == 0


def test_damaged_state_stops_the_server(server):
    """A damaged state file: a clear error, never an empty table."""
    server.install(1, member(live=(1,), next_=2))
    server.kill()
    path = server.state_dir / "fencing.state"
    data = bytearray(path.read_bytes())
    for slot in (0, len(data) // 2):
        data[slot + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssertionError, match=r"fencing\.state is damaged"):
        server.start()


def test_a_state_directory_has_one_server(server):
    """A second server on the same directory does not start."""
    import subprocess

    done = subprocess.run(server.command(), capture_output=True, text=True)
    assert done.returncode == 5
    assert f"gnbd-server (pid {server.process.pid}) uses" in done.stderr


def test_join_is_idempotent(server):
    """--join again is fine, with another cluster's token it is refused."""
    server.join_by_command()
    server.identity = type(server.identity)(
        "0" * 32, "other", "1" * 64, server.identity.server_id, "s1"
    )
    with pytest.raises(Exception, match="non-zero"):
        server.join_by_command()


def test_control_needs_the_key(server):
    """A frame under another key is not believed."""
    server.identity = type(server.identity)(
        server.identity.cluster_id, "demo", "f" * 64, server.identity.server_id, "s1"
    )
    with pytest.raises((StackError, AuthenticationError)):
        server.install(1, member())


def test_sender_must_be_in_the_keep_list(server):
    """An install from a node that the list does not keep is refused."""
    with server.control(node=2) as control, pytest.raises(InstallRefusedError, match="sender"):
        control.ask(m.Install(Epoch(1), [member(1)]), m.Done)


def reserve(control, who, action, key=0, service_key=0, kind=0):
    return control.ask(
        m.ReserveOut("disk0", who, int(action), key, service_key, kind), m.ReserveResult
    )


def test_the_reservation_of_who_leaves_is_gone_for_those_who_are_there(server):
    """At once, without another decision."""
    server.install(1, member(live=(1, 2), next_=3))
    logged_in(server, ME)
    other = logged_in(server, OTHER)
    with server.control() as control:
        kind = int(ReservationType.WRITE_EXCLUSIVE)
        answer = reserve(control, ME, ServiceAction.PREEMPT, registration_key(ME), 0, kind)
        assert answer.status == Status.GOOD
        assert other.request(p.CMD_WRITE, 0, b"o" * 512) == p.EPERM
        control.ask(m.Leave(ME), m.Done)
    assert other.request(p.CMD_WRITE, 0, b"o" * 512) == 0


def test_login_registers_and_install_unregisters(server):
    """The cluster holds type 7; registrations are those of the living, also after a restart."""
    server.install(1, member(live=(1, 2), next_=3))
    logged_in(server, ME)
    second = logged_in(server, OTHER)
    with server.control() as control:
        report = control.ask(m.ReserveIn("disk0"), m.ReserveReport)
        assert [row.nexus for row in report.registrations] == [ME, OTHER]
        assert report.type == 7
    server.install(2, member(live=(2,), next_=3))
    server.kill()
    server.start()
    server.install(2, member(live=(2,), next_=3))
    with server.control() as control:
        report = control.ask(m.ReserveIn("disk0"), m.ReserveReport)
        assert [row.nexus for row in report.registrations] == [OTHER]
        with pytest.raises(StackError, match="not admitted"):
            reserve(control, ME, ServiceAction.REGISTER_AND_IGNORE, 0, 0xA)
    second.sock.close()
    with logged_in(server, OTHER, generation=2) as second:
        assert second.request(p.CMD_LOGOUT) == 0
    with server.control() as control:
        report = control.ask(m.ReserveIn("disk0"), m.ReserveReport)
        assert (report.registrations, report.type) == ([], 7)


def test_preempt_and_abort_blocks_writes(server):
    """A preempted nexus reads and does not write; SPC lets it register again."""
    server.install(1, member(live=(1, 2), next_=3))
    first, second = logged_in(server, ME), logged_in(server, OTHER)
    with server.control() as control:
        report = control.ask(m.ReserveIn("disk0"), m.ReserveReport)
        keys = {row.nexus: row.key for row in report.registrations}
        done = reserve(control, OTHER, ServiceAction.PREEMPT_AND_ABORT, keys[OTHER], keys[ME], 7)
        assert done.status == Status.GOOD
        assert first.request(p.CMD_WRITE, 0, b"x" * 512) == p.EPERM
        assert first.request(p.CMD_FLUSH) == p.EPERM
        assert first.request(p.CMD_READ, 0, length=0) == 0
        assert second.request(p.CMD_WRITE, 0, b"x" * 512) == 0
        assert reserve(control, ME, ServiceAction.REGISTER, 0, 0xA).status == Status.GOOD
        assert first.request(p.CMD_WRITE, 0, b"x" * 512) == 0
        status = control.ask(m.StatusRequest(), m.StatusReport)
        assert (ME, "disk0", 0x2A05) in status.attentions
        assert "2a05 registrations preempted" in server.log.read_text()


def test_login_does_not_claim_an_install_that_is_not_drained(server):
    """R3: a LOGIN that is answered while an install drains must not tell the new epoch: what the
    victim has in flight may still land, so a survivor must not use the data yet."""
    server.install(1, member(live=(1, 2), next_=3))
    victim = logged_in(server, ME, "slow")
    with server.control() as control:
        control.ask(m.FilterCommand("slow", "set", "delay", {"write_ms": 1500}), m.Done)
    victim.send(p.CMD_WRITE, 0, b"v" * 4096)
    image = server.directory / "slow.img"
    done: list[bool] = []

    def coordinator() -> None:
        server.install(2, member(live=(2,), next_=3))
        done.append(True)

    thread = threading.Thread(target=coordinator)
    thread.start()
    generation = 1

    def barred() -> bool:
        return login_status(server, ME) == m.LOGIN_BARRED

    wait_for(barred, "the new keep-list")
    while not done:
        generation += 1
        with RawClient(server) as client:
            result = client.login(OTHER, "slow", generation=generation)
        assert result.status == m.LOGIN_OK
        if result.epoch >= 2:
            frozen = image.read_bytes()
            thread.join()
            assert image.read_bytes() == frozen, "the victim wrote in the installed epoch"
    thread.join()
    assert login_result(server, OTHER, generation=generation + 1).epoch == 2


def test_failed_flush_reaches_who_has_only_logged_in(tmp_path):
    """R7: a connection between LOGIN and GO was told the old cache generation: it is cut too."""
    exports = export_toml("disk0", tmp_path / "d.img", "cluster",
                          filters='"error:operation=flush,count=0"')  # fmt: skip
    with running(tmp_path, exports) as server:
        server.install(1, member(live=(1, 2), next_=3))
        with RawClient(server) as early, logged_in(server, OTHER) as client:
            assert early.login(ME, "disk0").status == m.LOGIN_OK
            with server.control() as control:
                command = {"operation": "flush", "count": 1}
                control.ask(m.FilterCommand("disk0", "set", "error", command), m.Done)
            assert client.request(p.CMD_FLUSH) == p.EIO
            with pytest.raises((EOFError, ConnectionError)):
                client.request(p.CMD_FLUSH)
            with pytest.raises((EOFError, ConnectionError)):
                early.go("disk0")


def test_failed_flush_of_an_install_changes_the_cache_generation(tmp_path):
    """R7: the error of a flush comes once; when an install gets it, clients must hear of it."""
    exports = export_toml("disk0", tmp_path / "d.img", "cluster",
                          filters='"error:operation=flush,count=0"')  # fmt: skip
    with running(tmp_path, exports) as server:
        server.install(1, member(live=(1, 2), next_=3))
        before = login_result(server, ME, generation=1).cache_generation
        with server.control() as control:
            command = {"operation": "flush", "count": 1}
            control.ask(m.FilterCommand("disk0", "set", "error", command), m.Done)
        with pytest.raises(StackError):
            server.install(2, member(live=(1,), next_=3))
        server.install(2, member(live=(1,), next_=3))
        assert login_result(server, ME, generation=2).cache_generation == before + 1


def test_a_failed_flush_is_no_success_for_the_others(tmp_path):
    """R7: the kernel tells an error once per open file; a flush of another client at the same time
    would succeed although its writes are lost."""
    filters = '"error:operation=flush,count=0", "delay:flush_ms=0"'
    exports = export_toml("disk0", tmp_path / "d.img", "cluster", filters=filters)
    with running(tmp_path, exports) as server:
        server.install(1, member(live=(1, 2), next_=3))
        with logged_in(server, ME) as first, logged_in(server, OTHER) as second:
            with server.control() as control:
                error = {"operation": "flush", "count": 1}
                control.ask(m.FilterCommand("disk0", "set", "delay", {"flush_ms": 300}), m.Done)
                control.ask(m.FilterCommand("disk0", "set", "error", error), m.Done)
            answers = []
            for client in (first, second):
                client.send(p.CMD_FLUSH)
            for client in (first, second):
                try:
                    answers.append(client.reply()[1])
                except (EOFError, ConnectionError):
                    answers.append(None)
            assert 0 not in answers, answers
