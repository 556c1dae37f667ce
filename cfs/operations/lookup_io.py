"""What the kernel asks most, taken past libfuse: lookup, getattr, forget. Mostly answered at once.

Answers that the kernel may cache are built and sent without a checkpoint between the look at the
lock and the answer; see `KernelCaches.attribute_timeout` and `name_timeout`.
"""

from __future__ import annotations

import errno

from cfs.attributes import Attributes
from cfs.errors import FsError
from cfs.fuse import layout
from cfs.fuse.kernel_cache import KernelInode
from cfs.operations.base_io import OperationsBase
from cfs.operations.extension_io import Extension
from native.requests import Opcode, Request


class LookupOperations(OperationsBase):
    """lookup, getattr, forget."""

    def lookup_extensions(self) -> dict[Opcode, Extension]:
        return {
            Opcode.LOOKUP: Extension(self._lookup, self._try_lookup),
            Opcode.GETATTR: Extension(self._getattr, self._try_getattr),
            Opcode.FORGET: Extension(self._forget, self._try_forget),
            Opcode.BATCH_FORGET: Extension(self._forget, self._try_forget_many),
        }

    # -- lookup ----------------------------------------------------------------------------------

    def _try_lookup(self, request: Request, body: bytes) -> bytes | None:
        parent = self.known(request.inode)
        revision = parent.revision
        try:
            attributes = self.fs.try_lookup(parent.number, body[:-1])
        except FsError as error:
            return self._absent(parent, revision, error)
        return None if attributes is None else self.encode_named(parent, revision, attributes)

    async def _lookup(self, request: Request, body: bytes) -> bytes:
        parent = self.known(request.inode)
        revision = parent.revision
        try:
            attributes = await self.fs.lookup(parent.number, body[:-1])
            self.stop_if_abandoned(request.unique)
        except FsError as error:
            return self._absent(parent, revision, error)
        return self.encode_named(parent, revision, attributes)

    def name_timeout(self, parent: KernelInode, revision: int) -> float:
        """How long a name in `parent` may be believed, in seconds; `revision`: as it was before the
        name was looked at."""
        return self.caches.name_timeout(parent, self.fs.inode_lock(parent.number), revision)

    def _absent(self, parent: KernelInode, revision: int, error: FsError) -> bytes:
        """The answer that a name is not there, if that may be believed; else the error."""
        timeout = self.name_timeout(parent, revision)
        if error.errno != errno.ENOENT or not timeout:
            raise error
        return layout.encode_absent(timeout)

    def encode_named(self, parent: KernelInode, revision: int, attributes: Attributes) -> bytes:
        """The answer that makes the kernel know an inode: counted until it is forgotten."""
        inode, attributes, timeout = self.count_entry(attributes)
        return layout.encode_entry(
            attributes,
            inode.node,
            attribute_timeout_s=timeout,
            name_timeout_s=self.name_timeout(parent, revision),
        )

    # -- getattr ---------------------------------------------------------------------------------

    def _try_getattr(self, request: Request, body: bytes) -> bytes | None:
        account = self.known(request.inode)
        attributes = self.try_attributes_of(account)
        return None if attributes is None else self._attributes(account, attributes)

    async def _getattr(self, request: Request, body: bytes) -> bytes:
        account = self.known(request.inode)
        return self._attributes(account, await self.attributes_of(account))

    def _attributes(self, account: KernelInode, attributes: Attributes) -> bytes:
        attributes, timeout = self.current_attributes(account, attributes)
        return layout.encode_attr_out(attributes, timeout)

    # -- forget: no answer -----------------------------------------------------------------------

    def _try_forget(self, request: Request, body: bytes) -> bytes:
        (count,) = layout.FORGET_IN.unpack_from(body)
        return self._forgotten([(request.inode, count)])

    def _try_forget_many(self, request: Request, body: bytes) -> bytes:
        return self._forgotten(layout.decode_batch_forget(body))

    async def _forget(self, request: Request, body: bytes) -> bytes:
        raise AssertionError("a forget never waits")

    def _forgotten(self, several: list[tuple[int, int]]) -> bytes:
        inodes = self.caches.inodes
        unused = []
        for node, count in several:
            inode = inodes.get(self.ino(node))
            if inode is None:
                continue
            inode.lookups = max(0, inode.lookups - count)
            if self.caches.drop_if_unused(inode):
                unused.append(inode.number)
        if unused:
            self.fs.forget(unused)
        return b""
