"""Three mounts of one file system on three nodes: one view of it, whatever happens."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cfs.attributes import FILE_BYTES_MAX
from tests.fuse.cluster_mounts import cluster_mounts, harness, mount
from tests.fuse.mounting import scratch
from tests.fuse.test_attributes import RENAME_EXCHANGE, as_user, link_descriptor, run
from tests.fuse.test_names import rename2


@pytest.fixture(scope="module")
def mounts():
    """The mounts of a module, by node number, and their cluster. Groups are small, so that inode
    numbers come again soon."""
    small = ("--group-blocks", "1024")
    with scratch() as base, cluster_mounts(base, mkfs=small) as (cluster, mounts):
        yield cluster, mounts


def test_a_change_is_announced_only_where_something_of_it_is_cached(mounts):
    """The kernel of a node that caches nothing of a file is told nothing of its changes."""
    _cluster, on = mounts
    one, two = on[1].path / "unseen", on[2].path / "unseen"
    one.write_bytes(b"0")
    two.read_bytes()
    before = [on[number].counters()["notifications"] for number in (1, 2, 3)]
    for number in range(20):
        one.write_bytes(b"%d" % number)
        assert two.read_bytes() == b"%d" % number
    after = [on[number].counters()["notifications"] for number in (1, 2, 3)]
    one.unlink()
    assert after[1] >= before[1] + 20
    assert after[2] == before[2]


def judge(mounted, board, node, seed, *extra):
    """A judge of coherence on a mount."""
    words = [sys.executable, "-m", "lab.judge", mounted.path / "judge", "--board", board]
    words += ["--writer", str(node), "--seed", str(seed), *extra]
    return subprocess.Popen(
        [str(word) for word in words], cwd=harness.ROOT, stdout=subprocess.PIPE, text=True
    )


def test_each_sees_what_the_others_do(mounts):
    """Data, size, names, links, modes: visible on every other node at once."""
    _cluster, on = mounts
    one, two, three = (on[n].path for n in (1, 2, 3))
    (one / "f").write_bytes(b"first")
    assert (two / "f").read_bytes() == b"first"
    assert os.stat(three / "f").st_size == 5
    with (two / "f").open("ab") as file:
        file.write(b", second")
    assert (one / "f").read_bytes() == b"first, second"
    assert (three / "f").read_bytes() == b"first, second"
    os.rename(three / "f", three / "g")
    assert not (one / "f").exists()
    assert (two / "g").exists()
    os.truncate(one / "g", 3)
    assert (three / "g").read_bytes() == b"fir"
    os.chmod(two / "g", 0o640)
    os.link(one / "g", one / "h")
    found = os.stat(three / "h")
    assert (found.st_mode & 0o777, found.st_nlink) == (0o640, 2)
    for number, path in enumerate((one, two, three)):
        (path / f"d{number}").mkdir()
    names = {tuple(sorted(os.listdir(path))) for path in (one, two, three)}
    assert names == {("d0", "d1", "d2", "g", "h")}
    for number, path in enumerate((three, one, two)):
        (path / f"d{number}").rmdir()
    os.unlink(two / "h")
    assert os.listdir(three) == ["g"]


def test_attributes_are_the_same_on_all_nodes(mounts):
    """Lists that the kernels have cached, extended attributes, flags, exchanged names."""
    _cluster, on = mounts
    for mounted in on.values():
        for parent in (mounted.path.parent, mounted.path.parent.parent):
            parent.chmod(0o711)
    one, two, three = (on[n].path for n in (1, 2, 3))
    (one / "acl").write_text("content")
    os.chmod(one / "acl", 0o640)
    for node in (one, two, three):
        assert as_user("cat", node / "acl")[0] != 0
    run("setfacl", "-m", "u:1000:r", one / "acl")
    for node in (one, two, three):
        assert as_user("cat", node / "acl") == (0, "content")
        assert "user:1000:r--" in run("getfacl", "-n", "--absolute-names", node / "acl")
    os.chmod(two / "acl", 0o600)
    for node in (one, two, three):
        assert as_user("cat", node / "acl")[0] != 0
    run("setfacl", "-b", three / "acl")
    for node in (one, two, three):
        assert os.listxattr(node / "acl") == []
        assert "user:1000" not in run("getfacl", "-n", "--absolute-names", node / "acl")

    (one / "dir").mkdir()
    run("setfacl", "-d", "-m", "u:1000:rwx", two / "dir")
    (three / "dir" / "f").touch()
    assert "user:1000:rwx" in run("getfacl", "-n", "--absolute-names", one / "dir" / "f")
    for number, node in enumerate((one, two, three)):
        os.setxattr(node / "acl", "user.last", b"%d" % number * 30_000)
        for other in (one, two, three):
            assert os.getxattr(other / "acl", "user.last") == b"%d" % number * 30_000
    os.removexattr(one / "acl", "user.last")
    assert os.listxattr(two / "acl") == []

    kept = (two / "acl").open("r+b", buffering=0)
    run("chattr", "+i", one / "acl")
    for call in (lambda: kept.write(b"x"), lambda: os.unlink(three / "acl")):
        with pytest.raises(PermissionError):
            call()
    kept.close()
    run("chattr", "-i", three / "acl")

    assert os.listdir(two / "dir") == ["f"]
    rename2(one / "acl", one / "dir", RENAME_EXCHANGE)
    assert (two / "dir").read_text() == "content"
    assert os.listdir(three / "acl") == ["f"]
    descriptor = os.open(two, os.O_TMPFILE | os.O_RDWR, 0o644)
    os.write(descriptor, b"named later")
    link_descriptor(descriptor, two / "named")
    assert (one / "named").read_bytes() == b"named later"
    os.close(descriptor)
    for path in (one / "named", two / "dir", three / "acl" / "f"):
        path.unlink()
    (one / "acl").rmdir()


def test_a_volume_is_mounted_once_per_node(mounts):
    """At the same or another place it is refused with the holder, and with what to do instead."""
    cluster, on = mounts
    node = cluster.node(1)
    (node.base / "other").mkdir()
    holder = f"at {on[1].path} \\(pid {on[1].process.pid}\\)"
    told = {
        on[1].path: f"vg0/vol0 is mounted {holder}\n  hint: umount",
        node.base / "other": f"vg0/vol0 is mounted on this node already, {holder}\n"
        f"  hint: .*mount --bind {on[1].path} {node.base / 'other'}",
    }
    for place, text in told.items():
        done = subprocess.run(
            [sys.executable, "-m", "cfs.mount.cli", "vg0/vol0", place],
            env=node.environment, cwd=harness.ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 32
        assert re.fullmatch(f"mount.cfs: {text}.*\n", done.stderr), done.stderr
    assert not os.path.ismount(node.base / "other")


def test_an_open_file_outlives_its_name_on_another_node(mounts):
    """Unlinked on n2, read and written on n1."""
    _cluster, on = mounts
    fd = os.open(on[1].path / "doomed", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"still here")
    os.unlink(on[2].path / "doomed")
    assert not (on[3].path / "doomed").exists()
    assert os.pread(fd, 100, 0) == b"still here"
    os.pwrite(fd, b"!", 10)
    assert os.pread(fd, 100, 0) == b"still here!"
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)


def test_a_number_that_is_another_file_by_now(mounts, request):
    """Who has found a file long ago changes and links that one, or none."""
    _cluster, on = mounts
    one, two = (on[n].path for n in (1, 2))
    (one / "old").touch()
    found = os.open(one / "old", os.O_PATH)
    request.addfinalizer(lambda: os.close(found))
    ino, handle = os.fstat(found).st_ino, f"/proc/self/fd/{found}"
    os.unlink(two / "old")
    (two / "new").mkdir()
    deadline = time.monotonic() + 60
    number = 0
    while os.stat(two / "new" / str(number)).st_ino != ino if number else True:
        assert time.monotonic() < deadline
        number += 1
        (two / "new" / str(number)).touch(0o600)
    for change in (
        lambda: os.chmod(handle, 0o777),
        lambda: os.chown(handle, 1000, 1000),
        lambda: os.utime(handle, (1, 1)),
        lambda: link_descriptor(found, one / "linked"),
    ):
        with pytest.raises(OSError) as error:
            change()
        assert error.value.errno == errno.ESTALE
    left = os.stat(two / "new" / str(number))
    assert (left.st_ino, left.st_mode & 0o777, left.st_nlink, left.st_uid) == (ino, 0o600, 1, 0)
    assert left.st_mtime > 1


def test_appends_of_all_nodes(mounts):
    """Records up to 1 MiB, ragged buffers, from three nodes at once: every record whole."""
    _cluster, on = mounts
    (on[1].path / "log").touch()
    program = (
        "import os,sys\nfd=os.open(sys.argv[1],os.O_WRONLY|os.O_APPEND)\n"
        "me=int(sys.argv[2])\n"
        "for i in range(24):\n"
        "    n=[20,5000,70000,1<<20,(1<<20)-1][i%5]\n"
        "    record=b'%04d%04d%08d'%(me,i,n)+bytes([65+me])*(n-17)+b'\\n'\n"
        "    assert os.write(fd,record)==len(record)\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", program, on[n].path / "log", str(n)]) for n in on
    ]
    assert [process.wait() for process in running] == [0] * 3
    found, data, at = [], (on[2].path / "log").read_bytes(), 0
    while at < len(data):
        node, number, size = (int(data[at + a : at + b]) for a, b in ((0, 4), (4, 8), (8, 16)))
        assert data[at + 16 : at + size] == bytes([65 + node]) * (size - 17) + b"\n"
        found.append((node, number))
        at += size
    assert sorted(found) == [(node, number) for node in on for number in range(24)]


def test_a_write_that_fails_takes_nothing_of_others_away(mounts):
    """The kernel cuts a file back to the end that it remembers when a write past the page cache
    fails, and what it remembers may be old."""
    _cluster, on = mounts
    one, two = (on[n].path / "unwritten" for n in (1, 2))
    one.write_bytes(b"")
    fd = os.open(one, os.O_RDWR | os.O_DIRECT)
    assert os.fstat(fd).st_size == 0
    content = b"precious" * 1000
    two.write_bytes(content)
    with pytest.raises(OSError, match="too large"):
        os.pwrite(fd, mmap.mmap(-1, 4096), FILE_BYTES_MAX)
    assert two.read_bytes() == content
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.pwrite(fd, ctypes.c_void_p(8192), 4096, 0) == -1
    assert ctypes.get_errno() == errno.EFAULT
    assert two.read_bytes() == one.read_bytes() == content
    os.ftruncate(fd, 8)
    assert two.read_bytes() == b"precious"
    os.close(fd)


def test_an_append_may_take_its_time(mounts):
    """The writer is held up in the middle of its record, in a page fault of its buffer: another
    node's record comes after it, however long that takes."""
    _cluster, on = mounts
    for number in (1, 2):
        (on[number].path / "slow").touch()
    held = subprocess.Popen(
        [sys.executable, harness.ROOT / "tests/fuse/held_append.py", on[1].path / "slow"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert held.stdout.readline() == "held\n"
        program = "import sys; open(sys.argv[1], 'ab').write(b'last')"
        other = subprocess.Popen([sys.executable, "-c", program, on[2].path / "slow"])
        with contextlib.suppress(subprocess.TimeoutExpired):
            other.wait(2)
        assert other.poll() is None
        assert held.communicate("go\n", 60) == ("ended\n", None)
        assert other.wait(60) == 0
    finally:
        held.kill()
        held.wait()
    data = (on[2].path / "slow").read_bytes()
    assert data.strip(b"r") == b"last"
    assert data.endswith(b"last")


def test_nothing_is_stale(mounts, chooser):
    """The judge on all nodes at once."""
    _cluster, on = mounts
    seed = chooser.randrange(1 << 30)
    board = on[1].log.parent.parent / "board"
    (on[1].path / "judge").mkdir()
    assert judge(on[1], board, 1, seed, "--prepare").wait() == 0
    extra = ("--checks", "20000", "--seconds", "15")
    running = [judge(on[n], board, n, seed + n, *extra) for n in on]
    results = [json.loads(p.communicate(timeout=120)[0].splitlines()[-1]) for p in running]
    print(results, {n: on[n].counters() for n in on})
    assert [result["stale"] for result in results] == [0] * 3
    assert not any(result["lost"] for result in results)
    assert sum(sum(result["writes"].values()) for result in results) > 20


def test_a_mount_that_dies_costs_nothing_that_was_synced(mounts):
    """SIGKILL of a mount: what it had fsynced is there, the others go on, it comes back."""
    cluster, on = mounts
    program = (
        "import os,sys\nfd=os.open(sys.argv[1],os.O_CREAT|os.O_RDWR)\n"
        "for i in range(100000):\n"
        "    os.pwrite(fd,b'%08d'%i,0); os.fsync(fd)\n"
        "    sys.stdout.write('%d\\n'%i); sys.stdout.flush()\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", program, on[3].path / "synced"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    seen = [int(writer.stdout.readline()) for _ in range(20)][-1]
    on[3].process.kill()
    seen = max([seen, *(int(line) for line in writer.stdout)])
    writer.wait()
    started = time.monotonic()
    for number in (1, 2):
        assert int((on[number].path / "synced").read_bytes()) >= seen
        (on[number].path / f"after-{number}").write_bytes(b"x")
    print(f"the survivors stalled for {time.monotonic() - started:.2f} s")
    on[3].destroy()
    on[3] = mount(cluster.node(3))
    assert int((on[3].path / "synced").read_bytes()) >= seen
    (on[3].path / "back").touch()
    assert (on[1].path / "back").exists()


def test_shared_mappings_of_all_nodes(mounts):
    """Stores through MAP_SHARED on every node into one page: none is lost, all are seen."""
    _cluster, on = mounts
    (on[1].path / "page").write_bytes(bytes(8192))
    # struct.pack_into is no single store: it zeroes the place first.
    program = (
        "import ctypes,mmap,os,sys,time\n"
        "fd=os.open(sys.argv[1],os.O_RDWR); me=int(sys.argv[2])\n"
        "view=mmap.mmap(fd,8192); seen=[0]*4; value=0; end=time.monotonic()+4\n"
        "slots=[ctypes.c_uint64.from_buffer(view,n*64) for n in range(4)]\n"
        "second=ctypes.c_uint64.from_buffer(view,4096+me*8)\n"
        "while time.monotonic()<end:\n"
        "    value+=1\n"
        "    old=slots[me].value\n"
        "    assert old==value-1,(old,value)\n"
        "    slots[me].value=value\n"
        "    second.value=value\n"
        "    for other in (1,2,3):\n"
        "        now=slots[other].value\n"
        "        assert now>=seen[other],(other,now,seen)\n"
        "        seen[other]=now\n"
        "print(value)\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-c", program, on[n].path / "page", str(n)],
            stdout=subprocess.PIPE, text=True,
        )
        for n in on
    ]  # fmt: skip
    values = [int(process.communicate(timeout=60)[0]) for process in running]
    print(values)
    for mounted in on.values():
        data = (mounted.path / "page").read_bytes()
        assert values == [int.from_bytes(data[n * 64 : n * 64 + 8], "little") for n in on]
        assert values == [int.from_bytes(data[4096 + n * 8 : 4104 + n * 8], "little") for n in on]


def test_writes_to_pages_that_were_evicted(mounts):
    """Small writes of all nodes to pages that are recorded as cached and are not: each keeps its
    page locked while it waits for EX under PR, in the way of the revocation that it needs."""
    _cluster, on = mounts
    (on[1].path / "evicted").write_bytes(bytes(64 * 4096))
    program = (
        "import os,random,sys,time\n"
        "fd=os.open(sys.argv[1],os.O_RDONLY); out=os.open(sys.argv[1],os.O_WRONLY)\n"
        "me=int(sys.argv[2]); choose=random.Random(int(sys.argv[3])); end=time.monotonic()+6\n"
        "mine={}; count=0\n"
        "while time.monotonic()<end:\n"
        "    os.pread(fd,64*4096,0)\n"
        "    page=choose.randrange(64)\n"
        "    os.posix_fadvise(fd,page*4096,4096,os.POSIX_FADV_DONTNEED)\n"
        "    count+=1; mine[page]=count\n"
        "    os.pwrite(out,count.to_bytes(8,'little'),page*4096+me*100)\n"
        "    assert os.pread(fd,8,page*4096+me*100)==count.to_bytes(8,'little')\n"
        "print(count,[(p*4096+me*100,v) for p,v in mine.items()],sep='|')\n"
    )
    words = [sys.executable, "-c", program]
    running = [
        subprocess.Popen(
            [*words, on[n].path / "evicted", str(n), str(n)], stdout=subprocess.PIPE, text=True
        )
        for n in on
    ]
    answers = [process.communicate(timeout=60)[0].split("|") for process in running]
    print([count for count, _ in answers], {n: on[n].counters()["revoke_detours"] for n in on})
    for mounted in on.values():
        data = (mounted.path / "evicted").read_bytes()
        for _, written in answers:
            for at, value in json.loads(written.replace("(", "[").replace(")", "]")):
                assert int.from_bytes(data[at : at + 8], "little") == value


def test_mounts_tell_whom_they_do_not_reach(mounts):
    """clusterd judges circuits by these answers."""
    cluster, _on = mounts
    for node in map(cluster.node, (1, 2, 3)):
        harness.wait_until(
            lambda node=node: [row["result"] for row in node.call("dlm.circuits")]
            == [{"unreached": []}],
            f"{node.name} reaches everybody",
        )  # fmt: skip


def test_a_mount_without_clusterd_ends(mounts):
    """SIGKILL of clusterd: its guard ends the mount, callers get errors, the others go on."""
    cluster, on = mounts
    node = cluster.node(3)
    (on[3].path / "cached").write_bytes(b"old")
    assert (on[3].path / "cached").read_bytes() == b"old"
    fd = os.open(on[3].path / "cached", os.O_RDONLY)
    node.process.kill()
    node.process.wait()
    assert on[3].process.wait(60) != 0
    (on[1].path / "cached").write_bytes(b"newer")  # needs the dead node's caches to be empty
    with pytest.raises(OSError):
        os.pread(fd, 10, 0)
    with contextlib.suppress(OSError):  # close() tells of the end, too
        os.close(fd)
    assert (on[2].path / "cached").read_bytes() == b"newer"
    on[3].destroy()
    node.start()
    cluster.wait_view([1, 2, 3])
    on[3] = mount(node)
    assert (on[3].path / "cached").read_bytes() == b"newer"


def test_a_stopped_mount_is_put_out(mounts):
    """SIGSTOP of a mount process: its locks go, its kernel serves nothing old, it is aborted."""
    cluster, on = mounts
    (on[3].path / "held").write_bytes(b"old")
    fd = os.open(on[3].path / "held", os.O_RDONLY)
    assert os.pread(fd, 10, 0) == b"old"
    on[3].process.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    (on[1].path / "held").write_bytes(b"newer")
    print(f"the others waited {time.monotonic() - started:.2f} s")
    with pytest.raises(OSError):
        os.pread(fd, 10, 0)
    with contextlib.suppress(OSError):  # close() tells of the end, too
        os.close(fd)
    on[3].process.send_signal(signal.SIGCONT)
    assert on[3].process.wait(60) != 0
    on[3].destroy()
    on[3] = mount(cluster.node(3))
    assert (on[3].path / "held").read_bytes() == b"newer"


def test_a_lost_mount_comes_back_by_itself(mounts):
    """A mount in the background is remembered until it is unmounted: it comes back after the death
    of its process and after a power cut, and what was open in the old one gets ENOTCONN."""
    cluster, on = mounts
    node = cluster.node(3)
    assert on.pop(3).close() == 0
    path = node.base / "mnt"
    command = [sys.executable, "-m", "cfs.mount.cli", "vg0/vol0", str(path), "-o", "noatime"]

    def run(*words):
        return subprocess.run(
            words, env=node.environment, cwd=harness.ROOT, capture_output=True, text=True
        )

    def remembered():
        return [row["mountpoint"] for row in node.call("mounts.list")]

    def is_back():
        with contextlib.suppress(OSError):
            return (path / "kept").read_bytes() == b"safe"

    try:
        done = run(*command)
        assert done.returncode == 0, done.stderr
        (path / "kept").write_bytes(b"safe")
        again = run(*command)
        assert again.returncode == 32
        assert "mounted at" in again.stderr
        for loss in ("mount", "power"):
            file = os.open(path / "kept", os.O_RDONLY)
            os.fsync(file)
            if loss == "mount":
                (row,) = [i for i in node.status()["instances"] if i["kind"] == "mount"]
                os.kill(row["pid"], signal.SIGKILL)
            else:
                node.kill()
                node.start()
            harness.wait_until(is_back, f"mounted again after the loss of {loss}")
            with pytest.raises(OSError, match="not connected"):
                os.read(file, 10)
            with contextlib.suppress(OSError):  # close() tells of the end, too
                os.close(file)
            assert "noatime" in str(node.call("mounts.list"))
        assert run("umount", str(path)).returncode == 0
        harness.wait_until(lambda: not remembered(), "the clean unmount is forgotten for")
    finally:
        run("umount", "-lf", str(path))
        node.call("mounts.forget", {"mountpoint": str(path)})
    on[3] = mount(node)


def test_tools_reach_the_mounts(mounts):
    """df, journals and sync through clusterd; the lock manager's own tool."""
    cluster, on = mounts
    (on[2].path / "f").write_bytes(b"x")
    node = cluster.node(2)
    place = {"mountpoint": str(on[2].path)}
    rows = node.call("cfs.journals", place)
    assert rows, "at least one journal"
    assert node.call("cfs.df", place)["blocks"] > 1000
    assert node.call("cfs.sync", place) == {}
    assert node.call("cfs.counters", place)["create"] >= 1
    assert node.call("dlm.spaces", place)


def test_a_mount_ended_by_force_comes_back(mounts):
    """umount -f refuses, with consent it discards; the mount comes back, also when it
    was the only one, and so master of every lock: it waits for its own recovery."""
    cluster, on = mounts
    node = cluster.node(3)
    (on[3].path / "kept").write_bytes(b"kept")
    os.sync()
    node.call("cfs.sync", {"mountpoint": str(on[3].path)})
    for number in (1, 2):
        assert on[number].close() == 0
    words = [sys.executable, "-m", "cfs.mount.umount_cli", "-f", str(on[3].path)]
    how = {"env": node.environment, "cwd": harness.ROOT, "capture_output": True, "text": True}
    refused = subprocess.run(words, **how, timeout=60)
    assert refused.returncode == 32, refused.stderr
    assert "not yet durable" in refused.stdout
    assert "--yes" in refused.stderr
    assert (on[3].path / "kept").read_bytes() == b"kept"
    ended = subprocess.run([*words, "--yes"], **how, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "not yet durable" in ended.stdout
    assert on[3].process.wait(60) != 0
    assert not os.path.ismount(on[3].path)
    on[3].destroy()
    for number in (3, 1, 2):
        on[number] = mount(cluster.node(number))
        assert (on[number].path / "kept").read_bytes() == b"kept"
