"""Any NBD server's disk for one user: nbdkit, qemu-nbd, nbd-server, our own plain exports (trio).

The same client as for a cluster's disks, without what only gnbd-server has: nobody is kept from
writing, so that such a disk must not be shared (`fenced` is False; a cluster refuses it), and
nothing is confirmed about broken connections. After one breaks:

- READ, WRITE, TRIM, WRITE_ZEROES and FLUSH without an answer are sent again: the same bytes at the
  same place. They keep their place before everything that was asked for later.
- All writes since the last FLUSH are sent again first, because the server may be a new process
  whose cache is empty.
- *Not guaranteed*: a server that still executes a request of the broken connection after it has
  answered a newer one at the same place on the new connection brings the old bytes back. A server
  that executes what it has received before it serves others, or drops it, does not.
- Without FLUSH in the server nothing is known to be durable, and nothing is sent again: `flush`
  raises.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
import trio

from cluster.control import ServerInfo
from cluster.device import Buffer
from cluster.errors import DeviceError, UsageError
from cluster.ids import ServerId
from cluster.tls import TlsSection
from gnbd import protocol as p
from gnbd.client.device_io import GnbdDevice, Options
from gnbd.client.entrance_io import PlainEntrance

PORT = 10809
ZEROES_BYTES = 1 << 20


class PlainDevice(GnbdDevice):
    """A disk of any server. What the server cannot do is done without it, or refused. Make it with
    `open_plain`."""

    def _can(self, flag: int) -> bool:
        return bool(self.flags & flag)

    async def write(
        self, offset_bytes: int, data: Buffer, *, fua: bool = False, sums: array[int] | None = None
    ) -> None:
        direct = fua and self._can(p.FLAG_SEND_FUA)
        await super().write(offset_bytes, data, fua=direct, sums=sums)
        if fua and not direct:
            await self.flush()

    async def write_many(self, parts: Sequence[tuple[int, Buffer]], *, fua: bool = False) -> None:
        direct = fua and self._can(p.FLAG_SEND_FUA)
        await super().write_many(parts, fua=direct)
        if fua and not direct:
            await self.flush()

    async def flush(self) -> None:
        """Raises DeviceError if the server offers no FLUSH."""
        if self._can(p.FLAG_READ_ONLY):
            return
        if not self._can(p.FLAG_SEND_FLUSH):
            raise DeviceError(
                f"{self.name}: the server offers no FLUSH: nothing is known to be durable"
            )
        await super().flush()

    async def discard(self, offset_bytes: int, length_bytes: int) -> None:
        """Nothing if the server offers no TRIM."""
        if self._can(p.FLAG_SEND_TRIM):
            await super().discard(offset_bytes, length_bytes)

    async def write_zeroes(self, offset_bytes: int, length_bytes: int) -> None:
        if self._can(p.FLAG_SEND_WRITE_ZEROES):
            await super().write_zeroes(offset_bytes, length_bytes)
            return
        zeroes = bytes(ZEROES_BYTES)
        end = offset_bytes + length_bytes
        for start in range(offset_bytes, end, ZEROES_BYTES):
            await self.write(start, memoryview(zeroes)[: min(ZEROES_BYTES, end - start)])


class Place(msgspec.Struct, frozen=True):
    """Where a URI leads. `address`: of a host, or a path; `tls`: what the URI says of it."""

    address: str
    port: int
    export: str
    tls: TlsSection | None
    secure: bool


def parse_uri(uri: str) -> Place:
    """nbd://HOST[:PORT]/EXPORT, nbds:// with TLS, nbd+unix:///EXPORT?socket=PATH, nbds+unix. As for
    libnbd, ?tls-certificates=DIRECTORY has ca-cert.pem, client-cert.pem and client-key.pem. Raises
    UsageError."""
    try:
        parts = urlsplit(uri)
        port = parts.port or PORT
    except ValueError as error:
        raise UsageError(f"{uri!r} is no NBD URI: {error}") from None
    kind, _, way = parts.scheme.partition("+")
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    address = query.get("socket", "") if way == "unix" else parts.hostname or ""
    known = kind in ("nbd", "nbds") and way in ("", "tcp", "unix")
    if not known or not address or (way == "unix" and not address.startswith("/")):
        raise UsageError(
            f"{uri!r} is no NBD URI", hint="nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=/PATH"
        )
    tls = None
    if directory := query.get("tls-certificates"):
        files = ("client-cert.pem", "client-key.pem", "ca-cert.pem")
        own, key, authority = (str(Path(directory).absolute() / name) for name in files)
        tls = TlsSection(own, key, authority, required=True)
    export = unquote(parts.path.removeprefix("/"))
    return Place(address, port, export, tls, secure=kind == "nbds")


async def open_plain(
    uri: str, nursery: trio.Nursery, options: Options | None = None
) -> PlainDevice:
    """Open a disk of any NBD server; its tasks live in `nursery`. Waits until the server answers.
    Several connections only if the server says that they see each other's writes. Raises
    UsageError, ForeignError."""
    options = options or Options()
    place = parse_uri(uri)
    tls = place.tls or options.tls
    if place.secure and tls is None:
        raise UsageError(f"{uri!r}: TLS needs certificates", hint="?tls-certificates=DIRECTORY")
    if place.secure and tls is not None:
        tls = msgspec.structs.replace(tls, required=True)
    options = msgspec.structs.replace(options, tls=tls if place.secure else None)
    name = "localhost" if place.address.startswith("/") else place.address
    info = ServerInfo(ServerId(0), name, [place.address], place.port)
    device = PlainDevice(info, place.export, PlainEntrance(place.export), options)
    await device.start(nursery)
    return device
