"""Load on a block device of ours: so many requests under way, for a while."""

from __future__ import annotations

import random

import trio

from cluster.device import BlockDevice


async def rate(
    device: BlockDevice, kind: str, size_bytes: int, depth: int, runtime_s: float
) -> float:
    """MiB/s of reads or writes; `kind` as fio's rw."""
    blocks = device.size_bytes // size_bytes
    data = bytes(size_bytes)
    # Drawing a place costs almost as much as a request.
    places = [random.randrange(blocks) for _ in range(1 << 16)]
    done, next_block = 0, 0
    is_random, is_read = kind.startswith("rand"), "read" in kind

    async def worker() -> None:
        nonlocal done, next_block
        while True:
            next_block += 1
            block = places[next_block % len(places)] if is_random else next_block % blocks
            if is_read:
                await device.read(block * size_bytes, size_bytes)
            else:
                await device.write(block * size_bytes, data)
            done += 1

    begin = trio.current_time()
    with trio.move_on_after(runtime_s):
        async with trio.open_nursery() as nursery:
            for _ in range(depth):
                nursery.start_soon(worker)
    return done * size_bytes / (1 << 20) / (trio.current_time() - begin)
