"""Unit attentions of all exports: NBD has nowhere to put them, so they are told in the log and in
the status of the server."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import structlog

from fencing.reservations import (
    REGISTRATIONS_PREEMPTED,
    RESERVATIONS_PREEMPTED,
    RESERVATIONS_RELEASED,
    Attention,
)

ATTENTIONS_MAX = 256
_TEXTS = {
    RESERVATIONS_PREEMPTED: "reservations preempted",
    RESERVATIONS_RELEASED: "reservations released",
    REGISTRATIONS_PREEMPTED: "registrations preempted",
}
_log = structlog.get_logger("gnbd")


class Attentions:
    """The last of them, with their exports. The service guards it."""

    def __init__(self) -> None:
        self.last: deque[tuple[Attention, str]] = deque(maxlen=ATTENTIONS_MAX)

    def tell(self, export: str, attentions: Iterable[Attention]) -> None:
        """What has led to them is durable."""
        for one in attentions:
            self.last.append((one, export))
            what = f"{one.code:04x} {_TEXTS[one.code]}"
            _log.info("unit attention", export=export, nexus=str(one.nexus), what=what)
