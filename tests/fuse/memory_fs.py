"""A file system in memory with the door of `cfs.filesystem`: the FUSE layer without the core."""

from __future__ import annotations

import errno
import itertools
import stat
import time

import trio

from cfs.attributes import NOW, Attributes, DirEntry, SetAttributes, Totals
from cfs.errors import FsError
from cfs.lock_names import inode_lock_name, number_of
from cfs.transaction import NotNow
from cluster.locks import Mode


class Node:
    def __init__(self, ino, mode, uid=0, gid=0, rdev=0):
        self.ino, self.mode, self.uid, self.gid, self.rdev = ino, mode, uid, gid, rdev
        self.nlink = 2 if stat.S_ISDIR(mode) else 1
        self.data = bytearray()
        self.names = {}
        self.parent = ino
        self.opens = 0
        self.atime = self.mtime = self.ctime = time.time_ns()
        self.change = 1

    def touch(self):
        self.mtime = self.ctime = max(time.time_ns(), self.mtime + 1)
        self.change += 1


class MemoryFileSystem:
    damage_met = 0

    def __init__(self, locks, environment, storage):
        self.root_ino = 7
        self.locks = locks
        self.environment = environment
        self.nodes = storage
        self.inos = itertools.count(100)
        self.cookies = itertools.count(10)
        if self.root_ino not in storage:
            storage[self.root_ino] = Node(self.root_ino, stat.S_IFDIR | 0o755)

    # locks
    def inode_lock(self, ino):
        return self.locks.get(inode_lock_name(ino), self)

    async def demote(self, lock, mode):
        await self.environment.kernel.revoke(number_of(lock.name), mode)
        await self.revoked(number_of(lock.name), mode)

    async def revoked(self, ino, mode):
        """For tests."""

    def granted(self, lock, mode):
        self.environment.kernel.granted(number_of(lock.name), mode)

    def node(self, ino):
        try:
            return self.nodes[ino]
        except KeyError:
            raise FsError(errno.ESTALE) from None

    def attributes(self, node):
        return Attributes(
            node.ino, 1, node.mode, node.nlink, node.uid, node.gid, node.rdev, len(node.data),
            (len(node.data) + 511) // 512, node.atime, node.mtime, node.ctime,
            node.change, 0, 0,
        )  # fmt: skip

    def held(self, mode, *inos):
        return Held(self, mode, inos)

    def try_getattr(self, ino):
        lock = self.inode_lock(ino)
        if not lock.try_hold(Mode.PR):
            return None
        lock.release(Mode.PR)
        return self.attributes(self.node(ino))

    def try_lookup(self, parent, name):
        lock = self.inode_lock(parent)
        if not lock.try_hold(Mode.PR):
            return None
        lock.release(Mode.PR)
        found = self.node(parent).names.get(name)
        if found is None:
            raise FsError(errno.ENOENT)
        return self.try_getattr(found[0])

    async def getattr_held(self, ino):
        return self.attributes(self.node(ino))

    def start_read(self, ino, offset, size, done):
        raise NotNow

    def start_write(self, ino, offset, data, done, *, kill):
        raise NotNow

    async def read_held(self, ino, offset, size, *, direct=False):
        return bytes(self.node(ino).data[offset : offset + size])

    async def write_held(self, ino, offset, data, *, laundered=False, kill=False):
        node = self.node(ino)
        if laundered:
            data = data[: max(0, len(node.data) - offset)]
        if offset > len(node.data):
            node.data.extend(bytes(offset - len(node.data)))
        node.data[offset : offset + len(data)] = data
        node.touch()
        return len(data)

    async def reserve_held(self, ino, offset, size):
        pass

    async def has_holes_held(self, ino, offset, end):
        return False

    def error_mark(self, ino):
        return 0

    def take_error(self, ino, mark):
        return 0, mark

    async def setattr_held(self, ino, changes):
        node = self.node(ino)
        if changes.size is not None:
            del node.data[changes.size :]
            node.data.extend(bytes(changes.size - len(node.data)))
            node.touch()
        if changes.mode is not None:
            node.mode = stat.S_IFMT(node.mode) | changes.mode
        for field in ("uid", "gid"):
            if getattr(changes, field) is not None:
                setattr(node, field, getattr(changes, field))
        node.ctime = time.time_ns()
        for field in ("atime", "mtime"):
            value = getattr(changes, field + "_ns")
            if value is not None:
                setattr(node, field, node.ctime if value == NOW else value)
        return self.attributes(node)

    async def getattr(self, ino):
        async with self.held(Mode.PR, ino):
            return self.attributes(self.node(ino))

    async def setattr(self, ino, changes: SetAttributes):
        async with self.held(Mode.EX, ino):
            return await self.setattr_held(ino, changes)

    def accessed(self, ino):
        pass

    def has_attributes(self, ino):
        return True

    def _not_now(self, *_arguments, **_how):
        """Everything takes the way that waits."""
        raise NotNow

    try_create = try_mkdir = try_remove = try_rename = try_setattr = try_write_held = _not_now

    def try_getxattr(self, ino, name):
        raise FsError(errno.ENODATA)

    async def readlink(self, ino):
        async with self.held(Mode.PR, ino):
            return bytes(self.node(ino).data)

    async def lookup(self, parent, name):
        async with self.held(Mode.PR, parent):
            found = self.node(parent).names.get(name)
        if found is None:
            raise FsError(errno.ENOENT)
        return await self.getattr(found[0])

    async def mknod(self, parent, name, mode, uid, gid, rdev, umask=0, data=b""):
        async with self.held(Mode.EX, parent):
            directory = self.node(parent)
            if name in directory.names:
                raise FsError(errno.EEXIST)
            if len(name) > 255:
                raise FsError(errno.ENAMETOOLONG)
            ino = next(self.inos)
            made = self.nodes[ino] = Node(ino, mode & ~umask, uid, gid, rdev)
            made.data[:] = data
            if stat.S_ISDIR(mode):
                made.parent = parent
                directory.nlink += 1
            directory.names[name] = (ino, next(self.cookies), stat.S_IFMT(mode))
            directory.touch()
        return await self.getattr(ino)

    async def create(self, parent, name, mode, uid, gid, umask=0):
        return await self.mknod(parent, name, mode | stat.S_IFREG, uid, gid, 0, umask)

    async def mkdir(self, parent, name, mode, uid, gid, umask=0):
        return await self.mknod(parent, name, mode | stat.S_IFDIR, uid, gid, 0, umask)

    async def symlink(self, parent, name, target, uid, gid):
        return await self.mknod(parent, name, stat.S_IFLNK | 0o777, uid, gid, 0, 0, target)

    async def link(self, ino, parent, name, generation=None):
        async with self.held(Mode.EX, parent, ino):
            directory, node = self.node(parent), self.node(ino)
            if name in directory.names:
                raise FsError(errno.EEXIST)
            directory.names[name] = (ino, next(self.cookies), stat.S_IFMT(node.mode))
            node.nlink += 1
            directory.touch()
            return self.attributes(node)

    def _remove(self, directory, name):
        ino, _, _ = directory.names.pop(name)
        node = self.node(ino)
        node.nlink -= 2 if stat.S_ISDIR(node.mode) else 1
        if stat.S_ISDIR(node.mode):
            directory.nlink -= 1
        directory.touch()
        node.ctime = time.time_ns()
        if not node.nlink and not node.opens:
            del self.nodes[ino]

    async def unlink(self, parent, name):
        async with self.held(Mode.EX, parent):
            directory = self.node(parent)
            if name not in directory.names:
                raise FsError(errno.ENOENT)
            if directory.names[name][2] == stat.S_IFDIR:
                raise FsError(errno.EISDIR)
            async with self.held(Mode.EX, directory.names[name][0]):
                self._remove(directory, name)

    async def rmdir(self, parent, name):
        async with self.held(Mode.EX, parent):
            directory = self.node(parent)
            if name not in directory.names:
                raise FsError(errno.ENOENT)
            if directory.names[name][2] != stat.S_IFDIR:
                raise FsError(errno.ENOTDIR)
            if self.node(directory.names[name][0]).names:
                raise FsError(errno.ENOTEMPTY)
            self._remove(directory, name)

    async def rename(self, parent, name, new_parent, new_name, flags=0):
        async with self.held(Mode.EX, *sorted({parent, new_parent})):
            source, target = self.node(parent), self.node(new_parent)
            if name not in source.names:
                raise FsError(errno.ENOENT)
            moved = source.names[name]
            there = target.names.get(new_name)
            if there is not None:
                if flags & 1:
                    raise FsError(errno.EEXIST)
                if there[0] == moved[0]:
                    return
                if there[2] == stat.S_IFDIR and self.node(there[0]).names:
                    raise FsError(errno.ENOTEMPTY)
                self._remove(target, new_name)
            del source.names[name]
            target.names[new_name] = (moved[0], next(self.cookies), moved[2])
            source.touch()
            target.touch()
            self.node(moved[0]).parent = new_parent

    async def readdir(self, ino, cookie, limit):
        async with self.held(Mode.PR, ino):
            node = self.node(ino)
            found = [DirEntry(1, b".", ino, stat.S_IFDIR),
                     DirEntry(2, b"..", node.parent, stat.S_IFDIR)]  # fmt: skip
            found += [DirEntry(c, n, i, t) for n, (i, c, t) in node.names.items()]
        return sorted((e for e in found if e.cookie > cookie), key=lambda e: e.cookie)[:limit]

    async def read(self, ino, offset, size, *, direct=False):
        async with self.held(Mode.PR, ino):
            return await self.read_held(ino, offset, size)

    async def write(self, ino, offset, data, *, append=False, sync=False, direct=False, kill=False):
        async with self.held(Mode.EX, ino):
            if append:
                end = len(self.node(ino).data)
                if end != offset:
                    self.environment.kernel.changed(ino, end, len(data))
                offset = end
            return await self.write_held(ino, offset, data)

    async def sync_own(self, ino, *, datasync):
        return None

    async def fsync(self, ino, datasync=False):
        pass

    def try_open_ref(self, ino):
        self.node(ino).opens += 1
        return True

    async def open_ref(self, ino):
        self.node(ino).opens += 1

    def close_ref(self, ino):
        node = self.node(ino)
        node.opens -= 1
        if not node.nlink and not node.opens:
            del self.nodes[ino]

    def forget(self, inos):
        pass

    async def statfs(self):
        return Totals(1 << 20, 1 << 19, 0)

    async def query(self, verb, params):
        return {}

    async def unmount(self):
        pass


class Held:
    def __init__(self, fs, mode, inos):
        self.locks = [fs.inode_lock(ino) for ino in inos]
        self.mode = mode

    async def __aenter__(self):
        for lock in self.locks:
            if not lock.try_hold(self.mode):
                await lock.hold(self.mode)

    async def __aexit__(self, *_details):
        for lock in self.locks:
            lock.release(self.mode)


async def make(device, locks, environment, options):
    await trio.lowlevel.checkpoint()
    return MemoryFileSystem(locks, environment, {})
