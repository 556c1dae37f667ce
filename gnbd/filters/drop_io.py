"""`drop`: requests that the chooser takes are executed and never answered."""

from __future__ import annotations

from gnbd.backends_io import Backend
from gnbd.exports import FilterSpec
from gnbd.filters.chooser_io import Chooser
from gnbd.filters.filter_io import Filter


class Drop(Filter):
    """Swallows replies: a client that trusts in being answered hangs."""

    kind = "drop"

    def __init__(self, below: Backend, spec: FilterSpec) -> None:
        super().__init__(below, spec)
        self._chooser = Chooser(spec)

    def configure(self, spec: FilterSpec) -> None:
        super().configure(spec)
        self._chooser = Chooser(spec)

    def loses_reply(self, operation: str, offset: int, length: int) -> bool:
        taken = self._chooser.takes(operation, offset, length)
        return self.below.loses_reply(operation, offset, length) or taken
