"""XOR of buffers (mirror comparison, parity); releases the GIL."""

from __future__ import annotations

from collections.abc import Sequence

from native._native import ffi, lib

Buffer = bytes | bytearray | memoryview


def xor_into(destination: bytearray | memoryview, sources: Sequence[Buffer]) -> None:
    """destination ^= every source; all have the same length and none is the destination."""
    target = ffi.from_buffer("uint8_t[]", destination, require_writable=True)
    views = [ffi.from_buffer("uint8_t[]", source) for source in sources]
    if any(len(view) != len(target) for view in views):
        raise ValueError("all buffers must have the same length")
    if any(view == target for view in views) and len(target):
        raise ValueError("a source must not be the destination")
    pointers = ffi.new("uint8_t *[]", [ffi.cast("uint8_t *", view) for view in views])
    lib.native_xor(target, pointers, len(views), len(target))
