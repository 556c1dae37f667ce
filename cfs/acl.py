"""POSIX access control lists, as the kernel passes them and as they are kept (acl(5)).

The kernel checks permissions with them; here they are kept in agreement with the mode, and handed
down to new inodes. Little endian: version u32 (2), then per entry tag u16, permissions u16, id u32.

An access list that says no more than the mode is not kept. The middle bits of a mode are those of
the list's mask, or of its owning group where there is no mask.
"""

from __future__ import annotations

import errno
import struct

import msgspec

from cfs.errors import CorruptionError, FsError

VERSION = 2
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")
USER_OBJ = 0x01
USER = 0x02
GROUP_OBJ = 0x04
GROUP = 0x08
MASK = 0x10
OTHER = 0x20
_ORDER = (USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER)
_ONCE = (USER_OBJ, GROUP_OBJ, MASK, OTHER)
UNDEFINED_ID = 0xFFFF_FFFF


class Entry(msgspec.Struct, frozen=True, gc=False):
    """What one class of processes may do: `permissions` of read 4, write 2, execute 1."""

    tag: int
    permissions: int
    id: int = UNDEFINED_ID


Acl = list[Entry]


def decode_untrusted(value: bytes) -> Acl:
    """The list in an attribute's value; empty for one without entries. Raises CorruptionError
    unless it is complete, in order, and has a mask where it needs one."""
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        raise CorruptionError("an access control list is cut short")
    if _HEADER.unpack_from(value)[0] != VERSION:
        raise CorruptionError("an access control list has an unknown version")
    acl = [Entry(*fields) for fields in _ENTRY.iter_unpack(value[_HEADER.size :])]
    if not acl:
        return acl
    tags = [entry.tag for entry in acl]
    places = [_ORDER.index(tag) if tag in _ORDER else -1 for tag in tags]
    if min(places) < 0 or places != sorted(places) or any(e.permissions > 7 for e in acl):
        raise CorruptionError("an access control list has entries out of order")
    if any(tags.count(tag) > 1 for tag in _ONCE):
        raise CorruptionError("an access control list has an entry twice")
    if not {USER_OBJ, GROUP_OBJ, OTHER} <= set(tags):
        raise CorruptionError("an access control list is incomplete")
    if (USER in tags or GROUP in tags) and MASK not in tags:
        raise CorruptionError("an access control list needs a mask")
    return acl


def encode(acl: Acl) -> bytes:
    """The value of the attribute."""
    parts = [_HEADER.pack(VERSION)]
    parts += [_ENTRY.pack(entry.tag, entry.permissions, entry.id) for entry in acl]
    return b"".join(parts)


def parse(value: bytes) -> Acl:
    """`decode_untrusted` for what a caller gave: EINVAL."""
    try:
        return decode_untrusted(value)
    except CorruptionError as error:
        raise FsError(errno.EINVAL, error.message) from None


def _shift(entry: Entry, has_mask: bool) -> int | None:
    """Where the entry's permissions stand in a mode; None: nowhere."""
    if entry.tag == USER_OBJ:
        return 6
    if entry.tag == OTHER:
        return 0
    if entry.tag == (MASK if has_mask else GROUP_OBJ):
        return 3
    return None


def permission_bits(acl: Acl) -> int:
    """The nine bits of the mode that belongs to the list."""
    has_mask = not is_minimal(acl)
    bits = 0
    for entry in acl:
        shift = _shift(entry, has_mask)
        if shift is not None:
            bits |= entry.permissions << shift
    return bits


def is_minimal(acl: Acl) -> bool:
    """Whether a mode says the same."""
    return all(entry.tag in (USER_OBJ, GROUP_OBJ, OTHER) for entry in acl)


def with_mode(acl: Acl, mode: int) -> Acl:
    """The list after chmod(2)."""
    has_mask = any(entry.tag == MASK for entry in acl)
    result = []
    for entry in acl:
        shift = _shift(entry, has_mask)
        if shift is not None:
            entry = Entry(entry.tag, mode >> shift & 7, entry.id)
        result.append(entry)
    return result


def inherited(default: Acl, mode: int) -> tuple[Acl, int]:
    """What a new inode gets from its directory's default list: (access list, mode), neither with
    more permissions than `mode` asks for."""
    has_mask = any(entry.tag == MASK for entry in default)
    result = []
    for entry in default:
        shift = _shift(entry, has_mask)
        if shift is not None:
            entry = Entry(entry.tag, entry.permissions & mode >> shift, entry.id)
            mode &= ~(7 << shift) | entry.permissions << shift
        result.append(entry)
    return result, mode
