"""The bytes of files: write, cut, sync.

Small files live in their inode (`InodeNode.data`), journalled with it. Larger ones have extents;
their data goes through the write-behind buffer, or past it (`direct`) when every block is written.

The bytes of a file's last block beyond its end may be anything on the disk: data goes there before
the transaction that moves the end, and a crash may come in between. So they are made zero whenever
they come into the file: a page that is read to be changed is cut at the end of file, and whatever
makes a file longer without writing that block zeroes its tail (`zero_tail`).

A write never fails for want of space where the file has blocks already. Turning a part of an
unwritten extent into a written one may split it, and that may need a tree block; when there is
none, the whole extent is turned, its other blocks filled with zeroes.
"""

from __future__ import annotations

import contextlib
import errno

from cfs import extents
from cfs.attributes import BLOCK_BYTES, FILE_BYTES_MAX, FLAG_CUTTING
from cfs.cache import InodeState, Page
from cfs.core import Core
from cfs.errors import FsError
from cfs.nodes import CONTENT_BYTES_MAX, Extent, InodeNode, Tree
from cfs.protection import clear_privileges, need_mutable
from cfs.reading import ZERO_PAGE, need_regular
from cfs.transaction import READER, NeedWait, NotNow, Tx
from cfs.tree import TreeEditor
from cfs.xattr import CAPABILITY, XattrEditor
from cluster.device import Buffer
from cluster.errors import BarredError, DeviceError, StackError
from cluster.locks import Mode

CUT_EXTENTS_MAX = 64
CLEAN_PAGES_MAX = 64


def lasting(data: Buffer) -> memoryview:
    """A view of bytes that nobody changes: written pages keep parts of it."""
    if isinstance(data, memoryview) and isinstance(data.obj, bytes):
        return data
    return memoryview(data if isinstance(data, bytes) else bytes(data))


class PageChanges:
    """Pages that a transaction brings: they go to the buffer when it is applied."""

    __slots__ = ("fresh", "ordered", "pages")

    def __init__(self) -> None:
        self.pages: dict[int, Page] = {}
        self.fresh: list[tuple[int, int]] = []
        """(first, count): the running transaction calls these blocks written."""
        self.ordered = False
        """They must be on the disk before the running transaction is."""


class Files:
    """Changes of file data. The methods want the inode's lock held in EX by the caller."""

    def __init__(self, core: Core) -> None:
        self.core = core
        core.pages.on_spoiled = self._isolate_soon
        core.pages.isolate = self.isolate

    # -- writing ---------------------------------------------------------------------------------

    async def write(
        self,
        state: InodeState,
        offset: int | None,
        data: Buffer,
        *,
        laundered: bool = False,
        kill: bool = True,
    ) -> tuple[int, int]:
        """Write into the buffer; (offset, length). `offset` None: at the end of file. `kill`: the
        writer may not keep set-user-id and set-group-id."""
        core = self.core
        if not laundered:
            await core.pages.room(len(data))
        view = lasting(data)
        try:
            return await core.run(
                lambda tx: self._write_body(tx, state, offset, view, laundered=laundered, kill=kill)
            )
        except FsError as error:
            if error.errno != errno.ENOSPC or not await self._has_unwritten(state, offset, view):
                raise
            return await core.run(
                lambda tx: self._write_body(
                    tx, state, offset, view, laundered=laundered, kill=kill, whole_extents=True
                )
            )
        finally:
            if not laundered:
                core.pages.settled(len(data))

    def try_write(self, state: InodeState, offset: int, data: Buffer, *, kill: bool) -> int:
        """As `write`, at once; the length. Raises NotNow."""
        if not self.core.pages.has_room(len(data)):
            raise NotNow
        view = lasting(data)
        return self.core.try_run(
            lambda tx: self._write_body(tx, state, offset, view, laundered=False, kill=kill)
        )[1]

    async def _has_unwritten(self, state: InodeState, offset: int | None, view: memoryview) -> bool:
        """Whether a write goes to blocks that the file has, but that were never written."""

        def look() -> bool:
            inode = READER.inode(state)
            first = (inode.size if offset is None else offset) // BLOCK_BYTES
            count = len(view) // BLOCK_BYTES + 2
            return any(piece[3] for piece in extents.pieces(READER, state, inode, first, count))

        return await self.core.see(look)

    def _write_body(
        self,
        tx: Tx,
        state: InodeState,
        at: int | None,
        view: memoryview,
        *,
        laundered: bool,
        kill: bool,
        whole_extents: bool = False,
    ) -> tuple[int, int]:
        seen = tx.inode(state)
        need_regular(seen)
        offset = seen.size if at is None else at
        end = offset + len(view)
        if laundered:
            end = min(end, seen.size)
            view = view[: max(end - offset, 0)]
        if not len(view):
            return offset, 0
        if end > FILE_BYTES_MAX:
            raise FsError(errno.EFBIG)
        if not laundered:
            need_mutable(seen)
        inode = tx.edit_inode(state)
        if inode.root is None and max(end, len(inode.data)) <= CONTENT_BYTES_MAX:
            old = inode.data.ljust(offset, b"\0")
            inode.data = b"".join((old[:offset], view, old[end:]))
            self.mark_changed(tx, state)
        else:
            if end > inode.size:
                self.need_whole_cut(state, inode)
            self._write_blocks(tx, state, inode, offset, view, whole_extents=whole_extents)
        if end > inode.size:
            inode.size = end
            self.mark_changed(tx, state)
        if not laundered:
            self.drop_privileges(tx, state, inode, kill=kill)
        self.touch(inode)
        return offset, len(view)

    def drop_privileges(self, tx: Tx, state: InodeState, inode: InodeNode, *, kill: bool) -> None:
        """The file's content or owner changes: its capabilities go, and if `kill` (who does it may
        not keep them) set-user-id and set-group-id as well."""
        mode = inode.mode
        if kill:
            clear_privileges(inode)
        if inode.mode != mode:
            tx.after(lambda: self.core.kernel.attributes_changed(inode.block))
        if inode.xattrs is not None:
            XattrEditor(tx, state, inode, self.core.space).remove(CAPABILITY)

    def mark_changed(self, tx: Tx, state: InodeState) -> None:
        """fdatasync must commit: data in the inode, its size or its map changed."""
        journal = self.core.journal

        def mark() -> None:
            state.changed_in = journal.running_id

        tx.after(mark)

    def touch(self, inode: InodeNode) -> None:
        """The content changed now."""
        inode.mtime_ns = inode.ctime_ns = self.core.now(max(inode.mtime_ns, inode.ctime_ns))
        inode.counter += 1

    def editor(self, tx: Tx, state: InodeState, inode: InodeNode) -> TreeEditor:
        return TreeEditor(tx, state, inode, self.core.space.tree_space(tx, inode))

    def spill(self, tx: Tx, state: InodeState, inode: InodeNode, changes: PageChanges) -> None:
        """Move the content of a file from its inode to blocks."""
        data, inode.data = inode.data, b""
        inode.root = Tree(0, [], [], 0)
        if data or 0 < inode.size <= CONTENT_BYTES_MAX:
            # Also of a small file that is all hole: the kernel may have mapped its page, for which
            # stores until now needed no block.
            ((_, block, _, _),) = self.fill(tx, state, inode, 0, 1, unwritten=not data)
            if data:
                changes.pages[0] = (data.ljust(BLOCK_BYTES, b"\0"), block)
                changes.fresh.append((0, 1))

    def put(self, tx: Tx, state: InodeState, changes: PageChanges) -> None:
        """Hand the pages over when the transaction is applied."""
        if changes.fresh:
            changes.ordered = True
            self.mark_changed(tx, state)
        if changes.pages:
            pages, fresh, ordered = changes.pages, changes.fresh, changes.ordered
            tx.after(lambda: self.core.pages.put(state, pages, ordered=ordered, fresh=fresh))

    def _write_blocks(
        self,
        tx: Tx,
        state: InodeState,
        inode: InodeNode,
        offset: int,
        view: memoryview,
        *,
        whole_extents: bool,
    ) -> None:
        changes = PageChanges()
        pages = changes.pages
        end = offset + len(view)
        first, last = offset // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        # A size that is durable before the bytes would show what nobody wrote.
        changes.ordered = end > inode.size
        if inode.root is None:
            self.spill(tx, state, inode, changes)
        elif inode.size < first * BLOCK_BYTES:
            self.zero_tail(tx, state, inode, changes)
        for logical, block, count, unwritten in extents.pieces(
            tx, state, inode, first, last - first + 1
        ):
            runs = [(logical, block, count, unwritten)]
            fresh = not block or unwritten
            if not block:
                runs = self.fill(tx, state, inode, logical, count)
            elif unwritten:
                self._convert(tx, state, inode, (logical, count), changes, whole=whole_extents)
            if fresh:
                changes.fresh.append((logical, count))
            for start, physical, length, _ in runs:
                for step in range(length):
                    index = start + step
                    old = pages.get(index)
                    base = old[0] if old is not None else ZERO_PAGE if fresh else None
                    data = self._page(state, index, offset, view, base, physical + step)
                    pages[index] = (data, physical + step)
        self.put(tx, state, changes)

    def _convert(
        self,
        tx: Tx,
        state: InodeState,
        inode: InodeNode,
        span: tuple[int, int],
        changes: PageChanges,
        *,
        whole: bool,
    ) -> None:
        """Blocks of unwritten extents are going to be written. `whole`: turn whole extents, which
        needs no space; the rest of them becomes zeroes, or free beyond the end of file."""
        first, end = span[0], span[0] + span[1]
        editor = self.editor(tx, state, inode)
        for mapped in extents.overlapping(tx, state, inode, first, end, span[1]):
            logical, extent = mapped
            if not whole:
                extents.convert(editor, mapped, first, end)
                continue
            size_end = max(end, -(-inode.size // BLOCK_BYTES))
            if logical + extent.length > size_end:
                gone = extents.take_away(editor, mapped, size_end, logical + extent.length)
                self.core.space.free(tx, gone.block, gone.length)
                inode.blocks -= gone.length
                extent = extent._replace(length=size_end - logical)
            extents.convert(editor, (logical, extent), logical, logical + extent.length)
            changes.fresh.append((logical, extent.length))
            for step in range(extent.length):
                changes.pages[logical + step] = (ZERO_PAGE, extent.block + step)

    def _page(
        self,
        state: InodeState,
        index: int,
        offset: int,
        view: memoryview,
        base: Buffer | None,
        block: int,
    ) -> Buffer:
        """The page as it is after the write. `base`: its old content, None: as on the disk. What
        lies behind the end of file stays as it is: it may be in the file that a crash brings back,
        if the truncation that took it away is not durable yet."""
        start = index * BLOCK_BYTES - offset
        if start >= 0 and start + BLOCK_BYTES <= len(view):
            return view[start : start + BLOCK_BYTES]
        page = bytearray(self.old_page(state, index, block) if base is None else base)
        low = max(-start, 0)
        high = min(len(view) - start, BLOCK_BYTES)
        if base is None:
            node = state.node
            inside = 0 if node is None else max(node.size - index * BLOCK_BYTES, 0)
            if inside < low:
                page[inside:low] = bytes(low - inside)
        page[low:high] = view[start + low : start + high]
        return page

    def old_page(self, state: InodeState, index: int, block: int) -> Buffer:
        """The content of a block that the file has. Raises NeedWait while it is read."""
        page = state.pages.get(index) or state.flushing.get(index)
        if page is not None:
            return page[0]
        if index in state.spoiled:
            return ZERO_PAGE
        pages = self.core.pages
        if pages.written_directly(state, index, index + 1):
            raise NeedWait(lambda: pages.settle(state, index, index + 1))
        clean = state.clean.get(index)
        if isinstance(clean, bytes):
            return clean
        raise NeedWait(lambda: self._load_page(state, index, block))

    async def _load_page(self, state: InodeState, index: int, block: int) -> None:
        if len(state.clean) >= CLEAN_PAGES_MAX:
            state.clean.clear()
        reading = state.clean[index] = object()
        try:
            data = await self.core.device.read(block * BLOCK_BYTES, BLOCK_BYTES)
        except DeviceError as error:
            raise FsError(errno.EIO, error.message) from error
        # A read that a write and a later read have overtaken brings an old page.
        if state.clean.get(index) is reading:
            state.clean[index] = data

    def fill(
        self,
        tx: Tx,
        state: InodeState,
        inode: InodeNode,
        logical: int,
        count: int,
        *,
        unwritten: bool = False,
    ) -> list[extents.Piece]:
        """Give blocks to a hole."""
        editor = self.editor(tx, state, inode)
        result: list[extents.Piece] = []
        while count:
            goal = extents.goal_for(tx, state, inode, logical)
            start, length = self.core.space.allocate(tx, goal, count)
            extents.insert(editor, logical, Extent(start, length, unwritten))
            inode.blocks += length
            result.append((logical, start, length, unwritten))
            logical += length
            count -= length
        return result

    # -- cutting ---------------------------------------------------------------------------------

    def set_size(self, tx: Tx, state: InodeState, inode: InodeNode, size: int) -> bool:
        """Truncate or extend the transaction's own clone; False: more blocks must go in further
        transactions (`cut_more`). Blocks beyond the end go also when the size stays the same."""
        if size > FILE_BYTES_MAX:
            raise FsError(errno.EFBIG)
        done = True
        if size > inode.size:
            self.extend(tx, state, inode, size)
        elif inode.root is None:
            inode.data = inode.data[:size]
        else:
            done = self.cut(tx, state, inode, -(-size // BLOCK_BYTES))
        if size != inode.size:
            self.mark_changed(tx, state)
        inode.size = size
        return done

    def extend(self, tx: Tx, state: InodeState, inode: InodeNode, size: int) -> None:
        """Make the file longer; what it gains reads as zeroes."""
        self.need_whole_cut(state, inode)
        if inode.root is not None:
            changes = PageChanges()
            self.zero_tail(tx, state, inode, changes)
            self.put(tx, state, changes)
        inode.size = size
        self.mark_changed(tx, state)

    def zero_tail(self, tx: Tx, state: InodeState, inode: InodeNode, changes: PageChanges) -> None:
        """The bytes after the end of file become zero in its last block."""
        index, keep = divmod(inode.size, BLOCK_BYTES)
        if keep and self.zero_bytes(tx, state, inode, (index, keep, BLOCK_BYTES), changes):
            changes.ordered = True

    def zero_bytes(
        self,
        tx: Tx,
        state: InodeState,
        inode: InodeNode,
        where: tuple[int, int, int],
        changes: PageChanges,
    ) -> bool:
        """Zero a part of one block (index, start, end) if it is written; whether it is."""
        index, start, end = where
        ((_, block, _, unwritten),) = extents.pieces(tx, state, inode, index, 1)
        if not block or unwritten:
            return False
        found = changes.pages.get(index)
        page = bytearray(found[0] if found is not None else self.old_page(state, index, block))
        page[start:end] = bytes(end - start)
        changes.pages[index] = (page, block)
        return True

    def cut(self, tx: Tx, state: InodeState, inode: InodeNode, first: int) -> bool:
        """Free blocks from index `first` on, a bounded number; True: all of them."""
        if inode.root is None:
            return True
        self.settle(state, first, 1 << 63)
        editor = self.editor(tx, state, inode)
        space = self.core.space
        freed, done = extents.cut(
            editor, first, CUT_EXTENTS_MAX, lambda block, count: space.free(tx, block, count)
        )
        inode.blocks -= freed
        inode.flags = inode.flags & ~FLAG_CUTTING | (0 if done else FLAG_CUTTING)
        self.forget(tx, state, first, 1 << 63)
        return done

    def cut_more(self, tx: Tx, state: InodeState) -> bool:
        """The next step of a cut that one transaction could not do."""
        inode = tx.edit_inode(state)
        return self.cut(tx, state, inode, -(-inode.size // BLOCK_BYTES))

    def need_whole_cut(self, state: InodeState, inode: InodeNode) -> None:
        """Blocks of the file beyond its end are going to be used: none of them may be the rest of a
        cut that a crash, or a signal to its caller, has ended half-way. Raises NeedWait."""

        async def finish() -> None:
            while not await self.core.run(lambda tx: self.cut_more(tx, state)):
                pass

        if inode.flags & FLAG_CUTTING:
            raise NeedWait(finish)

    def settle(self, state: InodeState, first: int, end: int) -> None:
        """Blocks [first, end) are going to be taken away: nothing may be on the way to them.
        Raises NeedWait."""
        pages = self.core.pages
        if pages.must_wait(state, first, end):
            raise NeedWait(lambda: pages.settle(state, first, end))

    def forget(self, tx: Tx, state: InodeState, first: int, end: int) -> None:
        """Blocks [first, end) are taken away: drop what is in memory of them, and let readers whose
        I/O overlaps this read again."""
        pages = self.core.pages

        def drop() -> None:
            pages.discard(state, first, end)
            state.map_version += 1

        tx.after(drop)

    # -- lost data -------------------------------------------------------------------------------

    def _isolate_soon(self, state: InodeState) -> None:
        async def isolate() -> None:
            try:
                await state.hold(Mode.EX)
                try:
                    await self.isolate(state)
                finally:
                    state.release(Mode.EX)
            except (FsError, BarredError):
                pass  # The file is gone, or the mount: nobody will read those blocks here.

        self.core.runtime.spawn(isolate, "lost data")

    async def isolate(self, state: InodeState) -> None:
        """Make the blocks whose first content was lost unwritten, so that nobody reads what some
        other file has left in them. Called under the lock, or while it is being demoted."""
        try:
            while state.spoiled:
                await self.core.run(lambda tx: self._isolate_body(tx, state))
        except FsError as error:
            if error.errno == errno.ENOSPC and state.spoiled:  # no block is left for a split
                with contextlib.suppress(FsError):
                    await self._wipe(state)
            state.spoiled.clear()  # else the file is gone

    async def _wipe(self, state: InodeState) -> None:
        """Zeroes in the place of content that was lost; a block that refuses even those keeps what
        it has."""
        counter, first = self.core.counter, min(state.spoiled)
        count = max(state.spoiled) + 1 - first
        found = await self.core.run(
            lambda tx: extents.pieces(tx, state, tx.inode(state), first, count)
        )
        for logical, block, length, unwritten in found:
            for index in range(logical, logical + length) if block and not unwritten else ():
                if index in state.spoiled:
                    with contextlib.suppress(DeviceError):
                        offset_bytes = (block + index - logical) * BLOCK_BYTES
                        await counter.device.write(offset_bytes, ZERO_PAGE)
        state.written_at = counter.wrote()

    def _isolate_body(self, tx: Tx, state: InodeState) -> None:
        if not state.spoiled:
            return  # somebody else has done it
        first = min(state.spoiled)
        end = first + 1
        while end in state.spoiled:
            end += 1
        inode = tx.edit_inode(state)
        if inode.root is not None:
            editor = self.editor(tx, state, inode)
            for mapped in extents.overlapping(tx, state, inode, first, end, end - first):
                if not mapped[1].unwritten:
                    extents.convert(editor, mapped, first, end)
            self.mark_changed(tx, state)

        def done() -> None:
            state.spoiled.difference_update(range(first, end))
            state.map_version += 1

        tx.after(done)

    # -- syncing ---------------------------------------------------------------------------------

    async def sync(self, state: InodeState, *, datasync: bool) -> None:
        """What was written before this call is on the disk, or has been counted in
        `InodeState.errors`. Raises FsError(EIO) if the mount cannot go on."""
        core = self.core
        journal = core.journal
        if core.error is not None:
            raise FsError(errno.EIO, str(core.error))
        pending = any(b in journal.running or b in journal.sealed for b in state.nodes)
        if datasync:
            pending = state.changed_in > journal.durable_id
        if pending:
            await self._commit_beside_data(state)
        else:
            await core.pages.flush(state, durable=True)
        if core.error is not None:
            raise FsError(errno.EIO, str(core.error))
        await core.counter.ensure(state.written_at)

    async def _commit_beside_data(self, state: InodeState) -> None:
        """Write data and log at the same time: mostly the log's flush covers both. Data that has to
        be on the disk before the log is waited for by the commit itself (`cfs.pages`)."""
        core = self.core
        if not (state.pages or state.flushing):
            await core.journal.commit()
            return
        done = core.runtime.event()
        failed: list[StackError] = []

        async def write() -> None:
            try:
                await core.pages.flush(state, durable=True)
            except StackError as error:
                failed.append(error)
            finally:
                done.set()

        core.runtime.spawn(write, "data beside the log")
        await core.journal.commit()
        await done.wait()
        if failed:
            raise failed[0]
