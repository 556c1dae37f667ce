"""The metadata blocks as objects: what the cache holds, transactions change and the journal writes.

A node in the cache is never changed: a transaction clones it, changes the clone and puts that in
its place when all of the operation has succeeded. So readers between two awaits see one consistent
state, a transaction that fails leaves no trace, and the journal can encode a node later.

Bodies (after the 64-byte header of `cfs.format`):

Inode, at 64: `INODE` below (192 bytes), then `content_bytes` of content, then `xattr_bytes` of
extended attributes: level u16 and entry count u16 of the root of their tree, and its entries.

| bytes | field | | bytes | field |
|---|---|---|---|---|
| 4 | mode (0: dead) | | 8 | birth, ns |
| 4 | nlink | | 8 | parent inode (directories) |
| 4, 4 | uid, gid | | 8 | change counter of the inode |
| 4 | rdev | | 1 | content: 0 bytes, 1 tree root |
| 4 | flags | | 1 | level of the root (0: leaf) |
| 8 | size | | 2 | entries of the root |
| 8 | blocks (data and tree) | | 2 | content_bytes |
| 8, 8, 8 | atime, mtime, ctime, ns | | 2 | xattr_bytes |

Tree block, at 64: level u16, entry count u16, zero u32, zero u64; entries follow at 80. The root
of a tree has its entries in the inode.

| entry | bytes |
|---|---|
| index | key u64, block u64 |
| extent | first logical block u64, first physical block u64, count u32, flags u32 |
| name | cookie u64, inode u64, type u8 (S_IFMT >> 12), length u8, name |
| attribute | cookie u64, name length u8, value blocks u8, value length u32, name, then the value, \
or if there are value blocks their numbers u64 |

Attribute value, at 64: up to `VALUE_BYTES` of the value, zeroes in the last block.

`flags` of an inode are bits of FS_IOC_GETFLAGS, see `cfs.attributes`.

Flags of an extent: bit 0 *unwritten*: the blocks belong to the file and hold nothing yet; they read
as zeroes whatever is in them. Only such extents may lie beyond the end of file. Other bits are 0.

Group, at 64: group u64, last generation u64, blocks u32, free u32, freeing u32, zero; at 128 the
map, 2 bits a block, lowest bits first (`BlockState`).

Orphans, at 64: next free slot hint u64; at 72 inode numbers u64, 0 = empty, `ORPHANS_PER_BLOCK`.

Slots, at 64: count u64; at 72 per journal: first block u64, length in blocks u64.
"""

from __future__ import annotations

import enum
import itertools
import struct
from typing import NamedTuple, Self

import msgspec

from cfs.attributes import BLOCK_BYTES, XATTR_BYTES_MAX, Attributes
from cfs.errors import CorruptionError
from cfs.format import HEADER_BYTES, SLOTS_MAX, Header, Kind, open_block_untrusted, seal_block

INODE = struct.Struct("<IIIIIIQQqqqqQQBBHHH")
CONTENT_OFFSET = 256
XATTR_ROOM_BYTES = 256
CONTENT_BYTES_MAX = BLOCK_BYTES - CONTENT_OFFSET - XATTR_ROOM_BYTES
TREE = struct.Struct("<HHIQ")
TREE_OFFSET = HEADER_BYTES + TREE.size
TREE_BYTES_MAX = BLOCK_BYTES - TREE_OFFSET
GROUP = struct.Struct("<QQIII")
GROUP_MAP_OFFSET = 128
INDEX_ENTRY = struct.Struct("<QQ")
EXTENT_ENTRY = struct.Struct("<QQII")
NAME_ENTRY = struct.Struct("<QQBB")
XATTR_ROOT = struct.Struct("<HH")
XATTR_ROOT_BYTES_MAX = XATTR_ROOM_BYTES - XATTR_ROOT.size
XATTR_ENTRY = struct.Struct("<QBBI")
VALUE_BYTES = BLOCK_BYTES - HEADER_BYTES
LEVELS_MAX = 8
ORPHANS_OFFSET = 72
ORPHANS_PER_BLOCK = (BLOCK_BYTES - ORPHANS_OFFSET) // 8
_U64 = struct.Struct("<Q")

UNWRITTEN = 1
"""Flag of an extent."""


class Extent(NamedTuple):
    """Blocks in a row that belong to a file; the first logical block is the key."""

    block: int
    length: int
    unwritten: bool = False


Name = tuple[int, int, bytes]
"""Inode, type (S_IFMT >> 12), name."""


class Xattr(msgspec.Struct, frozen=True, gc=False):
    """An extended attribute: `value` is here, or in `blocks` if there are any."""

    name: bytes
    size: int
    value: bytes = b""
    blocks: tuple[int, ...] = ()


Value = int | Extent | Name | Xattr


class Node:
    """A metadata block. `block` names it, (`generation`, `change`) is its version."""

    __slots__ = ("block", "change", "generation", "owner")
    kind: Kind

    def __init__(self, block: int, owner: int, generation: int, change: int) -> None:
        self.block = block
        self.owner = owner
        self.generation = generation
        self.change = change

    def clone(self) -> Self:
        raise NotImplementedError

    def body(self) -> bytes:
        raise NotImplementedError

    def encode(self, fs: int, sequence: int) -> bytes:
        """The sealed block."""
        header = Header(self.kind, self.block, self.owner, self.generation, self.change, sequence)
        return seal_block(fs, header, self.body())


class Tree:
    """Keys in order, a value for each: children if `level` > 0. Part of an inode or a block."""

    __slots__ = ("keys", "level", "used", "values")

    def __init__(self, level: int, keys: list[int], values: list[Value], used: int) -> None:
        self.level = level
        self.keys = keys
        self.values = values
        self.used = used

    def copy(self) -> Tree:
        return Tree(self.level, self.keys.copy(), self.values.copy(), self.used)


def value_bytes(value: Value) -> int:
    """Size of an entry on the disk."""
    if isinstance(value, int):
        return INDEX_ENTRY.size
    if isinstance(value, Xattr):
        return XATTR_ENTRY.size + len(value.name) + len(value.value) + 8 * len(value.blocks)
    if isinstance(value, Extent):
        return EXTENT_ENTRY.size
    return NAME_ENTRY.size + len(value[2])


def encode_tree(tree: Tree) -> bytes:
    parts: list[bytes] = []
    for key, value in zip(tree.keys, tree.values, strict=True):
        if isinstance(value, int):
            parts.append(INDEX_ENTRY.pack(key, value))
        elif isinstance(value, Xattr):
            count = len(value.blocks)
            parts.append(XATTR_ENTRY.pack(key, len(value.name), count, value.size) + value.name)
            parts.append(value.value or struct.pack(f"<{count}Q", *value.blocks))
        elif isinstance(value, Extent):
            parts.append(EXTENT_ENTRY.pack(key, *value))
        else:
            parts.append(NAME_ENTRY.pack(key, value[0], value[1], len(value[2])))
            parts.append(value[2])
    return b"".join(parts)


def decode_tree_untrusted(kind: Kind, level: int, count: int, data: bytes) -> Tree:
    """Raises CorruptionError unless keys rise and all entries are whole. What they say is another
    matter (`cfs.sanity`)."""
    if level >= LEVELS_MAX:
        raise CorruptionError("an impossible level of a tree")
    keys: list[int] = []
    values: list[Value] = []
    try:
        if level:
            for key, child in INDEX_ENTRY.iter_unpack(data[: count * INDEX_ENTRY.size]):
                keys.append(key)
                values.append(child)
            used = count * INDEX_ENTRY.size
        elif kind == Kind.EXTENT_TREE:
            for key, physical, length, flags in EXTENT_ENTRY.iter_unpack(
                data[: count * EXTENT_ENTRY.size]
            ):
                if flags & ~UNWRITTEN:
                    raise CorruptionError("an extent has unknown flags")
                keys.append(key)
                values.append(Extent(physical, length, bool(flags)))
            used = count * EXTENT_ENTRY.size
        elif kind == Kind.XATTR_TREE:
            used = _decode_xattrs(count, data, keys, values)
        else:
            used = _decode_names(count, data, keys, values)
    except struct.error:
        raise CorruptionError("a tree that is cut short") from None
    if len(keys) != count or any(a >= b for a, b in itertools.pairwise(keys)):
        raise CorruptionError("keys out of order")
    return Tree(level, keys, values, used)


def _decode_names(count: int, data: bytes, keys: list[int], values: list[Value]) -> int:
    offset = 0
    for _ in range(count):
        cookie, ino, kind, length = NAME_ENTRY.unpack_from(data, offset)
        offset += NAME_ENTRY.size
        name = data[offset : offset + length]
        if len(name) != length or not length:
            raise CorruptionError("a name that is cut short")
        offset += length
        keys.append(cookie)
        values.append((ino, kind, name))
    return offset


def _decode_xattrs(count: int, data: bytes, keys: list[int], values: list[Value]) -> int:
    offset = 0
    for _ in range(count):
        cookie, name_bytes, blocks, size = XATTR_ENTRY.unpack_from(data, offset)
        start = offset + XATTR_ENTRY.size + name_bytes
        name = data[start - name_bytes : start]
        offset = start + (8 * blocks if blocks else size)
        whole = not blocks or blocks == -(-size // VALUE_BYTES)
        if not name or offset > len(data) or size > XATTR_BYTES_MAX or not whole:
            raise CorruptionError("an extended attribute")
        keys.append(cookie)
        if blocks:
            numbers = struct.unpack_from(f"<{blocks}Q", data, start)
            values.append(Xattr(name, size, blocks=numbers))
        else:
            values.append(Xattr(name, size, data[start:offset]))
    return offset


class TreeNode(Node):
    """A block of a directory, extent or attribute tree."""

    __slots__ = ("kind", "tree")
    kind: Kind

    def __init__(
        self, block: int, owner: int, version: tuple[int, int], kind: Kind, tree: Tree
    ) -> None:
        super().__init__(block, owner, *version)
        self.kind = kind
        self.tree = tree

    def clone(self) -> TreeNode:
        version = (self.generation, self.change)
        return TreeNode(self.block, self.owner, version, self.kind, self.tree.copy())

    def body(self) -> bytes:
        return TREE.pack(self.tree.level, len(self.tree.keys), 0, 0) + encode_tree(self.tree)


class ValueNode(Node):
    """A part of the value of an extended attribute, padded with zeroes."""

    __slots__ = ("data",)
    kind = Kind.XATTR_VALUE

    def __init__(self, block: int, owner: int, version: tuple[int, int], data: bytes) -> None:
        super().__init__(block, owner, *version)
        self.data = data

    def clone(self) -> ValueNode:
        return ValueNode(self.block, self.owner, (self.generation, self.change), self.data)

    def body(self) -> bytes:
        return self.data


class InodeNode(Node):
    """An inode. Content is either `data` (bytes) or `root` (a tree). `xattrs` is the root of the
    tree of extended attributes, None if there are none. `listed_bytes` is not on the disk: how long
    the list of their names is, -1 if that has not been counted."""

    __slots__ = (
        "atime_ns", "birth_ns", "blocks", "counter", "ctime_ns", "data", "flags", "gid",
        "listed_bytes", "mode", "mtime_ns", "nlink", "parent", "rdev", "root", "size", "uid",
        "xattrs",
    )  # fmt: skip
    kind = Kind.INODE
    root_bytes_max = CONTENT_BYTES_MAX

    def __init__(self, block: int, generation: int, change: int = 0) -> None:
        super().__init__(block, block, generation, change)
        self.mode = 0
        self.nlink = 0
        self.uid = 0
        self.gid = 0
        self.rdev = 0
        self.flags = 0
        self.size = 0
        self.blocks = 0
        self.atime_ns = 0
        self.mtime_ns = 0
        self.ctime_ns = 0
        self.birth_ns = 0
        self.parent = 0
        self.counter = 0
        self.data = b""
        self.root: Tree | None = None
        self.xattrs: Tree | None = None
        self.listed_bytes = -1

    def clone(self) -> InodeNode:
        twin = InodeNode.__new__(InodeNode)
        twin.block = twin.owner = self.block
        twin.generation = self.generation
        twin.change = self.change
        twin.mode = self.mode
        twin.nlink = self.nlink
        twin.uid = self.uid
        twin.gid = self.gid
        twin.rdev = self.rdev
        twin.flags = self.flags
        twin.size = self.size
        twin.blocks = self.blocks
        twin.atime_ns = self.atime_ns
        twin.mtime_ns = self.mtime_ns
        twin.ctime_ns = self.ctime_ns
        twin.birth_ns = self.birth_ns
        twin.parent = self.parent
        twin.counter = self.counter
        twin.data = self.data
        twin.root = None if self.root is None else self.root.copy()
        twin.xattrs = None if self.xattrs is None else self.xattrs.copy()
        twin.listed_bytes = self.listed_bytes
        return twin

    @property
    def is_directory(self) -> bool:
        return self.mode & 0o170000 == 0o040000

    @property
    def is_regular(self) -> bool:
        return self.mode & 0o170000 == 0o100000

    @property
    def tree_kind(self) -> Kind:
        return Kind.DIRECTORY_TREE if self.is_directory else Kind.EXTENT_TREE

    def attributes(self) -> Attributes:
        return Attributes(
            self.block, self.generation, self.mode, self.nlink, self.uid, self.gid, self.rdev,
            self.size, self.blocks * 8, self.atime_ns, self.mtime_ns, self.ctime_ns, self.counter,
            self.birth_ns, self.flags,
        )  # fmt: skip

    def body(self) -> bytes:
        root = self.root
        content = self.data if root is None else encode_tree(root)
        xattrs = b""
        if self.xattrs is not None:
            xattrs = XATTR_ROOT.pack(self.xattrs.level, len(self.xattrs.keys))
            xattrs += encode_tree(self.xattrs)
        assert len(content) <= CONTENT_BYTES_MAX
        assert len(xattrs) <= XATTR_ROOM_BYTES
        core = INODE.pack(
            self.mode, self.nlink, self.uid, self.gid, self.rdev, self.flags, self.size,
            self.blocks, self.atime_ns, self.mtime_ns, self.ctime_ns, self.birth_ns, self.parent,
            self.counter, root is not None, 0 if root is None else root.level,
            0 if root is None else len(root.keys), len(content), len(xattrs),
        )  # fmt: skip
        pad = CONTENT_OFFSET - HEADER_BYTES - INODE.size
        return b"".join((core, bytes(pad), content, xattrs))


class XattrTree:
    """The tree of an inode's extended attributes, in the shape that `cfs.tree` works on."""

    __slots__ = ("block", "root")
    tree_kind = Kind.XATTR_TREE
    root_bytes_max = XATTR_ROOT_BYTES_MAX

    def __init__(self, inode: InodeNode) -> None:
        self.block = inode.block
        self.root = inode.xattrs


class BlockState(enum.IntEnum):
    """Two bits of the map. FREEING: free, but the map on the disk may still say otherwise, or a
    journal may still hold an image of it: not for use yet."""

    FREE = 0
    DATA = 1
    FREEING = 2
    META = 3


_MASKS = {n: int.from_bytes(b"\x03" * n, "little") for n in (GROUP_MAP_OFFSET,)}


def _mask(length: int) -> int:
    if length not in _MASKS:
        _MASKS[length] = int.from_bytes(b"\x03" * length, "little")
    return _MASKS[length]


def pack_map(states: bytes | bytearray) -> bytes:
    """One byte a block into two bits a block. Values of four blocks meet in one byte, so whole
    columns are combined as big integers without a loop over blocks."""
    padded = bytes(states) + bytes(-len(states) % 4)
    value = 0
    for column in range(4):
        value |= int.from_bytes(padded[column::4], "little") << (2 * column)
    return value.to_bytes(len(padded) // 4, "little")


def unpack_map(packed: bytes, blocks: int) -> bytearray:
    """The inverse of `pack_map`."""
    length = -(-blocks // 4)
    value = int.from_bytes(packed[:length], "little")
    mask = _mask(length)
    states = bytearray(length * 4)
    for column in range(4):
        states[column::4] = ((value >> (2 * column)) & mask).to_bytes(length, "little")
    del states[blocks:]
    return states


class GroupNode(Node):
    """An allocation group: its map with one byte per block, and its generation counter."""

    __slots__ = ("free", "freeing", "last_generation", "states")
    kind = Kind.GROUP

    def __init__(
        self, block: int, group: int, change: int, last_generation: int, states: bytearray
    ) -> None:
        super().__init__(block, group, 0, change)
        self.last_generation = last_generation
        self.states = states
        self.free = states.count(BlockState.FREE)
        self.freeing = states.count(BlockState.FREEING)

    def clone(self) -> GroupNode:
        twin = GroupNode.__new__(GroupNode)
        twin.block = self.block
        twin.owner = self.owner
        twin.generation = 0
        twin.change = self.change
        twin.last_generation = self.last_generation
        twin.states = self.states.copy()
        twin.free = self.free
        twin.freeing = self.freeing
        return twin

    def body(self) -> bytes:
        core = GROUP.pack(
            self.owner, self.last_generation, len(self.states), self.free, self.freeing
        )
        pad = GROUP_MAP_OFFSET - HEADER_BYTES - GROUP.size
        return core + bytes(pad) + pack_map(self.states)


class OrphanNode(Node):
    """A block of a slot's list of inodes that have no name left."""

    __slots__ = ("inos",)
    kind = Kind.ORPHANS

    def __init__(self, block: int, slot: int, change: int, inos: list[int]) -> None:
        super().__init__(block, slot, 0, change)
        self.inos = inos

    def clone(self) -> OrphanNode:
        return OrphanNode(self.block, self.owner, self.change, self.inos.copy())

    def body(self) -> bytes:
        return bytes(8) + struct.pack(f"<{len(self.inos)}Q", *self.inos)


class SlotsNode(Node):
    """The slot table: (first block, length) of each journal."""

    __slots__ = ("journals",)
    kind = Kind.SLOTS

    def __init__(self, block: int, change: int, journals: list[tuple[int, int]]) -> None:
        super().__init__(block, 0, 0, change)
        self.journals = journals

    def clone(self) -> SlotsNode:
        return SlotsNode(self.block, self.change, self.journals.copy())

    def body(self) -> bytes:
        parts = [_U64.pack(len(self.journals))]
        parts += [INDEX_ENTRY.pack(*journal) for journal in self.journals]
        return b"".join(parts)


def decode_node_untrusted(header: Header, block: bytes) -> Node:
    """The object of a block whose header was checked. Raises CorruptionError naming the block."""
    try:
        return _decode_node(header, block)
    except CorruptionError as error:
        if error.block:
            raise
        text = f"block {header.block} makes no sense: {error.message}"
        raise CorruptionError(text, block=header.block) from None


def _decode_node(header: Header, block: bytes) -> Node:
    match header.kind:
        case Kind.INODE:
            return _decode_inode(header, block)
        case Kind.DIRECTORY_TREE | Kind.EXTENT_TREE | Kind.XATTR_TREE:
            level, count, _, _ = TREE.unpack_from(block, HEADER_BYTES)
            kind = Kind(header.kind)
            tree = decode_tree_untrusted(kind, level, count, block[TREE_OFFSET:])
            version = (header.generation, header.change)
            return TreeNode(header.block, header.owner, version, kind, tree)
        case Kind.XATTR_VALUE:
            version = (header.generation, header.change)
            return ValueNode(header.block, header.owner, version, block[HEADER_BYTES:])
        case Kind.GROUP:
            return _decode_group(header, block)
        case Kind.ORPHANS:
            inos = list(struct.unpack_from(f"<{ORPHANS_PER_BLOCK}Q", block, ORPHANS_OFFSET))
            return OrphanNode(header.block, header.owner, header.change, inos)
        case Kind.SLOTS:
            count = _U64.unpack_from(block, HEADER_BYTES)[0]
            if count > SLOTS_MAX:
                raise CorruptionError("too many journals")
            first = HEADER_BYTES + 8
            journals = list(INDEX_ENTRY.iter_unpack(block[first : first + 16 * count]))
            return SlotsNode(header.block, header.change, journals)
        case _:
            raise CorruptionError(f"the unknown kind {header.kind}")


def _decode_inode(header: Header, block: bytes) -> InodeNode:
    node = InodeNode(header.block, header.generation, header.change)
    (
        node.mode, node.nlink, node.uid, node.gid, node.rdev, node.flags, node.size, node.blocks,
        node.atime_ns, node.mtime_ns, node.ctime_ns, node.birth_ns, node.parent, node.counter,
        is_tree, level, count, content_bytes, xattr_bytes,
    ) = INODE.unpack_from(block, HEADER_BYTES)  # fmt: skip
    end = CONTENT_OFFSET + content_bytes
    if end + xattr_bytes > BLOCK_BYTES:
        raise CorruptionError("content size")
    content = block[CONTENT_OFFSET:end]
    if xattr_bytes:
        node.xattrs = _decode_xattr_root(block[end : end + xattr_bytes])
    if is_tree:
        node.root = decode_tree_untrusted(node.tree_kind, level, count, content)
    else:
        node.data = content
    return node


def _decode_xattr_root(data: bytes) -> Tree:
    if len(data) < XATTR_ROOT.size:
        raise CorruptionError("extended attributes that are cut short")
    level, count = XATTR_ROOT.unpack_from(data)
    return decode_tree_untrusted(Kind.XATTR_TREE, level, count, data[XATTR_ROOT.size :])


def mapped_blocks_untrusted(fs: int, number: int, block: bytes) -> int:
    """How many blocks the map of a group has, without unpacking it. Raises CorruptionError."""
    if open_block_untrusted(fs, number, block).kind != Kind.GROUP:
        raise CorruptionError(f"block {number} is no map")
    return int(GROUP.unpack_from(block, HEADER_BYTES)[2])


def _decode_group(header: Header, block: bytes) -> GroupNode:
    group, generation, blocks, free, freeing = GROUP.unpack_from(block, HEADER_BYTES)
    if group != header.owner or blocks > (BLOCK_BYTES - GROUP_MAP_OFFSET) * 4:
        raise CorruptionError("a group of this number or size")
    states = unpack_map(block[GROUP_MAP_OFFSET:], blocks)
    node = GroupNode(header.block, group, header.change, generation, states)
    if node.free != free or node.freeing != freeing:
        raise CorruptionError(f"group {group} counts other than its map")
    return node
