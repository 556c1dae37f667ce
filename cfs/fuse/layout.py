"""Bodies of FUSE requests and answers that are handled past libfuse (linux/fuse.h, native order).

| what | layout |
|---|---|
| getxattr_in | size u32, padding u32, then the name; answer to size 0: size u32, padding u32 |
| setxattr_in | size u32, flags u32, extra flags u32, padding u32; name, value |
| fallocate_in | handle u64, offset u64, length u64, mode u32, padding u32 |
| lseek_in | handle u64, offset u64, whence u32, padding u32; answer: offset u64 |
| copy_file_range_in | handle u64, offset u64, node out u64, handle out u64, offset out u64, \
length u64, flags u64; answer: size u32, padding u32, of COPY_FILE_RANGE_64: size u64 |
| ioctl_in | handle u64, flags u32, command u32, argument u64, in size u32, out size u32; data |
| ioctl_out | result i32, flags u32, in and out vectors u32; data |
| setattr_in | fields u32, padding u32, handle u64, size u64, lock owner u64, atime, mtime, ctime \
(seconds u64 each, then ns u32 each), mode u32, unused u32, uid u32, gid u32, unused u32 |
| mknod_in | mode u32, device u32, umask u32, padding u32; name |
| mkdir_in | mode u32, umask u32; name |
| link_in | node u64; name |
| rename_in | new directory u64; both names. rename2_in: flags u32, padding u32 before the names |
| write_in | handle u64, offset u64, size u32, write flags u32, lock owner u64, flags u32, \
padding u32; data. Answer: size u32, padding u32 |
| create_in | open flags u32, mode u32, umask u32, more flags u32; name |
| entry_out | node u64, generation u64, name and attribute timeouts (seconds u64; ns u32); attr |
| attr_out | attribute timeout (seconds u64, ns u32), padding u32; attr |
| forget_in | count u64 |
| batch_forget_in | entries u32, padding u32; node u64, count u64 each |
| open_out | handle u64, flags u32, padding |
| statx_in | flags u32, reserved u32, handle u64, sync flags u32, mask u32 |
| statx_out | timeout (seconds u64, ns u32), flags u32, spare u64 twice, statx of 256 bytes |
"""

from __future__ import annotations

import struct

from cfs.attributes import BLOCK_BYTES, Attributes

GETXATTR_IN = struct.Struct("=II")
SETXATTR_IN = struct.Struct("=IIII")
FALLOCATE_IN = struct.Struct("=QQQII")
LSEEK_IN = struct.Struct("=QQII")
LSEEK_OUT = struct.Struct("=Q")
COPY_IN = struct.Struct("=7Q")
COPY_OUT = struct.Struct("=II")
COPY_64_OUT = struct.Struct("=Q")
IOCTL_IN = struct.Struct("=QIIQII")
IOCTL_OUT = struct.Struct("=iIII")
SETATTR_IN = struct.Struct("=I4xQQQqqqIIII4xII4x")
MKNOD_IN = struct.Struct("=IIII")
MKDIR_IN = struct.Struct("=II")
LINK_IN = struct.Struct("=Q")
RENAME_IN = struct.Struct("=Q")
RENAME2_IN = struct.Struct("=QII")
WRITE_IN_BYTES = 40
WRITE_OUT = struct.Struct("=II")
CREATE_IN = struct.Struct("=IIII")
OPEN_OUT = struct.Struct("=QIi")
STATX_IN = struct.Struct("=IIQII")
FORGET_IN = struct.Struct("=Q")
_BATCH_FORGET = struct.Struct("=II")
_FORGET_ONE = struct.Struct("=QQ")
_ATTR_HEAD = struct.Struct("=QII")
_ENTRY_HEAD = struct.Struct("=QQQQII")
_ATTR = struct.Struct("=QQQqqqIIIIIIIIII")
_STATX_HEAD = struct.Struct("=QIIQQ")
_STATX = struct.Struct("=IIQIIIHHQQQQ")
_STATX_TIME = struct.Struct("=qIi")
_STATX_END = struct.Struct("=IIII")
STATX_BYTES = 256

SETXATTR_ACL_KILL_SGID = 1
STATX_BASIC_STATS = 0x7FF
STATX_BTIME = 0x800
FOPEN_DIRECT_IO = 1
FOPEN_KEEP_CACHE = 2
NS_PER_S = 1_000_000_000


def split_name(body: bytes) -> tuple[bytes, bytes]:
    """A name that ends with a zero byte, and what follows it."""
    name, _, rest = body.partition(b"\0")
    return name, rest


def _timeout(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * NS_PER_S)


def _device(rdev: int) -> tuple[int, int]:
    """(major, minor) of a device number as stat() shows it."""
    major = (rdev >> 8 & 0xFFF) | (rdev >> 32 & ~0xFFF)
    minor = (rdev & 0xFF) | (rdev >> 12 & ~0xFF)
    return major, minor & 0xFFFF_FFFF


def encode_attributes(attributes: Attributes) -> bytes:
    """`fuse_attr`."""
    times = (attributes.atime_ns, attributes.mtime_ns, attributes.ctime_ns)
    major, minor = _device(attributes.rdev)
    rdev = (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12
    return _ATTR.pack(
        attributes.ino, attributes.size, attributes.blocks, *(time // NS_PER_S for time in times),
        *(time % NS_PER_S for time in times), attributes.mode, attributes.nlink, attributes.uid,
        attributes.gid, rdev & 0xFFFF_FFFF, BLOCK_BYTES, 0,
    )  # fmt: skip


def encode_entry(
    attributes: Attributes, node: int, *, attribute_timeout_s: float, name_timeout_s: float
) -> bytes:
    """`fuse_entry_out`; `node` is what the kernel will call the inode."""
    name_s, name_ns = _timeout(name_timeout_s)
    attribute_s, attribute_ns = _timeout(attribute_timeout_s)
    head = _ENTRY_HEAD.pack(node, attributes.generation, name_s, attribute_s, name_ns, attribute_ns)
    return head + encode_attributes(attributes)


def encode_absent(name_timeout_s: float) -> bytes:
    """`fuse_entry_out` of a name that is not there."""
    seconds, ns = _timeout(name_timeout_s)
    return _ENTRY_HEAD.pack(0, 0, seconds, 0, ns, 0) + bytes(_ATTR.size)


def encode_attr_out(attributes: Attributes, attribute_timeout_s: float) -> bytes:
    """`fuse_attr_out`."""
    seconds, ns = _timeout(attribute_timeout_s)
    return _ATTR_HEAD.pack(seconds, ns, 0) + encode_attributes(attributes)


def decode_batch_forget(body: bytes) -> list[tuple[int, int]]:
    """(node, count) of each entry."""
    count, _ = _BATCH_FORGET.unpack_from(body)
    start = _BATCH_FORGET.size
    return list(_FORGET_ONE.iter_unpack(body[start : start + count * _FORGET_ONE.size]))


def encode_statx(attributes: Attributes, attribute_timeout_s: float) -> bytes:
    """`fuse_statx_out` with all basic fields and the time of birth."""
    seconds, ns = _timeout(attribute_timeout_s)
    times = (
        attributes.atime_ns, attributes.birth_ns, attributes.ctime_ns, attributes.mtime_ns
    )  # fmt: skip
    parts = [
        _STATX.pack(
            STATX_BASIC_STATS | STATX_BTIME, BLOCK_BYTES, 0, attributes.nlink, attributes.uid,
            attributes.gid, attributes.mode, 0, attributes.ino, attributes.size,
            attributes.blocks, 0,
        ),
        *(_STATX_TIME.pack(time // NS_PER_S, time % NS_PER_S, 0) for time in times),
        _STATX_END.pack(*_device(attributes.rdev), 0, 0),
    ]  # fmt: skip
    return _STATX_HEAD.pack(seconds, ns, 0, 0, 0) + b"".join(parts).ljust(STATX_BYTES, b"\0")
