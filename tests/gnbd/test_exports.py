"""EXPORTS.toml, filters, and the tools."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time

import pytest

from cluster.config import ClusterSection, NodeConfig, NodeSection, encode_node_config
from cluster.errors import ConfigError, UsageError
from cluster.ids import NodeId
from cluster.sizes import parse_size
from gnbd.exports import FilterSpec, decode_exports, parse_filter
from gnbd.identity import decode_server_token_untrusted, encode_server_token
from gnbd.server.backends_io import FileBackend
from gnbd.server.filters.log_io import LOG_ENTRY, LOG_MAGIC
from gnbd.server.filters.stack_io import changed_stack, filters_of, stack_filter
from lab.block_server import export_toml, member, running

GOOD = """
listen = "127.0.0.1"
state_dir = "/tmp/x"
[[exports]]
name = "disk0"
path = "/tmp/x/disk0"
size = "4G"
access = "cluster"
filters = ["volatile", "delay:read_ms=5,write_ms=7"]
"""


def test_a_good_file():
    """Defaults, sizes, filters."""
    config = decode_exports(GOOD, "x.toml")
    assert config.addresses == ["127.0.0.1"]
    assert config.port == 10809
    (export,) = config.exports
    assert parse_size(export.size) == 4 << 30
    assert parse_filter(export.filters[1]) == FilterSpec("delay", {"read_ms": 5, "write_ms": 7})


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"cluster"', '"anyone"', r"\$\.exports\[0\]\.access"),
        ('"4G"', '"four"', r"\$\.exports\[0\]\.size"),
        ('"4G"', "1000", r"\$\.exports\[0\]\.size.*512"),
        ('"volatile"', '"volatil"', r"\$\.exports\[0\]\.filters\[0\].*volatil"),
        ("read_ms=5", "read_ms=x", r"\$\.exports\[0\]\.filters\[1\].*number"),
        ("read_ms=5", "reed=5", r"\$\.exports\[0\]\.filters\[1\].*reed"),
        ('name = "disk0"', "", r"name.*\$\.exports\[0\]"),
        ("state_dir", "state_dirr", "state_dir"),
        ("[[exports]]", "[[exports]", "x.toml"),
    ],
)
def test_errors_name_the_key_path(old, new, words):
    """Every mistake is found with its place."""
    assert old in GOOD
    with pytest.raises(ConfigError, match=words) as caught:
        decode_exports(GOOD.replace(old, new), "x.toml")
    assert caught.value.message.startswith("x.toml")


def test_sizes():
    """Units of 1024."""
    assert [parse_size(t) for t in ("512", "1k", "2M", "3GiB", "1 TB", 99)] == [
        512, 1 << 10, 2 << 20, 3 << 30, 1 << 40, 99,
    ]  # fmt: skip


@pytest.fixture
def backend(tmp_path):
    backend = FileBackend(tmp_path / "disk", 1 << 20)
    yield backend
    backend.close()


def read(backend, offset, length):
    view = memoryview(bytearray(length))
    backend.read_into(offset, view)
    return bytes(view)


def test_volatile_agrees_with_memory(tmp_path):
    """Random writes, zeroes, FUA and flushes: reads see the newest, the file what was flushed."""
    import random

    chance = random.Random(4)
    path = tmp_path / "disk"
    top = stack_filter(FileBackend(path, 1 << 16), FilterSpec("volatile"))
    model = bytearray(1 << 16)
    for _ in range(2000):
        offset = chance.randrange(1 << 16)
        length = chance.randrange(1, min(5000, (1 << 16) - offset) + 1)
        action = chance.random()
        if action < 0.6:
            data, fua = chance.randbytes(length), chance.random() < 0.2
            top.write(offset, memoryview(data), fua)
            model[offset : offset + length] = data
            if fua:
                assert path.read_bytes()[offset : offset + length] == data
        elif action < 0.8:
            top.zero(offset, length, chance.random() < 0.5)
            model[offset : offset + length] = bytes(length)
        elif action < 0.85:
            top.flush()
            assert path.read_bytes() == model
            assert top.dirty_bytes() == 0
        assert read(top, offset, length) == model[offset : offset + length]
    top.close()


def test_log_holds_everything_in_order(backend, tmp_path):
    """Entries can be replayed: data, flush and FUA in the order of execution."""
    path = tmp_path / "log"
    top = stack_filter(backend, FilterSpec("log", {"path": str(path)}))
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    top.write(0, memoryview(b"abcd"), False)
    top.flush()
    after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    top.write(4096, memoryview(b"xy"), True)
    top.zero(0, 512, False)
    top.trim(512, 512)
    data, entries = path.read_bytes(), []
    while data:
        magic, operation, flags, _, offset, length, at = LOG_ENTRY.unpack_from(data)
        assert magic == LOG_MAGIC
        body = length if operation == 1 else 0
        if operation == 2:
            assert before <= offset <= at <= after  # arrived, and executed
            offset = 0
        entries.append((operation, flags, offset, length, data[40 : 40 + body]))
        data = data[40 + body :]
    assert entries == [
        (5, 0, 0, 0, b""), (1, 0, 0, 4, b"abcd"), (2, 0, 0, 0, b""), (1, 1, 4096, 2, b"xy"),
        (4, 0, 0, 512, b""), (3, 0, 512, 512, b""),
    ]  # fmt: skip


def test_error_counts_and_ranges(backend):
    """The next `count` requests of the kind in the range fail, then all is well."""
    top = stack_filter(
        backend,
        FilterSpec("error", {"operation": "write", "count": 1, "offset": 4096, "length": 4096}),
    )
    top.write(0, memoryview(b"a"), False)
    with pytest.raises(OSError, match="Input/output"):
        top.write(8191, memoryview(b"a"), False)
    top.write(8191, memoryview(b"a"), False)
    assert read(top, 8191, 1) == b"a"


def test_filters_come_and_go(backend):
    """add, set, remove at run time; volatile only by configuration."""
    top = changed_stack(backend, "add", FilterSpec("delay", {"read_ms": 1}))
    top = changed_stack(top, "add", FilterSpec("error", {"count": 0}))
    assert [f.kind for f in filters_of(top)] == ["delay", "error"]
    top = changed_stack(top, "set", FilterSpec("delay", {"read_ms": 0}))
    top = changed_stack(top, "remove", FilterSpec("delay"))
    assert [f.kind for f in filters_of(top)] == ["error"]
    top = changed_stack(top, "remove", FilterSpec("error"))
    assert top is backend
    for action, kind in (("remove", "error"), ("add", "volatile"), ("burn", "delay")):
        with pytest.raises(UsageError):
            changed_stack(top, action, FilterSpec(kind))


def test_token_round_trip(tmp_path):
    """The line that `clusterctl server add` prints; damage is a clear error."""
    with running(tmp_path, "", joined=True) as server:
        token = encode_server_token(server.identity)
        assert decode_server_token_untrusted(f" {token}\n") == server.identity
        raw = json.loads(__import__("base64").urlsafe_b64decode(token + "=="))
        assert set(raw) == {"cluster_id", "cluster_name", "key", "key_id", "server_id", "name"}
    with pytest.raises(ConfigError, match="token"):
        decode_server_token_untrusted(token[5:])


def test_gnbdctl(tmp_path):
    """exports, stats, status, keys and filter against a running server, with the node's key."""
    exports = export_toml("disk0", tmp_path / "d.img", "cluster", "8M")
    with running(tmp_path, exports) as server:
        server.install(1, member(live=(1,), next_=2))
        identity = server.identity
        config = NodeConfig(
            ClusterSection(identity.cluster_id, "demo", identity.key),
            NodeSection(NodeId(1), "n1", ["127.0.0.1"]),
        )
        (tmp_path / "node.toml").write_text(encode_node_config(config))

        def ctl(*arguments: str) -> str:
            program = "import sys; from gnbd.control.cli import control_main; control_main()"
            where = ["-s", f"127.0.0.1:{server.port}", "--config", str(tmp_path / "node.toml")]
            done = subprocess.run(
                [sys.executable, "-c", program, *where, *arguments],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            return done.stdout

        assert "disk0" in ctl("exports")
        (export,) = json.loads(ctl("--json", "exports"))
        assert export["size_bytes"] == 8 << 20
        assert "read_bytes" in ctl("stats")
        assert json.loads(ctl("--json", "status"))["epoch"] == 1
        assert "type 0" in ctl("keys", "disk0")
        ctl("filter", "disk0", "add", "delay:read_ms=1")
        (export,) = json.loads(ctl("--json", "exports"))
        assert export["filters"] == ["delay:read_ms=1"]


def test_entry_is_forty_bytes():
    """The write log's format is fixed."""
    assert LOG_ENTRY.size == struct.calcsize("<IIIIQQQ") == 40
