"""The header of an integrity area's file. What follows it: native/src/integrity.h.

4096 bytes, twice (at 0 and 4096); the copy with the higher generation counts, and they are written
one after the other, so that one is always whole. Little endian:

| offset | size | field |
|---|---|---|
| 0 | 8 | magic "CFSintg1" |
| 8 | 4 | version: 1 |
| 12 | 4 | bytes of a block: 4096 |
| 16 | 8 | bytes of a region: 4 MiB |
| 24 | 8 | generation of the header |
| 32 | 8 | size of the disk in bytes |
| 40 | 2 | length of the export's name |
| 42 | 2 | length of the path of its disk |
| 44 | | name and path, UTF-8; zeroes |
| 4092 | 4 | CRC-32C of what is before |
"""

from __future__ import annotations

import struct

import msgspec

from cluster.errors import ConfigError, CorruptionError
from native.checksum import crc32c
from native.integrity import BLOCK_BYTES, REGION_BYTES, SIZE_BYTES_MAX, SUMS_AT

HEADER_BYTES = 4096
MAGIC = b"CFSintg1"
VERSION = 1
_HEAD = struct.Struct("<8sIIQQQHH")
_SUM = struct.Struct("<I")
TEXT_BYTES_MAX = HEADER_BYTES - _HEAD.size - _SUM.size


class Header(msgspec.Struct, frozen=True):
    """Whose sums they are."""

    name: str
    path: str
    size_bytes: int
    generation: int = 1


def file_bytes(size_bytes: int) -> int:
    """How long the file for a disk of that size is."""
    return SUMS_AT + -(-size_bytes // BLOCK_BYTES) * 4


def encode_header(header: Header) -> bytes:
    """Raises ConfigError for what it has no room for."""
    name, path = header.name.encode(), header.path.encode()
    if len(name) + len(path) > TEXT_BYTES_MAX:
        raise ConfigError(f"export {header.name!r}: the path is too long for an integrity area")
    if header.size_bytes > SIZE_BYTES_MAX:
        raise ConfigError(
            f"export {header.name!r}: an integrity area is for at most {SIZE_BYTES_MAX >> 40} TiB"
        )
    head = _HEAD.pack(
        MAGIC, VERSION, BLOCK_BYTES, REGION_BYTES, header.generation, header.size_bytes,
        len(name), len(path),
    )  # fmt: skip
    body = (head + name + path).ljust(HEADER_BYTES - _SUM.size, b"\0")
    return body + _SUM.pack(crc32c(body))


def decode_header_untrusted(data: bytes) -> Header:
    """One copy. Raises CorruptionError."""
    if len(data) != HEADER_BYTES or _SUM.unpack(data[-4:])[0] != crc32c(data[:-4]):
        raise CorruptionError("the header of an integrity area is damaged")
    magic, version, block, region, generation, size, name, path = _HEAD.unpack_from(data)
    if (magic, version, block, region) != (MAGIC, VERSION, BLOCK_BYTES, REGION_BYTES):
        raise CorruptionError("an integrity area of another version")
    text = data[_HEAD.size : _HEAD.size + name + path]
    if name + path > TEXT_BYTES_MAX or size > SIZE_BYTES_MAX:
        raise CorruptionError("the header of an integrity area makes no sense")
    try:
        return Header(text[:name].decode(), text[name:].decode(), size, generation)
    except UnicodeDecodeError:
        raise CorruptionError("the header of an integrity area makes no sense") from None


def newest_untrusted(copies: list[bytes]) -> Header:
    """The header that counts. Raises CorruptionError if none does."""
    found: list[Header] = []
    problem = CorruptionError("an integrity area without header")
    for data in copies:
        try:
            found.append(decode_header_untrusted(data))
        except CorruptionError as error:
            problem = error
    if not found:
        raise problem
    return max(found, key=lambda header: header.generation)
