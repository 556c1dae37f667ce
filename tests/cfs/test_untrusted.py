"""Blocks with a right checksum and hostile content: CorruptionError, never a crash or a hang."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cfs.attributes import BLOCK_BYTES
from cfs.errors import CorruptionError
from cfs.format import (
    HEADER,
    HEADER_BYTES,
    Header,
    Kind,
    Superblock,
    decode_superblock_untrusted,
    open_block_untrusted,
    seal_block,
)
from cfs.journal_format import (
    HEADER_BLOCKS,
    commit_sequence,
    decode_commit_untrusted,
    decode_header_untrusted,
)
from cfs.nodes import Extent, InodeNode, Node, Tree, TreeNode, Xattr, decode_node_untrusted
from cfs.sanity import check_node_untrusted
from tests.corrupter.image import reseal

FS = 0x03020100
SUPERBLOCK = Superblock(bytes(range(16)), "", bytes(16), 512, 4096, 19, 1, 0)
BODY = BLOCK_BYTES - HEADER_BYTES
kinds = st.sampled_from([*Kind, 0, 99])


def verify(number: int, block: bytes) -> Node | None:
    """As a mount does; None if the block was refused. What passes can be written again."""
    try:
        node = decode_node_untrusted(open_block_untrusted(FS, number, block), block)
        check_node_untrusted(node, SUPERBLOCK)
    except CorruptionError:
        return None
    twin = node.clone()
    twin.change += 1
    twin.encode(FS, 1)
    return node


@given(kinds, st.binary(max_size=BODY), st.integers(0, 1 << 64 - 1), st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_any_body_is_decoded_or_refused(kind: int, body: bytes, owner: int, number: int) -> None:
    verify(number, seal_block(FS, Header(kind, number, owner, 1, 1, 1), body))


def honest_nodes() -> list[Node]:
    file = InodeNode(700, 3)
    file.mode, file.nlink, file.size, file.blocks = 0o100644, 1, 5 * 4096, 4
    file.root = Tree(0, [0, 3], [Extent(800, 2), Extent(802, 2, True)], 48)
    file.xattrs = Tree(0, [9], [Xattr(b"user.a", 5000, blocks=(900, 901))], 40)
    small = InodeNode(701, 3)
    small.mode, small.nlink, small.size, small.data = 0o100644, 1, 3, b"abc"
    holder = InodeNode(702, 3)
    holder.mode, holder.nlink, holder.parent = 0o040755, 2, 19
    holder.root = Tree(1, [5, 90], [1000, 1001], 32)
    names = Tree(0, [7, 80], [(701, 8, b"one"), (702, 4, b"two")], 42)
    index = Tree(1, [7, 80], [1000, 1002], 32)
    return [
        file,
        small,
        holder,
        TreeNode(1000, 702, (4, 5), Kind.DIRECTORY_TREE, names),
        TreeNode(1001, 702, (4, 5), Kind.DIRECTORY_TREE, index),
        TreeNode(1003, 700, (4, 5), Kind.EXTENT_TREE, file.root),
        TreeNode(1004, 700, (4, 5), Kind.XATTR_TREE, file.xattrs),
    ]


@given(
    st.sampled_from(honest_nodes()),
    st.lists(st.tuples(st.integers(24, 500), st.integers(0, 255)), min_size=1, max_size=6),
)
@settings(max_examples=500, deadline=None)
def test_an_honest_block_with_changed_bytes_is_decoded_or_refused(
    node: Node, changes: list[tuple[int, int]]
) -> None:
    block = bytearray(node.encode(FS, 1))
    assert verify(node.block, bytes(block)) is not None
    for offset, value in changes:
        block[offset] = value
    verify(node.block, reseal(block))


@given(st.binary(min_size=8, max_size=300), st.integers(0, 3), st.integers(0, 64), st.data())
@settings(max_examples=200, deadline=None)
def test_journal_blocks_are_decoded_or_refused(
    body: bytes, slot: int, sequence: int, data: st.DataObject
) -> None:
    blocks = b""
    for index in range(HEADER_BLOCKS):
        kind = data.draw(st.sampled_from([Kind.JOURNAL_HEADER, Kind.JOURNAL_COMMIT]))
        blocks += seal_block(FS, Header(kind, 50 + index, slot, 0, index, sequence), body)
    try:
        header = decode_header_untrusted(FS, 50, blocks)
        assert header.sequence < 1 << 48
    except CorruptionError:
        pass
    commit = seal_block(FS, Header(Kind.JOURNAL_COMMIT, 50, slot, 0, 0, sequence), body)
    assert commit_sequence(commit, 50, slot) == sequence
    try:
        part = decode_commit_untrusted(FS, 50, commit, slot, sequence)
        assert len(part.items) <= part.item_count
    except CorruptionError:
        pass


@given(st.binary(max_size=BODY))
@settings(max_examples=200, deadline=None)
@example(bytes(BODY))
def test_superblocks_are_decoded_or_refused(body: bytes) -> None:
    uuid = int.from_bytes(body[:4].ljust(4, b"\0"), "little")
    block = seal_block(uuid, Header(Kind.SUPERBLOCK, 16, 0, 0, 1, 0), body)
    try:
        found = decode_superblock_untrusted(16, block)
    except CorruptionError:
        return
    assert 0 < found.root_ino < found.total_blocks
    assert found.backup_block < found.total_blocks


@pytest.mark.parametrize("seed", range(3))
def test_random_headers_never_pass(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        block = bytearray(rng.randbytes(BLOCK_BYTES))
        if rng.random() < 0.8:
            struct.pack_into("<IHH", block, 0, 0x62534643, rng.randrange(12), 1)
        with pytest.raises(CorruptionError):
            open_block_untrusted(FS, 7, bytes(block))
    assert HEADER.size == HEADER_BYTES
