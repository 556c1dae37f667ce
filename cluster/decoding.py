"""Bytes of a stranger through a msgspec decoder: a value, or ProtocolError and nothing else. Pure.

A decoder raises more than DecodeError: UnicodeDecodeError for a text that is no UTF-8, and
RecursionError for a value nested too deeply.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import msgspec

from cluster.errors import ProtocolError

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")
BROKEN = (msgspec.DecodeError, ValueError, RecursionError, OverflowError)
"""What decoding of arbitrary bytes may raise."""


class Decoder(Protocol[T_co]):
    """`msgspec.msgpack.Decoder` and `msgspec.json.Decoder`."""

    def decode(self, data: bytes | memoryview, /) -> T_co: ...


def decode_untrusted(decoder: Decoder[T], data: bytes | memoryview, what: str) -> T:
    """The value in `data`. Raises ProtocolError that says that it is no `what`."""
    try:
        return decoder.decode(data)
    except BROKEN as error:
        raise ProtocolError(f"not a {what}: {error}") from error
