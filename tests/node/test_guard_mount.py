"""The guard against a real FUSE mount: death, barring, lapse, and the death of clusterd."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from node_harness import ROOT, wait_until

from native.requests import TABLE_BYTES
from node.fuse_connection_io import open_connections
from node.guard_mounts_io import WAITING_MAX

HERE = Path(__file__).parent
READ = "import os,sys; print(len(os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, 0)))"


HOLD = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
print(len(os.pread(fd, 4096, 0)), flush=True)
for _ in sys.stdin:
    try:
        print(len(os.pread(fd, 4096, 0)), flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


class Holder:
    """A process that keeps the file open: lookups and opens do not protect it."""

    def __init__(self, mount, name="data"):
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", HOLD, str(mount.point / name)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        mount.node.cluster.started.append(self.process)
        assert self.process.stdout.readline().strip() == "4096"

    def ask(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def answer(self):
        return self.process.stdout.readline().strip()

    def read(self):
        self.ask()
        return self.answer()


class Mounted:
    def __init__(self, node, name="mnt"):
        self.node = node
        self.point = node.base / name
        self.report = node.base / "reads"
        self.point.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "tiny_mount.py"), str(self.point), str(self.report)],
            env=node.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        node.cluster.started.append(self.process)
        line = self.process.stdout.readline()
        assert line.startswith("ready"), line
        self.reader = None

    def start_read(self):
        """Read one page of the file in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-S", "-c", READ, str(self.point / "data")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def read(self):
        output, errors = self.start_read().communicate(timeout=60)
        return output.strip() or errors.strip().splitlines()[-1]

    def blocked_read(self):
        """A read that does not end; None if it was served."""
        reader = self.start_read()
        try:
            reader.wait(1)
        except subprocess.TimeoutExpired:
            return reader
        reader.communicate()
        return None

    def reads(self):
        return len(self.report.read_bytes()) if self.report.exists() else 0

    def warm(self):
        """Pages in the cache: a second read does not reach the mount process."""
        assert self.read() == "4096"
        before = self.reads()
        assert self.read() == "4096"
        assert self.reads() == before

    def close(self):
        subprocess.run(["fusermount3", "-uzq", str(self.point)], check=False)
        self.process.kill()
        self.process.wait()


@pytest.fixture
def mounted(cluster, request):
    made = []

    def make(node, name="mnt"):
        made.append(Mounted(node, name))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_death_of_the_mount_process(cluster, mounted):
    """The guard aborts and purges: no cached page is served after PURGED."""
    node = cluster.found()
    mount = mounted(node)
    mount.warm()
    mount.process.kill()
    wait_until(lambda: node.events("instance.purged"), "purged")
    assert "not connected" in mount.read()
    wait_until(lambda: not node.status()["instances"], "the instance is gone")


def test_clean_unmount(cluster, mounted):
    node = cluster.found()
    mount = mounted(node)
    mount.warm()
    subprocess.run(["fusermount3", "-u", str(mount.point)], check=True)
    assert mount.process.wait(60) == 0
    wait_until(lambda: node.events("instance.left"), "it left")
    assert node.status()["instances"] == []
    assert not node.events("instance.purged")
    assert not node.events("instance.died")
    again = mounted(node, "again")
    again.warm()


def test_stopped_mount_is_put_out_and_purged(cluster, mounted):
    """Rule R9: a mount that makes no progress is barred; its cached pages go all the same."""
    node = cluster.found()
    mount = mounted(node)
    mount.warm()
    os.kill(mount.process.pid, signal.SIGSTOP)
    wait_until(lambda: node.events("instance.purged"), "purged")
    assert "not connected" in mount.read()


def test_death_of_clusterd_purges_all_mounts(cluster, mounted):
    node = cluster.found()
    mount = mounted(node)
    mount.warm()
    node.process.kill()
    wait_until(lambda: "not connected" in mount.read(), "the mount is dead")
    wait_until(lambda: not Path(f"/proc/{node.guard}").exists(), "the guard ends after its purge")


def test_lapsed_lease_empties_the_caches_and_comes_back(cluster, mounted):
    first, second = cluster.up(2)
    mount = mounted(first)
    mount.warm()
    for pid in (second.process.pid, second.guard):
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: first.events("lease.lapsed"), "the lease lapses without the other voter")
    reader = wait_until(mount.blocked_read, "the cached page is gone: a read waits")
    for pid in (second.guard, second.process.pid):
        os.kill(pid, signal.SIGCONT)
    assert reader.communicate(timeout=60)[0].strip() == "4096"
    assert first.events("lease.renewed")
    assert not first.events("instance.purged")


def test_a_guard_that_stops_before_its_purge_is_done_leaves_nothing_to_read(cluster, mounted):
    """Rule G3: it has closed the gate, but waits for an answer that is under way. clusterd aborts
    and purges the mount in its place."""
    first, second = cluster.up(2)
    mount = mounted(first)
    mount.warm()
    holder = Holder(mount)
    mount.process.send_signal(signal.SIGUSR2)
    assert mount.process.stdout.readline() == "under way True\n"
    for pid in (second.process.pid, second.guard):
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: first.events("lease.lapsed"), "the lease lapses without the other voter")
    os.kill(first.guard, signal.SIGSTOP)
    wait_until(lambda: "not connected" in holder.read(), "its page is gone")
    for pid in (first.guard, second.guard, second.process.pid):
        os.kill(pid, signal.SIGCONT)


def spawn(mount, name, program):
    """A program that opens a file of the mount as `fd`."""
    code = f"import os,sys\nfd=os.open(sys.argv[1],os.O_RDWR)\n{program}"
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(mount.point / name)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    mount.node.cluster.started.append(process)
    return process


RANDOM = "os.posix_fadvise(fd,0,0,os.POSIX_FADV_RANDOM)\n"


def test_lapse_goes_around_pages_of_unanswered_requests(cluster, mounted):
    """Rule G3: pages locked by a READ and by a WRITE, and a page that a WRITE has not locked. The
    mount is not aborted, everything cached is gone, and when the lease is back all are answered."""
    first, second = cluster.up(2)
    mount = mounted(first)
    mount.warm()
    holders = [Holder(mount, name) for name in ("data", "slow1", "slow2")]
    before = mount.reads()
    requests = [
        spawn(mount, "slow1", f"{RANDOM}print(len(os.pread(fd,8192,40960)))"),
        spawn(mount, "slow1", "print(os.pwrite(fd,b'y'*4096,53300))"),  # into pages without data
        spawn(mount, "slow2", "print(os.pwrite(fd,b'y'*10,100))"),  # into the page that has data
        spawn(mount, "slow2", "print(len(os.pread(fd,20000,40960)))"),  # with read-ahead
    ]
    wait_until(lambda: mount.reads() >= before + 2, "the reads have arrived")
    for pid in (second.process.pid, second.guard):
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: first.events("lease.lapsed"), "the lease lapses without the other voter")

    def dropped(holder, reads):
        """Asked again and again: it was served from the cache until a read reached the mount."""
        while mount.reads() == reads:
            if select.select([holder.process.stdout], [], [], 0.05)[0]:
                assert holder.answer() == "4096"
                holder.ask()
        return True

    for holder in holders:
        reads = mount.reads()
        holder.ask()
        wait_until(lambda h=holder, r=reads: dropped(h, r), "its page is gone")
    assert [process.poll() for process in requests] == [None] * 4
    for pid in (second.guard, second.process.pid):
        os.kill(pid, signal.SIGCONT)
    mount.process.send_signal(signal.SIGUSR1)
    answers = [process.communicate(timeout=60)[0].strip() for process in requests]
    assert answers == ["8192", "4096", "10", "20000"]
    assert [holder.answer() for holder in holders] == ["4096"] * 3
    assert first.events("lease.renewed")
    assert not first.events("instance.died")


def test_death_of_the_guard_purges_all_mounts(cluster, mounted):
    """Nobody is left to take pages back when clusterd has gone too: it does so itself."""
    node = cluster.found()
    mount = mounted(node)
    mount.warm()
    holder = Holder(mount)
    assert holder.read() == "4096"
    os.kill(node.guard, signal.SIGKILL)
    node.process.wait(60)
    assert "not connected" in holder.read()


def test_abort_from_outside_leaves_no_pages_behind(cluster, mounted):
    """As `umount -f`: the mount process says good-bye, but files are still open."""
    node = cluster.found()
    mount = mounted(node)
    mount.warm()
    holder = Holder(mount)
    connections = open_connections()
    minor = os.minor(os.stat(mount.point).st_dev)
    descriptor = os.open(f"{minor}/abort", os.O_WRONLY, dir_fd=connections)
    os.write(descriptor, b"1")
    for one in (descriptor, connections):
        os.close(one)
    wait_until(lambda: "not connected" in holder.read(), "the pages of the open file are gone")
    assert not node.events("instance.died")


def test_mounts_that_end_before_they_are_attached_cost_nothing(cluster, mounted):
    """Their instance never comes; the guard forgets them, and takes the next mount."""
    node = cluster.found()
    descriptors = Path(f"/proc/{node.guard}/fd")
    before = len(os.listdir(descriptors))
    life = node.status()["node"]["incarnation"]
    memory = os.memfd_create("table")
    os.ftruncate(memory, TABLE_BYTES)
    packet = {"attach": [1, life, 4000], "connection": 1, "mountpoint": "/nowhere"}
    for _ in range(WAITING_MAX + 10):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(node.run_dir / "guard.sock"))
            socket.send_fds(sock, [json.dumps(packet).encode()], [memory] * 3)
    wait_until(lambda: len(os.listdir(descriptors)) == before, "they are forgotten")
    os.close(memory)
    mounted(node).warm()
