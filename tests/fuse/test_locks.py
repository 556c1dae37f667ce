"""Locks of files between three mounts: flock, as programs use it."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.fuse.cluster_mounts import cluster_mounts
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
    name = request.node.name
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
        assert flock(places[0], "-n").wait(30) == FLOCK_BUSY
        assert flock(places[2], "-w", "0.2").wait(30) == FLOCK_BUSY
    finally:
        os.killpg(holder.pid, signal.SIGKILL)  # the command has inherited the lock
        holder.wait()
        holder.stdout.close()
    eventually(lambda: flock(places[0], "-n").wait(30) == 0, "the lock came free")
