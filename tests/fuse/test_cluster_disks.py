"""Disks that are full, away or damaged, below the mounts of a real cluster."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cfs.attributes import BLOCK_BYTES, MountOptions
from cvm.layout import Layout
from tests.crash.writelog import HEAD_BYTES, map_in
from tests.fuse.cluster_mounts import VOLUME, cluster_mounts, fsck, harness, mount
from tests.fuse.mounting import DEADLINE_S, scratch

MIB = 1 << 20
DIRTY_BYTES = MountOptions().dirty_bytes_max


@pytest.fixture(scope="module")
def mounts():
    """Two mounts, by node number, and their cluster; the volume is soon full."""
    small = ("-J", "4m", "-j", "3", "--group-blocks", "2048")
    with (
        scratch() as base,
        cluster_mounts(base, count=2, volume="192m", mkfs=small) as (cluster, mounts),
    ):
        yield cluster, mounts


def free_blocks(path: Path) -> int:
    return os.statvfs(path).f_bfree


def wait_for_free(on, blocks: int) -> None:
    """df says so on every node, soon (it may be a second old) and to the block."""
    for mounted in on.values():
        harness.wait_until(
            lambda m=mounted: free_blocks(m.path) == blocks,
            f"{blocks} blocks are free, df says {free_blocks(mounted.path)}",
        )


def fill(path: Path) -> int:
    """Append to a file until the last block is used; how many bytes were written."""
    written = 0
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        for size in (MIB, BLOCK_BYTES):
            with contextlib.suppress(OSError):
                while True:
                    written += os.write(handle, b"f" * size)
        with pytest.raises(OSError, match="space") as full:
            os.write(handle, b"f" * BLOCK_BYTES)
        assert full.value.errno == errno.ENOSPC
        os.fsync(handle)
    finally:
        os.close(handle)
    return written


def test_what_one_node_frees_the_other_uses_at_once(mounts):
    """Full to the last block; what node 1 takes away node 2 finds with its next write, all of it;
    df is exact on both all the time."""
    _cluster, on = mounts
    one, two = on[1].path, on[2].path
    before = free_blocks(one)
    (one / "freed").write_bytes(b"x" * (20 * MIB))
    fill(two / "grown")
    wait_for_free(on, 0)
    for blocks in (1, 7, 1000):
        size = (one / "freed").stat().st_size
        os.truncate(one / "freed", size - blocks * BLOCK_BYTES)
        moment = time.monotonic()
        with (two / "grown").open("ab", buffering=0) as file:
            assert file.write(b"g" * BLOCK_BYTES) == BLOCK_BYTES
        print(f"{blocks} freed: one is used after {(time.monotonic() - moment) * 1000:.0f} ms")
        assert fill(two / "grown") == (blocks - 1) * BLOCK_BYTES
        wait_for_free(on, 0)
    os.unlink(two / "freed")
    os.unlink(one / "grown")
    wait_for_free(on, before)


def test_a_writer_that_waits_for_room_can_be_killed(mounts):
    """The servers stop: a writer goes on until as much is unwritten as may be, then waits. kill -9
    ends it; when the servers are back everything goes on."""
    cluster, on = mounts
    path = on[1].path / "waiting"
    size = DIRTY_BYTES + 8 * MIB
    path.write_bytes(bytes(size))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    program = (
        "import os, sys\nfd = os.open(sys.argv[1], os.O_WRONLY)\n"
        f"for at in range(0, {size}, {MIB}):\n    os.pwrite(fd, b'w' * {MIB}, at)\n"
    )
    servers = [server.process for server in cluster.servers.values()]
    node, place = cluster.node(1), {"mountpoint": str(on[1].path)}
    writer = None
    try:
        for process in servers:
            process.send_signal(signal.SIGSTOP)
        writer = subprocess.Popen([sys.executable, "-c", program, path])

        def waits_for_room() -> bool:
            found = node.call("cfs.waiting", place)
            dirty = sum(row["bytes"] for row in node.call("cfs.losses", place)["files"])
            return dirty > DIRTY_BYTES - MIB and "write" in {row["operation"] for row in found}

        harness.wait_until(waits_for_room, "the writer waits for room")
        assert writer.poll() is None
        writer.kill()
        assert writer.wait(DEADLINE_S) == -signal.SIGKILL
    finally:
        for process in servers:
            process.send_signal(signal.SIGCONT)
        if writer is not None:
            writer.kill()
            writer.wait()
    found = (on[2].path / "waiting").read_bytes()
    written = found.index(b"\0")
    assert written >= DIRTY_BYTES - 2 * MIB
    assert found == b"w" * written + bytes(size - written)
    os.unlink(path)


def disk_place(cluster, offset: int) -> tuple[Path, int]:
    """Where a byte of the volume lies: (file of a server, offset in it)."""
    with (cluster.servers[1].base / "disk0").open("rb") as file:
        volume_map = map_in(file.read(HEAD_BYTES), VOLUME)
    layout = Layout(volume_map)
    leg, place = layout.locate(offset, BLOCK_BYTES)
    pv = layout.pvs[leg]
    (server,) = {
        each.server
        for segment in volume_map.segments
        for stripe in segment.stripes
        for each in stripe.legs
        if each.pv == pv
    }
    return cluster.servers[server - 128].base / "disk0", place


def test_a_damaged_block_is_told_and_repaired(mounts):
    """One block of the volume rots: EIO for the file it belongs to on every node, one line in the
    log, an event; all else goes on. fsck.cfs repairs it when the volume is mounted nowhere."""
    cluster, on = mounts
    node = cluster.node(1)
    top = on[1].path / "top"
    top.mkdir()
    for name in ("rotten", "good"):
        (top / name).write_bytes(name.encode() * 5000)
    ino = (top / "rotten").stat().st_ino
    for number in (1, 2):
        assert on[number].close() == 0
    path, offset = disk_place(cluster, ino * BLOCK_BYTES)
    with path.open("r+b") as file:
        file.seek(offset + 200)
        file.write(b"rot")
    for number in (1, 2):
        lines = len(on[number].log.read_text().splitlines())
        on[number] = mount(cluster.node(number))
        here = on[number].path / "top"
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output") as refused:
                (here / "rotten").read_bytes()
            assert refused.value.errno == errno.EIO
        assert (here / "good").read_bytes() == b"good" * 5000
        (here / f"new{number}").write_bytes(b"n" * 10_000)
        said = [line for line in on[number].log.read_text().splitlines()[lines:] if "ERROR" in line]
        (line,) = said
        assert f"block {ino}" in line
        assert f"inode {ino}" in line
        assert "fsck.cfs --repair" in line
        events = harness.wait_until(
            lambda n=number: cluster.node(n).events("fs.damaged"), "the event"
        )
        assert len(events) == 1
        assert str(ino) in str(events[0])
    for number in (1, 2):
        assert on[number].close() == 0
    code, text = fsck(node, "-n")
    assert code == 4, text
    assert str(ino) in text
    code, text = fsck(node, "-y")
    assert code == 1, text
    code, text = fsck(node)
    assert code == 0, text
    for number in (1, 2):
        on[number] = mount(cluster.node(number))
        names = set(os.listdir(on[number].path / "top"))
        assert {"good", "new1", "new2"} <= names
        assert (on[number].path / "top" / "good").read_bytes() == b"good" * 5000
        for name in names:
            (on[number].path / "top" / name).read_bytes()
