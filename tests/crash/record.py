"""Run the workload on a real cluster and keep what the block servers wrote.

On the way a mount process may be killed and a server may lose its power (what no flush had covered
is gone; each life of a server has a log of its own). What the dead mount had changed last, and
nobody had synced, may be gone with it: such things are *retired*, nobody touches them again.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from tests.crash.agent import now_ns
from tests.crash.things import KINDS, Change, History, InPlace, Mover, Thing
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
    logs: dict[int, list[str]]
    """The logs of each server, one for each of its lives."""
    begin_ns: int
    things: list[History]


def make_things(
    rng: random.Random, folders: int, each: int, kinds: Iterable[str] = tuple(KINDS)
) -> list[Thing]:
    """A bit of everything, spread over the folders."""
    things: list[Thing] = []
    for number in range(each):
        for kind in kinds:
            build = KINDS[kind]
            seed = rng.randrange(1 << 30) * 2 + number % 2
            top = f"d{rng.randrange(folders)}"
            if issubclass(build, InPlace):
                for index in range(build.BLOCKS):
                    name = f"{top}/{kind}{number}:{index}"
                    things.append(build(History(kind, name, seed)))
            else:
                things.append(build(History(kind, f"{top}/{kind}{number}", seed)))
    return things


class AgentDied(Exception):
    """The client process has ended."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the agent died: {status}")
        self.status = status


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
            raise AgentDied(self.process.wait())
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
            self.process.wait(60)
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
        self.doomed = self.dead = 0
        """The mount that is about to be killed, and once it may be dead."""
        self._retired: set[int] = set()
        self._locks = [threading.Lock() for _ in things]
        self._lock = threading.Lock()
        self._unsynced: dict[int, int] = {}
        """Which mount has changed a thing without a sync; its index first."""

    def prepare(self, agent: Agent, folders: int) -> None:
        tops = [f"d{number}" for number in range(folders)]
        names = tops + [f"{top}/place{place}" for top in tops for place in range(Mover.PLACES)]
        answer = agent.do([["mkdir", name] for name in names] + [["sync", "."]])
        assert not answer["error"], answer["text"]
        for index, thing in enumerate(self.things):
            assert self._apply(index, thing.prepare(), agent, 1), self.errors

    def _apply(self, index: int, change: Change, agent: Agent, mount: int) -> bool:
        """False if the agent met an error."""
        history = self.things[index].history
        if change.state is not None:
            history.begins.append(now_ns())
            history.states.append(change.state)
            self._unsynced[index] = mount
        try:
            answer = agent.do(change.commands)
        except AgentDied as died:
            if mount == self.dead and died.status == -signal.SIGBUS:
                return False  # it was writing to a mapping: no page comes from a dead mount
            raise
        if answer["error"]:
            if mount != self.dead:
                self.errors.append(f"{history.name}: {change.commands}: {answer['text']}")
            return False
        if change.durable:
            history.marks.append((answer["end"], len(history.states) - 1))
            self._unsynced.pop(index, None)
        return True

    def _choose(self, rng: random.Random) -> int | None:
        """A thing that nobody else changes, locked; None: there is no more to do."""
        with self._lock:
            if self.left <= 0:
                return None
            self.left -= 1
        free = list(range(len(self.things)))
        rng.shuffle(free)
        return next((i for i in free if self._locks[i].acquire(blocking=False)), None)

    def work(self, agent: Agent, number: int, mount: int) -> None:
        """What the thread of one agent does."""
        rng = random.Random(f"{self.seed} {number}")
        while not self.errors:
            index = self._choose(rng)
            if index is None:
                return
            try:
                good = self._apply(index, self.things[index].change(rng), agent, mount)
            except BaseException as error:
                self.errors.append(f"agent {number}: {error!r}")
                raise
            if not good:
                return
            if mount == self.doomed and index in self._unsynced:
                self._retired.add(index)
            else:
                self._locks[index].release()

    def doom(self, mount: int) -> None:
        """Retire what would be gone if this mount died at any moment from now on; its agents go on
        with the rest."""
        self.doomed = mount
        for index, lock in enumerate(self._locks):
            while self._unsynced.get(index) == mount and index not in self._retired:
                if lock.acquire(timeout=0.01):
                    if self._unsynced.get(index) == mount:
                        self._retired.add(index)
                    else:
                        lock.release()

    def wait_for_left(self, left: int) -> None:
        """Until so few changes are still to be begun."""
        end = time.monotonic() + ANSWER_S
        while self.left > left and not self.errors:
            assert time.monotonic() < end, f"{self.left} changes are left for {ANSWER_S} s"
            time.sleep(0.01)


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
    base: Path,
    seed: int,
    *,
    changes: int,
    nodes: int = 3,
    agents: int = 2,
    each: int = 2,
    kill: bool = False,
    power: bool = False,
) -> Recording:
    """Run it; the directory then holds the logs and `history.json`. `power`: after a third of the
    changes a server loses its power. `kill`: after two thirds the last mount is killed."""
    enter_private_namespace()
    rng = random.Random(seed)
    folders = 4
    driver = Driver(make_things(rng, folders, each), seed, changes)
    mounts: dict[int, Mounted] = {}
    logs = {128 + number: [f"s{number}.log"] for number in (1, 2)}
    with recorded_cluster(base, nodes) as (cluster, servers, begin_ns):
        try:
            for number in range(1, nodes + 1):
                mounts[number] = mount(cluster.node(number))
            faults: list[tuple[int, Callable[[], None]]] = []
            if power:
                faults.append((changes * 2 // 3, lambda: _cut_power(base, servers[2], logs[130])))
            if kill:
                faults.append((changes // 3, lambda: _kill_mount(driver, mounts, nodes)))
            _run(driver, mounts, agents, folders, faults)
            for number, mounted in mounts.items():
                assert mounted.close() == 0, (number, mounted.log.read_text()[-3000:])
        finally:
            for mounted in mounts.values():
                mounted.destroy()
    made = Recording(seed, VOLUME, logs, begin_ns, [thing.history for thing in driver.things])
    (base / HISTORY).write_bytes(msgspec.json.encode(made))
    return made


def _cut_power(base: Path, server: Any, logs: list[str]) -> None:
    """What no flush has covered is gone; the server comes back with a log of its own, because the
    end of the first may be torn."""
    server.kill()
    kept = f"s{server.number}.{len(logs)}.log"
    (base / f"s{server.number}.log").rename(base / kept)
    logs.insert(-1, kept)
    server.start()


def _kill_mount(driver: Driver, mounts: dict[int, Mounted], number: int) -> None:
    driver.doom(number)
    driver.wait_for_left(driver.left - 2 * len(mounts))  # its agents are at work again
    driver.dead = number
    mounts.pop(number).destroy()


def _run(
    driver: Driver,
    mounts: dict[int, Mounted],
    each: int,
    folders: int,
    faults: list[tuple[int, Callable[[], None]]],
) -> None:
    agents: list[Agent] = []
    try:
        homes = [number for number in mounts for _ in range(each)]
        agents += [Agent(mounts[number].path) for number in homes]
        driver.prepare(agents[0], folders)
        threads = [
            threading.Thread(target=driver.work, args=(agent, index, home), daemon=True)
            for index, (agent, home) in enumerate(zip(agents, homes, strict=True))
        ]
        for thread in threads:
            thread.start()
        for left, fault in faults:
            driver.wait_for_left(left)
            fault()
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
