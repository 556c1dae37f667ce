"""Certificates of a node, as its configuration names them."""

from __future__ import annotations

from typing import Annotated

import msgspec

Absolute = Annotated[str, msgspec.Meta(pattern="^/")]


class TlsSection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How this node speaks to block servers over TLS. Files in PEM: its own certificate, which
    names the node, and the authority of the servers' ones, which name the server. They are read
    for each connection. `required`: a server without TLS is not spoken to."""

    certificate: Absolute
    key: Absolute
    authority: Absolute
    required: bool = False
