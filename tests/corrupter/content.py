"""Classes of damage: inodes, extents and trees that are whole and say what is wrong or hostile."""

from __future__ import annotations

import struct

from cfs.nodes import (
    InodeNode,
    TreeNode,
)
from tests.corrupter.edits import (
    DIR,
    LARGE,
    ONE,
    extent_of,
    set_inode,
)
from tests.corrupter.image import Image
from tests.corrupter.table import damage
from tests.corrupter.world import World

# -- inodes ----------------------------------------------------------------------------------------


@damage("inode of unknown type", fails=("/small",), told="unknown type", says="unknown type",
        lossy=True, lost=("/small",))  # fmt: skip
async def unknown_type(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/small"], mode=0o130644)


@damage("inode with a wrong count of names", differs=("/small",), says="counts 7 names but has 1")
async def wrong_links(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/small"], nlink=7)


@damage("inode without names by its count", differs=("/small",), says="counts 0 names but has 1")
async def no_links(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/small"], nlink=0)


@damage("directory with a wrong count of links", differs=("/dir",), says="links but has")
async def wrong_directory_links(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/dir"], nlink=9)


@damage("directory with a wrong parent", says="as its parent, wrongly")
async def wrong_parent(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/deep/er"], parent=world.inos["/dir"])


@damage("inode with a wrong count of blocks", says="blocks but has")
async def wrong_blocks(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/big"], blocks=3)


@damage("size below the blocks", differs=("/big",), says="beyond its end", lost=("/big",))
async def size_below(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/big"], size=5000)


@damage("impossible size", fails=("/big",), told="the size of an inode", says="impossible size",
        lost=("/big",))  # fmt: skip
async def impossible_size(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/big"], size=(1 << 62) + 5)


@damage("more bytes than the size", fails=("/small",), told="more bytes than the size",
        says="more bytes than its size")  # fmt: skip
async def small_size(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/small"], size=20)


@damage("impossible times", fails=("/small",), told="the times of an inode", says="impossible")
async def impossible_times(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/small"], mtime_ns=(1 << 63) - 1)


@damage("unknown flags", says="unknown flags")
async def unknown_flags(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/small"], flags=1 << 20)


@damage("content longer than an inode", fails=("/small",), told="content size",
        says="longer than an inode", lossy=True, lost=("/small",))  # fmt: skip
async def content_too_long(image: Image, world: World) -> None:
    await image.patch(world.inos["/small"], 64 + struct.calcsize("<IIIIIIQQqqqqQQBBH"),
                      struct.pack("<H", 60_000))  # fmt: skip


@damage("symbolic link of wrong length", fails=("/link",), told="symbolic link",
        says="is a symbolic link of 7 bytes")  # fmt: skip
async def link_length(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/link"], size=70)


@damage("pipe with content", fails=("/fifo",), told="more bytes", says="content that its type")
async def pipe_content(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/fifo"], data=b"something")


@damage("directory without a tree", fails=DIR, told="a directory without names", says="no tree",
        lossy=True, lost=DIR, reconnected=3)  # fmt: skip
async def no_tree(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/dir"], root=None, data=b"")


# -- extents ---------------------------------------------------------------------------------------


async def _patch_extent(image: Image, ino: int, physical: int, count: int) -> None:
    """Other numbers in the first extent of a file (in the inode, behind its logical block)."""
    await image.patch(ino, 256 + 8, struct.pack("<QI", physical, count))


@damage("extent beyond the end", fails=("/big",), told="an extent at", says="do not exist",
        lossy=True, lost=("/big",))  # fmt: skip
async def extent_beyond(image: Image, world: World) -> None:
    await _patch_extent(image, world.inos["/big"], world.superblock.total_blocks - 2, 25)


@damage("extent at block 0", fails=("/big",), told="an extent at", says="do not exist",
        lossy=True, lost=("/big",))  # fmt: skip
async def extent_zero(image: Image, world: World) -> None:
    await _patch_extent(image, world.inos["/big"], 0, 25)


@damage("extent of no length", fails=("/big",), told="impossible length", says="do not exist",
        lossy=True, lost=("/big",))  # fmt: skip
async def extent_empty(image: Image, world: World) -> None:
    await _patch_extent(image, world.inos["/big"], 600, 0)


@damage("extent across groups", fails=("/big",), told="an extent at", says="crosses a group",
        lossy=True, lost=("/big",))  # fmt: skip
async def extent_across(image: Image, world: World) -> None:
    await _patch_extent(image, world.inos["/big"], world.superblock.group_blocks * 3 - 2, 25)


@damage("extents that overlap", fails=("/pieces",), told="overlap", says="overlap", lossy=True,
        lost=("/pieces",))  # fmt: skip
async def extents_overlap(image: Image, world: World) -> None:
    def change(node: TreeNode) -> None:
        value = node.tree.values[4]
        assert isinstance(value, tuple)
        node.tree.values[4] = (
            type(value)((value[0], 4)) if type(value) is tuple else (value._replace(length=4))
        )  # type: ignore[attr-defined]

    await image.edit((await image.leaves(world.inos["/pieces"]))[0], TreeNode, change)


@damage("block of two files", differs=ONE, says="something else uses too: inode", lossy=True,
        lost=ONE)  # fmt: skip
async def block_of_two(image: Image, world: World) -> None:
    physical, _ = await extent_of(image, world.inos["/big"])
    await _patch_extent(image, world.inos["/dir/one"], physical + 2, 1)


@damage("block of file and metadata", differs=("/big",), says="too: metadata", lossy=True,
        lost=("/big",))  # fmt: skip
async def block_of_metadata(image: Image, world: World) -> None:
    await _patch_extent(image, world.inos["/big"], world.inos["/small"], 1)


@damage("block of file and journal", differs=("/big",), says="too: metadata", lossy=True,
        lost=("/big",))  # fmt: skip
async def block_of_journal(image: Image, world: World) -> None:
    await _patch_extent(image, world.inos["/big"], (await image.journals())[0][0] + 30, 4)


# -- trees -----------------------------------------------------------------------------------------


@damage("tree that points to itself", may_fail=LARGE, told="inode|directory", says="tree of inode",
        lossy=True, lost=LARGE, reconnected=-1)  # fmt: skip
async def tree_loop(image: Image, world: World) -> None:
    leaves = await image.leaves(world.inos["/large"])

    def change(node: TreeNode) -> None:
        node.tree.level = 1
        node.tree.keys, node.tree.values = [1, 2], [leaves[0], leaves[0]]

    await image.edit(leaves[0], TreeNode, change)


@damage("child beyond the end", fails=LARGE, told="it points to block", says="does not exist",
        lossy=True, lost=LARGE, reconnected=-1)  # fmt: skip
async def child_beyond(image: Image, world: World) -> None:
    def change(node: InodeNode) -> None:
        assert node.root is not None
        node.root.values[1] = 1 << 47

    await image.edit(world.inos["/large"], InodeNode, change)


@damage("child of another tree", may_fail=LARGE, told="tree of directory|inode",
        says="holds something else", lossy=True, lost=LARGE, reconnected=-1)  # fmt: skip
async def child_of_another(image: Image, world: World) -> None:
    other = (await image.leaves(world.inos["/pieces"]))[0]

    def change(node: InodeNode) -> None:
        assert node.root is not None
        node.root.values[1] = other

    await image.edit(world.inos["/large"], InodeNode, change)


@damage("child that stands there twice", may_fail=LARGE, told="keys of another place",
        says="referred to twice", lossy=False, lost=LARGE, reconnected=-1)  # fmt: skip
async def child_twice(image: Image, world: World) -> None:
    def change(node: InodeNode) -> None:
        assert node.root is not None
        node.root.values[1] = node.root.values[0]

    await image.edit(world.inos["/large"], InodeNode, change)


@damage("leaf at a wrong level", may_fail=LARGE, told="wrong level|out of order",
        says="wrong level", lossy=True, lost=LARGE, reconnected=-1)  # fmt: skip
async def wrong_level(image: Image, world: World) -> None:
    await image.patch((await image.leaves(world.inos["/large"]))[0], 64, b"\2\0")


@damage("impossible level", may_fail=LARGE, told="impossible level", says="wrong level",
        lossy=True, lost=LARGE, reconnected=-1)  # fmt: skip
async def impossible_level(image: Image, world: World) -> None:
    await image.patch((await image.leaves(world.inos["/large"]))[0], 64, b"\xff\xff")


@damage("leaf with too many entries", may_fail=LARGE, told="cut short", says="to its end",
        lossy=True)  # fmt: skip
async def too_many(image: Image, world: World) -> None:
    await image.patch((await image.leaves(world.inos["/large"]))[0], 66, b"\xff\xff")


@damage("empty leaf", may_fail=LARGE, told="empty tree block", says="is empty", lossy=True,
        lost=LARGE, reconnected=-1)  # fmt: skip
async def empty_leaf(image: Image, world: World) -> None:
    await image.patch((await image.leaves(world.inos["/large"]))[0], 66, b"\0\0")


@damage("keys out of order", may_fail=LARGE, told="out of order", says="out of order")
async def keys_out_of_order(image: Image, world: World) -> None:
    def change(node: TreeNode) -> None:
        tree = node.tree
        for part in (tree.keys, tree.values):
            part[2], part[5] = part[5], part[2]  # type: ignore[index, assignment]

    await image.edit((await image.leaves(world.inos["/large"]))[1], TreeNode, change)


@damage("index out of order", fails=LARGE, told="out of order", says="out of order|elsewhere",
        lost=())  # fmt: skip
async def index_out_of_order(image: Image, world: World) -> None:
    def change(node: InodeNode) -> None:
        assert node.root is not None
        for part in (node.root.keys, node.root.values):
            part[1], part[2] = part[2], part[1]  # type: ignore[index, assignment]

    await image.edit(world.inos["/large"], InodeNode, change)
