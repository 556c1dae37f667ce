"""What a gnbd-server knows of its cluster: `server.toml` in its state directory, and the token.

The token of `clusterctl server add` is base64url of JSON
`{"cluster_id": hex, "cluster_name", "key": hex, "key_id": 1, "server_id": 129, "name": "s1"}`.
"""

from __future__ import annotations

import json
from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import Annotated

import msgspec

from cluster.config import Hex16, Hex32, Name, decode_config
from cluster.decoding import BROKEN
from cluster.errors import ConfigError
from cluster.ids import SERVER_ID_MAX, SERVER_ID_MIN, ServerId
from cluster.wire import Keys


class ServerIdentity(msgspec.Struct, frozen=True):
    """Name and key of one server in one cluster."""

    cluster_id: Hex16
    cluster_name: str
    key: Hex32
    server_id: Annotated[ServerId, msgspec.Meta(ge=SERVER_ID_MIN, le=SERVER_ID_MAX)]
    name: Name
    key_id: int = 1

    @property
    def keys(self) -> Keys:
        return Keys(self.key_id, {self.key_id: bytes.fromhex(self.key)})

    @property
    def cluster_id_bytes(self) -> bytes:
        return bytes.fromhex(self.cluster_id)


LOCAL_SOCKET = "gnbd.sock"
"""In the state directory of a server: CONTROL for whoever may open it."""
LOCAL_IDENTITY = ServerIdentity("00" * 16, "", "00" * 32, ServerId(0), "local")
"""Of that socket: no secret, its permissions are enough."""


def encode_server_token(identity: ServerIdentity) -> str:
    """One line for `gnbd-server --join`."""
    return urlsafe_b64encode(msgspec.json.encode(identity)).decode().rstrip("=")


def decode_server_token_untrusted(text: str) -> ServerIdentity:
    """The inverse. Raises ConfigError."""
    text = text.strip()
    try:
        raw = urlsafe_b64decode(text + "=" * (-len(text) % 4))
        return msgspec.json.decode(raw, type=ServerIdentity)
    except BROKEN as error:
        raise ConfigError(
            f"this is not a server token: {error}",
            hint="clusterctl server add makes one; that of clusterctl invite is for clusterctl "
            "join",
        ) from error


def encode_identity(identity: ServerIdentity) -> str:
    """server.toml."""
    values = msgspec.to_builtins(identity)
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def decode_identity(text: str | bytes, source: str) -> ServerIdentity:
    """The inverse of `encode_identity`. Raises ConfigError."""
    return decode_config(text, ServerIdentity, source)
