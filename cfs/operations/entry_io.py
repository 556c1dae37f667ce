"""Attributes in the shape that pyfuse3 sends to the kernel."""

from __future__ import annotations

import ctypes
import stat

from cfs.attributes import Attributes, DirEntry
from cfs.fuse.pyfuse3_io import pyfuse3

BLOCK_BYTES = 4096
_NODE_OFFSET_BYTES = 16
"""Of `fuse_entry_param.ino` in a pyfuse3.EntryAttributes: behind the two words of every object."""


def entry(
    attributes: Attributes, *, attribute_timeout_s: float, name_timeout_s: float
) -> pyfuse3.EntryAttributes:
    """An answer that names an inode."""
    found = pyfuse3.EntryAttributes()
    found.st_ino = pyfuse3.InodeT(attributes.ino)
    found.generation = attributes.generation
    found.attr_timeout = attribute_timeout_s
    found.entry_timeout = name_timeout_s
    found.st_mode = pyfuse3.ModeT(attributes.mode)
    found.st_nlink = attributes.nlink
    found.st_uid = attributes.uid
    found.st_gid = attributes.gid
    found.st_rdev = attributes.rdev
    found.st_size = attributes.size
    found.st_blocks = attributes.blocks
    found.st_blksize = BLOCK_BYTES
    found.st_atime_ns = attributes.atime_ns
    found.st_mtime_ns = attributes.mtime_ns
    found.st_ctime_ns = attributes.ctime_ns
    return found


class PlainEntry:
    """A directory entry that only says name, number and type.

    The kernel takes node id 0 in a READDIRPLUS answer for "no attributes", but pyfuse3 has one
    setter for the node id and the number that getdents() shows; so the node id is cleared behind
    its back. Without it every entry would need its inode's lock and block, and a generation.
    """

    def __init__(self) -> None:
        self._entry = pyfuse3.EntryAttributes()
        address = id(self._entry) + _NODE_OFFSET_BYTES
        self._node = ctypes.c_uint64.from_address(address)
        for probe in (0x5AFE_0000_0000_0001, 0x5AFE_0000_0000_0002):
            self._entry.st_ino = pyfuse3.InodeT(probe)
            if self._node.value != probe:
                raise RuntimeError("pyfuse3.EntryAttributes has another layout than expected")
        self._entry.attr_timeout = 0.0
        self._entry.entry_timeout = 0.0

    def fill(self, found: DirEntry) -> pyfuse3.EntryAttributes:
        """The entry for `found`; used up before the next call."""
        self._entry.st_ino = pyfuse3.InodeT(found.ino)
        self._entry.st_mode = pyfuse3.ModeT(stat.S_IFMT(found.type))
        self._node.value = 0
        return self._entry
