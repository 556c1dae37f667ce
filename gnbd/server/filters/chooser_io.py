"""Which requests a filter takes: by class, range, number and chance."""

from __future__ import annotations

import random
import threading

from gnbd.exports import FilterSpec
from gnbd.server.backends_io import Backend
from gnbd.server.filters.filter_io import Filter

_CLASSES = {"write": ("write", "trim", "zero"), "read": ("read", "cache", "status")}
PER_MILLE_ALL = 1000


class Chooser:
    """`operation`: one of `gnbd.exports.OPERATIONS` (read and write are classes); `offset` and
    `length`: only what touches that range (a flush touches every range). Of those the first `skip`
    are left alone, then `count` are taken (-1: all), each with a chance of `per_mille`."""

    def __init__(self, spec: FilterSpec) -> None:
        parameters = spec.parameters
        self._lock = threading.Lock()
        self._operation = str(parameters.get("operation", "all"))
        self._start = int(parameters.get("offset", 0))
        self._end = self._start + int(parameters.get("length", 1 << 62))
        self._skip = int(parameters.get("skip", 0))
        self._left = int(parameters.get("count", -1))
        self._per_mille = int(parameters.get("per_mille", PER_MILLE_ALL))
        self._chance = random.Random(parameters.get("seed"))

    def takes(self, operation: str, offset: int = 0, length: int = 0) -> bool:
        """Whether this request is one of them."""
        if self._operation != "all" and operation not in _CLASSES.get(
            self._operation, (self._operation,)
        ):
            return False
        if operation != "flush" and (offset + length <= self._start or offset >= self._end):
            return False
        with self._lock:
            if self._skip:
                self._skip -= 1
                return False
            if self._left == 0:
                return False
            if self._chance.randrange(PER_MILLE_ALL) >= self._per_mille:
                return False
            self._left -= self._left > 0
            return True


class Choosing(Filter):
    """A filter that does something to the requests that its chooser takes."""

    def __init__(self, below: Backend, spec: FilterSpec) -> None:
        super().__init__(below, spec)
        self._chooser = Chooser(spec)

    def configure(self, spec: FilterSpec) -> None:
        super().configure(spec)
        self._chooser = Chooser(spec)
