"""More space: from groups that nobody uses, from blocks that were freed here, from other mounts.

What another mount has freed stands in its memory until its maps are in their place. Lock `S` makes
it tell: a mount whose maps on the disk are not the truth holds `S` in PR; who finds no space takes
`S` in EX, and before the others let go of it they write their maps. From then on the disk says
which groups have room, and they are asked for one by one. As long as `S` stays here in EX nothing
has changed, and a file system that is full says so without asking again.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from cfs.attributes import BLOCK_BYTES
from cfs.cache import GroupState
from cfs.errors import CorruptionError, FsError
from cfs.format import Kind, open_block_untrusted
from cfs.lock_names import SPACE_LOCK
from cfs.nodes import GroupNode, decode_node_untrusted
from cfs.seams import Event
from cfs.transaction import Missing
from cluster.errors import BarredError, DeviceError
from cluster.locks import Mode

if TYPE_CHECKING:
    from cfs.core import Core

ROUNDS_MIN = 16
"""How often one operation looks for more space before it is told that there is none; twice for each
group more, because it may need the last blocks of all of them."""
PATIENCE_S = 1.0
"""How long statfs waits for what other mounts have not written yet."""
MAPS_READ_MAX = 64


class SpaceDemand:
    """Finds space for one mount, and shows other mounts what is free here."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.lock = core.locks.get(SPACE_LOCK, core)
        self._announcing: Event | None = None
        self._seen = False
        """The maps of others were read under `S`, which has been here in EX since."""
        self._recovered: Event | None = None

    # -- what others see of us -------------------------------------------------------------------

    def maps_changed(self) -> None:
        """Maps here are not what the disk says."""
        if self.lock.try_hold(Mode.PR):
            self.lock.release(Mode.PR)
        elif self._announcing is None:
            self._announcing = self.core.runtime.event()
            self.core.runtime.spawn(self._announce, "space")

    @property
    def told(self) -> bool:
        """Whether others learn of any change that is made now."""
        if self._announcing is not None or not self.lock.try_hold(Mode.PR):
            return False
        self.lock.release(Mode.PR)
        return True

    @property
    def untold(self) -> bool:
        """Whether changes here are not yet to be seen by others."""
        return self._announcing is not None

    async def announced(self) -> None:
        """Wait until others can learn of the changes. Who holds `S` in EX waits only for the disk,
        or is dead, and its recovery changes no maps and so never waits here: any lock may be
        held."""
        while self._announcing is not None:
            await self._announcing.wait()

    async def _announce(self) -> None:
        try:
            await self.lock.hold(Mode.PR)
            self.lock.release(Mode.PR)
        except (FsError, BarredError):
            pass
        finally:
            done, self._announcing = self._announcing, None
            if done is not None:
                done.set()

    async def demote(self, mode: Mode) -> None:
        """`S` goes down: another mount wants to know, or to use, what is free."""
        self._seen = False
        core = self.core
        if mode == Mode.NL and any(core.is_dirty(g) for g in core.space.mine.values()):
            await core.journal.checkpoint()

    # -- looking for space -----------------------------------------------------------------------

    async def more_space(self, rounds: int) -> None:
        """Get a group with room, or raise ENOSPC. No group lock is held by the caller, who tries
        again afterwards and counts its `rounds` from 1."""
        core, space = self.core, self.core.space
        if any(g.node is None and not g.damaged for g in space.mine.values()):
            for group in list(space.mine.values()):
                await core.load(Missing(group, group.block, (Kind.GROUP,)))
            if any(space.available(group) for group in space.staying()):
                return
        for group in space.candidates():
            if await self._try_group(group):
                return
        if rounds > ROUNDS_MIN + 2 * len(space.groups):
            raise FsError(errno.ENOSPC)
        if await self._reclaim() or await self._wait_for_one():
            return
        if await self._look_under_lock() and await self._wait_for_one():
            return
        if space.recovering and self._has_freeing():
            await self._wait_for_recovery()
            return
        raise FsError(errno.ENOSPC)

    async def need_free(self, blocks: int) -> None:
        """Raise ENOSPC if there are certainly not so many free blocks in all groups."""
        if blocks > self.core.space.total_free():
            await self._look_under_lock()
            if blocks > self.core.space.total_free():
                raise FsError(errno.ENOSPC)

    async def look(self) -> None:
        """Know what is free now in the groups of others, or what their maps on the disk say if they
        do not answer soon."""
        if not self.lock.try_hold(Mode.EX):
            await self._ask_within(PATIENCE_S)
        else:
            self.lock.release(Mode.EX)
        await self.core.refresh_superblock()
        await self._read_beliefs()

    async def _ask_within(self, seconds: float) -> None:
        done = self.core.runtime.event()

        async def ask() -> None:
            try:
                await self.lock.hold(Mode.EX)
                self.lock.release(Mode.EX)
            except (FsError, BarredError):
                pass
            finally:
                done.set()

        async def give_up() -> None:
            await self.core.runtime.sleep(seconds)
            done.set()

        self.core.runtime.spawn(ask, "space")
        self.core.runtime.spawn(give_up, "patience")
        await done.wait()

    async def _look_under_lock(self) -> bool:
        """Whether anything may have become free with others; the beliefs are the truth then."""
        core = self.core
        groups = len(core.space.groups)
        try:
            await core.refresh_superblock()
            if self._seen and groups == len(core.space.groups):
                return False
            await self.lock.hold(Mode.EX)
            try:
                self._seen = True  # unless the lock has been asked for by the time we are done
                await self._read_beliefs()
            finally:
                self.lock.release(Mode.EX)
        except DeviceError as error:
            raise FsError(errno.EIO, error.message) from error
        return any(group.believed_free > 0 for group in core.space.candidates())

    async def _wait_for_one(self) -> bool:
        space = self.core.space
        leaving = [group for group in space.mine.values() if group.lock.demoting]
        for group in [*space.candidates(), *leaving]:
            await group.lock.hold(Mode.EX)
            if await self._has_room(group):
                return True
        return False

    async def _try_group(self, group: GroupState) -> bool:
        if await self.core.locks.try_lock(group.lock.name, Mode.EX) is None:
            return False
        return await self._has_room(group)

    async def _has_room(self, group: GroupState) -> bool:
        """The lock is held; it is given back."""
        try:
            node = await self.core.load_group(group)
            room = self.core.space.available(group)
            group.believed_free = node.free + node.freeing
            return bool(room)
        except FsError:
            group.damaged = True
            group.believed_free = 0
            return False
        finally:
            group.lock.release(Mode.EX)

    def _has_freeing(self) -> bool:
        mine = self.core.space.mine.values()
        return any(group.node is not None and group.node.freeing for group in mine)

    async def _reclaim(self) -> bool:
        """Make blocks that were freed here usable: their maps must be on the disk."""
        space = self.core.space
        if space.recovering or not self._has_freeing():
            return False
        await self.core.journal.checkpoint()
        return any(space.available(group) for group in space.staying())

    async def _wait_for_recovery(self) -> None:
        """Until a dead mount is recovered nothing that was freed may be used."""
        event = self._recovered = self._recovered or self.core.runtime.event()
        await event.wait()

    def recovery_ended(self) -> None:
        """Freed blocks may be used again, and the maps of the dead are on the disk."""
        self._seen = False
        if self._recovered is not None:
            self._recovered.set()
            self._recovered = None

    async def _read_beliefs(self) -> None:
        """Free blocks of groups that are not ours, without their locks."""
        core = self.core
        others = [g for g in core.space.groups if g.number not in core.space.mine]
        for start in range(0, len(others), MAPS_READ_MAX):
            part = others[start : start + MAPS_READ_MAX]
            ranges = [(group.block * BLOCK_BYTES, BLOCK_BYTES) for group in part]
            for group, data in zip(part, await core.device.read_many(ranges), strict=True):
                try:
                    header = open_block_untrusted(core.fs, group.block, data)
                    node = decode_node_untrusted(header, data)
                except CorruptionError:
                    continue
                if isinstance(node, GroupNode):
                    group.believed_free = node.free + node.freeing
