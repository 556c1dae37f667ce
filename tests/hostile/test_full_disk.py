"""A really full disk below a gnbd-server: told as such, nothing lost, and it goes on with room."""

from __future__ import annotations

import contextlib
import re
import subprocess
from pathlib import Path

import pytest

from cluster.errors import EXIT_NO_SPACE, StackError
from gnbd import messages as m
from gnbd import protocol as p
from lab.block_server import GnbdServer, export_toml, member
from tests.gnbd.raw import RawClient
from tests.hostile.disks import small_disk

MIB = 1 << 20
BLOCKS = 16


def stamp(number: int) -> bytes:
    return bytes([number]) * MIB


@contextlib.contextmanager
def serving(tmp_path: Path, *, all_on_it: bool):
    """A server with an export of twice the 8 MiB of its disk; its state is on that disk too, or
    elsewhere."""
    with small_disk(tmp_path / "small", "8m") as disk:
        server = GnbdServer(tmp_path, "")
        if all_on_it:
            server.state_dir.symlink_to(disk.place)
        server.exports = export_toml("disk", disk.place / "disk0", size=f"{BLOCKS}M")
        server.exports += export_toml("ours", disk.place / "disk1", size="1M", access="cluster")
        server.join()
        server.start()
        try:
            yield server, disk
        finally:
            server.kill()


def refused(server) -> None:
    """The first start needs some room for its state; it says which."""
    done = subprocess.run(server.command(), capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_NO_SPACE, done
    assert re.search("^gnbd-server: \\S+/state/\\S+: No space left on device\n", done.stderr), done


def test_a_full_disk_below_a_server(tmp_path):
    """A writer hears ENOSPC, not EIO; what was acknowledged is there, also after a crash; what has
    its place can still be overwritten; with room the same request succeeds."""
    with serving(tmp_path, all_on_it=False) as (server, disk):
        last = (BLOCKS - 1) * MIB
        with RawClient(server, "disk") as client:
            error, written = 0, 0
            while not error:
                error = client.request(p.CMD_WRITE, written * MIB, stamp(written + 1))
                written += not error
            assert error == p.ENOSPC
            disk.fill()
            assert 2 < written < BLOCKS
            assert client.request(p.CMD_WRITE, last, stamp(99)) == p.ENOSPC
            assert client.request(p.CMD_WRITE, 0, stamp(77), flags=p.CMD_FLAG_FUA) == 0
            assert client.request(p.CMD_FLUSH) == 0
            kept = [stamp(77), *(stamp(number + 1) for number in range(1, written))]
            assert [client.read(number * MIB, MIB) for number in range(written)] == kept
        server.kill()
        server.start()
        with RawClient(server, "disk") as client:
            assert [client.read(number * MIB, MIB) for number in range(written)] == kept
            assert client.request(p.CMD_WRITE, last, stamp(99)) == p.ENOSPC
            assert client.request(p.CMD_TRIM, MIB, length=(written - 1) * MIB) == 0
            assert client.request(p.CMD_WRITE, last, stamp(99)) == 0
            assert client.request(p.CMD_FLUSH) == 0
            assert client.read(last, MIB) == stamp(99)
            assert client.read(0, MIB) == stamp(77)


def test_no_place_for_the_state_of_a_server(tmp_path):
    """What a server has stored has its place: bars and starts need no room. A view that outgrows it
    is not acknowledged, and the one before stands; the server lives and takes it when there is
    room."""
    before = m.Install(2, [member(1), member(2)], {}, 60_000)
    large = [member(node, tuple(range(4000)), 4000) for node in range(1, 13)]
    with serving(tmp_path, all_on_it=True) as (server, disk):
        server.install(1, member(1), member(2))
        disk.fill()
        server.install(2, member(1), member(2))
        for _ in range(2):
            with server.control() as control:
                control.ask(before, m.Done)
                with pytest.raises(StackError, match="No space left"):
                    control.ask(m.Install(3, large, {}, 60_000), m.Done)
        with server.control() as control:
            assert control.ask(before, m.Done)
        server.kill()
        server.start()
        with server.control() as control:
            assert control.ask(before, m.Done)
        disk.make_room()
        server.install(3, member(1))
        server.kill()
        (server.state_dir / "fencing.state").unlink()
        disk.fill()
        refused(server)
        disk.make_room()
        server.start()
        server.install(3, member(1))
        with server.control() as control, pytest.raises(StackError):
            control.ask(before, m.Done)
