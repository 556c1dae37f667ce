"""Run the workload on a real cluster and keep what the block servers wrote."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from tests.crash.agent import now_ns
from tests.crash.things import KINDS, Block, Change, History, Mover, Thing
from tests.fuse.cluster_mounts import harness, mount
from tests.fuse.mounting import Mounted, enter_private_namespace

VOLUME = "vg0/vol0"
HISTORY = "history.json"
DISK_SIZE = "44m"
VOLUME_SIZE = "80m"
MKFS = ("-q", "-J", "1m", "-j", "4", "--group-blocks", "512")
ANSWER_S = 120.0


class Recording(msgspec.Struct):
    """What a run leaves in its directory besides the servers' logs."""

    seed: int
    volume: str
    logs: dict[int, str]
    begin_ns: int
    things: list[History]


def make_things(rng: random.Random, folders: int, each: int) -> list[Thing]:
    """A bit of everything, spread over the folders."""
    things: list[Thing] = []
    for number in range(each):
        for kind, build in KINDS.items():
            seed = rng.randrange(1 << 30) * 2 + number % 2
            top = f"d{rng.randrange(folders)}"
            if build is Block:
                for index in range(Block.BLOCKS):
                    name = f"{top}/block{number}:{index}"
                    things.append(build(History(kind, name, seed)))
            else:
                things.append(build(History(kind, f"{top}/{kind}{number}", seed)))
    return things


class Agent:
    """A client process on one mount."""

    def __init__(self, path: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.agent", str(path)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=harness.ROOT,
        )  # fmt: skip
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the agent died: {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, commands: list[list[Any]]) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": commands}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def stop(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Driver:
    """Lets the agents change the things until it is enough."""

    def __init__(self, things: list[Thing], seed: int, changes: int) -> None:
        self.things = things
        self.seed = seed
        self.left = changes
        self.errors: list[str] = []
        self._locks = [threading.Lock() for _ in things]
        self._lock = threading.Lock()

    def prepare(self, agent: Agent, folders: int) -> None:
        tops = [f"d{number}" for number in range(folders)]
        names = tops + [f"{top}/place{place}" for top in tops for place in range(Mover.PLACES)]
        answer = agent.do([["mkdir", name] for name in names] + [["sync", "."]])
        assert not answer["error"], answer["text"]
        for thing in self.things:
            self._apply(thing, thing.prepare(), agent)
        assert not self.errors, self.errors

    def _apply(self, thing: Thing, change: Change, agent: Agent) -> None:
        history = thing.history
        if change.state is not None:
            history.begins.append(now_ns())
            history.states.append(change.state)
        answer = agent.do(change.commands)
        if answer["error"]:
            self.errors.append(f"{thing.name}: {change.commands}: {answer['text']}")
        elif change.durable:
            history.marks.append((answer["end"], len(history.states) - 1))

    def work(self, agent: Agent, number: int) -> None:
        """What the thread of one agent does."""
        rng = random.Random(f"{self.seed} {number}")
        while not self.errors:
            with self._lock:
                if self.left <= 0:
                    return
                self.left -= 1
            index = rng.randrange(len(self.things))
            while not self._locks[index].acquire(blocking=False):
                index = rng.randrange(len(self.things))
            try:
                thing = self.things[index]
                self._apply(thing, thing.change(rng), agent)
            except BaseException as error:
                self.errors.append(f"agent {number}: {error!r}")
                raise
            finally:
                self._locks[index].release()


@contextlib.contextmanager
def recorded_cluster(base: Path, count: int) -> Iterator[tuple[Any, dict[int, Any], int]]:
    """A cluster whose servers record: (cluster, servers, time after mkfs)."""
    cluster = harness.Cluster(base)
    try:
        first = cluster.up(count)[0]
        servers = {}
        for number in (1, 2):
            server = servers[number] = harness.Server(cluster, number)
            server.configure(DISK_SIZE, filters=("volatile", f"log:path={base}/s{number}.log"))
            server.start()
        first.tool("cvm.cli", "pvcreate", "s1/disk0", "s2/disk0")
        first.tool("cvm.cli", "vgcreate", "vg0", "s1/disk0", "s2/disk0")
        first.tool("cvm.cli", "lvcreate", "-n", "vol0", "-i", "2", "-I", "64k", "-l", "100%FREE",
                   "vg0")  # fmt: skip
        first.tool("cfs.mkfs", *MKFS, VOLUME)
        yield cluster, servers, now_ns()
    finally:
        cluster.close()


def record(
    base: Path, seed: int, *, changes: int, nodes: int = 3, agents: int = 2, each: int = 2
) -> Recording:
    """Run it; the directory then holds the logs and `history.json`."""
    enter_private_namespace()
    rng = random.Random(seed)
    folders = 4
    driver = Driver(make_things(rng, folders, each), seed, changes)
    mounts: dict[int, Mounted] = {}
    with recorded_cluster(base, nodes) as (cluster, _servers, begin_ns):
        try:
            for number in range(1, nodes + 1):
                mounts[number] = mount(cluster.node(number))
            _run(driver, mounts, agents, folders)
            for number, mounted in mounts.items():
                assert mounted.close() == 0, (number, mounted.log.read_text()[-3000:])
        finally:
            for mounted in mounts.values():
                mounted.destroy()
    logs = {128 + number: f"s{number}.log" for number in (1, 2)}
    made = Recording(seed, VOLUME, logs, begin_ns, [thing.history for thing in driver.things])
    (base / HISTORY).write_bytes(msgspec.json.encode(made))
    return made


def _run(driver: Driver, mounts: dict[int, Mounted], each: int, folders: int) -> None:
    agents: list[Agent] = []
    try:
        for mounted in mounts.values():
            agents += [Agent(mounted.path) for _ in range(each)]
        driver.prepare(agents[0], folders)
        threads = [
            threading.Thread(target=driver.work, args=(agent, number), daemon=True)
            for number, agent in enumerate(agents)
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + max(ANSWER_S, driver.left)
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0.1))
        assert not driver.errors, driver.errors[:5]
        assert not any(thread.is_alive() for thread in threads), "an agent hangs"
    finally:
        for agent in agents:
            agent.stop()


def load(base: Path) -> Recording:
    return msgspec.json.decode((base / HISTORY).read_bytes(), type=Recording)
