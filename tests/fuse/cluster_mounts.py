"""Three nodes on this machine (addresses of 127/8), two block servers, a mount per node."""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from pathlib import Path

from tests.fuse.mounting import Mounted

_path = Path(__file__).parent.parent / "node" / "harness.py"
_spec = importlib.util.spec_from_file_location("node_harness", _path)
harness = sys.modules.get("node_harness") or importlib.util.module_from_spec(_spec)
if "node_harness" not in sys.modules:
    sys.modules["node_harness"] = harness
    _spec.loader.exec_module(harness)


VOLUME = "vg0/vol0"
DISK_SIZE = "600m"


def fsck(node, *options):
    """Run fsck.cfs on the volume, which is mounted nowhere: (exit code, what it said)."""
    done = subprocess.run(
        [sys.executable, "-m", "cfs.fsck.cli", *options, VOLUME],
        env=node.environment, cwd=harness.ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def mount(node, *options):
    """Mount the volume on a node."""
    path = node.base / "mnt"
    path.mkdir(exist_ok=True)
    words = ["-m", "cfs.mount.cli", VOLUME, str(path), "-f"]
    if options:
        words += ["-o", ",".join(options)]
    return Mounted(words, path, node.base / "mount.log", node.environment)


@contextlib.contextmanager
def cluster_mounts(
    base: Path, *options: str, count: int = 3, volume: str = "1g", mkfs: tuple[str, ...] = ()
):
    """A cluster with a mounted file system: (cluster, mounts by node number)."""
    cluster = harness.Cluster(base)
    mounts: dict[int, Mounted] = {}
    try:
        first = cluster.up(count)[0]
        for number in (1, 2):
            server = harness.Server(cluster, number)
            server.configure(DISK_SIZE)
            server.start()
        for words in (
            ("pvcreate", "s1/disk0", "s2/disk0"),
            ("vgcreate", "vg0", "s1/disk0", "s2/disk0"),
            ("lvcreate", "-n", "vol0", "-i", "2", "-I", "64k", "-L", volume, "vg0"),
        ):
            first.tool("cvm.cli", *words)
        first.tool("cfs.mkfs", "-q", *mkfs, VOLUME)
        for number in range(1, count + 1):
            mounts[number] = mount(cluster.node(number), *options)
        yield cluster, mounts
        for number, mounted in mounts.items():
            assert mounted.close() == 0, (number, mounted.log.read_text()[-3000:])
        code, text = fsck(first, "-n")
        assert code == 0, text
    finally:
        for mounted in mounts.values():
            mounted.destroy()
        cluster.close()
