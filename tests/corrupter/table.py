"""What a class of damage is: how it is planted, what a mount answers, what fsck says and saves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tests.corrupter.image import Image
from tests.corrupter.world import World

Plant = Callable[[Image, World], Awaitable[None]]


@dataclass(frozen=True)
class Damage:
    """One class. Patterns are those of fnmatch, over paths of the world."""

    name: str
    plant: Plant
    fails: tuple[str, ...] = ()
    """Paths that answer EIO on the mount; all others must be as they were."""
    may_fail: tuple[str, ...] = ()
    """Paths that may answer EIO or not."""
    differs: tuple[str, ...] = ()
    """Paths that a mount cannot know to be wrong."""
    told: str = ""
    """In the one line of the log; "" if a mount does not meet or cannot see the damage."""
    told_by_chance: bool = False
    """Whether a mount meets it depends on where it puts new blocks."""
    refused: str = ""
    """In the error of a mount that is refused."""
    crashed: bool = False
    """Planted into a disk with a journal that is in use."""
    says: str = ""
    """In an error of fsck."""
    errors_max: int = 40
    """One fault is not told as many."""
    lossy: bool = False
    """The repair asks, because something is lost."""
    lost: tuple[str, ...] = ()
    """Paths that may be gone (or other than they were) after the repair."""
    reconnected: int = 0
    """Inodes that the repair puts into /lost+found."""

    def is_in(self, path: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatchcase(path, pattern) for pattern in patterns)


TABLE: dict[str, Damage] = {}


def damage(name: str, **what: object) -> Callable[[Plant], Plant]:
    """Enter a class into the table."""

    def enter(plant: Plant) -> Plant:
        assert name not in TABLE
        TABLE[name] = Damage(name, plant, **what)  # type: ignore[arg-type]
        return plant

    return enter
