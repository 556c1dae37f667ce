"""Classes of damage: blocks that are whole and say what is wrong or hostile."""

from __future__ import annotations

import struct

from cfs.format import FIRST_GROUP_BLOCK, HASH_SHIFT, SLOT_TABLE_BLOCK
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
from tests.corrupter.image import Image
from tests.corrupter.table import damage
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


# -- names -----------------------------------------------------------------------------------------


def _rename(world: World, old: bytes, new: bytes) -> object:
    def change(entries: dict[int, tuple[int, int, bytes]]) -> None:
        child, kind, _ = entries.pop(cookie_of(world, old))
        entries[cookie_of(world, new)] = (child, kind, new)

    return change


@damage("name with a slash", fails=DIR, told="impossible name", says="impossible name",
        lossy=True, lost=ONE, reconnected=1)  # fmt: skip
async def name_with_slash(image: Image, world: World) -> None:
    await edit_names(image, world.inos["/dir"], _rename(world, b"one", b"o/e"))


@damage("name with a zero byte", fails=DIR, told="impossible name", says="impossible name",
        lossy=True, lost=ONE, reconnected=1)  # fmt: skip
async def name_with_zero(image: Image, world: World) -> None:
    await edit_names(image, world.inos["/dir"], _rename(world, b"one", b"o\0e"))


@damage("name that is two dots", fails=DIR, told="impossible name", says="impossible name",
        lossy=True, lost=ONE, reconnected=1)  # fmt: skip
async def name_of_dots(image: Image, world: World) -> None:
    await edit_names(image, world.inos["/dir"], _rename(world, b"one", b".."))


@damage("cookie that does not fit", differs=ONE, says="does not fit its hash")
async def wrong_cookie(image: Image, world: World) -> None:
    def change(entries: dict[int, tuple[int, int, bytes]]) -> None:
        cookie = cookie_of(world, b"one")
        entries[cookie ^ 1 << 40] = entries.pop(cookie)

    await edit_names(image, world.inos["/dir"], change)


@damage("name twice for one inode", differs=ONE, says="twice")
async def name_twice(image: Image, world: World) -> None:
    def change(entries: dict[int, tuple[int, int, bytes]]) -> None:
        cookie = cookie_of(world, b"one")
        entries[cookie + 1] = entries[cookie]

    await edit_names(image, world.inos["/dir"], change)


@damage("name twice for two inodes", differs=DIR, says="twice", lossy=True, reconnected=1,
        lost=("/dir/two",))  # fmt: skip
async def name_twice_of_two(image: Image, world: World) -> None:
    def change(entries: dict[int, tuple[int, int, bytes]]) -> None:
        child, kind, _ = entries.pop(cookie_of(world, b"two"))
        entries[cookie_of(world, b"one") + 1] = (child, kind, b"one")

    await edit_names(image, world.inos["/dir"], change)


@damage("name of a wrong type", says="of another type")
async def wrong_type(image: Image, world: World) -> None:
    def change(entries: dict[int, tuple[int, int, bytes]]) -> None:
        cookie = cookie_of(world, b"one")
        entries[cookie] = (entries[cookie][0], 4, b"one")

    await edit_names(image, world.inos["/dir"], change)


@damage("name of no type", fails=DIR, told="points to", says="of another type")
async def no_type(image: Image, world: World) -> None:
    def change(entries: dict[int, tuple[int, int, bytes]]) -> None:
        cookie = cookie_of(world, b"one")
        entries[cookie] = (entries[cookie][0], 77, b"one")

    await edit_names(image, world.inos["/dir"], change)


def _lead_to(world: World, ino: int) -> object:
    def change(entries: dict[int, tuple[int, int, bytes]]) -> None:
        cookie = cookie_of(world, b"one")
        entries[cookie] = (ino, 8, b"one")

    return change


@damage("name of a free block", fails=ONE, told="which is no inode|no inode", says="inode 3000",
        lossy=True, lost=ONE, reconnected=1)  # fmt: skip
async def name_of_free(image: Image, world: World) -> None:
    await edit_names(image, world.inos["/dir"], _lead_to(world, 3000))


@damage("name of a block that is not there", fails=ONE, told="beyond the end|no inode",
        says="does not exist", lost=ONE, reconnected=1)  # fmt: skip
async def name_of_nothing(image: Image, world: World) -> None:
    await edit_names(image, world.inos["/dir"], _lead_to(world, 1 << 40))


@damage("name of inode 0", fails=DIR, told="points to", says="does not exist", lost=ONE,
        reconnected=1)  # fmt: skip
async def name_of_zero(image: Image, world: World) -> None:
    await edit_names(image, world.inos["/dir"], _lead_to(world, 0))


@damage("name of a dead inode", fails=ONE, told="no inode", says="dead but still", lost=ONE)
async def name_of_dead(image: Image, world: World) -> None:
    await set_inode(image, world.inos["/dir/one"], mode=0)


@damage("lost file", differs=ONE, says="has no name", lost=ONE, reconnected=1)
async def lost_file(image: Image, world: World) -> None:
    await edit_names(image, world.inos["/dir"], lambda e: e.pop(cookie_of(world, b"one")))


@damage("lost directory", differs=("/deep/er", "/deep/er/*"), says="has no name",
        lost=("/deep", "/deep/er", "/deep/er/*"), reconnected=1)  # fmt: skip
async def lost_directory(image: Image, world: World) -> None:
    await edit_names(image, world.inos["/deep"], lambda e: e.pop(cookie_of(world, b"er")))


@damage("directory with two names", differs=DIR, says="a second name")
async def directory_twice(image: Image, world: World) -> None:
    def change(entries: dict[int, tuple[int, int, bytes]]) -> None:
        entries[cookie_of(world, b"again")] = (world.inos["/deep/er"], 4, b"again")

    await edit_names(image, world.inos["/dir"], change)


@damage("directories in a circle", differs=("/deep/er", "/deep/er/*"), says="circle",
        lost=("/deep", "/deep/er", "/deep/er/*"), reconnected=1)  # fmt: skip
async def circle(image: Image, world: World) -> None:
    await edit_names(image, world.inos["/deep"], lambda e: e.pop(cookie_of(world, b"er")))

    def change(entries: dict[int, tuple[int, int, bytes]]) -> None:
        entries[cookie_of(world, b"up")] = (world.inos["/deep/er"], 4, b"up")

    await edit_names(image, world.inos["/deep/er/and/deeper"], change)


@damage("directory that contains the root", differs=DIR, says="for itself or for the root")
async def root_inside(image: Image, world: World) -> None:
    def change(entries: dict[int, tuple[int, int, bytes]]) -> None:
        entries[cookie_of(world, b"root")] = (world.inos["/"], 4, b"root")

    await edit_names(image, world.inos["/dir"], change)


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
