"""Classes of damage: blocks that are not whole (flipped bits, zeroes, old or foreign content)."""

from __future__ import annotations

import msgspec

from cfs.format import SLOT_TABLE_BLOCK, SUPERBLOCK_BLOCK
from cfs.journal_format import HEADER_BLOCKS, HEADER_COPIES, LOG_OFFSET
from cfs.nodes import Xattr
from tests.corrupter.image import Image
from tests.corrupter.table import damage
from tests.corrupter.world import World, large_name

DIRECTORY = ("/large/*",)


# -- superblock and slot table ---------------------------------------------------------------------


@damage("superblock flipped", told="block 16 ", says="superblock")
async def superblock_flipped(image: Image, world: World) -> None:
    await image.flip(SUPERBLOCK_BLOCK, 100)


@damage("superblock zeroed", told="block 16 ", says="superblock")
async def superblock_zeroed(image: Image, world: World) -> None:
    await image.zero(SUPERBLOCK_BLOCK)


@damage("superblock misplaced", told="block 16 ", says="superblock")
async def superblock_misplaced(image: Image, world: World) -> None:
    await image.put(SUPERBLOCK_BLOCK, await image.get(world.superblock.backup_block))


@damage("superblock stale", says="differs")
async def superblock_stale(image: Image, world: World) -> None:
    newer = msgspec.structs.replace(world.superblock, version=2)
    await image.put(newer.backup_block, newer.encode(newer.backup_block))


@damage("superblock copy flipped", told="block 511 ", says="superblock")
async def superblock_copy_flipped(image: Image, world: World) -> None:
    await image.flip(world.superblock.backup_block, 100)


@damage("superblock copy stale", says="differs")
async def superblock_copy_stale(image: Image, world: World) -> None:
    newer = msgspec.structs.replace(world.superblock, version=2)
    await image.put(SUPERBLOCK_BLOCK, newer.encode(SUPERBLOCK_BLOCK))


@damage("superblock nonsense", told="block 16 |superblock makes no sense", says="superblock")
async def superblock_nonsense(image: Image, world: World) -> None:
    wrong = msgspec.structs.replace(world.superblock, root_ino=1 << 40)
    await image.put(SUPERBLOCK_BLOCK, wrong.encode(SUPERBLOCK_BLOCK))


@damage("slot table flipped", refused="block 17 .*fsck.cfs", says="slot table")
async def slot_table_flipped(image: Image, world: World) -> None:
    await image.flip(SLOT_TABLE_BLOCK, 80)


@damage("slot table zeroed", refused="block 17 .*fsck.cfs", says="slot table")
async def slot_table_zeroed(image: Image, world: World) -> None:
    await image.zero(SLOT_TABLE_BLOCK)


# -- groups ----------------------------------------------------------------------------------------


@damage("group flipped", told="block 18 .*allocation group 0", says="group 0")
async def group_flipped(image: Image, world: World) -> None:
    await image.flip(18)


@damage("group zeroed", told="block 18 .*allocation group 0", says="group 0")
async def group_zeroed(image: Image, world: World) -> None:
    await image.zero(18)


@damage("group misplaced", told="block 18 .*allocation group 0", says="group 0")
async def group_misplaced(image: Image, world: World) -> None:
    await image.put(18, await image.get(world.superblock.group_block(1)))


@damage(
    "group stale", differs=("*",), may_fail=("*",), told="in use but free", told_by_chance=True,
    says="by use but",
)  # fmt: skip
async def group_stale(image: Image, world: World) -> None:
    """The most dangerous lost write: what is in use looks free. Nobody but fsck can see it."""
    for number in range(world.superblock.group_count):
        block = world.superblock.group_block(number)
        await image.put(block, await Image(world.early, world.superblock).get(block))


@damage("every group flipped", told="allocation group ", says="group 7")
async def every_group_flipped(image: Image, world: World) -> None:
    for number in range(world.superblock.group_count):
        await image.flip(world.superblock.group_block(number))


# -- inodes ----------------------------------------------------------------------------------------


@damage(
    "inode flipped", fails=("/small",), told=r"\(inode ", says="inode", lossy=True, lost=("/small",)
)
async def inode_flipped(image: Image, world: World) -> None:
    await image.flip(world.inos["/small"])


@damage(
    "inode zeroed", fails=("/small",), told=r"\(inode ", says="inode", lossy=True, lost=("/small",)
)
async def inode_zeroed(image: Image, world: World) -> None:
    await image.zero(world.inos["/small"])


@damage(
    "inode misplaced", fails=("/small",), told=r"\(inode ", says="inode", lossy=True,
    lost=("/small",),
)  # fmt: skip
async def inode_misplaced(image: Image, world: World) -> None:
    await image.put(world.inos["/small"], await image.get(world.inos["/big"]))


@damage("inode stale", differs=("/marked",), says="FREE by use", lost=("/marked",))
async def inode_stale(image: Image, world: World) -> None:
    ino = world.inos["/marked"]
    await image.put(ino, await Image(world.early, world.superblock).get(ino))


@damage(
    "directory flipped", fails=("/dir", "/dir/*"), told=r"\(inode ", says="inode", lossy=True,
    lost=("/dir", "/dir/*"), reconnected=3,
)  # fmt: skip
async def directory_flipped(image: Image, world: World) -> None:
    await image.flip(world.inos["/dir"])


@damage(
    "root directory zeroed", fails=("*",), told=r"\(inode 19\)", says="inode 19", lossy=True,
    lost=("*",), reconnected=13,
)  # fmt: skip
async def root_zeroed(image: Image, world: World) -> None:
    await image.zero(19)


# -- trees -----------------------------------------------------------------------------------------


async def _large_leaf(image: Image, world: World) -> int:
    return (await image.leaves(world.inos["/large"]))[1]


LEAF = {
    "may_fail": DIRECTORY,
    "told": "the tree of directory ",
    "says": "tree",
    "lossy": True,
    "lost": DIRECTORY,
    "reconnected": -1,
}


@damage("directory leaf flipped", **LEAF)
async def leaf_flipped(image: Image, world: World) -> None:
    await image.flip(await _large_leaf(image, world))


@damage("directory leaf zeroed", **LEAF)
async def leaf_zeroed(image: Image, world: World) -> None:
    await image.zero(await _large_leaf(image, world))


@damage("directory leaf misplaced", **LEAF)
async def leaf_misplaced(image: Image, world: World) -> None:
    leaves = await image.leaves(world.inos["/large"])
    await image.put(leaves[1], await image.get(leaves[2]))


@damage("directory leaf of another one", **LEAF)
async def leaf_of_another(image: Image, world: World) -> None:
    """An inode where a leaf should be, whole and in its place."""
    leaf = await _large_leaf(image, world)
    node = await image.inode(world.inos["/small"])
    node.block = node.owner = leaf
    await image.put(leaf, node.encode(world.superblock.fs, 0))


@damage(
    "directory leaf stale", may_fail=DIRECTORY, differs=DIRECTORY,
    told="holds keys of another place", says="directory", lost=DIRECTORY, reconnected=-1,
)  # fmt: skip
async def leaf_stale(image: Image, world: World) -> None:
    early = Image(world.early, world.superblock)
    leaves = set(await image.leaves(world.inos["/large"]))
    block = next(b for b in await early.leaves(world.inos["/large"]) if b in leaves)
    await image.put(block, await early.get(block))


@damage(
    "extent leaf flipped", fails=("/pieces",), told="the tree of file ", says="tree", lossy=True,
    lost=("/pieces",),
)  # fmt: skip
async def extent_leaf_flipped(image: Image, world: World) -> None:
    await image.flip((await image.leaves(world.inos["/pieces"]))[1])


@damage(
    "extent leaf zeroed", fails=("/pieces",), told="the tree of file ", says="tree", lossy=True,
    lost=("/pieces",),
)  # fmt: skip
async def extent_leaf_zeroed(image: Image, world: World) -> None:
    await image.zero((await image.leaves(world.inos["/pieces"]))[0])


async def _xattr_blocks(image: Image, world: World) -> tuple[list[int], list[int]]:
    """The blocks of the attribute tree and of the values of the file `marked`."""
    node = await image.inode(world.inos["/marked"])
    trees, values = [], []
    assert node.xattrs is not None
    stack = list(node.xattrs.values)
    while stack:
        value = stack.pop()
        if isinstance(value, Xattr):
            values += value.blocks
        else:
            assert isinstance(value, int)
            trees.append(value)
            stack += (await image.node(value)).tree.values  # type: ignore[attr-defined]
    return trees, values


@damage(
    "attribute tree flipped", fails=("/marked",), told="inode|file", says="attribute", lossy=True,
    lost=("/marked",),
)  # fmt: skip
async def xattr_tree_flipped(image: Image, world: World) -> None:
    await image.flip((await _xattr_blocks(image, world))[0][0])


@damage(
    "attribute value zeroed", fails=("/marked",), told="inode|file", says="attribute", lossy=True,
    lost=("/marked",),
)  # fmt: skip
async def xattr_value_zeroed(image: Image, world: World) -> None:
    await image.zero((await _xattr_blocks(image, world))[1][2])


# -- journals --------------------------------------------------------------------------------------


@damage("orphan list flipped", told="unlinked files of journal 0", says="orphan list")
async def orphans_flipped(image: Image, world: World) -> None:
    await image.flip((await image.journals())[0][0] + HEADER_BLOCKS)


@damage("orphan list zeroed", told="unlinked files of journal 1", says="orphan list")
async def orphans_zeroed(image: Image, world: World) -> None:
    await image.zero((await image.journals())[1][0] + HEADER_BLOCKS + 3)


@damage("journal header copy flipped", told="header of journal 0", says="journal 0")
async def header_flipped(image: Image, world: World) -> None:
    await image.flip((await image.journals())[0][0] + 1, 90)


@damage("journal header stale")
async def header_stale(image: Image, world: World) -> None:
    """One copy is old, its twin is not: nothing is lost, and a power cut may do the same."""
    first = (await image.journals())[0][0]
    for index in (0, 2):
        block = first + index
        data = await Image(world.early, world.superblock).get(block)
        if data != await image.get(block):
            await image.put(block, data)
            return
    raise AssertionError("no header has changed")


@damage(
    "journal headers lost", refused="headers in blocks .*fsck.cfs", says="journal 0", lossy=True
)
async def headers_lost(image: Image, world: World) -> None:
    first = (await image.journals())[0][0]
    for index in range(HEADER_COPIES):
        await image.flip(first + index, 90)


async def _commits(image: Image, world: World) -> list[int]:
    """The commit blocks of the journal that is in use, in order."""
    first, length = (await image.journals())[0]
    found = []
    for block in range(first + LOG_OFFSET, first + length):
        data = await image.get(block)
        if data[:4] == b"CFSb" and data[4:6] == b"\x09\0":
            sequence = int.from_bytes(data[48:56], "little")
            found.append((sequence, block))
    return [block for _, block in sorted(found)]


@damage(
    "journal commit flipped", crashed=True, refused="cannot be read, a later one is there",
    says="journal 0", lossy=True, lost=("/dir/late*",), reconnected=-1,
)  # fmt: skip
async def commit_flipped(image: Image, world: World) -> None:
    await image.flip((await _commits(image, world))[-8], 100)


@damage(
    "journal image zeroed", crashed=True, refused="cannot be read, a later one is there",
    says="journal 0", lossy=True, lost=("/dir/late*",), reconnected=-1,
)  # fmt: skip
async def image_zeroed(image: Image, world: World) -> None:
    await image.zero((await _commits(image, world))[-8] + 1)


@damage("journal torn at its end", crashed=True, differs=("/dir/late03",), lost=("/dir/late*",))
async def torn_end(image: Image, world: World) -> None:
    """The last transaction rotted: as if it had never been written. Nobody can tell."""
    await image.flip((await _commits(image, world))[-1] + 1)


LATE = [f"/dir/{name}" for name in ("late00", "late19")]
NAMES = [large_name(number).decode() for number in (0, 1)]
