"""Bad input that needs no daemon: one sentence, a hint, an exit code; and nothing has changed.

A row: what it is called, the files that are there, what is typed, the exit code, words of the
complaint. `{dir}` stands for the directory, also in files.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import pytest
import trio

from cfs.mkfs_plan import Choices, plan
from cluster import holders_io, signatures_io
from cluster.config import ClusterSection, NodeConfig, NodeSection, Token, encode_token
from cluster.device_file_io import FileDevice
from cluster.ids import NodeId, ServerId
from cluster.paths_io import encode_store, lock_directory
from cluster.state import NodeInfo, encode_state, initial_state
from cvm.metadata import DATA_OFFSET_BYTES, PvLabel, encode_label
from gnbd.identity import ServerIdentity, encode_identity, encode_server_token
from lab.block_server import reserve_port
from tests.hostile.disks import loop_device
from tests.hostile.tools import one_sentence, run, snapshot

ID, KEY, OTHER = "ab" * 16, "cd" * 32, "ef" * 16
NODE_TOML = f"""
[cluster]
id = "{ID}"
name = "prod"
key = "{KEY}"

[node]
id = 1
name = "n1"
addresses = ["127.0.0.1"]
"""
EXPORTS = """
state_dir = "{dir}/gnbd"
listen = "127.0.0.1"
port = 0
heartbeat_port = 0
[[exports]]
name = "disk0"
path = "{dir}/disk0"
size = "1M"
"""
INIT = "clusterctl init --name prod --node n1 --id 1 --address 127.0.0.1"


def token(key: str = KEY) -> str:
    state = initial_state(ID, "prod", "default", NodeInfo(NodeId(1), "n1", ["127.0.0.1"]))
    config = NodeConfig(
        ClusterSection(ID, "prod", key), NodeSection(NodeId(2), "n2", ["127.0.0.2"])
    )
    return encode_token(Token(config, state))


def identity(cluster_id: str = ID) -> ServerIdentity:
    return ServerIdentity(cluster_id, "prod", KEY, ServerId(129), "s1")


def known(node: str = "n1") -> bytes:
    state = initial_state(ID, "prod", "default", NodeInfo(NodeId(1), node, ["127.0.0.1"]))
    return encode_store(encode_state(state))


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


def cfs_image(blocks: int = 4096) -> bytes:
    image = bytearray(blocks * 4096)
    choices = Choices(bytes(16), bytes(16), 0, label="precious")
    for block, data in plan(blocks, choices).writes:
        image[block * 4096 : block * 4096 + len(data)] = data
    return bytes(image)


NODE = {"state/node.toml": NODE_TOML, "state/known": known()}

CONFIGURATION = [
    ("no node.toml", {}, "clusterd", 2, "is in no cluster"),
    ("node.toml is a directory", {"state/node.toml/x": ""}, "clusterd", 2, "Is a directory"),
    ("node.toml is no TOML", {"state/node.toml": "[cluster"}, "clusterd", 2, "node.toml"),
    ("node.toml is noise", {"state/node.toml": b"\xff\x00\xfe"}, "clusterd", 2, "node.toml"),
    ("node.toml is empty", {"state/node.toml": ""}, "clusterd", 2, "missing required field"),
    ("an unknown key", {"state/node.toml": NODE_TOML + 'colour = "red"'}, "clusterd", 2,
     "colour.*\\$.node"),
    ("a wrong type", {"state/node.toml": changed(NODE_TOML, "id = 1", 'id = "one"')}, "clusterd",
     2, "\\$.node.id"),
    ("node id 65", {"state/node.toml": changed(NODE_TOML, "id = 1", "id = 65")}, "clusterd", 2,
     "\\$.node.id"),
    ("a short key", {"state/node.toml": changed(NODE_TOML, KEY, KEY[2:])}, "clusterd", 2,
     "\\$.cluster.key"),
    ("an unknown profile", {"state/node.toml": changed(NODE_TOML, 'key =', 'profile="x"\nkey =')},
     "clusterd", 2, "\\$.cluster.profile"),
    ("an address that is none", {"state/node.toml": changed(NODE_TOML, "127.0.0.1", "n1.local")},
     "clusterd", 2, "n1.local.*\\$.node"),
    ("port 0", {"state/node.toml": NODE_TOML + "[ports]\ncontrol = 0"}, "clusterd", 2,
     "\\$.ports.control"),
    ("known is missing", {"state/node.toml": NODE_TOML}, "clusterd", 2, "known.*join"),
    ("known is damaged", {**NODE, "state/known": known()[:-1]}, "clusterd", 11, "known is damaged"),
    ("the acceptor is damaged", {**NODE, "state/acceptor": b"CFSstor1junk"}, "clusterd", 11,
     "acceptor is damaged.*voter replace"),
    ("the id of another node", {**NODE, "state/known": known("n7")}, "clusterd", 2,
     "id 1.*n7"),
    ("known of another cluster",
     {"state/node.toml": changed(NODE_TOML, ID, OTHER), "state/known": known()}, "clusterd", 8,
     "another cluster"),
]  # fmt: skip

CLUSTERCTL = [
    ("init here twice", NODE, INIT, 4, "already n1 of cluster prod"),
    ("init over rubbish", {"state/node.toml": "x"}, INIT, 2, "node.toml"),
    ("a cluster without a name", {}, changed(INIT, "prod", "''"), 2, "name"),
    ("a name with a space", {}, changed(INIT, "prod", "'a b'"), 2, "\\$.cluster.name"),
    ("a name of 64 letters", {}, changed(INIT, "prod", "n" * 64), 2, "\\$.cluster.name"),
    ("a node name with a slash", {}, changed(INIT, "n1", "n/1"), 2, "\\$.node.name"),
    ("a host name as address", {}, changed(INIT, "127.0.0.1", "example.org"), 2, "example.org"),
    ("an address with a port", {}, changed(INIT, "127.0.0.1", "127.0.0.1:7400"), 2, ":7400"),
    ("the same address twice", {}, INIT + " --address 127.0.0.1", 2, "twice"),
    ("five networks", {}, INIT + "".join(f" --address 127.0.0.{n}" for n in range(2, 6)), 2,
     "at most|<= 4"),
    ("a state directory that is a file", {"state": "x"}, INIT, 2, "state is not a directory"),
    ("no token", {}, "clusterctl join ''", 2, "not an invitation token"),
    ("a token that was cut", {}, f"clusterctl join {token()[:-9]}", 2, "not an invitation token"),
    ("a token for a server", {}, f"clusterctl join {encode_server_token(identity())}", 2,
     "gnbd-server --join"),
    ("join twice", NODE, f"clusterctl join {token()}", 4, "already n1"),
    ("recover without --yes", {}, "clusterctl recover prod --voters n1", 4, "--yes"),
    ("no clusterd", NODE, "clusterctl status", 6, "clusterd"),
    ("no clusterd for dlmctl", {}, "dlmctl spaces", 6, "clusterd"),
    ("no clusterd for fencectl", {}, "fencectl status", 6, "clusterd"),
    ("no clusterd for cfsctl", {}, "cfsctl df /mnt/cfs", 6, "clusterd"),
    ("no clusterd for cvmctl", {}, "cvmctl vgs", 6, "clusterd"),
]  # fmt: skip


def exports(old: str = "", new: str = "", more: str = "") -> dict[str, str | bytes]:
    return {"exports.toml": (changed(EXPORTS, old, new) if old else EXPORTS) + more}


SERVE = "gnbd-server {dir}/exports.toml"
GNBD = [
    ("no exports file", {}, SERVE, 2, "exports.toml"),
    ("the exports file is a directory", {"exports.toml/x": ""}, SERVE, 2, "exports.toml"),
    ("the exports file is noise", {"exports.toml": b"\xfe\xff\x00"}, SERVE, 2, "exports.toml"),
    ("no state_dir", exports('state_dir = "{dir}/gnbd"', ""), SERVE, 2, "state_dir"),
    ("unknown key of an export", exports(more="colour = 1"), SERVE, 2, "colour.*exports"),
    ("unknown access", exports(more='access = "all"'), SERVE, 2, "\\$.exports\\[0\\].access"),
    ("a size that is none", exports("1M", "4X"), SERVE, 2, "exports\\[0\\].size.*4X"),
    ("a size of 1000", exports("1M", "1000"), SERVE, 2, "exports\\[0\\].size.*512"),
    ("a negative size", exports('"1M"', "-512"), SERVE, 2, "exports\\[0\\].size"),
    ("a size beyond all disks", exports("1M", "9000P"), SERVE, 2, "exports\\[0\\].size"),
    ("a name used twice", exports(more='[[exports]]\nname = "disk0"\npath = "{dir}/b"'), SERVE, 2,
     "used twice"),
    ("a file used twice",
     exports(more='[[exports]]\nname = "b"\npath = "{dir}/./disk0"\nsize = "1M"'), SERVE, 2,
     "disk0.*the same disk"),
    ("an unknown filter", exports(more='filters = ["shuffle"]'), SERVE, 2, "shuffle"),
    ("a filter with a wrong number", exports(more='filters = ["delay:read_ms=x"]'), SERVE, 2,
     "read_ms"),
    ("a filter with a negative number", exports(more='filters = ["delay:read_ms=-1"]'), SERVE, 2,
     "read_ms"),
    ("an address that is none", exports("127.0.0.1", "s1.local"), SERVE, 2, "s1.local"),
    ("an address of another machine", exports("127.0.0.1", "192.0.2.1"), SERVE, 2,
     "192.0.2.1.*not an address of this machine"),
    ("port 70000", exports("port = 0", "port = 70000"), SERVE, 2, "\\$.port"),
    ("no disk and no size", exports('size = "1M"', ""), SERVE, 2, "disk0.*size"),
    ("the disk is a directory", {**exports(), "disk0/x": ""}, SERVE, 2, "disk0.*directory"),
    ("the disk is a terminal", exports("{dir}/disk0", "/dev/null"), SERVE, 2,
     "/dev/null.*neither"),
    ("an empty disk without a size", {**exports('size = "1M"', ""), "disk0": b""}, SERVE, 10,
     "disk0.*empty"),
    ("state_dir is a file", {**exports(), "gnbd": "x"}, SERVE, 2, "gnbd.*directory"),
    ("the state is damaged", {**exports(), "gnbd/fencing.state": b"x" * 99}, SERVE, 11,
     "fencing.state is damaged"),
    ("the acceptor is damaged",
     {**exports(), "gnbd/server.toml": encode_identity(identity()), "gnbd/acceptor": b"x"}, SERVE,
     11, "acceptor is damaged"),
    ("server.toml is noise", {**exports(), "gnbd/server.toml": b"\xff"}, SERVE, 2, "server.toml"),
    ("server.toml has a wrong id",
     {**exports(), "gnbd/server.toml": changed(encode_identity(identity()), "129", "7")}, SERVE, 2,
     "\\$.server_id"),
    ("a token that is none", exports(), f"gnbd-server --join nonsense {SERVE.split()[1]}", 2,
     "not a server token"),
    ("a token for a node", exports(), f"gnbd-server --join {token()} {SERVE.split()[1]}", 2,
     "clusterctl join"),
    ("a token of another cluster",
     {**exports(), "gnbd/server.toml": encode_identity(identity(OTHER))},
     f"gnbd-server --join {encode_server_token(identity())} {SERVE.split()[1]}", 8,
     "s1 of cluster prod"),
]  # fmt: skip

CTL = "gnbdctl --config {dir}/state/node.toml -s"
GNBDCTL = [
    ("no node.toml", {}, f"{CTL} 127.0.0.1 exports", 2, "node.toml.*on a node"),
    ("a port that is no number", NODE, f"{CTL} 127.0.0.1:x exports", 2, "127.0.0.1:x"),
    ("port 0", NODE, f"{CTL} 127.0.0.1:0 exports", 2, "port"),
    ("port 70000", NODE, f"{CTL} 127.0.0.1:70000 exports", 2, "port"),
    ("nobody listens", NODE, f"{CTL} 127.0.0.1:1 exports", 6, "gnbd-server running"),
    ("a name without clusterd", NODE, f"{CTL} s1 exports", 6, "clusterd"),
    ("an unknown filter", NODE, f"{CTL} 127.0.0.1:1 filter disk0 add shuffle", 2, "shuffle"),
    ("a filter without a value", NODE, f"{CTL} 127.0.0.1:1 filter disk0 add delay:read_ms", 2,
     "read_ms"),
]  # fmt: skip

MKFS = [
    ("no such file", {}, "mkfs.cfs {dir}/image", 7, "image"),
    ("a directory", {"image/x": ""}, "mkfs.cfs {dir}/image", 2, "image.*directory"),
    ("a character device", {}, "mkfs.cfs /dev/null", 2, "/dev/null.*neither"),
    ("an empty file", {"image": b""}, "mkfs.cfs {dir}/image", 10, "at least \\d+ MiB"),
    ("a small file", {"image": bytes(1 << 20)}, "mkfs.cfs {dir}/image", 10, "at least \\d+ MiB"),
    ("no volume", {}, "mkfs.cfs vol0", 2, "VG/LV"),
    ("too many slashes", {}, "mkfs.cfs a/b/c", 2, "VG/LV"),
    ("an empty name", {}, "mkfs.cfs ''", 2, "VG/LV"),
    ("a volume without clusterd", {}, "mkfs.cfs vg0/vol0", 6, "clusterd"),
    ("a journal size that is none", {"image": bytes(16 << 20)},
     "mkfs.cfs -J big {dir}/image", 2, "big"),
    ("a tiny journal", {"image": bytes(16 << 20)}, "mkfs.cfs -J 4k {dir}/image", 2, "journal"),
    ("a huge journal", {"image": bytes(16 << 20)}, "mkfs.cfs -J 1G {dir}/image", 2, "journal"),
    ("too many journals", {"image": bytes(16 << 20)},
     "mkfs.cfs -j 64 -J 512k {dir}/image", 10, "journals"),
    ("a label of 64 bytes", {"image": bytes(16 << 20)},
     f"mkfs.cfs -L {'l' * 64} {{dir}}/image", 2, "label.*63"),
    ("groups of 3 blocks", {"image": bytes(16 << 20)},
     "mkfs.cfs --group-blocks 3 {dir}/image", 2, "group"),
    ("a file system of ours", {"image": cfs_image()}, "mkfs.cfs {dir}/image", 4,
     "cfs file system called 'precious'"),
    ("fsck of nothing", {}, "fsck.cfs {dir}/image", 8, "image"),
    ("fsck of a directory", {"image/x": ""}, "fsck.cfs {dir}/image", 16, "image.*directory"),
    ("fsck without clusterd", {}, "fsck.cfs vg0/vol0", 8, "clusterd"),
    ("fsck of no volume", {}, "fsck.cfs vol0", 16, "VG/LV"),
]  # fmt: skip

LAB = [
    ("no lab", {}, "cfs-lab status", 2, "cfs-lab up"),
    ("no lab to ask", {}, "cfs-lab exec n1 true", 2, "cfs-lab up"),
    ("a directory with something else", {"lab/precious": "x"}, "cfs-lab up", 2,
     "not empty and holds no lab"),
    ("a lab of zero nodes", {}, "cfs-lab up --nodes 0", 2, "nodes"),
    ("a lab of 99 nodes", {}, "cfs-lab up --nodes 99", 2, "nodes"),
    ("a disk size that is none", {}, "cfs-lab up --disk-size huge", 2, "huge"),
    ("the state file is noise", {"lab/lab.json": "{"}, "cfs-lab status", 11, "lab.json"),
]  # fmt: skip

ROWS = [*CONFIGURATION, *CLUSTERCTL, *GNBD, *GNBDCTL, *MKFS, *LAB]


@pytest.fixture
def place(tmp_path, monkeypatch):
    at(tmp_path, monkeypatch)
    return tmp_path


def at(place, monkeypatch) -> None:
    for name in ("RUN", "STATE"):
        monkeypatch.setenv(f"CFS_{name}_DIR", str(place / name.lower()))
    monkeypatch.setenv("CFS_LAB_DIR", str(place / "lab"))


def lay_out(place, files) -> None:
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            content = content.replace("{dir}", str(place)).encode()
        path.write_bytes(content)


def words_of(place, typed: str) -> list[str]:
    return shlex.split(typed.replace("{dir}", str(place)))


def refused(place, typed: str, code: int, words: str) -> None:
    """Run it: the code, the sentence, and the same state as before."""
    before = snapshot(place)
    tool, *arguments = words_of(place, typed)
    ended = run(tool, *arguments)
    text = one_sentence(tool, ended)
    assert ended.code == code, text
    assert re.search(words, text, re.DOTALL), text
    assert snapshot(place) == before


@pytest.mark.parametrize(
    ("files", "typed", "code", "words"),
    [pytest.param(*row[1:], id=f"{row[2].split()[0]}: {row[0]}") for row in ROWS],
)
def test_bad_input(place, files, typed, code, words):
    """The table above."""
    lay_out(place, files)
    refused(place, typed, code, words)


# --- what is on a device already


def made_by(*command: str, size: int = 64 << 20):
    def make(path) -> None:
        os.truncate(path, size)
        program = shutil.which(command[0], path="/usr/sbin:/sbin:/usr/bin:/bin")
        assert program, command
        subprocess.run([program, *command[1:], str(path)], check=True, capture_output=True)

    return make


def partitions(path) -> None:
    entry = struct.pack("<B3sB3sII", 0, b"\0\2\0", 0x83, b"\0\2\1", 2048, 4096)
    written(path, 446, entry.ljust(64, b"\0") + b"\x55\xaa")


def gpt(path) -> None:
    """At the end of the device only: the copy that is left when the first sectors are wiped."""
    table = bytes(128 * 128)
    last = (16 << 20) // 512 - 1
    head = struct.pack(
        "<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, last, 1, 34, last - 33, b"u" * 16,
        last - 32, 128, 128, zlib.crc32(table),
    )  # fmt: skip
    head = head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]
    os.truncate(path, 16 << 20)
    written(path, 446, (bytes(4) + b"\xee").ljust(64, b"\0") + b"\x55\xaa")
    written(path, last * 512, head)


def lvm(path) -> None:
    """LABELONE in sector 1, as pvcreate writes it."""
    body = struct.pack("<I8s32sQ", 32, b"LVM2 001", b"abcdef" * 5 + b"gh", 16 << 20).ljust(492)
    crc = ~zlib.crc32(body, ~0xF597A6CF & 0xFFFFFFFF) & 0xFFFFFFFF
    written(path, 512, struct.pack("<8sQI", b"LABELONE", 1, crc) + body)


def written(path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def ours(path) -> None:
    path.write_bytes(cfs_image())


def our_volume(path) -> None:
    label = PvLabel("ab" * 16, ID, 16 << 20, DATA_OFFSET_BYTES, "s1/disk0")
    written(path, 0, encode_label(label))


SIGNATURES = {
    "ext4": (made_by("mkfs.ext4", "-q", "-F", "-L", "home"), "ext4 file system 'home'"),
    "xfs": (made_by("mkfs.xfs", "-q", "-f", size=400 << 20), "xfs file system"),
    "swap": (made_by("mkswap", "-q"), "swap"),
    "partitions": (partitions, "dos partition table"),
    "gpt at the end": (gpt, "(gpt|PMBR) partition table"),
    "lvm": (lvm, "LVM2_member"),
    "cfs": (ours, "cfs file system called 'precious'"),
    "cvm": (our_volume, "cvm physical volume"),
}


@pytest.mark.parametrize("kind", SIGNATURES)
def test_mkfs_over_data_wants_to_be_told(place, kind):
    """Refused with the name of what is there, until it is said again with --force."""
    make, words = SIGNATURES[kind]
    image = place / "image"
    image.write_bytes(b"")
    os.truncate(image, 16 << 20)
    make(image)
    refused(place, "mkfs.cfs {dir}/image", 4, f"already: {words}.*--yes")
    assert run("mkfs.cfs", "-q", "--force", str(image)).code == 0
    refused(place, "mkfs.cfs {dir}/image", 4, "already: cfs file system")


def test_what_is_not_there_is_not_seen(place):
    """Zeroes, noise, a short file: nothing; and our own magics are those of the formats."""
    for content in (bytes(1 << 20), os.urandom(1 << 20), b"", bytes(512)):
        (place / "image").write_bytes(content)
        with FileDevice(str(place / "image"), read_only=True) as device:
            assert trio.run(signatures_io.signature, device) == ""
    for _name, offset, magic in signatures_io._OURS:
        (place / "image").write_bytes(cfs_image())
        our_volume(place / "image")
        with (place / "image").open("rb") as file:
            file.seek(offset)
            assert file.read(len(magic)) == magic


@pytest.mark.parametrize("content", ["noise", "zeroes", "a cut image"])
def test_a_check_of_what_is_no_file_system(place, content):
    """It could not be done (8), also when it may repair; nothing is written."""
    size = 8 << 20
    made = {"noise": os.urandom(size), "zeroes": bytes(size), "a cut image": cfs_image()[:70_000]}
    lay_out(place, {"image": made[content]})
    before = snapshot(place)
    for option in ("-n", "-p", "-y"):
        ended = run("fsck.cfs", option, str(place / "image"))
        assert ended.code == 8, ended
        assert "Traceback" not in ended.err
        assert re.search("superblock|larger than its device", ended.out + ended.err), ended
        assert snapshot(place) == before


# --- what somebody else has


def test_a_file_in_use_is_left_alone(place):
    """A mount, a server, a check: one at a time; the holder is named."""
    (place / "image").write_bytes(cfs_image())
    lay_out(place, exports("{dir}/disk0", "{dir}/image"))
    with (place / "image").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        who = f"in use by \\S+ \\(pid {os.getpid()}\\)"
        refused(place, "mkfs.cfs --yes {dir}/image", 5, f"image is {who}")
        refused(place, "fsck.cfs {dir}/image", 8, f"image is {who}")
        (place / "gnbd").mkdir()
        (place / "gnbd/lock").touch()
        refused_but(place, SERVE, 5, f"image is {who}", "gnbd/lock")


def refused_but(place, typed, code, words, *changing: str) -> None:
    """As `refused`; these files may change (a lock file names its holder)."""
    before = snapshot(place)
    tool, *arguments = words_of(place, typed)
    ended = run(tool, *arguments)
    text = one_sentence(tool, ended)
    assert ended.code == code, text
    assert re.search(words, text, re.DOTALL), text
    after = snapshot(place)
    names = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert names <= {str(place / name) for name in changing}


def test_a_mounted_device_is_left_alone(place):
    """mkfs, fsck and a server refuse a block device that is mounted."""
    image = place / "image"
    image.write_bytes(b"")
    SIGNATURES["ext4"][0](image)
    (place / "mnt").mkdir()
    with loop_device(image) as loop:
        subprocess.run(["mount", loop, place / "mnt"], check=True)
        try:
            lay_out(place, exports("{dir}/disk0", str(loop)))
            (place / "gnbd").mkdir()
            (place / "gnbd/lock").touch()
            for typed, code in ((f"mkfs.cfs --yes {loop}", 5), (f"fsck.cfs {loop}", 8), (SERVE, 5)):
                tool, *arguments = words_of(place, typed)
                ended = run(tool, *arguments)
                assert ended.code == code, ended
                assert f"{loop} is mounted or in use" in one_sentence(tool, ended)
        finally:
            subprocess.run(["umount", place / "mnt"], check=True)


@pytest.mark.parametrize("kind", ["TCP", "UDP"])
def test_a_port_in_use(place, kind):
    """The holder of the port is named, for each kind of port of each daemon."""
    types = {"TCP": socket.SOCK_STREAM, "UDP": socket.SOCK_DGRAM}
    with socket.socket(socket.AF_INET, types[kind]) as sock:
        sock.bind(("127.0.0.1", 0))
        if kind == "TCP":
            sock.listen()
        port = sock.getsockname()[1]
        who = f"cannot listen on {kind} 127.0.0.1:{port}.*in use by \\S+ \\(pid {os.getpid()}\\)"
        assert str(os.getpid()) in holders_io.holder(kind, port)
        assert holders_io.holder(kind, 1) == ""
        served = {"TCP": ("port = 0\nheart", f"port = {port}\nheart"),
                  "UDP": ("beat_port = 0", f"beat_port = {port}")}  # fmt: skip
        lay_out(place, exports(*served[kind]))
        lay_out(place, {"gnbd/server.toml": encode_identity(identity()), "disk0": bytes(1 << 20)})
        made = ("gnbd/lock", "gnbd/fencing.state", "gnbd")
        refused_but(place, SERVE, 5, who, *made)
        name = {"TCP": "control", "UDP": "heartbeat"}[kind]
        other = {"TCP": "heartbeat", "UDP": "control"}[kind]
        with reserve_port() as free:
            ports = f"[ports]\n{name} = {port}\n{other} = {free.getsockname()[1]}\n"
            lay_out(place, {**NODE, "state/node.toml": NODE_TOML + ports})
            made = ("run", "run/guard.lock", "run/guard.sock", "state/lock", "state/incarnation")
            refused_but(place, "clusterd", 5, who, *made)


def test_a_state_directory_in_use(place):
    """A second daemon with the same state does not start; the first one is named."""
    lay_out(place, {**NODE, **exports(), "state/lock": "", "gnbd/lock": ""})
    daemons = {"state": "clusterd", "gnbd": "gnbd-server"}
    locks = [lock_directory(place / name, daemon) for name, daemon in daemons.items()]
    try:
        refused(place, "clusterd", 5, f"clusterd \\(pid {os.getpid()}\\) uses .*state")
        refused(place, SERVE, 5, f"gnbd-server \\(pid {os.getpid()}\\) uses .*gnbd")
    finally:
        for lock in locks:
            os.close(lock)


# --- not root


NOBODY = 65534
UNPRIVILEGED = [
    ("clusterd", 9, "only root"),
    ("clusterctl status", 9, "clusterd.sock: Permission denied.*root"),
    ("cvmctl vgs", 5, "clusterd.sock: Permission denied.*root"),
    (INIT, 9, "state.*Permission denied.*root"),
    ("cfs-lab up", 9, "only root"),
    ("mkfs.cfs {dir}/image", 9, "image: Permission denied.*root"),
    ("fsck.cfs {dir}/image", 8, "image: Permission denied.*root"),
    (SERVE, 9, "disk0.*Permission denied.*root"),
    (f"{CTL} s1 exports", 2, "node.toml: Permission denied"),
]


@pytest.mark.parametrize(("typed", "code", "words"), UNPRIVILEGED)
def test_run_by_nobody(typed, code, words, monkeypatch):
    """A user who is not root is told so."""
    with tempfile.TemporaryDirectory() as place:  # pytest's directories are root's
        os.chmod(place, 0o755)
        at(Path(place), monkeypatch)
        by_nobody(Path(place), typed, code, words)


def by_nobody(place, typed, code, words) -> None:
    lay_out(place, {**exports(), "image": cfs_image(), "disk0": bytes(1 << 20), "gnbd/lock": ""})
    os.chown(place / "gnbd", NOBODY, NOBODY)
    os.chown(place / "gnbd/lock", NOBODY, NOBODY)
    for name, mode in (("image", 0o600), ("disk0", 0o600), ("exports.toml", 0o644)):
        os.chmod(place / name, mode)
    lay_out(place, {} if typed == INIT else NODE)
    (place / "state").mkdir(exist_ok=True)
    os.chmod(place / "state", 0o700)
    (place / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(place / "run/clusterd.sock"))
        os.chmod(place / "run/clusterd.sock", 0o600)
        os.seteuid(NOBODY)
        try:
            tool, *arguments = words_of(place, typed)
            ended = run(tool, *arguments)
        finally:
            os.seteuid(0)
    text = one_sentence(tool, ended)
    assert ended.code == code, text
    assert re.search(words, text, re.DOTALL), text
