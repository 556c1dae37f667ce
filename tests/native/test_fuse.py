"""The FUSE session extension, on a small file system with clients in other processes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from native import notify
from native.requests import Opcode, RequestTable

sys.path.insert(0, str(Path(__file__).parent))
from fuse_mount import ROOT, blocked, mounted, wait_for

PAGE = 4096
READ_DIRECT = "fd = os.open('d', os.O_RDONLY); print(len(os.pread(fd, 4096, 0)))"
READ_ALL = "fd = os.open('f', os.O_RDONLY); print(len(os.pread(fd, 1 << 20, 0)))"
MAPPED_WRITE = """
fd = os.open('f', os.O_RDWR)
m = mmap.mmap(fd, 4096)
m[0:5] = b'DIRTY'
print('dirty', flush=True)
"""
EXPLICIT, AUTO, WRITEBACK = 1 << 25, 1 << 12, 1 << 16


@pytest.fixture
def mount(tmp_path):
    with mounted(tmp_path / "m") as result:
        yield result


@pytest.fixture
def gated(tmp_path):
    """A mount whose gate is open."""
    with mounted(tmp_path / "m", gate=True) as result:
        result.gate.set_lease_end(1 << 62)
        result.gate.set_word(1)
        result.do("gate")
        yield result


def test_init_says_what_was_set(tmp_path):
    settings = {"max_background": 5000, "congestion_threshold": 4000, "max_readahead_bytes": 65536}
    with mounted(tmp_path / "m", settings=settings) as mount:
        mount.do("put", "f", "x")
        assert mount.run("print(os.stat('f').st_mtime_ns)") == "1000000007"
        info = mount.do("session")
        assert info["agreed_bits"] & EXPLICIT
        assert not info["agreed_bits"] & (AUTO | WRITEBACK)
        assert info["offered_bits"] & AUTO
        assert info["kernel_minor"] >= 31
        assert info["max_write_bytes"] == 1 << 20
        assert info["max_readahead_bytes"] == 65536
        for name, value in (("max_background", 5000), ("congestion_threshold", 4000)):
            with mount.control(name) as control:
                assert control.read() == f"{value}\n"


def test_pyfuse3_first_is_refused():
    result = subprocess.run(
        [sys.executable, "-c", "import pyfuse3, native.fuse"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert "must be imported before pyfuse3" in result.stderr


def test_the_descriptor_never_blocks_the_loop(mount):
    mount.do("put", "f", "x")
    mount.run("os.stat('f')")
    descriptor = mount.descriptor("fd")
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NONBLOCK
    os.close(descriptor)


def test_write_flags_and_lock_owner(mount):
    mount.do("put", "f", "hello")
    mount.run(
        "fd = os.open('f', os.O_WRONLY | os.O_APPEND | os.O_DSYNC); os.write(fd, b'more');"
        "fd2 = os.open('f', os.O_WRONLY); os.write(fd2, b'H'); os.close(fd); os.close(fd2)"
    )
    first, second = mount.do("log", "WRITE")
    assert (first["offset"], first["size"], first["append"], first["sync"]) == (5, 4, True, True)
    assert (second["offset"], second["size"]) == (0, 1)
    assert not any(second[flag] for flag in ("append", "sync", "laundered"))
    flushes = mount.do("log", "FLUSH")
    assert len({row["lock_owner"] for row in flushes}) == 1
    assert all(row["lock_owner"] for row in flushes)
    assert first["pid"] == flushes[0]["pid"]
    wait_for(lambda: mount.count("RELEASE") == 2, "RELEASE of both")
    assert mount.do("log", "RELEASE")[0]["flags"] & os.O_APPEND
    assert mount.do("state")["mismatches"] == 0


def test_a_diverted_request_is_answered_past_libfuse(mount):
    mount.do("put", "f", "x")
    code = """
fd = os.open('f', os.O_RDONLY)
assert os.lseek(fd, 5, os.SEEK_DATA) == 12
try:
    os.lseek(fd, 2000, os.SEEK_HOLE)
except OSError as error:
    print(error.errno == errno.ENXIO)
"""
    assert mount.run(code) == "True"
    assert mount.pending(Opcode.LSEEK) == []
    assert mount.count("OPEN") == 1


def test_laundered_writes_are_known(mount):
    inode = mount.do("put", "f", "x" * PAGE)
    mount.run(MAPPED_WRITE + "m.flush()")
    (row,) = mount.do("log", "WRITE")
    assert row["laundered"]
    assert (row["inode"], row["offset"], row["size"]) == (inode, 0, PAGE)


def test_the_current_request_is_right_under_concurrency(mount):
    for index in range(4):
        mount.do("put", f"d{index}", "x" * 65536)
    code = """
import random, threading
rng = random.Random(int(sys.argv[1]))
def work(seed):
    rng = random.Random(seed)
    for _ in range(120):
        fd = os.open(f'd{rng.randrange(4)}', os.O_RDWR)
        for _ in range(4):
            at = rng.randrange(60000)
            if rng.random() < 0.5:
                os.pread(fd, rng.randrange(1, 5000), at)
            else:
                os.pwrite(fd, bytes(rng.randrange(1, 5000)), at)
        os.fsync(fd) if rng.random() < 0.5 else os.fdatasync(fd)
        os.listdir('.')
        os.close(fd)
threads = [threading.Thread(target=work, args=(rng.random(),)) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
"""
    clients = [mount.client(code, seed) for seed in range(3)]
    for client in clients:
        output, _ = client.communicate(timeout=60)
        assert client.returncode == 0, output
    state = mount.do("state")
    assert state["mismatches"] == 0
    assert state["counts"]["READ"] + state["counts"]["WRITE"] >= 3 * 4 * 120 * 4
    wait_for(lambda: not mount.do("state")["pending"], "no pending request")


def test_pages_are_kept_until_their_range_is_invalidated(mount):
    inode = mount.do("put", "f", "a" * (4 * PAGE))
    fill = "fd = os.open('f', os.O_RDONLY); print(os.pread(fd, 16384, 0)[::4096].decode())"
    assert mount.run(fill) == "aaaa"
    reads = mount.count("READ")
    for page, letter in enumerate("bcde"):
        mount.do("poke", inode, page * PAGE, letter)
    assert mount.run(fill) == "aaaa"
    assert mount.count("READ") == reads
    assert mount.do("notify", "invalidate_inode", inode, PAGE, PAGE) == 0
    assert mount.run(fill) == "acaa"
    assert mount.do("notify", "invalidate_attributes", inode) == 0
    getattrs = mount.count("GETATTR")
    assert mount.run(fill + "; os.fstat(fd)") == "acaa"
    assert mount.count("GETATTR") == getattrs + 1
    assert mount.do("notify", "invalidate_inode", inode) == 0
    assert mount.run(fill) == "bcde"
    assert mount.do("notify", "invalidate_inode", 999999) == 2  # ENOENT


def test_names_are_kept_until_expired_deleted_or_a_new_epoch(mount):
    mount.do("put", "f", "x")
    stat = "os.stat('f')"
    mount.run(stat)
    looked_up = mount.count("LOOKUP")

    def looks_up_again():
        nonlocal looked_up
        before, _ = looked_up, mount.run(stat)
        looked_up = mount.count("LOOKUP")
        return looked_up > before

    assert not looks_up_again()
    minor = mount.do("session")["kernel_minor"]
    for call, args, needed in (
        ("invalidate_entry", (1, "f"), 0),
        ("increment_epoch", (), notify.MINOR_INC_EPOCH),
        ("delete_entry", (1, 2, "f"), 0),
    ):
        result = mount.do("notify", call, *args)
        assert result == (0 if minor >= needed else 22)
        assert looks_up_again() is (result == 0)
        assert not looks_up_again()
    assert mount.do("notify", "prune", [2]) == (0 if minor >= notify.MINOR_PRUNE else 22)


def test_a_blocked_invalidation_does_not_stop_the_loop(mount):
    inode = mount.do("put", "f", "x" * PAGE)
    mount.run("os.stat('f')")
    mount.do("hold", ["READ"])
    client = mount.client(READ_ALL)
    wait_for(lambda: mount.pending(Opcode.READ), "a held READ")
    descriptor = mount.descriptor("fd")
    done = []
    thread = threading.Thread(
        target=lambda: done.append(notify.invalidate_inode(descriptor, inode)), daemon=True
    )
    thread.start()
    assert blocked(thread)
    assert mount.do("state")["mismatches"] == 0  # both processes go on
    mount.do("hold", [])
    thread.join(60)
    assert done == [0]
    assert client.communicate(timeout=60)[0] == f"{PAGE}\n"
    os.close(descriptor)


def test_another_process_invalidates_while_the_daemon_is_stopped(mount):
    inodes = [mount.do("put", f"f{index}", "x" * PAGE) for index in range(200)]
    read_all = "print(sum(len(open(f'f{i}', 'rb').read()) for i in range(200)))"
    mount.run(read_all)
    reads = mount.count("READ")
    mount.run(read_all)
    assert mount.count("READ") == reads
    descriptor = mount.descriptor("fd")
    table = memoryview(b"".join(n.to_bytes(8, "little") for n in [0, *inodes, 777777]))
    mount.process.send_signal(signal.SIGSTOP)
    try:
        sweep = notify.InodeSweep(descriptor, table)
        threads = [threading.Thread(target=sweep.run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sweep.complete
        assert sweep.done == 202
    finally:
        mount.process.send_signal(signal.SIGCONT)
    assert mount.run(read_all) == str(200 * PAGE)
    assert mount.count("READ") >= reads + 200
    mount.abort()
    sweep = notify.InodeSweep(descriptor, table)  # also after an abort (rule G4)
    assert sweep.run() == 0
    assert sweep.complete
    os.close(descriptor)
    assert notify.InodeSweep(0, table).run() != 0


def test_another_process_sees_the_pending_ranges(mount):
    inode = mount.do("put", "d", "x" * (64 * PAGE))
    table = RequestTable(mount.descriptor("table"))
    mount.run("os.stat('d')")
    wait_for(lambda: not table.rows(), "an empty table")
    mount.do("hold", ["READ"])
    client = mount.client(
        "fd = os.open('d', os.O_RDONLY); os.pread(fd, 8192, 12288); print('done')"
    )
    wait_for(lambda: mount.pending(Opcode.READ), "a held READ")
    mount.process.send_signal(signal.SIGSTOP)
    (row,) = table.rows()
    mount.process.send_signal(signal.SIGCONT)
    assert (row.opcode, row.inode, row.offset, row.size) == (Opcode.READ, inode, 12288, 8192)
    assert (row.pid, row.handle) == (client.pid, inode + 1000)
    assert (row.interrupted, row.answered) == (False, False)
    assert len(table) == 1
    mount.do("hold", [])
    assert client.communicate(timeout=60)[0] == "done\n"
    wait_for(lambda: not table.rows(), "an empty table")
    table.close()


@pytest.mark.parametrize("earlier_signal", [False, True])
def test_a_killed_caller_of_a_held_request_ends(mount, earlier_signal):
    mount.do("put", "d", "x" * PAGE)
    mount.do("hold", ["READ"])
    code = "signal.signal(signal.SIGUSR1, lambda *_: None);" + READ_DIRECT
    client = mount.client(code)
    wait_for(lambda: mount.pending(Opcode.READ), "a held READ")
    if earlier_signal:
        client.send_signal(signal.SIGUSR1)
        wait_for(lambda: mount.pending(Opcode.READ)[0]["interrupted"], "the interrupt")
        assert mount.do("state")["eintr"] == 0
    client.send_signal(signal.SIGKILL)
    client.wait(timeout=60)
    assert wait_for(lambda: mount.do("state")["eintr"] == 1, "EINTR")
    wait_for(lambda: not mount.do("state")["pending"], "no pending request")


def test_a_closed_gate_keeps_answers_until_it_opens(gated):
    gated.do("put", "f", "x" * PAGE)
    gated.run("os.stat('f')")
    gated.gate.set_word(2)
    client = gated.client(READ_ALL + "; os.close(fd)")
    row = wait_for(lambda: gated.pending(Opcode.READ), "a READ")[0]
    wait_for(lambda: gated.pending(Opcode.READ)[0]["answered"], "a kept answer")
    queue = gated.do("state")["queue"]
    assert (queue["answers"], queue["kept_total"], queue["sent_total"]) == (1, 1, 0)
    assert queue["bytes"] >= PAGE
    assert gated.do("flush") == 1
    assert gated.gate.in_flight() == 0
    gated.gate.set_word(1)
    assert gated.do("flush") == 0
    assert client.communicate(timeout=60)[0] == f"{PAGE}\n"
    assert row["unique"] not in [r["unique"] for r in gated.do("state")["pending"]]
    assert gated.do("state")["queue"]["sent_total"] == 1


@pytest.mark.parametrize("look", ["os.stat('f')", "list(os.scandir('.'))"])
def test_a_kept_answer_is_not_believed_afterwards(gated, look):
    """The kernel could not be told of a change meanwhile, because it knew nothing of the inode."""
    gated.run("os.stat('.')")
    inode = gated.do("put", "f", "x" * PAGE)
    gated.gate.set_word(2)
    client = gated.client(look)
    wait_for(lambda: gated.do("state")["queue"]["answers"], "a kept answer")
    gated.do("poke", inode, PAGE, "longer")
    gated.do("notify", "invalidate_inode", inode, -1, 0)
    gated.gate.set_word(1)
    assert gated.do("flush") == 0
    client.wait(timeout=60)
    assert gated.run("print(os.stat('f').st_size)").strip() == str(PAGE + 6)


def test_the_next_answer_flushes_the_kept_ones(gated):
    gated.do("put", "f", "x" * PAGE)
    gated.run("os.stat('f')")
    gated.gate.set_lease_end(1)  # the lease ended, nobody stored a word yet
    client = gated.client(READ_ALL)
    wait_for(lambda: gated.do("state")["queue"]["answers"], "a kept answer")
    gated.gate.set_lease_end(1 << 62)
    gated.run("os.path.exists('other')")  # an error passes, but flushes nothing
    gated.run("os.listdir('.')")
    assert client.communicate(timeout=60)[0] == f"{PAGE}\n"


def test_a_barred_gate_refuses(gated):
    gated.do("put", "d", "x" * PAGE)
    gated.run("os.stat('d')")
    gated.gate.set_word(2)
    code = """
fd = os.open('d', os.O_RDONLY)
try: os.pread(fd, 100, 0)
except OSError as e: print(errno.errorcode[e.errno])
"""
    client = gated.client(code)
    wait_for(lambda: gated.do("state")["queue"]["answers"], "a kept answer")
    gated.gate.set_word(3)
    assert gated.do("flush") == 0
    assert client.communicate(timeout=60)[0] == "ENOTCONN\n"
    assert gated.run(code) == "ENOTCONN"
    assert gated.do("state")["queue"]["refused_total"] == 2


def test_a_killed_caller_of_a_kept_answer_ends(gated):
    gated.do("put", "d", "x" * PAGE)
    gated.run("os.stat('d')")
    gated.gate.set_word(2)
    client = gated.client(READ_DIRECT)
    wait_for(lambda: gated.do("state")["queue"]["answers"], "a kept answer")
    client.kill()
    client.wait(timeout=60)
    queue = gated.do("state")["queue"]
    assert (queue["answers"], queue["refused_total"]) == (0, 1)
    assert not gated.do("abandon", 12345)


def test_what_a_kept_answer_has_counted_is_given_back_when_its_caller_is_killed(gated):
    gated.run("os.stat('.')")
    gated.gate.set_word(2)
    client = gated.client("os.open('f', os.O_CREAT | os.O_RDWR)")
    wait_for(lambda: gated.do("state")["queue"]["answers"], "a kept answer")
    client.kill()
    client.wait(timeout=60)
    wait_for(lambda: gated.do("state")["counts"].get("RELEASE") == 1, "the handle's release")
    queue = gated.do("state")["queue"]
    assert (queue["answers"], queue["sent_total"], queue["refused_total"]) == (0, 1, 0)
    gated.gate.set_word(1)
    gated.do("flush")
    looked_up = gated.do("state")["counts"]["LOOKUP"]
    gated.run("os.stat('f')")
    assert gated.do("state")["counts"]["LOOKUP"] == looked_up + 1  # its name is not believed


def test_a_closed_gate_lets_laundered_writes_flush_and_release_pass(gated):
    inode = gated.do("put", "f", "x" * PAGE)
    client = gated.client(MAPPED_WRITE + "sys.stdin.read(); m.close(); os.close(fd); print('end')")
    assert client.stdout.readline() == "dirty\n"
    gated.gate.set_word(2)
    assert gated.do("notify", "invalidate_inode", inode) == 0  # launders
    (row,) = gated.do("log", "WRITE")
    assert row["laundered"]
    assert gated.do("state")["queue"]["kept_total"] == 0


def test_a_closed_gate_grants_no_lock(tmp_path):
    settings = {"set_bits": EXPLICIT | 1 << 10}  # FLOCK_LOCKS
    with mounted(tmp_path / "m", settings=settings, gate=True) as mount:
        mount.gate.set_lease_end(1 << 62)
        mount.gate.set_word(1)
        mount.do("gate")
        mount.do("put", "f", "x")
        lock = """
fd = os.open('f', os.O_RDONLY)
try: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB); print('locked')
except OSError as e: print(errno.errorcode[e.errno])
"""
        assert mount.run(lock) == "locked"
        mount.gate.set_word(2)
        client = mount.client(lock)
        wait_for(lambda: mount.do("state")["queue"]["answers"], "a kept answer")
        mount.gate.set_word(3)
        mount.do("flush")
        assert client.communicate(timeout=60)[0] == "ENOTCONN\n"


def test_no_cache_is_filled_after_the_purge(gated):
    """Rule G2: answers in flight at the lapse do not put an old page back behind the purge."""
    inode = gated.do("put", "f", "old!" * (PAGE // 4))
    gated.run("os.stat('f')")
    gated.do("hold", ["READ"])
    client = gated.client("fd = os.open('f', os.O_RDONLY); print(os.pread(fd, 4, 0).decode())")
    wait_for(lambda: gated.pending(Opcode.READ), "a held READ")
    gated.gate.set_word(2)
    wait_for(lambda: gated.gate.in_flight() == 0, "nobody in flight")
    gated.do("hold", [])  # the daemon answers too late
    wait_for(lambda: gated.do("state")["queue"]["answers"], "a kept answer")
    gated.gate.set_word(3)
    gated.do("flush")
    client.wait(timeout=60)
    assert gated.do("notify", "invalidate_inode", inode) == 0
    assert json.dumps(gated.do("state")["pending"]) == "[]"


TWO_SESSIONS = """
import sys
sys.path.insert(0, sys.argv[2])
import trio
from tiny_fs import TinyFs
from native import fuse
# isort: split
import pyfuse3

async def session(fs):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pyfuse3.main)
        code = "import os, sys; os.listdir(sys.argv[1])"
        await trio.run_process([sys.executable, "-I", "-c", code, sys.argv[1]])
        assert fuse.current_request().unique
        pyfuse3.terminate()

assert not fuse.interposed()
for _ in range(2):
    fs = TinyFs()
    pyfuse3.init(fs, sys.argv[1], {*pyfuse3.default_options, "fsname=tiny"})
    assert fuse.interposed()
    assert fuse.session_fd() > 0
    assert fuse.session_info().agreed_bits == 0
    trio.run(session, fs)
    assert fs.counts["READDIRPLUS"] and not fs.mismatches
    assert fuse.session_info().agreed_bits
    pyfuse3.close()
    assert fuse.session_fd() == -1
    assert fuse.gate_flush() == 0
print("good")
"""


def test_sessions_one_after_another(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", TWO_SESSIONS, str(tmp_path), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=ROOT,
    )
    subprocess.run(["umount", "-l", str(tmp_path)], check=False, capture_output=True)
    assert result.stdout == "good\n", result.stderr
