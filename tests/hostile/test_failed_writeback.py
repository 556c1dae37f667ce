"""A disk that takes a write into the page cache and refuses it later: what is read afterwards is
what is on the disk.

The kernel keeps such a page, as if it had been written, until memory runs short, and the next
fdatasync succeeds. Whoever reads the new bytes meanwhile decides by something that will be gone.
"""

from __future__ import annotations

import contextlib
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from cluster.device_file_io import FileDevice
from cluster.errors import DeviceError
from gnbd import protocol as p
from lab.block_server import GnbdServer, running
from tests.gnbd.raw import RawClient
from tests.hostile.disks import SmallDisk, loop_device, small_disk

MIB = 1 << 20
PIECE = 64 << 10


@contextlib.contextmanager
def device_on(tmp_path: Path) -> Iterator[tuple[Path, SmallDisk]]:
    """A block device whose blocks have no place yet in the small file system below."""
    with small_disk(tmp_path / "small", "8m") as disk:
        image = disk.place / "image"
        with image.open("wb") as file:
            file.truncate(32 * MIB)
        with loop_device(image) as device:
            yield device, disk


@contextlib.contextmanager
def serving(tmp_path: Path, filters: str) -> Iterator[tuple[GnbdServer, SmallDisk]]:
    """The same, exported."""
    with device_on(tmp_path) as (device, disk):
        exports = f'[[exports]]\nname = "disk"\npath = "{device}"\nfilters = [{filters}]\n'
        with running(tmp_path, exports, joined=False) as server:
            yield server, disk


@contextlib.contextmanager
def open_disk(server: GnbdServer) -> Iterator[int]:
    """In another program."""
    device = os.open(tomllib.loads(server.file.read_text())["exports"][0]["path"], os.O_RDONLY)
    try:
        yield device
    finally:
        os.close(device)


def write_back(server: GnbdServer) -> None:
    """The kernel does so at any time, and finds out what the disk refuses."""
    with open_disk(server) as device, pytest.raises(OSError, match="Input/output"):
        os.fdatasync(device)


@pytest.mark.parametrize("filters", ["", '"stats"'], ids=["C", "Python"])
@pytest.mark.parametrize("how", ["flush", "durable"])
def test_what_was_refused_is_not_read(tmp_path, how, filters):
    with serving(tmp_path, filters) as (server, disk):
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, 0, b"o" * PIECE, flags=p.CMD_FLAG_FUA) == 0
            disk.fill()
            flags = p.CMD_FLAG_FUA if how == "durable" else 0
            assert client.request(p.CMD_WRITE, 0, b"n" * PIECE, flags=flags) == 0
            error = client.request(p.CMD_WRITE, MIB, b"n" * PIECE, flags=flags)
            if how == "flush":
                assert error == 0
                assert client.read(MIB, PIECE) == b"n" * PIECE
                error = client.request(p.CMD_FLUSH)
            assert error == p.EIO
        with RawClient(server, "disk") as client:
            assert client.read(MIB, PIECE) == bytes(PIECE)
            assert client.read(0, PIECE) == b"n" * PIECE
            assert client.request(p.CMD_FLUSH) == 0


def test_what_was_refused_in_an_earlier_life_is_not_read(tmp_path):
    """Killed when another program had been told, and before its own next flush: nobody tells the
    next one, whose flushes succeed."""
    with serving(tmp_path, "") as (server, disk):
        with RawClient(server, "disk") as client:
            assert client.request(p.CMD_WRITE, 0, b"o" * PIECE, flags=p.CMD_FLAG_FUA) == 0
            disk.fill()
            assert client.request(p.CMD_WRITE, 0, b"n" * PIECE) == 0
            assert client.request(p.CMD_WRITE, MIB, b"n" * PIECE) == 0
            write_back(server)
        with open_disk(server):  # as a file system below would: the last close forgets all
            server.kill()
            server.start()
        with RawClient(server, "disk") as client:
            found = client.read(MIB, PIECE)
            assert client.request(p.CMD_FLUSH) == 0
            assert found == bytes(PIECE)
            assert client.read(0, PIECE) == b"n" * PIECE


@pytest.mark.parametrize("filters", ["", '"stats"'], ids=["C", "Python"])
@pytest.mark.parametrize("other", ["flush", "durable", "refused"])
def test_whoever_lost_something_is_told(tmp_path, other, filters):
    """The kernel tells of a failed write-back once per open file: not another client, instead."""
    with (
        serving(tmp_path, filters) as (server, disk),
        RawClient(server, "disk") as client,
        RawClient(server, "disk") as second,
    ):
        assert client.request(p.CMD_WRITE, 0, b"o" * PIECE, flags=p.CMD_FLAG_FUA) == 0
        disk.fill()
        assert client.request(p.CMD_WRITE, MIB, b"n" * PIECE) == 0
        write_back(server)
        match other:
            case "flush":
                assert second.request(p.CMD_FLUSH) == p.EIO
            case "durable":
                assert second.request(p.CMD_WRITE, 0, b"d" * PIECE, flags=p.CMD_FLAG_FUA) == 0
            case "refused":
                durable = second.request(p.CMD_WRITE, 2 * MIB, b"d" * PIECE, flags=p.CMD_FLAG_FUA)
                assert durable == p.EIO
        assert client.request(p.CMD_FLUSH) == p.EIO
        with RawClient(server, "disk") as third:
            assert third.request(p.CMD_FLUSH) == 0
            assert third.request(p.CMD_WRITE, 0, b"t" * PIECE, flags=p.CMD_FLAG_FUA) == 0


@pytest.mark.parametrize("how", ["flush", "fua"])
def test_a_local_disk_does_not_read_what_was_refused(tmp_path, how):
    """Else a replay would find newer blocks in place than its journal has, and leave them out. Nor
    does the next flush say that all is well: another file's data was lost, too."""

    async def written(path):
        with FileDevice(path) as device:
            await device.write(0, b"o" * PIECE, fua=True)
            disk.fill()
            if how == "flush":
                await device.write(MIB, b"n" * PIECE)
                done = device.flush()
            else:
                done = device.write(MIB, b"n" * PIECE, fua=True)
            with pytest.raises(DeviceError, match="Input/output"):
                await done
            assert await device.read(MIB, PIECE) == bytes(PIECE)
            for done in (device.flush(), device.write(0, b"a" * PIECE, fua=True)):
                with pytest.raises(DeviceError, match="earlier"):
                    await done

    async def left(path):
        with FileDevice(path) as device:
            await device.write(2 * MIB, b"n" * PIECE)
            told = os.open(path, os.O_RDONLY)  # another program, which goes on
            with pytest.raises(OSError, match="Input/output"):
                os.fdatasync(told)
        with FileDevice(path) as device:
            found = await device.read(2 * MIB, PIECE)
            await device.flush()
        os.close(told)
        assert found == bytes(PIECE)

    with device_on(tmp_path) as (path, disk):
        trio.run(written, str(path))
        trio.run(left, str(path))
