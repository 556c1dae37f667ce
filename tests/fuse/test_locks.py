"""Locks of files between three mounts: flock and fcntl, as programs use them."""

from __future__ import annotations

import json
import mailbox
import os
import re
import signal
import struct
import subprocess
import sys

import pytest

from tests.fuse import mapped_store
from tests.fuse.cluster_mounts import cluster_mounts, mount
from tests.fuse.lock_client import clients, eventually
from tests.fuse.mounting import scratch

FLOCK_BUSY = 75


@pytest.fixture(scope="module")
def mounts():
    """The mounts of a module, by node number, and their cluster."""
    with scratch() as base, cluster_mounts(base) as (cluster, mounts):
        yield cluster, mounts


@pytest.fixture
def places(mounts, request):
    """The same empty directory on each mount."""
    _cluster, on = mounts
    name = re.sub(r"\W+", "_", request.node.name)
    (on[1].path / name).mkdir()
    return [on[number].path / name for number in sorted(on)]


def test_flock_excludes_between_nodes(places):
    with clients(*places) as (a, b, c):
        fa, fb, fc = (one.do("open", "f") for one in (a, b, c))
        assert a.do("flock", fa, "r") is None
        assert b.do("flock", fb, "r", nowait=True) is None
        assert c.do("flock", fc, "w", nowait=True) == "EAGAIN"
        b.start("flock", fb, "w")
        assert not b.answered(0.1)
        assert a.do("flock", fa, "u") is None
        assert b.end() is None
        assert c.do("flock", fc, "r", nowait=True) == "EAGAIN"
        b.do("flock", fb, "u")
        assert c.do("flock", fc, "w") is None


def test_a_waiting_flock_ends_with_any_signal(places):
    with clients(*places[:2]) as (a, b):
        fa, fb = a.do("open", "f"), b.do("open", "f")
        a.do("flock", fa, "w")
        b.start("flock", fb, "w")
        assert not b.answered(0.1)
        b.interrupt()
        assert b.end() == "EINTR"
        assert b.do("flock", fb, "r", nowait=True) == "EAGAIN"
        a.do("flock", fa, "u")
        assert b.do("flock", fb, "w") is None


@pytest.mark.parametrize("end", ["close", "kill"])
def test_flock_ends_with_its_open_file(places, end):
    with clients(*places[:2]) as (a, b):
        fa, fb = a.do("open", "f"), b.do("open", "f")
        copy = a.do("dup", fa)
        assert a.do("flock", fa, "w") is None
        a.do("close", fa)  # the copy holds the lock
        b.start("flock", fb, "w")
        assert not b.answered(0.1)
        if end == "close":
            a.do("close", copy)
        else:
            a.kill()
        assert b.end() is None


def test_who_waits_and_is_killed_leaves_nothing_behind(places):
    with clients(*places) as (a, b, c):
        fa, fb, fc = (one.do("open", "f") for one in (a, b, c))
        a.do("flock", fa, "w")
        b.start("flock", fb, "w")
        assert not b.answered(0.1)
        b.kill()
        c.start("flock", fc, "w")
        a.do("flock", fa, "u")
        assert c.end() is None


def test_two_open_files_of_one_process_are_two_owners(places):
    with clients(places[0], places[2]) as (a, b):
        one, two = a.do("open", "f"), a.do("open", "f")
        assert a.do("flock", one, "w") is None
        assert a.do("flock", two, "r", nowait=True) == "EAGAIN"
        assert a.do("flock", one, "r") is None
        assert a.do("flock", two, "r", nowait=True) is None
        fb = b.do("open", "f")
        assert b.do("flock", fb, "r", nowait=True) is None


def flock(place, *options, command=("true",)):
    """flock(1) on a file of a mount."""
    words = ["flock", "-E", str(FLOCK_BUSY), *options, str(place / "lockfile"), *command]
    return subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )


def test_flock_1_serialises_a_counter_on_all_nodes(places):
    """The classic: read, add one, write, under flock(1)."""
    (places[0] / "count").write_text("0")
    script = "for i in 1 2 3 4 5 6 7 8; do flock {0}/lockfile sh -c 'read n < {0}/count; "
    script += "echo $((n + 1)) > {0}/count'; done"
    running = [subprocess.Popen(["sh", "-c", script.format(place)]) for place in places]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert (places[1] / "count").read_text() == f"{8 * len(places)}\n"


def test_flock_1_reports_who_is_not_first(places):
    holder = flock(places[1], command=("sh", "-c", "echo got; read x"))
    try:
        assert holder.stdout.readline() == "got\n"
        assert flock(places[0], "-n").wait(60) == FLOCK_BUSY
        assert flock(places[2], "-w", "0.2").wait(60) == FLOCK_BUSY
    finally:
        os.killpg(holder.pid, signal.SIGKILL)  # the command has inherited the lock
        holder.wait()
        holder.stdout.close()
    eventually(lambda: flock(places[0], "-n").wait(60) == 0, "the lock came free")


@pytest.mark.parametrize("what", ["mount", "node"])
def test_locks_of_who_dies_go_to_who_waits_elsewhere(mounts, places, what):
    """A mount process is killed, or all daemons of a node."""
    cluster, on = mounts
    kinds = ["flock", "posix", "ofd"]
    with clients(*[places[2]] * 3, *[places[0]] * 3) as processes:
        holders, waiters = processes[:3], processes[3:]
        for how, holder, waiter in zip(kinds, holders, waiters, strict=True):
            assert holder.do(how, holder.do("open", how), "w") is None
            waiter.start(how, waiter.do("open", how), "w")
            assert not waiter.answered(0.1)
        if what == "mount":
            on[3].process.kill()
        else:
            cluster.node(3).kill()
        assert [waiter.end() for waiter in waiters] == [None, None, None]
        with clients(places[1]) as (other,):
            for how in kinds:
                assert other.do(how, other.do("open", how), "r", nowait=True) == "EAGAIN"
    on[3].destroy()
    if what == "node":
        cluster.node(3).start()
        cluster.wait_view(sorted(on))
    on[3] = mount(cluster.node(3))


# Lock files, as mail software uses them.


@pytest.mark.parametrize("way", ["exclusive", "dot_lock"])
def test_a_lock_file_has_one_winner_in_the_cluster(places, way):
    """Two processes on each node try at once, again and again."""
    wins = [0] * 6
    with clients(*places, *places) as processes:
        for _ in range(40):
            for one in processes:
                one.start(way, "box.lock")
            answers = [one.end() for one in processes]
            if way == "dot_lock":
                assert all(linked == named for linked, named in answers), answers
                answers = [linked for linked, _named in answers]
            assert answers.count(True) == 1, answers
            wins[answers.index(True)] += 1
            processes[answers.index(True)].do("unlink", "box.lock")
    print(wins)


DELIVER = """
import mailbox, sys, time
path, me, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
for number in range(count):
    while True:
        box = mailbox.mbox(path)
        try:
            box.lock()  # fcntl and a dot lock
            break
        except mailbox.ExternalClashError:
            box.close()
            time.sleep(0.002)
    message = mailbox.mboxMessage()
    message.set_from(me)
    message["Subject"] = f"{me} {number}"
    message.set_payload(f"{me} {number}\\n" * 300)
    box.add(message)
    box.flush()
    box.unlock()
    box.close()
"""


def test_mail_is_delivered_from_all_nodes_into_one_mbox(places):
    count = 12
    (places[0] / "mbox").touch()  # mailbox.mbox makes it without a lock, and truncates it
    running = [
        subprocess.Popen([sys.executable, "-c", DELIVER, place / "mbox", f"n{number}", str(count)])
        for number, place in enumerate(places)
    ]
    assert [process.wait(120) for process in running] == [0] * len(places)
    for place in places:
        box = mailbox.mbox(place / "mbox", create=False)
        found = sorted(message["Subject"] for message in box)
        assert found == sorted(f"n{node} {n}" for node in range(len(places)) for n in range(count))
        for message in box:
            assert message.get_payload().splitlines() == [message["Subject"]] * 300
        box.close()


@pytest.mark.parametrize("role", ["write", "store"])
def test_readers_through_mappings_see_each_transaction_of_a_writer(places, role, tmp_path):
    """A store in the manner of LMDB (tests/fuse/mapped_store.py); two nodes write in turns."""
    count, board = 25, tmp_path / "board"
    board.write_bytes(bytes(4096))
    (places[0] / "store").write_bytes(mapped_store.empty())
    roles = [(places[0], role), (places[1], role), (places[1], "read"), (places[2], "read")]
    running = [
        subprocess.Popen(
            [sys.executable, mapped_store.__file__, place / "store", board, what,
             str(count if what == role else 2 * count)],
            stdout=subprocess.PIPE, text=True,
        )
        for place, what in roles
    ]  # fmt: skip
    try:
        results = [json.loads(process.communicate(timeout=120)[0]) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    print(results)
    assert [result["stale"] for result in results] == [0] * len(roles)
    assert [result["made"] for result in results[:2]] == [count, count]
    for result in results[2:]:
        assert result["torn"] == 0
        assert result["transactions"] > 2


def test_cfsctl_locks_shows_all_nodes(mounts, places):
    cluster, _on = mounts
    with clients(*places) as (a, b, c):
        fa, fb, fc = (one.do("open", "f") for one in (a, b, c))
        assert a.do("flock", fa, "r") is None
        assert b.do("posix", fb, "w", start=10, length=5) is None
        assert c.do("ofd", fc, "r", start=20) is None
        c.start("flock", fc, "w")
        a.start("posix", fa, "r", start=12, length=1)
        assert not a.answered(0.1)
        assert not c.answered(0.1)

        def shown(node, *options):
            path = str(places[node - 1] / "f")
            return cluster.node(node).tool("cfs.cli", "locks", path, *options)

        for node in (1, 3):
            text = shown(node)
            lines = {tuple(line.split()) for line in text.splitlines()[1:]}
            assert lines == {
                ("flock", "shared", "whole", "file", "holds", "n1", str(a.pid)),
                ("flock", "exclusive", "whole", "file", "waits", "n3", str(c.pid)),
                ("range", "write", "10-14", "holds", "n2", str(b.pid)),
                ("range", "read", "12-12", "waits", "n1", str(a.pid)),
                ("range", "read", "20-end", "holds", "n3", str(c.pid)),
            }, text
        found = json.loads(shown(2, "--json"))
        assert found["no_answer"] == []
        assert {row["node"] for row in found["locks"] if row["waits"]} == {"n1", "n3"}
        assert found["ino"] == (places[0] / "f").stat().st_ino


# Byte ranges.


def test_ranges_exclude_between_nodes(places):
    with clients(*places) as (a, b, c):
        fa, fb, fc = (one.do("open", "f") for one in (a, b, c))
        assert a.do("posix", fa, "w", start=10, length=10) is None
        assert b.do("posix", fb, "w", start=20, length=0, nowait=True) is None
        assert b.do("posix", fb, "r", start=19, length=1, nowait=True) == "EAGAIN"
        assert c.do("posix", fc, "r", length=10, nowait=True) is None
        assert a.do("posix", fa, "r", start=10, length=10) is None
        assert c.do("posix", fc, "r", length=20, nowait=True) is None
        b.start("posix", fb, "w", start=5, length=5)
        assert not b.answered(0.1)
        assert c.do("posix", fc, "u", length=12) is None
        assert b.end() is None
        assert c.do("posix", fc, "w", start=1 << 40, length=1, nowait=True) == "EAGAIN"


def test_the_holder_is_told_by_its_pid_or_as_another_node(places):
    with clients(places[0], places[0], places[1]) as (a, b, c):
        fa, fb, fc = (one.do("open", "f") for one in (a, b, c))
        assert a.do("posix", fa, "w", start=3, length=4) is None
        assert b.do("test", fb, "r") == ["w", 3, 4, a.pid]
        assert c.do("test", fc, "w", start=5, length=100) == ["w", 3, 4, 0]
        assert c.do("test", fc, "w", start=7) is None
        assert c.do("posix", fc, "r", start=20) is None
        assert a.do("test", fa, "w", start=10) == ["r", 20, 0, 0]
        assert a.do("test", fa, "r", start=10) is None


def test_a_waiting_range_ends_with_any_signal(places):
    with clients(*places) as (a, b, c):
        fa, fb, fc = (one.do("open", "f") for one in (a, b, c))
        a.do("posix", fa, "w")
        for waiting, fd in ((b, fb), (c, fc)):
            waiting.start("posix", fd, "w", start=7, length=1)
            assert not waiting.answered(0.1)
            waiting.interrupt()
            assert waiting.end() == "EINTR"
        assert a.do("posix", fa, "u") is None
        assert b.do("posix", fb, "w", nowait=True) is None


@pytest.mark.parametrize("end", ["close", "kill"])
def test_ranges_end_with_their_process(places, end):
    """Closing any descriptor of the file is enough, as POSIX wants it."""
    with clients(*places[:2]) as (a, b):
        fa, other, fb = a.do("open", "f"), a.do("open", "f"), b.do("open", "f")
        assert a.do("posix", fa, "w") is None
        b.start("posix", fb, "w")
        assert not b.answered(0.1)
        if end == "close":
            a.do("close", other)
        else:
            a.kill()
        assert b.end() is None


def test_ofd_locks_belong_to_the_open_file(places):
    with clients(*places[:2]) as (a, b):
        one, two, fb = a.do("open", "f"), a.do("open", "f"), b.do("open", "f")
        copy = a.do("dup", one)
        assert a.do("ofd", one, "w", length=10) is None
        assert a.do("ofd", two, "r", length=1, nowait=True) == "EAGAIN"
        assert a.do("posix", one, "r", length=1, nowait=True) == "EAGAIN"
        a.do("close", two)  # ends locks of the process, not of the open file
        a.do("close", one)
        assert b.do("ofd", fb, "r", nowait=True) == "EAGAIN"
        assert b.do("test", fb, "r", ofd=True)[:3] == ["w", 0, 10]
        b.start("ofd", fb, "r")
        a.do("close", copy)
        assert b.end() is None


def test_a_circle_over_nodes_is_a_deadlock(places):
    with clients(*places) as (a, b, c):
        files = [(one, one.do("open", "f"), one.do("open", "g")) for one in (a, b, c)]
        for number, (one, f, _g) in enumerate(files):
            assert one.do("posix", f, "w", start=number, length=1) is None
        assert a.do("posix", files[0][2], "w") is None
        a.start("posix", files[0][1], "w", start=1, length=1)
        assert not a.answered(0.1)
        b.start("posix", files[1][1], "w", start=2, length=1)
        assert not b.answered(0.1)
        assert c.do("posix", files[2][2], "w") == "EDEADLK"
        assert not a.answered(0.1)
        c.do("close", files[2][1])
        assert b.end() is None
        b.do("close", files[1][1])
        assert a.end() is None


PING_PONG = """
import fcntl, os, struct, sys
path, me, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
fd = os.open(path, os.O_RDWR)
def lock(kind, start, length=1):
    fcntl.fcntl(fd, fcntl.F_SETLKW, struct.pack("hhqqi4x", kind, 0, start, length, 0))
wrong = 0
for number in range(rounds):
    byte = 8 * (number % 4)
    lock(fcntl.F_WRLCK, byte, 8)
    count, = struct.unpack("<Q", os.pread(fd, 8, byte))
    os.pwrite(fd, struct.pack("<Q", count + 1), byte)
    if struct.unpack("<Q", os.pread(fd, 8, byte))[0] != count + 1:
        wrong += 1
    lock(fcntl.F_UNLCK, byte, 8)
print(wrong)
"""


def test_counters_under_ranges_lose_nothing(places):
    rounds = 60
    (places[0] / "f").write_bytes(bytes(32))
    words = [sys.executable, "-c", PING_PONG]
    running = [
        subprocess.Popen(
            [*words, place / "f", str(number), str(rounds)], stdout=subprocess.PIPE, text=True
        )
        for number, place in enumerate([*places, places[0]])
    ]
    assert [process.communicate(timeout=120)[0] for process in running] == ["0\n"] * len(running)
    total = sum(struct.unpack("<4Q", (places[1] / "f").read_bytes()))
    assert total == rounds * len(running)


def test_many_ranges_of_one_owner(places):
    with clients(*places[:2]) as (a, b):
        fa, fb = a.do("open", "f"), b.do("open", "f")
        for number in range(200):
            assert a.do("posix", fa, "rw"[number % 2], start=4 * number, length=2) is None
        assert b.do("posix", fb, "r", start=4 * 50 + 2, length=2, nowait=True) is None
        assert b.do("posix", fb, "w", start=4 * 50, length=1, nowait=True) == "EAGAIN"
        assert b.do("test", fb, "r", start=4 * 60) == ["w", 4 * 61, 2, 0]
        assert a.do("posix", fa, "u") is None
        assert b.do("posix", fb, "w", nowait=True) is None
