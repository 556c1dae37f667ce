"""Classes of damage: directories that are whole and say what is wrong."""

from __future__ import annotations

from tests.corrupter.edits import (
    DIR,
    ONE,
    cookie_of,
    edit_names,
    set_inode,
)
from tests.corrupter.image import Image
from tests.corrupter.table import damage
from tests.corrupter.world import World

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
