"""Classes of damage: attributes, maps and lists that are whole and say what is wrong."""

from __future__ import annotations

import struct
from collections.abc import Callable

from cfs.format import FIRST_GROUP_BLOCK, SLOT_TABLE_BLOCK
from cfs.journal_format import HEADER_BLOCKS
from cfs.nodes import (
    GROUP_MAP_OFFSET,
    BlockState,
    GroupNode,
    InodeNode,
    OrphanNode,
    SlotsNode,
    TreeNode,
    Xattr,
)
from cfs.xattr import DEFAULT_ACL
from tests.corrupter.edits import (
    extent_of,
    set_inode,
    set_state,
)
from tests.corrupter.image import Image
from tests.corrupter.table import damage
from tests.corrupter.world import World

# -- attributes ------------------------------------------------------------------------------------


async def edit_xattrs(image: Image, world: World, change: object) -> None:
    node = await image.inode(world.inos["/marked"])
    assert node.xattrs is not None
    block = node.xattrs.values[0]
    assert isinstance(block, int)

    def apply(node: TreeNode) -> None:
        change(node.tree.keys, node.tree.values)  # type: ignore[operator]

    await image.edit(block, TreeNode, apply)


@damage("attribute of an impossible name", differs=("/marked",), says="impossible attribute name",
        may_fail=("/marked",), lossy=True, lost=("/marked",))  # fmt: skip
async def attribute_name(image: Image, world: World) -> None:
    def change(keys: list[int], values: list[Xattr]) -> None:
        values[0] = Xattr(b"nonsense", values[0].size, values[0].value, values[0].blocks)

    await edit_xattrs(image, world, change)


@damage("cookie of an attribute that does not fit", differs=("/marked",), may_fail=("/marked",),
        says="the cookie of attribute")  # fmt: skip
async def attribute_cookie(image: Image, world: World) -> None:
    def change(keys: list[int], values: list[Xattr]) -> None:
        keys[0] -= 1 << 20

    await edit_xattrs(image, world, change)


async def edit_list(image: Image, world: World, change: Callable[[Xattr], Xattr]) -> None:
    """Change the one attribute of `listed`, which is in its inode."""

    def apply(node: InodeNode) -> None:
        assert node.xattrs is not None
        (entry,) = node.xattrs.values
        assert isinstance(entry, Xattr)
        node.xattrs.values[:] = [change(entry)]

    await image.edit(world.inos["/listed"], InodeNode, apply)


@damage("mode that its access list does not say", differs=("/listed",),
        says="has the mode 640, its access control list says 660")  # fmt: skip
async def listed_mode(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/listed"], mode=0o100640)


@damage("access list that is cut short", differs=("/listed",), lost=("/listed",), lossy=True,
        says="damaged access control list: .* cut short")  # fmt: skip
async def list_cut(image: Image, world: World) -> None:
    def change(entry: Xattr) -> Xattr:
        return Xattr(entry.name, entry.size - 3, entry.value[:-3])

    await edit_list(image, world, change)


@damage("access list without an owner", differs=("/listed",), lost=("/listed",), lossy=True,
        says="damaged access control list: .* incomplete")  # fmt: skip
async def list_incomplete(image: Image, world: World) -> None:
    def change(entry: Xattr) -> Xattr:
        rest = entry.value[:4] + entry.value[12:]
        return Xattr(entry.name, len(rest), rest)

    await edit_list(image, world, change)


@damage("default list of a file", differs=("/listed",), lost=("/listed",), lossy=True,
        says="no directory and has a default access control list")  # fmt: skip
async def list_of_file(image: Image, world: World) -> None:
    def change(entry: Xattr) -> Xattr:
        return Xattr(DEFAULT_ACL, entry.size, entry.value)

    await edit_list(image, world, change)


# -- maps ------------------------------------------------------------------------------------------


@damage("leaked blocks", says="FREE by use but DATA")
async def leaked(image: Image, world: World) -> None:
    await set_state(image, 3500, 5, BlockState.DATA)


@damage("leaked metadata", says="FREE by use but META")
async def leaked_metadata(image: Image, world: World) -> None:
    await set_state(image, 3500, 5, BlockState.META)


@damage("used block that is free in the map", says="DATA by use but FREE")
async def used_is_free(image: Image, world: World) -> None:
    first, count = await extent_of(image, world.inos["/big"])
    await set_state(image, first + count - 3, 3, BlockState.FREE)


@damage("inode that is free in the map", says="META by use but FREE")
async def inode_is_free(image: Image, world: World) -> None:
    await set_state(image, world.inos["/deep/er/and"], 1, BlockState.FREE)


@damage("data that is metadata in the map", says="DATA by use but META")
async def data_is_metadata(image: Image, world: World) -> None:
    first, _ = await extent_of(image, world.inos["/big"])
    await set_state(image, first, 2, BlockState.META)


@damage("group that counts wrong", told="allocation group 0", says="counts other than its map")
async def wrong_counts(image: Image, world: World) -> None:
    await image.patch(FIRST_GROUP_BLOCK, 64 + 20, struct.pack("<II", 1, 2))


@damage("group that calls itself free", told="own block is free", says="own block is free")
async def group_is_free(image: Image, world: World) -> None:
    await set_state(image, FIRST_GROUP_BLOCK, 1, BlockState.FREE)


@damage("group of too many blocks", told="allocation group 0", says="group 0")
async def group_too_long(image: Image, world: World) -> None:
    await image.patch(FIRST_GROUP_BLOCK, 64 + 16, struct.pack("<I", 15000))


@damage("group with an old generation", says="has counted generations")
async def old_generation(image: Image, world: World) -> None:
    def change(node: GroupNode) -> None:
        node.last_generation = 1

    await image.edit(world.superblock.group_block(2), GroupNode, change)


@damage("group with an impossible generation", told="generation of a group",
        says="generation of a group")  # fmt: skip
async def impossible_generation(image: Image, world: World) -> None:
    await image.patch(FIRST_GROUP_BLOCK, 64 + 8, b"\xff" * 8)


assert GROUP_MAP_OFFSET > 64 + 28

# -- journals --------------------------------------------------------------------------------------


@damage("slot table with journals that overlap", refused="a journal at blocks .*fsck.cfs",
        says="slot table")  # fmt: skip
async def slots_overlap(image: Image, world: World) -> None:
    def change(node: SlotsNode) -> None:
        node.journals[1] = (node.journals[0][0] + 3, node.journals[1][1])

    await image.edit(SLOT_TABLE_BLOCK, SlotsNode, change)


@damage("slot table beyond the end", refused="a journal at blocks .*fsck.cfs", says="slot table")
async def slots_beyond(image: Image, world: World) -> None:
    def change(node: SlotsNode) -> None:
        node.journals[1] = (1 << 50, 200)

    await image.edit(SLOT_TABLE_BLOCK, SlotsNode, change)


@damage("slot table without journals", refused="no journals.*fsck.cfs", says="slot table")
async def slots_empty(image: Image, world: World) -> None:
    await image.edit(SLOT_TABLE_BLOCK, SlotsNode, lambda node: node.journals.clear())


async def _put_orphans(image: Image, world: World, *inos: int) -> None:
    def change(node: OrphanNode) -> None:
        free = [index for index, ino in enumerate(node.inos) if not ino]
        for index, ino in zip(free, inos, strict=False):
            node.inos[index] = ino

    await image.edit((await image.journals())[1][0] + HEADER_BLOCKS, OrphanNode, change)


@damage("inode twice in the orphan lists", says="orphan lists twice")
async def orphan_twice(image: Image, world: World) -> None:
    await _put_orphans(image, world, world.orphan)


@damage("orphan that cannot be", says="which cannot be")
async def orphan_impossible(image: Image, world: World) -> None:
    await _put_orphans(image, world, 1 << 47, world.superblock.total_blocks)


@damage("orphan that is no inode", says="inode 3000", lossy=True)
async def orphan_no_inode(image: Image, world: World) -> None:
    await _put_orphans(image, world, 3000)


@damage("orphan with a name")
async def orphan_with_name(image: Image, world: World) -> None:
    """Legal: so is a file that is being cut."""
    await _put_orphans(image, world, world.inos["/small"])


@damage("unlinked inode in no list", says="FREE by use but")
async def unlinked_in_no_list(image: Image, world: World) -> None:
    def change(node: OrphanNode) -> None:
        node.inos[:] = [0] * len(node.inos)

    for first, _ in await image.journals():
        for index in range(16):
            await image.edit(first + HEADER_BLOCKS + index, OrphanNode, change)
