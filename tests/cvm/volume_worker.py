"""An instance that works on a volume until its standard input ends, as a mount would.

Every lane writes stamped blocks of its own area and reads them back; at the end everything is read
again. Prints lines of JSON: what happened to the gate, progress, and the verdict.
"""

from __future__ import annotations

import json
import random
import sys

import msgspec
import trio

from cluster.control import InstanceGranted, ViewInfo
from cluster.control_io import open_session
from cvm.target_io import VolumeClient, open_volume

BLOCK_BYTES = 4096
LANES = 4
LANE_BLOCKS = 512


def say(**fields) -> None:
    print(json.dumps(fields), flush=True)


class Worker:
    def __init__(self, device, node: int) -> None:
        self.device = device
        self.first = node * LANES * LANE_BLOCKS
        self.written: dict[int, bytes] = {}
        self.count = 0
        self.sizes = {device.size_bytes}
        self.stop = False

    async def lane(self, number: int) -> None:
        rng = random.Random(self.first + number)
        while not self.stop:
            length = rng.choice([1, 1, 4, 40])
            block = self.first + number * LANE_BLOCKS + rng.randrange(LANE_BLOCKS - length)
            data = b"".join(rng.randbytes(16) * (BLOCK_BYTES // 16) for _ in range(length))
            await self.device.write(block * BLOCK_BYTES, data)
            for index in range(length):
                piece = data[index * BLOCK_BYTES : (index + 1) * BLOCK_BYTES]
                self.written[block + index] = piece
            assert await self.device.read(block * BLOCK_BYTES, len(data)) == data
            if rng.random() < 0.1:
                await self.device.flush()
            self.count += 1
            self.sizes.add(self.device.size_bytes)

    async def progress(self) -> None:
        before = -1
        while not self.stop:
            await trio.sleep(0.05)
            if self.count != before:
                before = self.count
                say(count=before, sequence=self.device.map.sequence)

    async def wait_for_end(self) -> None:
        await trio.to_thread.run_sync(sys.stdin.read)
        self.stop = True

    async def verdict(self) -> None:
        blocks = sorted(self.written)
        wrong = [
            block
            for block in blocks
            if await self.device.read(block * BLOCK_BYTES, BLOCK_BYTES) != self.written[block]
        ]
        say(verdict="ok" if not wrong else "wrong", blocks=len(blocks), sizes=sorted(self.sizes))


async def main(volume: str) -> None:
    client = VolumeClient()

    def on_event(name: str, data) -> None:
        if name == "view":
            client.on_view(msgspec.convert(data, ViewInfo))
        else:
            say(event=name)

    handlers = dict(client.handlers())
    suspend = handlers["volume.suspend"]

    async def told(params):
        say(gate="closing")
        answer = await suspend(params)
        say(gate="closed")
        return answer

    handlers["volume.suspend"] = told
    async with open_session(None, handlers, on_event) as session, trio.open_nursery() as nursery:
        params = {"kind": "mount", "title": "worker"}
        granted = msgspec.convert(await session.call("instance.register", params), InstanceGranted)
        device = await open_volume(session, volume, "sharedwrite", granted, nursery, client)
        worker = Worker(device, granted.instance.node)
        async with trio.open_nursery() as lanes:
            for number in range(LANES):
                lanes.start_soon(worker.lane, number)
            lanes.start_soon(worker.progress)
            lanes.start_soon(worker.wait_for_end)
        await worker.verdict()
        await client.close(session, volume)
        await session.call("instance.leave", {})
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
