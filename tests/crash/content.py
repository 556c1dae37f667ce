"""What the files of the workload hold, computed from a few numbers alone."""

from __future__ import annotations

import functools
import random
import struct
import zlib

STREAM_BYTES_MAX = 1 << 20
SECTOR = 512
BLOCK = 4096
VERSIONS_MAX = 1 << 20
_HEAD = struct.Struct("<4sIIHHI")


@functools.lru_cache(maxsize=64)
def _whole_stream(seed: int) -> bytes:
    return random.Random(f"stream {seed}").randbytes(STREAM_BYTES_MAX)


def stream(seed: int, start: int, length: int) -> bytes:
    """A piece of an endless-looking file."""
    assert start + length <= STREAM_BYTES_MAX
    return _whole_stream(seed)[start : start + length]


@functools.lru_cache(maxsize=256)
def commit_bytes(seed: int, version: int) -> bytes:
    """A version of a whole file, of a size of its own: in the inode, one block, many blocks."""
    rng = random.Random(f"commit {seed} {version}")
    size = rng.choice([0, 10, 1000, 3000, 4096, 5000, 20_000, 70_000, 200_000])
    return rng.randbytes(size)


def sector_bytes(seed: int, index: int, sector: int, version: int) -> bytes:
    """A sector that tells its version and whether it is whole."""
    body = random.Random(f"{seed} {index} {sector} {version}").randbytes(SECTOR - _HEAD.size)
    return _HEAD.pack(b"crsh", version, index, sector, seed & 0xFFFF, zlib.crc32(body)) + body


@functools.lru_cache(maxsize=4096)
def block_bytes(seed: int, index: int, version: int) -> bytes:
    return b"".join(sector_bytes(seed, index, s, version) for s in range(BLOCK // SECTOR))


def attribute_bytes(seed: int, version: int) -> bytes:
    """The value of an extended attribute: in the inode, in its tree, in blocks of its own."""
    rng = random.Random(f"attribute {seed} {version}")
    return rng.randbytes(rng.choice([1, 100, 900, 5000, 40_000]))


def sector_versions(seed: int, index: int, block: bytes) -> list[int]:
    """The version of each sector of a block; -1 where it is nothing that was ever written, 0 where
    it is zeroes."""
    found = []
    for start in range(0, BLOCK, SECTOR):
        data = block[start : start + SECTOR]
        if not any(data):
            found.append(0)
            continue
        magic, version, *_ = _HEAD.unpack_from(data)
        whole = magic == b"crsh" and version < VERSIONS_MAX
        wanted = block_bytes(seed, index, version)[start : start + SECTOR] if whole else b""
        found.append(version if data == wanted else -1)
    return found
