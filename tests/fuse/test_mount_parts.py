"""Options, and who replays for whom."""

from __future__ import annotations

import errno
import itertools
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from cfs.errors import FsError
from cfs.fuse.callers_io import is_writing
from cfs.mount.options import fuse_options, parse_arguments
from cfs.mount.recovery import Recovering, RecoveryCore, Release, Replay
from cfs.operations.inode_io import InodeOperations
from cluster.control import GroupEvent, GroupMember
from cluster.errors import UsageError
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId


def instance(node, incarnation=1):
    return Instance(NodeId(node), Incarnation(incarnation), InstanceNo(3))


def group(kind, members, sequence=itertools.count(1), **fields):  # noqa: B008
    return GroupEvent(
        "g", Epoch(1), next(sequence), kind,
        [GroupMember(instance(n), f"n{n}", [], 0) for n in members], **fields,
    )  # fmt: skip


def test_arguments_of_mount():
    """Our own command line, and the helper interfaces of mount(8) and mount.fuse."""
    found = parse_arguments(["vg0/vol0", "/mnt/cfs"])
    assert (found.volume, found.mountpoint, found.foreground) == ("vg0/vol0", "/mnt/cfs", False)
    found = parse_arguments(["vg0/vol0", "/mnt/cfs", "-o", "rw,_netdev,noatime,dev,suid", "-n"])
    assert {"suid", "dev"} <= set(found.kernel_options)
    assert "noatime" in fuse_options(found)
    assert not found.access_times
    found = parse_arguments(["-f", "-o", "local,mmap=off", "-oread_ahead_kb=64", "image", "m"])
    assert (found.foreground, found.local, found.mmap_coherent, found.read_ahead_kb) == (
        True, True, False, 64,
    )  # fmt: skip
    assert parse_arguments(["a", "b", "-t", "fuse.cfs", "-r"]).read_only
    for words in (["a"], ["a", "b", "c"], ["a", "b", "-o", "nonsense"], ["a", "b", "-x"],
                  ["a", "b", "-o", "read_ahead_kb=many"], ["a", "b", "-o"]):  # fmt: skip
        with pytest.raises(UsageError):
            parse_arguments(words)


def test_kernel_options():
    """What the kernel gets: one of each pair."""
    options = fuse_options(parse_arguments(["v/l", "m", "-o", "ro,nosuid,noexec"]))
    assert {"ro", "nosuid", "noexec", "fsname=v/l", "default_permissions"} <= options
    assert not {"suid", "rw"} & options


def test_the_lowest_replays_when_it_is_silent():
    """view -> recovering; silent -> the lowest replays; done -> release; released -> over."""
    cores = {n: RecoveryCore(instance(n)) for n in (1, 2, 3)}
    for core in cores.values():
        assert core.event(group("view", [1, 2, 3])) == []
    dead = instance(2)
    view = group("view", [1, 3], failed=[dead], dead=[dead])
    assert cores[1].event(view) == [Recovering(True)]
    assert cores[3].event(view) == [Recovering(True)]
    assert not cores[1].gone(dead)
    silent = group("silent", [1, 3], subject=dead, dead=[dead], silent=[dead])
    assert cores[1].event(silent) == [Replay(dead)]
    assert cores[3].event(silent) == []
    assert cores[1].event(silent) == [], "not twice at once"
    assert cores[1].done(dead) == [Release(dead)]
    released = group("released", [1, 3], subject=dead)
    assert cores[1].event(released) == [Recovering(False)]
    assert cores[3].event(released) == [Recovering(False)]
    assert cores[3].gone(dead)


def test_the_next_lowest_starts_again():
    """The replayer dies: who is lowest then replays for both."""
    core = RecoveryCore(instance(3))
    core.event(group("view", [1, 2, 3]))
    one, two = instance(1), instance(2)
    core.event(group("view", [1, 3], failed=[two], dead=[two]))
    assert core.event(group("silent", [1, 3], subject=two, dead=[two], silent=[two])) == []
    both = [one, two]
    assert core.event(group("view", [3], failed=[one], dead=both, silent=[two])) == [Replay(two)]
    found = core.event(group("silent", [3], subject=one, dead=both, silent=both))
    assert found == [Replay(one)]
    assert core.done(two) == [Release(two)]
    assert core.event(group("released", [3], subject=two, dead=[one], silent=[one])) == []
    assert core.done(one) == [Release(one)]
    assert core.event(group("released", [3], subject=one)) == [Recovering(False)]


def test_a_joiner_learns_of_the_dead():
    """Dead and silent lists are in every event, so a new lowest member knows what to do."""
    core = RecoveryCore(instance(1, incarnation=9))
    dead = instance(2)
    members = [GroupMember(instance(1, 9), "n1", [], 0), GroupMember(instance(3), "n3", [], 0)]
    event = GroupEvent("g", Epoch(4), 9, "view", members, dead=[dead], silent=[dead])
    assert core.event(event) == [Recovering(True), Replay(dead)]
    core.failed(dead)
    assert core.event(event) == [Replay(dead)]


def caller(program):
    return subprocess.Popen(
        [sys.executable, "-c", f"import os; {program}"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("program", "writes"), [("os.write(1, bytes(1 << 20))", True), ("os.read(0, 1)", False)]
)
def test_who_writes_is_seen(program, writes):
    with caller(program) as process:
        try:
            end = time.monotonic() + 60
            while is_writing(process.pid) is not writes:
                assert time.monotonic() < end
        finally:
            process.kill()
    assert is_writing(process.pid) is None


def test_a_truncation_of_who_cannot_be_seen_is_doubted_once_after_a_failure():
    """Workers of io_uring. What was meant may be repeated after EINTR."""
    with caller("") as process:
        process.communicate()
    handle = SimpleNamespace(refused_thread=-1)
    operations = SimpleNamespace(handles={7: handle})
    request = SimpleNamespace(handle=7, pid=process.pid)
    InodeOperations._need_meant(operations, request)
    handle.refused_thread = process.pid
    with pytest.raises(FsError) as refused:
        InodeOperations._need_meant(operations, request)
    assert refused.value.errno == errno.EINTR
    InodeOperations._need_meant(operations, request)
