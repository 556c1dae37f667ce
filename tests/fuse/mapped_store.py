"""A small database in the manner of LMDB: readers look through a mapping, a writer copies on write.

`mapped_store.py PATH BOARD ROLE COUNT`. The store has two meta pages and some data pages. A
transaction writes a data page that the last two transactions do not use, makes it durable, then
writes the older meta page: number, data page, checksum. Writers exclude each other by an fcntl
lock. A reader takes the newer whole meta page and the data page it names; if it was overtaken by
two transactions meanwhile, what it saw counts for nothing.

BOARD is memory of this machine, outside of the mount: who has made transaction N says so there. A
reader that was told of N before it looks must not see less. (A transaction whose write has not
returned may be seen, on the writer's node, and then again not.)

ROLE is `read`, `write` (pwrite and fsync), `store` (stores through a mapping and msync). Prints one
JSON object; a reader runs until the board has the number COUNT.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import sys
import zlib

PAGE = 4096
PAGES = 8
META = struct.Struct("<QQ")
NUMBER = struct.Struct("<Q")


def body(number: int) -> bytes:
    """The content of the data page of a transaction."""
    return (NUMBER.pack(number) + b"%d " % number * PAGE)[: PAGE - 4]


def sealed(content: bytes) -> bytes:
    return content + struct.pack("<I", zlib.crc32(content))


def is_whole(page: bytes) -> bool:
    return zlib.crc32(page[:-4]) == struct.unpack("<I", page[-4:])[0]


def meta(number: int, page: int) -> bytes:
    return sealed(META.pack(number, page))


def empty() -> bytes:
    """A store without a transaction."""
    return (meta(0, 1).ljust(PAGE, b"\0") * 2).ljust(PAGES * PAGE, b"\0")


def newest(store: mmap.mmap) -> tuple[int, int]:
    """Number and data page of the newer meta page."""
    return max(whole_meta(store, 0), whole_meta(store, PAGE))


def whole_meta(store: mmap.mmap, offset: int) -> tuple[int, int]:
    """One that a writer on this node is just changing may be half of each; then look again."""
    while not is_whole(found := store[offset : offset + META.size + 4]):
        pass
    number, page = META.unpack_from(found)
    return number, page


class Board:
    """The highest transaction that is known to be made."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR)
        self._memory = mmap.mmap(fd, PAGE)

    @property
    def number(self) -> int:
        return NUMBER.unpack_from(self._memory)[0]

    @number.setter
    def number(self, value: int) -> None:
        NUMBER.pack_into(self._memory, 0, value)


def write(fd: int, store: mmap.mmap, board: Board, count: int, *, through_mapping: bool) -> dict:
    made = behind = 0
    while made < count:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        told = board.number
        number, page = newest(store)
        behind += number < told
        following = 2 + (page - 1) % (PAGES - 2)
        put(fd, store, following * PAGE, sealed(body(number + 1)), through_mapping)
        put(fd, store, (number + 1) % 2 * PAGE, meta(number + 1, following), through_mapping)
        board.number = number + 1
        fcntl.lockf(fd, fcntl.LOCK_UN)
        made += 1
    return {"made": made, "stale": behind}


def put(fd: int, store: mmap.mmap, offset: int, data: bytes, through_mapping: bool) -> None:
    if through_mapping:
        store[offset : offset + len(data)] = data
        store.flush()
    else:
        assert os.pwrite(fd, data, offset) == len(data)
        os.fsync(fd)


def read(store: mmap.mmap, board: Board, count: int) -> dict:
    seen = {"looks": 0, "transactions": 0, "stale": 0, "torn": 0}
    last = 0
    while last < count:
        told = board.number
        number, page = newest(store)
        seen["looks"] += 1
        seen["stale"] += number < told
        if number:
            content = bytes(store[page * PAGE : (page + 1) * PAGE])
            right = is_whole(content) and content[:-4] == body(number)
            seen["torn"] += not right and newest(store)[0] < number + 2
        seen["transactions"] += number != last
        last = number
    return seen


def main(path: str, board_path: str, role: str, count: str) -> None:
    fd = os.open(path, os.O_RDONLY if role == "read" else os.O_RDWR)
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if role == "store" else 0)
    store = mmap.mmap(fd, PAGES * PAGE, mmap.MAP_SHARED, protection)
    board = Board(board_path)
    if role == "read":
        print(json.dumps(read(store, board, int(count))))
    else:
        through_mapping = role == "store"
        print(json.dumps(write(fd, store, board, int(count), through_mapping=through_mapping)))


if __name__ == "__main__":
    main(*sys.argv[1:])
