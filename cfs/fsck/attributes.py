"""Extended attributes under check. Access control lists must be whole, and say what the mode says:
the kernel believes the one for some callers and the other for the rest."""

from __future__ import annotations

import stat
from collections.abc import Callable
from typing import Protocol

from cfs import acl
from cfs.errors import CorruptionError, FsError
from cfs.format import Kind, open_block_untrusted
from cfs.fsck.trees import TreeWalker, Walked
from cfs.fsck.volume import Volume
from cfs.nodes import BlockState, InodeNode, Tree, ValueNode, Xattr, decode_node_untrusted
from cfs.xattr import ACCESS_ACL, DEFAULT_ACL, need_name


class XattrFixes(Protocol):
    values: dict[str, int]
    rebuild_xattrs: bool


class AttributeFilter:
    """Which attributes of an inode can be kept."""

    def __init__(self, volume: Volume, node: InodeNode) -> None:
        self._volume = volume
        self._node = node
        self._ino = node.block
        self.faults: list[tuple[str, bool]] = []
        """(text, whether something is lost)."""
        self.value_blocks: list[int] = []
        self.listed_mode = node.mode
        """The mode as the access control list says it, if there is one."""

    async def keep(self, walked: Walked) -> list[tuple[int, Xattr]]:
        """(hash, entry) of each."""
        entries = [value for _, value in walked.entries if isinstance(value, Xattr)]
        blocks = [b for entry in entries for b in entry.blocks if self._volume.exists(b)]
        data = await self._volume.read_blocks(blocks)
        result: list[tuple[int, Xattr]] = []
        seen: set[bytes] = set()
        used: set[int] = set()
        for key, value in walked.entries:
            fault = self._fault(value, data, seen, used)
            if fault:
                self.faults.append((f"inode {self._ino} {fault}", True))
                continue
            assert isinstance(value, Xattr)
            hashed = self._volume.superblock.name_hash(value.name)
            if not self._volume.cookie_fits(key, value.name):
                text = f"inode {self._ino}: the cookie of attribute {value.name!r} does not fit"
                self.faults.append((text, False))
            seen.add(value.name)
            used.update(value.blocks)
            self.value_blocks += value.blocks
            result.append((hashed, value))
        return result

    def _fault(
        self, value: object, data: dict[int, bytes], seen: set[bytes], used: set[int]
    ) -> str:
        if not isinstance(value, Xattr):
            return "has an entry that is no attribute"
        try:
            need_name(value.name)
        except FsError:
            return f"has the impossible attribute name {value.name!r}"
        if value.name in seen and not self._volume.names_hashed:
            return f"has the attribute {value.name!r} twice"
        for block in value.blocks:
            if block in used:
                return f"uses block {block} for two attributes"
            if block not in data or not self._is_value(block, data[block]):
                return f"has lost the value of attribute {value.name!r}: block {block} is damaged"
        if value.name in (ACCESS_ACL, DEFAULT_ACL) and not self._volume.is_dump:
            return self._list_fault(value, data)
        return ""

    def _list_fault(self, value: Xattr, data: dict[int, bytes]) -> str:
        """An access control list. What it allows is known afterwards."""
        is_default = value.name == DEFAULT_ACL
        if is_default and not stat.S_ISDIR(self._node.mode):
            return "is no directory and has a default access control list"
        content = value.value
        if value.blocks:
            content = b"".join(self._content(block, data[block]) for block in value.blocks)
        try:
            entries = acl.decode_untrusted(content[: value.size])
        except CorruptionError as error:
            return f"has a damaged access control list: {error.message}"
        if entries and not is_default:
            self.listed_mode = self._node.mode & ~0o777 | acl.permission_bits(entries)
        return ""

    def _content(self, block: int, data: bytes) -> bytes:
        node = decode_node_untrusted(open_block_untrusted(self._volume.fs, block, data), data)
        return node.data if isinstance(node, ValueNode) else b""

    def _is_value(self, block: int, data: bytes) -> bool:
        try:
            header = open_block_untrusted(self._volume.fs, block, data)
        except CorruptionError:
            return False
        self._volume.saw(block, header.generation)
        return header.kind == Kind.XATTR_VALUE and header.owner == self._ino


class AttributeChecker:
    """Checks the attributes of one inode after the other."""

    def __init__(self, volume: Volume, fix_of: Callable[[int], XattrFixes]) -> None:
        self.volume = volume
        self.fix_of = fix_of

    async def check(self, node: InodeNode, root: Tree) -> int:
        """How many blocks the attributes have."""
        ino = node.block
        what = f"the attribute tree of inode {ino}"
        walked = await TreeWalker(self.volume, ino, Kind.XATTR_TREE, what).walk(root, claim=True)
        chosen = AttributeFilter(self.volume, node)
        await chosen.keep(walked)
        for block in chosen.value_blocks:
            self.volume.claims.claim(block, 1, BlockState.META)
        for text, lossy in (*walked.faults, *chosen.faults):
            remedy = "Keep the attributes that can be read"
            if await self.volume.session.fix(text, remedy, lossy=lossy):
                self.fix_of(ino).rebuild_xattrs = True
        if chosen.listed_mode != node.mode:
            text = (
                f"inode {ino} has the mode {node.mode & 0o777:03o}, its access control list says "
                f"{chosen.listed_mode & 0o777:03o}"
            )
            if await self.volume.session.fix(text, "Believe the list"):
                self.fix_of(ino).values["mode"] = chosen.listed_mode
        return len(walked.blocks) + len(chosen.value_blocks)
