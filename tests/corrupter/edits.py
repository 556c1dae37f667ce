"""What the classes of damage share: paths, and changes of whole nodes."""

from __future__ import annotations

from cfs.format import HASH_SHIFT
from cfs.nodes import (
    BlockState,
    GroupNode,
    InodeNode,
)
from tests.corrupter.image import Image
from tests.corrupter.world import World

ONE = ("/dir/one",)
DIR = ("/dir", "/dir/*")
LARGE = ("/large", "/large/*")


async def set_inode(image: Image, ino: int, **values: object) -> None:
    def change(node: InodeNode) -> None:
        for name, value in values.items():
            setattr(node, name, value)

    await image.edit(ino, InodeNode, change)


async def set_state(image: Image, block: int, count: int, state: BlockState) -> None:
    """Other states in a map, with counts that fit."""
    size = image.superblock.group_blocks
    number = image.superblock.group_block(block // size)

    def change(node: GroupNode) -> None:
        node.states[block % size : block % size + count] = bytes((state,)) * count
        node.free = node.states.count(BlockState.FREE)
        node.freeing = node.states.count(BlockState.FREEING)

    await image.edit(number, GroupNode, change)


async def extent_of(image: Image, ino: int) -> tuple[int, int]:
    """The first extent of a file that has its extents in the inode."""
    root = (await image.inode(ino)).root
    assert root is not None
    value = root.values[0]
    assert isinstance(value, tuple)
    return value[0], value[1]  # type: ignore[return-value]


async def edit_names(image: Image, ino: int, change: object) -> None:
    """Change the entries (key -> (inode, type, name)) of a directory that fits its inode."""

    def apply(node: InodeNode) -> None:
        assert node.root is not None
        entries = dict(zip(node.root.keys, node.root.values, strict=True))
        change(entries)  # type: ignore[operator]
        keys = sorted(entries)
        node.root.keys, node.root.values = keys, [entries[key] for key in keys]

    await image.edit(ino, InodeNode, apply)


def cookie_of(world: World, name: bytes) -> int:
    return world.superblock.name_hash(name) << HASH_SHIFT
