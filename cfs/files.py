"""The bytes of files: read, write, cut, sync.

Small files live in their inode (`InodeNode.data`), journalled with it. Larger ones have extents;
their data goes through the write-behind buffer, or past it (`direct`) when every block is there.

The bytes of a file's last block beyond its end may be anything on the disk: data goes there before
the transaction that moves the end, and a crash may come in between. So they are made zero whenever
they come into the file: a page that is read to be changed is cut at the end of file, and whatever
makes a file longer without writing that block zeroes its tail (`_zero_tail`).
"""

from __future__ import annotations

import errno
from bisect import bisect_right

from cfs import extents
from cfs.attributes import BLOCK_BYTES, FILE_BYTES_MAX
from cfs.cache import InodeState, Page
from cfs.core import Core
from cfs.errors import FsError
from cfs.nodes import CONTENT_BYTES_MAX, InodeNode, Tree
from cfs.protection import need_mutable
from cfs.transaction import READER, NeedWait, Tx
from cfs.tree import TreeEditor
from cfs.xattr import CAPABILITY, XattrEditor
from cluster.device import Buffer
from cluster.errors import DeviceError

CUT_EXTENTS_MAX = 64
CLEAN_PAGES_MAX = 64
_ZERO_PAGE = bytes(BLOCK_BYTES)
Part = bytes | tuple[int, int]
"""Bytes, or (device offset, length) still to be read."""


def need_regular(inode: InodeNode) -> None:
    if inode.is_directory:
        raise FsError(errno.EISDIR)
    if not inode.is_regular:
        raise FsError(errno.EINVAL)


def clear_privileges(inode: InodeNode) -> None:
    """A file that is written or given away loses set-user-id and, if executable, set-group-id."""
    if inode.mode & 0o4000:
        inode.mode &= ~0o4000
    if inode.mode & 0o2010 == 0o2010:
        inode.mode &= ~0o2000


class Files:
    """Operations on file data. The methods want the inode's lock held (PR or EX) by the caller."""

    def __init__(self, core: Core) -> None:
        self.core = core

    # -- reading ---------------------------------------------------------------------------------

    def read_now(self, state: InodeState, offset: int, size: int) -> bytes | None:
        """What can be read without the disk; None otherwise. May raise Missing."""
        parts = self._plan_read(state, offset, size)
        if any(isinstance(part, tuple) for part in parts):
            return None
        return self._assemble(parts, [], offset, size, state)

    async def read(self, state: InodeState, offset: int, size: int) -> bytes:
        core = self.core
        place = self._one_place(state, offset, size)
        if place:
            version = state.map_version
            try:
                data = await core.device.read(place, size)
            except DeviceError as error:
                raise FsError(errno.EIO, error.message) from error
            if version == state.map_version:
                return data
        while True:
            parts = await core.see(lambda: self._plan_read(state, offset, size))
            ranges = [part for part in parts if isinstance(part, tuple)]
            if not ranges:
                return self._assemble(parts, [], offset, size, state)
            version = state.map_version
            try:
                blocks = await core.device.read_many(ranges)
            except DeviceError as error:
                raise FsError(errno.EIO, error.message) from error
            if version == state.map_version:
                return self._assemble(parts, blocks, offset, size, state)

    @staticmethod
    def _one_place(state: InodeState, offset: int, size: int) -> int:
        """Where a range of whole blocks inside the file is on the device, if that is one place and
        easily found: the extents are in the inode and nothing newer is in memory. Else 0."""
        node = state.nodes.get(state.number)
        if (
            state.pages
            or state.flushing
            or not isinstance(node, InodeNode)
            or not node.is_regular
            or (offset | size) % BLOCK_BYTES
            or not size
            or offset + size > node.size
            or node.root is None
            or node.root.level
        ):
            return 0
        root = node.root
        first = offset // BLOCK_BYTES
        position = bisect_right(root.keys, first) - 1
        if position < 0:
            return 0
        extent = root.values[position]
        skip = first - root.keys[position]
        if not isinstance(extent, tuple) or skip + size // BLOCK_BYTES > extent[1]:
            return 0
        return (extent[0] + skip) * BLOCK_BYTES

    def _plan_read(self, state: InodeState, offset: int, size: int) -> list[Part]:
        """The whole blocks of the range (clipped at the end of file) in order."""
        inode = READER.inode(state)
        need_regular(inode)
        end = min(offset + size, inode.size)
        if end <= offset:
            return []
        if inode.root is None:
            data = inode.data[offset:end]
            return [data.ljust(end - offset, b"\0")]
        first = offset // BLOCK_BYTES
        count = -(-end // BLOCK_BYTES) - first
        parts: list[Part] = []
        dirty = bool(state.pages or state.flushing)
        for logical, physical, length in extents.pieces(READER, state, inode, first, count):
            if dirty:
                self._overlay(state, parts, logical, physical, length)
            elif physical:
                parts.append((physical * BLOCK_BYTES, length * BLOCK_BYTES))
            else:
                parts.append(bytes(length * BLOCK_BYTES))
        return parts

    @staticmethod
    def _overlay(
        state: InodeState, parts: list[Part], logical: int, physical: int, length: int
    ) -> None:
        """One extent or hole with pages that are not yet on the disk over it."""
        pages, flushing = state.pages, state.flushing
        run = 0
        for step in range(length + 1):
            page = None
            if step < length:
                page = pages.get(logical + step) or flushing.get(logical + step)
                if page is None:
                    run += 1
                    continue
            if run and physical:
                start = physical + step - run
                parts.append((start * BLOCK_BYTES, run * BLOCK_BYTES))
            elif run:
                parts.append(bytes(run * BLOCK_BYTES))
            run = 0
            if page is not None:
                parts.append(bytes(page[0]))

    @staticmethod
    def _assemble(
        parts: list[Part], blocks: list[bytes], offset: int, size: int, state: InodeState
    ) -> bytes:
        node = state.node
        assert node is not None
        if node.root is None:
            return b"".join(part for part in parts if isinstance(part, bytes))
        source = iter(blocks)
        joined = [part if isinstance(part, bytes) else next(source) for part in parts]
        data = joined[0] if len(joined) == 1 else b"".join(joined)
        skip = offset % BLOCK_BYTES
        length = max(min(offset + size, node.size) - offset, 0)
        if skip or len(data) != length:
            return data[skip : skip + length]
        return data

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
        if not laundered:
            await self.core.pages.room()
        view = memoryview(data if isinstance(data, bytes) else bytes(data))
        return await self.core.run(
            lambda tx: self._write_body(tx, state, offset, view, laundered=laundered, kill=kill)
        )

    def _write_body(
        self,
        tx: Tx,
        state: InodeState,
        at: int | None,
        view: memoryview,
        *,
        laundered: bool,
        kill: bool,
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
            self._write_blocks(tx, state, inode, offset, view)
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
        if kill:
            clear_privileges(inode)
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

    def _write_blocks(
        self, tx: Tx, state: InodeState, inode: InodeNode, offset: int, view: memoryview
    ) -> None:
        pages: dict[int, Page] = {}
        end = offset + len(view)
        first, last = offset // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        ordered = False
        spill = b""
        if inode.root is None:
            spill, inode.data = inode.data, b""
            inode.root = Tree(0, [], [], 0)
            if spill and first > 0:
                block = self._fill(tx, state, inode, 0, 1)[0][1]
                pages[0] = (spill.ljust(BLOCK_BYTES, b"\0"), block)
                ordered = True
        elif inode.size < first * BLOCK_BYTES:
            self._zero_tail(tx, state, inode, inode.size)
        for logical, physical, count in extents.pieces(tx, state, inode, first, last - first + 1):
            fresh = not physical
            runs = [(logical, physical, count)]
            if fresh:
                runs = self._fill(tx, state, inode, logical, count)
                ordered = True
            for start, block, length in runs:
                for step in range(length):
                    index = start + step
                    base = spill if fresh and not index else None if not fresh else b""
                    data = self._page(state, index, offset, view, base, block + step)
                    pages[index] = (data, block + step)
        if ordered:
            self.mark_changed(tx, state)
        tx.after(lambda: self.core.pages.put(state, pages, ordered=ordered))

    def _page(
        self,
        state: InodeState,
        index: int,
        offset: int,
        view: memoryview,
        base: bytes | None,
        block: int,
    ) -> Buffer:
        """The page as it is after the write. `base`: its old content, None: as on the disk."""
        start = index * BLOCK_BYTES - offset
        if start >= 0 and start + BLOCK_BYTES <= len(view):
            return view[start : start + BLOCK_BYTES]
        if base is None:
            page = bytearray(self.old_page(state, index, block))
            node = state.node
            inside = 0 if node is None else max(node.size - index * BLOCK_BYTES, 0)
            if inside < BLOCK_BYTES:
                page[inside:] = bytes(BLOCK_BYTES - inside)
        else:
            page = bytearray(base.ljust(BLOCK_BYTES, b"\0"))
        low = max(-start, 0)
        high = min(len(view) - start, BLOCK_BYTES)
        page[low:high] = view[start + low : start + high]
        return page

    def old_page(self, state: InodeState, index: int, block: int) -> Buffer:
        """The content of a block that the file has. Raises NeedWait while it is read."""
        page = state.pages.get(index) or state.flushing.get(index)
        if page is not None:
            return page[0]
        clean = state.clean.get(index)
        if clean is not None:
            return clean
        raise NeedWait(lambda: self._load_page(state, index, block))

    async def _load_page(self, state: InodeState, index: int, block: int) -> None:
        if len(state.clean) >= CLEAN_PAGES_MAX:
            state.clean.clear()
        state.clean[index] = None
        try:
            data = await self.core.device.read(block * BLOCK_BYTES, BLOCK_BYTES)
        except DeviceError as error:
            raise FsError(errno.EIO, error.message) from error
        if index in state.clean:
            state.clean[index] = data

    def _fill(
        self, tx: Tx, state: InodeState, inode: InodeNode, logical: int, count: int
    ) -> list[extents.Piece]:
        """Give blocks to a hole."""
        editor = self.editor(tx, state, inode)
        result: list[extents.Piece] = []
        while count:
            goal = extents.goal_for(tx, state, inode, logical)
            start, length = self.core.space.allocate(tx, goal, count)
            extents.insert(editor, logical, start, length)
            inode.blocks += length
            result.append((logical, start, length))
            logical += length
            count -= length
        return result

    async def reserve(self, state: InodeState, offset: int, size: int) -> None:
        """Put zeroes into the holes of a range inside the file."""
        await self.core.run(lambda tx: self._reserve_body(tx, state, offset, size))

    def _reserve_body(self, tx: Tx, state: InodeState, offset: int, size: int) -> None:
        seen = tx.inode(state)
        need_regular(seen)
        end = min(offset + size, seen.size)
        if end <= offset or (seen.root is None and seen.size <= CONTENT_BYTES_MAX):
            return
        first = offset // BLOCK_BYTES
        count = (end - 1) // BLOCK_BYTES - first + 1
        holes = [p for p in extents.pieces(tx, state, seen, first, count) if not p[1]]
        if not holes:
            return
        inode = tx.edit_inode(state)
        pages: dict[int, Page] = {}
        if inode.root is None:
            spill, inode.data = inode.data, b""
            inode.root = Tree(0, [], [], 0)
            block = self._fill(tx, state, inode, 0, 1)[0][1]
            pages[0] = (spill.ljust(BLOCK_BYTES, b"\0"), block)
            holes = [p for p in extents.pieces(tx, state, inode, first, count) if not p[1]]
        for logical, _, length in holes:
            for start, block, run in self._fill(tx, state, inode, logical, length):
                for step in range(run):
                    pages[start + step] = (_ZERO_PAGE, block + step)
        self.mark_changed(tx, state)
        tx.after(lambda: self.core.pages.put(state, pages, ordered=True))

    async def write_direct(
        self, state: InodeState, offset: int | None, data: Buffer, *, kill: bool = True
    ) -> tuple[int, int]:
        """Past the buffer when the range has all its blocks; else through it, and written out."""
        core = self.core
        length = len(data)
        if offset is not None and not offset % BLOCK_BYTES and not length % BLOCK_BYTES and length:
            first, count = offset // BLOCK_BYTES, length // BLOCK_BYTES
            pages, flushing = state.pages, state.flushing
            while any(i in pages or i in flushing for i in range(first, first + count)):
                await core.pages.flush(state)
                pages, flushing = state.pages, state.flushing
            runs = await core.run(lambda tx: self._direct_body(tx, state, offset, length, kill))
            if runs is not None:
                view = memoryview(data)
                writes: list[tuple[int, Buffer]] = []
                for logical, physical, blocks in runs:
                    start = (logical - first) * BLOCK_BYTES
                    writes.append((physical, view[start : start + blocks * BLOCK_BYTES]))
                try:
                    await core.pages.write_direct(state, writes)
                except DeviceError as error:
                    raise FsError(errno.EIO, error.message) from error
                return offset, length
        done = await self.write(state, offset, data, kill=kill)
        await core.pages.flush(state)
        return done

    def _direct_body(
        self, tx: Tx, state: InodeState, offset: int, length: int, kill: bool
    ) -> list[extents.Piece] | None:
        """The blocks of a range that lies inside the file without holes; None for any other."""
        seen = tx.inode(state)
        need_regular(seen)
        if seen.root is None or offset + length > seen.size:
            return None
        first, count = offset // BLOCK_BYTES, length // BLOCK_BYTES
        runs = extents.pieces(tx, state, seen, first, count)
        if not all(physical for _, physical, _ in runs):
            return None
        need_mutable(seen)
        inode = tx.edit_inode(state)
        self.drop_privileges(tx, state, inode, kill=kill)
        self.touch(inode)

        def forget_clean() -> None:
            if state.clean:
                for index in range(first, first + count):
                    state.clean.pop(index, None)

        tx.after(forget_clean)
        return runs

    # -- cutting ---------------------------------------------------------------------------------

    def set_size(self, tx: Tx, state: InodeState, inode: InodeNode, size: int) -> bool:
        """Truncate or extend the transaction's own clone; False: more blocks must go in further
        transactions (`cut_more`)."""
        if size > FILE_BYTES_MAX:
            raise FsError(errno.EFBIG)
        done = True
        if size < inode.size:
            if inode.root is None:
                inode.data = inode.data[:size]
            else:
                done = self.cut(tx, state, inode, -(-size // BLOCK_BYTES))
        elif size > inode.size and inode.root is not None:
            self._zero_tail(tx, state, inode, inode.size)
        if size != inode.size:
            self.mark_changed(tx, state)
        inode.size = size
        return done

    def _zero_tail(self, tx: Tx, state: InodeState, inode: InodeNode, size: int) -> None:
        """The bytes after `size`, where the file has ended, become zero in that block."""
        index, keep = divmod(size, BLOCK_BYTES)
        if not keep:
            return
        ((_, block, _),) = extents.pieces(tx, state, inode, index, 1)
        if block:
            page = bytearray(self.old_page(state, index, block))
            page[keep:] = bytes(BLOCK_BYTES - keep)
            pages: dict[int, Page] = {index: (page, block)}
            tx.after(lambda: self.core.pages.put(state, pages, ordered=True))

    def cut(self, tx: Tx, state: InodeState, inode: InodeNode, first: int) -> bool:
        """Free blocks from index `first` on, a bounded number; True: all of them."""
        core = self.core
        if core.pages.must_wait(state, first):
            raise NeedWait(lambda: core.pages.settle(state))
        if inode.root is None:
            return True
        editor = self.editor(tx, state, inode)
        freed, done = extents.cut(
            editor, first, CUT_EXTENTS_MAX, lambda block, count: core.space.free(tx, block, count)
        )
        inode.blocks -= freed

        def forget() -> None:
            core.pages.discard(state, first)
            state.map_version += 1

        tx.after(forget)
        return done

    # -- syncing ---------------------------------------------------------------------------------

    async def sync(self, state: InodeState, *, datasync: bool) -> None:
        core = self.core
        while state.pages or state.flushing:
            await core.pages.flush(state)
        journal = core.journal
        if core.error is not None:
            raise FsError(errno.EIO, str(core.error))
        pending = any(b in journal.running or b in journal.sealed for b in state.nodes)
        if datasync:
            pending = state.changed_in > journal.durable_id
        if pending:
            await journal.commit()
        else:
            await core.counter.ensure(state.written_at)
        if state.error_count > state.error_seen:
            state.error_seen = state.error_count
            raise FsError(errno.EIO, "data written earlier was lost")
