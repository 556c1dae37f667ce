"""`drop`: requests that the chooser takes are executed and never answered."""

from __future__ import annotations

from gnbd.server.filters.chooser_io import Choosing


class Drop(Choosing):
    """Swallows replies: a client that trusts in being answered hangs."""

    kind = "drop"

    def loses_reply(self, operation: str, offset: int, length: int) -> bool:
        taken = self._chooser.takes(operation, offset, length)
        return self.below.loses_reply(operation, offset, length) or taken
