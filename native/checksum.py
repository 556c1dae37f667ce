"""CRC-32C of one buffer or of many blocks in one call.

The best implementation for this machine is chosen at first use. Every call releases the GIL. A
call costs about 300 ns beside the bytes, so callers with many blocks use `crc32c_blocks`.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from native._native import ffi, lib

Buffer = bytes | bytearray | memoryview

# In the order of `enum native_crc32c_kind`.
IMPLEMENTATIONS = ("bytewise", "table", "sse4.2", "avx512", "armv8")


def crc32c(data: Buffer, seed: int = 0) -> int:
    """The checksum of `data`, continuing from `seed` (the checksum of what came before it)."""
    view = ffi.from_buffer(data)
    return lib.native_crc32c(view, len(view), seed)


def crc32c_blocks(data: Buffer | Sequence[Buffer], block_bytes: int) -> array[int]:
    """One checksum per block (`array("I")`); the last block of a buffer may be short.

    A sequence of buffers gives their checksums one after another.
    """
    if block_bytes <= 0:
        raise ValueError("block_bytes must be positive")
    if isinstance(data, bytes | bytearray | memoryview):
        view = ffi.from_buffer(data)
        result = array("I", bytes(4 * _blocks(len(view), block_bytes)))
        out = ffi.from_buffer("uint32_t[]", result, require_writable=True)
        lib.native_crc32c_blocks(view, len(view), block_bytes, out)
        return result
    views = [ffi.from_buffer(part) for part in data]
    lengths = [len(view) for view in views]
    result = array("I", bytes(4 * sum(_blocks(length, block_bytes) for length in lengths)))
    out = ffi.from_buffer("uint32_t[]", result, require_writable=True)
    pointers = ffi.new("uint8_t *[]", [ffi.cast("uint8_t *", view) for view in views])
    lib.native_crc32c_blocks_list(pointers, lengths, len(views), block_bytes, out)
    return result


def crc32c_verify(data: Buffer, block_bytes: int, expected: array[int]) -> int | None:
    """Index of the first block that does not have the expected checksum, or None."""
    if block_bytes <= 0:
        raise ValueError("block_bytes must be positive")
    view = ffi.from_buffer(data)
    if expected.itemsize != 4 or len(expected) != _blocks(len(view), block_bytes):
        raise ValueError("expected must hold one 32-bit checksum per block")
    index = lib.native_crc32c_verify(
        view, len(view), block_bytes, ffi.from_buffer("uint32_t[]", expected)
    )
    return None if index < 0 else index


def implementations() -> list[str]:
    """The implementations that this machine can run, the slowest first."""
    return [name for kind, name in enumerate(IMPLEMENTATIONS) if lib.native_crc32c_supported(kind)]


def select_implementation(name: str | None = None) -> str:
    """Use this implementation from now on (None: the best one); for tests and benchmarks."""
    kind = lib.native_crc32c_select(-1 if name is None else IMPLEMENTATIONS.index(name))
    if kind < 0:
        raise ValueError(f"this machine cannot run the {name} implementation")
    return IMPLEMENTATIONS[kind]


def _blocks(length_bytes: int, block_bytes: int) -> int:
    return -(-length_bytes // block_bytes)
