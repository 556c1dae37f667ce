"""The filters of an export: small wrappers around a back end that inject, limit and measure. They
stand bottom up, and come and go at run time."""

from __future__ import annotations

from cluster.errors import UsageError
from gnbd.exports import FilterSpec
from gnbd.server.backends_io import Backend
from gnbd.server.filters.delay_io import Delay
from gnbd.server.filters.drop_io import Drop
from gnbd.server.filters.error_io import Error
from gnbd.server.filters.filter_io import Filter
from gnbd.server.filters.log_io import Log
from gnbd.server.filters.rate_io import Rate
from gnbd.server.filters.stats_io import Stats
from gnbd.server.filters.torn_io import Torn
from gnbd.server.filters.volatile_io import Volatile

_KINDS: dict[str, type[Filter]] = {
    f.kind: f for f in (Volatile, Log, Delay, Error, Drop, Torn, Rate, Stats)
}


def stack_filter(below: Backend, spec: FilterSpec) -> Filter:
    """Put one filter on top."""
    return _KINDS[spec.kind](below, spec)


def filters_of(top: Backend) -> list[Filter]:
    """The stack from the bottom to the top."""
    found: list[Filter] = []
    while isinstance(top, Filter):
        found.append(top)
        top = top.below
    return found[::-1]


def changed_stack(top: Backend, action: str, spec: FilterSpec) -> Backend:
    """The new top after `add`, `set` or `remove` of a filter. Raises UsageError. What is running
    in the old top ends there: every filter but `volatile` is stateless for its requests."""
    if action == "add":
        if spec.kind == Volatile.kind:
            raise UsageError("the filter 'volatile' can only be set in the exports file")
        return stack_filter(top, spec)
    found = next((f for f in filters_of(top) if f.kind == spec.kind), None)
    if found is None:
        raise UsageError(f"the export has no filter {spec.kind!r}")
    if action == "set":
        found.configure(spec)
        return top
    if action != "remove" or spec.kind == Volatile.kind:
        raise UsageError(f"cannot {action} the filter {spec.kind!r}")
    if found is top:
        return found.below
    above = top
    while isinstance(above, Filter) and above.below is not found:
        above = above.below
    assert isinstance(above, Filter)
    above.below = found.below
    return top
