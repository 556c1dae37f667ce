"""What every filter is: a back end on top of another one that passes everything on."""

from __future__ import annotations

from gnbd.exports import FilterSpec
from gnbd.server.backends_io import Backend


class Filter(Backend):
    """Passes everything on."""

    kind = ""

    def __init__(self, below: Backend, spec: FilterSpec) -> None:
        self.below = below
        self.spec = spec
        self.read_only = below.read_only
        self.alignment = below.alignment

    @property
    def size_bytes(self) -> int:  # type: ignore[override]
        return self.below.size_bytes

    def configure(self, spec: FilterSpec) -> None:
        """New parameters while requests run."""
        self.spec = spec

    def read_into(self, offset: int, view: memoryview) -> None:
        self.below.read_into(offset, view)

    def write(self, offset: int, view: memoryview, fua: bool) -> None:
        self.below.write(offset, view, fua)

    def flush(self) -> None:
        self.below.flush()

    def trim(self, offset: int, length: int) -> None:
        self.below.trim(offset, length)

    def zero(self, offset: int, length: int, no_hole: bool, fast: bool = False) -> None:
        self.below.zero(offset, length, no_hole, fast)

    def cache(self, offset: int, length: int) -> None:
        self.below.cache(offset, length)

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        return self.below.extents(offset, length)

    def loses_reply(self, operation: str, offset: int, length: int) -> bool:
        return self.below.loses_reply(operation, offset, length)

    def owed_s(self, operation: str) -> float:
        return self.below.owed_s(operation)

    def report(self) -> dict[str, int]:
        """What the filter has seen, for `gnbdctl stats`."""
        return {}

    def resize(self, size_bytes: int) -> None:
        self.below.resize(size_bytes)

    def close(self) -> None:
        self.below.close()
