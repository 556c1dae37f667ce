"""`python -m bench.gnbd_integrity`: what an integrity area costs (also a part of bench.gnbd).

One export of one server over a Unix socket, converted by `gnbdctl integrity` in every round, so
that both sides have the same file; the order changes from round to round. The cost is the
median of the rounds' own ratios.
"""

from __future__ import annotations

import json
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from bench.gnbd_peers import SIZE_MIB, fio
from gnbd.server.backends_io import FileBackend
from gnbd.server.integrity import Header
from gnbd.server.integrity_io import Integrity, area_path, make_area, read_header
from lab.block_server import GnbdServer, export_toml
from native.checksum import crc32c_blocks
from native.integrity import BLOCK_BYTES

MIB = 1 << 20
READS = 400
JOBS = {
    "4 KiB random write QD32, IOPS": ("randwrite", "4k", 32, 15),
    "1 MiB read QD8, MiB/s": ("read", "1M", 8, 5),
    "4 KiB random read QD32, IOPS": ("randread", "4k", 32, None),
    "1 MiB write QD8, MiB/s": ("write", "1M", 8, None),
}
STATES = ("off", "on")


def _convert(server: GnbdServer, state: str) -> None:
    """Returns when it is so, and all sums are known."""
    assert server.ctl("integrity", "disk", state).returncode == 0
    while True:
        (export,) = json.loads(server.ctl("--json", "exports").stdout)
        if not export["integrity"].get("unsettled_regions"):
            return
        time.sleep(0.1)


def cost(directory: Path, rounds: int) -> str:
    """Markdown."""
    directory.mkdir(exist_ok=True)
    disk = directory / "disk.img"
    disk.write_bytes(os.urandom(1 << 20) * SIZE_MIB)
    socket = directory / "integrity.sock"
    server = GnbdServer(directory, export_toml("disk", disk, size=f"{SIZE_MIB}M"))
    server.head = f'unix_sockets = ["{socket}"]\n'
    uri = f"nbd+unix:///disk?socket={socket}"
    found: dict[str, dict[str, list[float]]] = {job: {s: [] for s in STATES} for job in JOBS}
    server.start()
    try:
        for number in range(rounds):
            for state in STATES[:: 1 if number % 2 else -1]:
                _convert(server, state)
                fio(uri, "randwrite", "4k", 32)  # the regions are marked, the pages are dirty
                for job, (rw, size, depth, _aim) in JOBS.items():
                    found[job][state].append(fio(uri, rw, size, depth)[0])
    finally:
        server.stop()
    lines = ["| figure | without area | with area | cost (spread) | aim |", "|---|---|---|---|---|"]
    for job, by in found.items():
        costs = sorted(100 * (1 - b / a) for a, b in zip(by["off"], by["on"], strict=True))
        aim = JOBS[job][3]
        lines.append(
            f"| {job} | {statistics.median(by['off']):.0f} | {statistics.median(by['on']):.0f} "
            f"| {statistics.median(costs):.1f} % ({costs[0]:.1f} to {costs[-1]:.1f}) "
            f"| {f'≤ {aim} %' if aim else '–'} |"
        )
    return "\n".join(lines) + "\n\n" + _alone(directory)


def _median_us(work: Callable[[], object]) -> float:
    took = []
    for _ in range(READS):
        begin = time.perf_counter()
        work()
        took.append(time.perf_counter() - begin)
    return statistics.median(took) * 1e6


def _alone(directory: Path) -> str:
    """One read of 1 MiB from the page cache, without server and client."""
    path = area_path(directory, "alone")
    backend = FileBackend(directory / "alone.img", 64 << 20)
    make_area(path, Header("alone", "alone.img", backend.size_bytes), settled=True)
    header = read_header(path)
    assert header is not None
    integrity = Integrity(path, header)
    found = []
    with mmap.mmap(-1, MIB) as memory, memoryview(memory) as view:
        view[:] = os.urandom(MIB)
        backend.area = integrity.area
        for offset in range(0, backend.size_bytes, MIB):
            backend.write(offset, view, False)
        for area in (None, integrity.area):
            backend.area = area
            found.append(_median_us(lambda: backend.read_into(8 * MIB, view)))
        found.append(_median_us(lambda: crc32c_blocks(view, BLOCK_BYTES)))
    integrity.close(True)
    backend.close()
    return (
        f"A read of 1 MiB from the page cache: {found[0]:.0f} µs, checked {found[1]:.0f} µs; "
        f"its CRC-32C alone {found[2]:.0f} µs."
    )


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=9, show_default=True)
def main(rounds: int) -> None:
    """Measure, print the table."""
    with tempfile.TemporaryDirectory(prefix="gnbd-bench-", dir="/var/tmp") as directory:
        print(cost(Path(directory), rounds))


if __name__ == "__main__":
    main()
