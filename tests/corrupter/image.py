"""Reading and spoiling blocks of a file system on a RAM disk."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TypeVar

from cfs.attributes import BLOCK_BYTES
from cfs.format import CRC_OFFSET, Kind, Superblock, open_block_untrusted
from cfs.nodes import GroupNode, InodeNode, Node, SlotsNode, TreeNode, decode_node_untrusted
from cluster.device_memory import MemoryDevice
from native.checksum import crc32c

AnyNode = TypeVar("AnyNode", bound=Node)


def reseal(block: bytes | bytearray) -> bytes:
    """The block with a checksum that is right again: damage that only sense can find."""
    copy = bytearray(block)
    copy[CRC_OFFSET : CRC_OFFSET + 4] = bytes(4)
    struct.pack_into("<I", copy, CRC_OFFSET, crc32c(copy))
    return bytes(copy)


class Image:
    """One disk to be spoiled."""

    def __init__(self, device: MemoryDevice, superblock: Superblock) -> None:
        self.device = device
        self.superblock = superblock

    async def get(self, block: int) -> bytes:
        return await self.device.read(block * BLOCK_BYTES, BLOCK_BYTES)

    async def put(self, block: int, data: bytes | bytearray) -> None:
        assert len(data) == BLOCK_BYTES
        await self.device.write(block * BLOCK_BYTES, data)
        await self.device.flush()

    async def flip(self, block: int, byte: int = 700, mask: int = 4) -> None:
        data = bytearray(await self.get(block))
        data[byte] ^= mask
        await self.put(block, data)

    async def zero(self, block: int) -> None:
        await self.put(block, bytes(BLOCK_BYTES))

    async def patch(self, block: int, offset: int, data: bytes) -> None:
        """Other bytes, with a checksum that fits."""
        copy = bytearray(await self.get(block))
        copy[offset : offset + len(data)] = data
        await self.put(block, reseal(copy))

    async def node(self, block: int) -> Node:
        data = await self.get(block)
        return decode_node_untrusted(open_block_untrusted(self.superblock.fs, block, data), data)

    async def edit(
        self, block: int, kind: type[AnyNode], change: Callable[[AnyNode], None]
    ) -> None:
        """Change a node and write it back whole."""
        node = await self.node(block)
        assert isinstance(node, kind)
        change(node)
        await self.put(block, node.encode(self.superblock.fs, 0))

    async def inode(self, ino: int) -> InodeNode:
        node = await self.node(ino)
        assert isinstance(node, InodeNode)
        return node

    async def leaves(self, ino: int) -> list[int]:
        """The blocks of the leaves of an inode's tree, in order."""
        root = (await self.inode(ino)).root
        assert root is not None
        found = []
        stack = [value for value in reversed(root.values) if root.level]
        while stack:
            block = stack.pop()
            assert isinstance(block, int)
            node = await self.node(block)
            assert isinstance(node, TreeNode)
            if node.tree.level:
                stack += reversed(node.tree.values)
            else:
                found.append(block)
        return found

    async def journals(self) -> list[tuple[int, int]]:
        node = await self.node(17)
        assert isinstance(node, SlotsNode)
        return node.journals

    async def groups(self) -> list[GroupNode]:
        result = []
        for number in range(self.superblock.group_count):
            node = await self.node(self.superblock.group_block(number))
            assert isinstance(node, GroupNode)
            result.append(node)
        return result

    async def metadata_blocks(self) -> list[int]:
        """Every block that is whole metadata."""
        result = []
        for block in range(self.superblock.total_blocks):
            data = await self.get(block)
            try:
                open_block_untrusted(self.superblock.fs, block, data)
            except Exception:
                continue
            result.append(block)
        return result


KINDS = {kind.value: kind.name for kind in Kind}
