"""Structures on their own: blocks, maps, trees, extents, journal records; and what fsck finds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfs import directory, extents, tree
from cfs.attributes import BLOCK_BYTES
from cfs.cache import Covered
from cfs.errors import CorruptionError
from cfs.format import Header, Kind, Superblock, open_block_untrusted, seal_block
from cfs.journal import joined
from cfs.journal_format import (
    HEADER_BLOCKS,
    ITEMS_PER_COMMIT,
    Item,
    JournalHeader,
    commit_parts,
    decode_commit_untrusted,
    decode_header_untrusted,
    encode_commit,
    encode_header,
)
from cfs.nodes import Extent, InodeNode, Node, Tree, decode_node_untrusted, pack_map, unpack_map
from cfs.space import find_run, usable_freeing
from cfs.stage import NOBODY
from cfs.transaction import READER, Tx

FS = 0x03020100


@given(st.binary(max_size=4000), st.integers(0, BLOCK_BYTES - 1), st.integers(1, 255))
def test_any_changed_byte_of_a_block_is_noticed(body: bytes, at: int, flip: int) -> None:
    block = seal_block(FS, Header(Kind.INODE, 7, 7, 1, 2, 3), body)
    assert open_block_untrusted(FS, 7, block) == Header(Kind.INODE, 7, 7, 1, 2, 3)
    damaged = bytearray(block)
    damaged[at] ^= flip
    with pytest.raises(CorruptionError):
        open_block_untrusted(FS, 7, bytes(damaged))
    with pytest.raises(CorruptionError):
        open_block_untrusted(FS, 8, block)


@given(st.lists(st.integers(0, 3), max_size=600))
def test_maps_are_packed_and_unpacked(states: list[int]) -> None:
    assert unpack_map(pack_map(bytes(states)), len(states)) == bytearray(states)


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=100), st.integers(1, 20), st.integers(0, 99)
)
def test_runs_are_free(states: list[int], count: int, hint: int) -> None:
    found = find_run(bytearray(states), count, hint % len(states))
    if found is None:
        assert 0 not in states
    else:
        at, size = found
        assert 1 <= size <= count
        assert states[at : at + size] == [0] * size


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=100))
def test_only_blocks_that_are_freeing_in_both_maps_are_used_again(pairs: list[tuple[int, int]]):
    current, durable = bytes(a for a, _ in pairs), bytes(b for _, b in pairs)
    both = usable_freeing(current, durable)
    assert both == sum((a == b == 2) << (8 * i) for i, (a, b) in enumerate(pairs))


class TreeWorld:
    """One inode with a tree, on an endless supply of blocks."""

    def __init__(self, mode: int) -> None:
        self.covered = Covered(5, None)
        inode = InodeNode(5, 1)
        inode.mode = mode
        inode.root = Tree(0, [], [], 0)
        self.covered.nodes[5] = inode
        self.running: dict[int, Node] = {}
        self.next = 100
        self.used: set[int] = set()

    def allocate(self) -> tuple[int, int]:
        self.next += 1
        self.used.add(self.next)
        return self.next, self.next

    def edit(self) -> tuple[Tx, tree.TreeEditor]:
        tx = Tx(self.running, set())
        inode = tx.edit_inode(self.covered)
        space = tree.TreeSpace(self.allocate, self.used.remove)
        return tx, tree.TreeEditor(tx, self.covered, inode, space)

    def inode(self) -> InodeNode:
        return READER.inode(self.covered)

    def check(self) -> None:
        """Every block encodes, decodes to the same, and is used once."""
        assert set(self.covered.nodes) == self.used | {5}
        for node in self.covered.nodes.values():
            block = node.encode(FS, 1)
            header = open_block_untrusted(FS, node.block, block)
            assert decode_node_untrusted(header, block).body() == node.body()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 400)), max_size=400), st.integers(1, 255))
@settings(max_examples=30, deadline=None)
def test_a_tree_is_a_sorted_dictionary(steps: list[tuple[bool, int]], length: int) -> None:
    world = TreeWorld(0o040755)
    model: dict[int, tree.Value] = {}
    for adding, key in steps:
        if adding == (key in model):
            continue
        tx, editor = world.edit()
        if adding:
            model[key] = (key, 8, bytes([key % 250 + 1]) * length)
            editor.insert(key, model[key])
        else:
            del model[key]
            editor.remove(key)
        tx.apply()
    inode = world.inode()
    assert list(tree.items(READER, world.covered, inode)) == sorted(model.items())
    for key in range(0, 401, 7):
        assert tree.find(READER, world.covered, inode, key) == model.get(key)
        below = max((k for k in model if k <= key), default=None)
        found = tree.floor(READER, world.covered, inode, key)
        assert (None if found is None else found[0]) == below
        after = sorted(k for k in model if k >= key)
        assert [k for k, _ in tree.items(READER, world.covered, inode, key)] == after
    world.check()


@pytest.mark.parametrize("mode", [0o040755, 0o100644])
def test_a_tree_that_grows_downwards_stays_in_order(mode: int) -> None:
    world = TreeWorld(mode)
    value: tree.Value = (1, 8, b"a name") if mode == 0o040755 else Extent(1, 1)
    for key in range(20_000, 0, -2):
        tx, editor = world.edit()
        editor.insert(key, value)
        tx.apply()
    found = [key for key, _ in tree.items(READER, world.covered, world.inode())]
    assert found == list(range(2, 20_001, 2))
    world.check()


def test_a_large_tree_shrinks_to_nothing() -> None:
    world = TreeWorld(0o040755)
    keys = list(range(5000))
    rng = random.Random(1)
    rng.shuffle(keys)
    for key in keys:
        tx, editor = world.edit()
        editor.insert(key, (key, 8, b"name-of-some-length-%06d" % key))
        tx.apply()
    root = world.inode().root
    assert root is not None
    assert root.level >= 1
    world.check()
    rng.shuffle(keys)
    for key in keys:
        tx, editor = world.edit()
        editor.remove(key)
        tx.apply()
    assert world.inode().root is not None
    assert not world.inode().root.keys
    world.check()


extent_steps = st.tuples(
    st.sampled_from(["cut", "fill", "reserve", "write", "unwrite", "punch"]),
    st.integers(0, 300),
    st.integers(1, 40),
)


class ExtentWorld:
    """Extents and what they must say: (physical block, unwritten) of each block."""

    def __init__(self) -> None:
        self.world = TreeWorld(0o100644)
        self.model: dict[int, tuple[int, bool]] = {}
        self.physical = 1000

    def do(self, kind: str, first: int, count: int) -> None:
        tx, editor = self.world.edit()
        covered, inode, end = self.world.covered, editor.inode, first + count
        if kind == "cut":
            self._cut(editor, first)
        elif kind in ("fill", "reserve"):
            for logical, place, size, _ in extents.pieces(tx, covered, inode, first, count):
                if not place:
                    extent = Extent(self.physical, size, kind == "reserve")
                    extents.insert(editor, logical, extent)
                    for step in range(size):
                        self.model[logical + step] = (self.physical + step, kind == "reserve")
                    self.physical += size + first % 2
        else:
            for mapped in extents.overlapping(tx, covered, inode, first, end, 1000):
                if kind == "punch":
                    gone = extents.take_away(editor, mapped, first, end)
                    for step in range(gone.length):
                        block = gone.block + step
                        (index,) = (i for i, (b, _) in self.model.items() if b == block)
                        assert first <= index < end
                        del self.model[index]
                elif mapped[1].unwritten == (kind == "write"):
                    extents.convert(editor, mapped, first, end)
            for index in range(first, end):
                if index in self.model and kind != "punch":
                    self.model[index] = (self.model[index][0], kind == "unwrite")
        tx.apply()

    def _cut(self, editor: tree.TreeEditor, first: int) -> None:
        freed: list[int] = []
        done = False
        while not done:
            _, done = extents.cut(
                editor, first, 3, lambda at, size: freed.extend(range(at, at + size))
            )
        gone = [block for block in self.model if block >= first]
        assert sorted(freed) == sorted(self.model.pop(block)[0] for block in gone)

    def check(self) -> None:
        found = {}
        at = 0
        before = (0, 0, 0, False)
        for piece in extents.pieces(READER, self.world.covered, self.world.inode(), 0, 400):
            logical, place, size, unwritten = piece
            assert logical == at
            at += size
            if place:
                found.update({logical + step: (place + step, unwritten) for step in range(size)})
                assert before[1] + before[2] != place or before[3] != unwritten, "not joined"
            before = piece
        assert at == 400
        assert found == self.model
        self._check_boundaries()
        self.world.check()

    def _check_boundaries(self) -> None:
        for is_data in (True, False):
            data = [i in self.model and (is_data or not self.model[i][1]) for i in range(401)]
            at = 0
            while at < 400:
                kind, until = extents.boundary(
                    READER, self.world.covered, self.world.inode(), at,
                    unwritten_is_data=is_data, limit=2,
                )  # fmt: skip
                assert until > at
                assert set(data[at : min(until, 400)]) == {kind}
                at = until


@given(st.lists(extent_steps, max_size=60))
@settings(max_examples=100, deadline=None)
def test_extents_map_every_block(steps: list[tuple[str, int, int]]) -> None:
    world = ExtentWorld()
    for kind, first, count in steps:
        world.do(kind, first, count)
        world.check()


def test_extents_of_many_pieces() -> None:
    """More than the inode holds: splits and joins across tree blocks."""
    rng = random.Random(1)
    world = ExtentWorld()
    for _ in range(4000):
        world.do(rng.choice(["fill", "reserve"]), rng.randrange(390), 1)
        world.do(rng.choice(["write", "unwrite", "punch"]), rng.randrange(390), rng.choice([1, 3]))
    world.check()


def test_names_with_one_hash_get_cookies_of_their_own() -> None:
    world = TreeWorld(0o040755)
    for number in range(300):
        tx, editor = world.edit()
        directory.insert(editor, 77, b"name%d" % number, number + 1, 8)
        tx.apply()
    inode = world.inode()
    for number in range(300):
        found = directory.find(READER, world.covered, inode, 77, b"name%d" % number)
        assert found is not None
        assert found[1] == number + 1
    cookies = [e[0] for e in directory.entries(READER, world.covered, inode, 0, 1000)]
    assert len(set(cookies)) == 300
    assert directory.find(READER, world.covered, inode, 77, b"other") is None


def test_journal_headers_alternate_and_the_newer_one_counts() -> None:
    blocks = bytearray(HEADER_BLOCKS * BLOCK_BYTES)
    for change in (4, 5, 6):
        header = JournalHeader(3, True, NOBODY, change * 10, change, change, 128)
        block, data = encode_header(FS, header, 50)
        start = (block - 50) * BLOCK_BYTES
        blocks[start : start + len(data)] = data
        if change > 4:
            assert decode_header_untrusted(FS, 50, bytes(blocks)) == header


def test_one_damaged_journal_header_does_no_harm_and_a_pair_makes_the_other_one_doubtful() -> None:
    whole = bytearray()
    for change in (6, 7):
        whole += encode_header(FS, JournalHeader(3, True, NOBODY, 0, 1, change, 128), 50)[1]
    for index in range(HEADER_BLOCKS):
        blocks = whole.copy()
        blocks[index * BLOCK_BYTES + 100] ^= 1
        assert decode_header_untrusted(FS, 50, bytes(blocks)).change == 7
        blocks[(index ^ 1) * BLOCK_BYTES + 100] ^= 1
        with pytest.raises(CorruptionError):
            decode_header_untrusted(FS, 50, bytes(blocks))


@pytest.mark.parametrize("count", [1, ITEMS_PER_COMMIT, ITEMS_PER_COMMIT + 1, 400])
def test_commit_blocks_list_all_items(count: int) -> None:
    items = [Item(1000 + n, n, n + 1, n + 2) for n in range(count)]
    places = list(range(60, 60 + commit_parts(count)))
    found: list[Item] = []
    for place, block in zip(places, encode_commit(FS, 2, 9, 33, items, places), strict=True):
        part = decode_commit_untrusted(FS, place, block, 2, 9)
        assert (part.parts, part.item_count, part.position) == (len(places), count, 33)
        found += part.items
        with pytest.raises(CorruptionError):
            decode_commit_untrusted(FS, place, block, 2, 10)
    assert found == items


def test_neighbours_are_written_together() -> None:
    page = bytes(BLOCK_BYTES)
    writes = joined([(9, page), (3, page), (4, page), (5, page)])
    assert [(offset, len(data)) for offset, data in writes] == [
        (3 * 4096, 3 * 4096),
        (9 * 4096, 4096),
    ]


def test_name_hashes_have_47_bits() -> None:
    superblock = Superblock(bytes(16), "", bytes(16), 512, 4096, 19, 1, 0)
    assert all(superblock.name_hash(b"%d" % n) < 1 << 47 for n in range(1000))
