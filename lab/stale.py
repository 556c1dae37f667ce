"""How long a node that is out goes on reading what it had cached.

`OldReaders` are programs on a node that read a cached block by pread and through a mapping; they
tell when they last got the old version, by a clock that all hosts of the lab share. `pause` stops a
whole node beyond its lease, has a survivor write, and lets it go on.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from cluster.errors import StackError
from lab import cluster, hosts
from lab.demo_work import WORK
from lab.old_reader import PAGE_BYTES, REPORT, WORD
from lab.topology import Host, Lab

WAYS = ("pread", "mapped")
WARM_READS = 1000
END_S = 60.0
SIGBUS_EXIT = -int(signal.SIGBUS)


class OldReader:
    """One such program."""

    def __init__(self, lab: Lab, node: Host, path: str, how: str) -> None:
        self.how = how
        self._report = lab.host_directory(node) / f"old-{how}"
        self._report.write_bytes(bytes(PAGE_BYTES))
        self.process = hosts.popen(
            lab, node, sys.executable, "-m", "lab.old_reader", path, str(self._report), how,
            stdout=subprocess.PIPE,
        )  # fmt: skip

    def report(self) -> tuple[int, int, int, int, int]:
        """Reads, version, when the last of them began and ended, whether another one came."""
        values: tuple[int, int, int, int, int] = REPORT.unpack_from(self._report.read_bytes())
        return values

    @property
    def last_begun_s(self) -> float:
        """When the last read began that gave the old version."""
        return self.report()[2] / 1e9

    def is_warm(self) -> bool:
        if self.process.poll() is not None:
            raise StackError(f"the {self.how} reader has ended: {self.outcome()}")
        return self.report()[0] >= WARM_READS

    def is_blocked(self, for_s: float = 0.2) -> bool:
        """Whether it has got nothing for so long, and has not ended."""
        since_s = time.monotonic() - self.report()[3] / 1e9
        return self.process.poll() is None and since_s >= for_s

    def outcome(self) -> str:
        """How it ended: the last line of a traceback, `SIGBUS`, `another version`."""
        output, _ = self.process.communicate(timeout=END_S)
        if self.process.returncode == SIGBUS_EXIT:
            return "SIGBUS"
        if self.process.returncode == 0:
            return "another version"
        return output.strip().splitlines()[-1] if output.strip() else "killed"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def write_version(lab: Lab, node: Host, path: str, version: int) -> float:
    """Write a version from a node; when the write had returned there, seconds."""
    program = (
        "import os,sys,time; fd=os.open(sys.argv[1],os.O_WRONLY|os.O_CREAT);"
        "os.pwrite(fd,int(sys.argv[2]).to_bytes(8,'little')+bytes(4088),0);"
        "print(time.monotonic())"
    )
    done = hosts.run(lab, node, sys.executable, "-c", program, path, str(version))
    return float(done.stdout)


def start_readers(lab: Lab, node: Host, path: str) -> list[OldReader]:
    """Readers of version 1 of a fresh block, warm."""
    other = next(one for one in lab.nodes if one != node)
    hosts.run(lab, other, "mkdir", "-p", str(Path(path).parent))
    write_version(lab, other, path, 1)
    readers = [OldReader(lab, node, path, how) for how in WAYS]
    for reader in readers:
        hosts.wait_for(reader.is_warm, END_S, f"the {reader.how} reader reads from the cache")
    return readers


class PauseResult(msgspec.Struct):
    """What a pause of a whole node has cost."""

    stale_ms: dict[str, float]
    """By way of reading: from the resume to the last read that still gave the old version."""
    outcomes: dict[str, str]
    refused_writes: int
    back_s: float


def pause(lab: Lab, victim: Host, name: str) -> PauseResult:
    """Pause a node beyond its lease, write on a survivor, let it go on, wait until it is back.
    Raises StackError if it reads anything wrong."""
    path = f"{WORK}/{name}"
    survivor = next(node for node in lab.nodes if node != victim)
    refused = refused_writes(lab, survivor)
    readers = start_readers(lab, victim, path)
    try:
        hosts.freeze(lab, victim, frozen=True)
        write_version(lab, survivor, path, 2)  # waits until the victim is out
        resumed = time.monotonic()
        hosts.freeze(lab, victim, frozen=False)
        outcomes = {reader.how: reader.outcome() for reader in readers}
        stale = {r.how: max(0.0, (r.last_begun_s - resumed) * 1e3) for r in readers}
        wrong = [how for how, outcome in outcomes.items() if outcome == "another version"]
        if wrong:
            raise StackError(f"readers of a dead mount read something new: {wrong}")
    finally:
        hosts.freeze(lab, victim, frozen=False)
        for reader in readers:
            reader.stop()
    cluster.wait_mounted(lab, victim)
    back = time.monotonic() - resumed
    found = WORD.unpack_from(_read(lab, victim, path))[0]
    if found != 2:
        raise StackError(f"{victim.name} came back and reads version {found}")
    return PauseResult(
        {how: round(ms, 1) for how, ms in stale.items()}, outcomes,
        refused_writes(lab, survivor) - refused, round(back, 1),
    )  # fmt: skip


def _read(lab: Lab, node: Host, path: str) -> bytes:
    code = "import os,sys; print(os.pread(os.open(sys.argv[1],os.O_RDONLY),8,0).hex())"
    return bytes.fromhex(hosts.run(lab, node, sys.executable, "-c", code, path).stdout.strip())


def refused_writes(lab: Lab, node: Host) -> int:
    """What all block servers have refused of barred instances so far."""
    total = 0
    for server in lab.servers:
        output = hosts.run(lab, node, "gnbdctl", "--json", "--server", server.name, "stats").stdout
        total += sum(export["counters"]["refused_writes"] for export in json.loads(output))
    return total
