"""Configuration: what is written is read; an error names file and key path; tokens."""

import pytest

from cluster import paths_io
from cluster.config import (
    ClusterSection,
    NodeConfig,
    NodeSection,
    Token,
    decode_config,
    decode_token_untrusted,
    encode_node_config,
    encode_token,
)
from cluster.errors import ConfigError, CorruptionError
from cluster.paths_io import read_store, write_store
from cluster.state import NodeInfo, initial_state

CONFIG = NodeConfig(
    ClusterSection("a" * 32, "demo", "b" * 64, "fast"), NodeSection(3, "n3", ["10.0.0.3"])
)


def test_round_trip():
    text = encode_node_config(CONFIG)
    assert decode_config(text, NodeConfig, "node.toml") == CONFIG


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ("id = 3", "id = 65", "$.node.id"),
        ('"fast"', '"slow"', "$.cluster.profile"),
        ('name = "n3"', 'nmae = "n3"', "$.node"),
        ("[cluster]", "[cluster", "node.toml"),
    ],
)
def test_errors_name_the_key(old, new, path):
    text = encode_node_config(CONFIG).replace(old, new)
    with pytest.raises(ConfigError) as caught:
        decode_config(text, NodeConfig, "node.toml")
    assert path in caught.value.message
    assert "node.toml" in caught.value.message


def test_token():
    state = initial_state("a" * 32, "demo", "fast", NodeInfo(1, "n1", ["10.0.0.1"]))
    token = Token(CONFIG, state)
    assert decode_token_untrusted(encode_token(token) + "\n") == token
    for bad in ("", "CFS1-", "CFS1-!!!", "x" + encode_token(token), encode_token(token)[:-9]):
        with pytest.raises(ConfigError):
            decode_token_untrusted(bad)


def test_damaged_store(tmp_path):
    path = tmp_path / "store"
    assert read_store(path) is None
    write_store(path, b"payload")
    assert read_store(path) == b"payload"
    data = bytearray(path.read_bytes())
    for index in (0, 10, len(data) - 1):
        damaged = bytearray(data)
        damaged[index] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CorruptionError):
            read_store(path)
    path.write_bytes(b"")
    with pytest.raises(CorruptionError):
        read_store(path)


class Killed(Exception):
    """In place of a signal."""


def test_what_a_killed_writer_has_renamed_is_durable_once_it_was_read(tmp_path, monkeypatch):
    """Else a voter would answer by what a power cut takes back."""

    def die(_path):
        raise Killed

    path = tmp_path / "store"
    write_store(path, b"old")
    monkeypatch.setattr(paths_io, "sync_directory", die)
    with pytest.raises(Killed):
        write_store(path, b"new")
    synced = []
    monkeypatch.setattr(paths_io, "sync_directory", synced.append)
    assert read_store(path) == b"new"
    assert synced == [tmp_path]
