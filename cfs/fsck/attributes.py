"""Extended attributes under check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cfs.errors import CorruptionError, FsError
from cfs.format import Kind, open_block_untrusted
from cfs.fsck.trees import TreeWalker, Walked
from cfs.fsck.volume import Volume
from cfs.nodes import BlockState, Tree, Xattr
from cfs.xattr import need_name


class XattrFixes(Protocol):
    rebuild_xattrs: bool


class AttributeFilter:
    """Which attributes of an inode can be kept."""

    def __init__(self, volume: Volume, ino: int) -> None:
        self._volume = volume
        self._ino = ino
        self.faults: list[tuple[str, bool]] = []
        """(text, whether something is lost)."""
        self.value_blocks: list[int] = []

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
        return ""

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

    async def check(self, ino: int, root: Tree) -> int:
        """How many blocks the attributes have."""
        what = f"the attribute tree of inode {ino}"
        walked = await TreeWalker(self.volume, ino, Kind.XATTR_TREE, what).walk(root, claim=True)
        chosen = AttributeFilter(self.volume, ino)
        await chosen.keep(walked)
        for block in chosen.value_blocks:
            self.volume.claims.claim(block, 1, BlockState.META)
        for text, lossy in (*walked.faults, *chosen.faults):
            remedy = "Keep the attributes that can be read"
            if await self.volume.session.fix(text, remedy, lossy=lossy):
                self.fix_of(ino).rebuild_xattrs = True
        return len(walked.blocks) + len(chosen.value_blocks)
