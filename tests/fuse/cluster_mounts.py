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


def mount(node, *options):
    """Mount vg0/vol0 on a node."""
    path = node.base / "mnt"
    path.mkdir(exist_ok=True)
    words = ["-m", "cfs.mount", "vg0/vol0", str(path), "-f"]
    if options:
        words += ["-o", ",".join(options)]
    return Mounted(words, path, node.base / "mount.log", node.environment)


@contextlib.contextmanager
def cluster_mounts(base: Path, *options: str, count: int = 3, size: str = "600m"):
    """A cluster with a mounted file system: (cluster, mounts by node number)."""
    cluster = harness.Cluster(base)
    mounts: dict[int, Mounted] = {}
    try:
        first = cluster.up(count)[0]
        for number in (1, 2):
            server = harness.Server(cluster, number)
            server.configure(size)
            server.start()
        for words in (
            ("pvcreate", "s1/disk0", "s2/disk0"),
            ("vgcreate", "vg0", "s1/disk0", "s2/disk0"),
            ("lvcreate", "-n", "vol0", "-i", "2", "-I", "64k", "-L", "1g", "vg0"),
        ):
            first.tool("cvm.cli", *words)
        first.tool("cfs.mkfs", "-q", "vg0/vol0")
        for number in range(1, count + 1):
            mounts[number] = mount(cluster.node(number), *options)
        yield cluster, mounts
        for number, mounted in mounts.items():
            assert mounted.close() == 0, (number, mounted.log.read_text()[-3000:])
        check = subprocess.run(
            [sys.executable, "-m", "cfs.fsck.cli", "-n", "vg0/vol0"],
            env=first.environment, cwd=harness.ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert check.returncode == 0, check.stdout + check.stderr
    finally:
        for mounted in mounts.values():
            mounted.destroy()
        cluster.close()
