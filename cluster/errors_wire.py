"""Errors on their way through a control session: class by exit code, message and hint kept."""

from __future__ import annotations

from typing import NoReturn

from cluster.control import Failure
from cluster.errors import (
    EXIT_FAILED,
    BusyError,
    CorruptionError,
    ForeignError,
    NoSpaceError,
    NotFoundError,
    NotPermittedError,
    NotQuorateError,
    RefusedError,
    StackError,
    UnreachableError,
    UsageError,
)

_CLASSES: dict[int, type[StackError]] = {
    kind.exit_code: kind
    for kind in (
        UsageError,
        NotQuorateError,
        RefusedError,
        BusyError,
        UnreachableError,
        NotFoundError,
        ForeignError,
        NotPermittedError,
        NoSpaceError,
        CorruptionError,
    )
}


def failure_of(error: StackError) -> Failure:
    """What goes on the wire for `error`."""
    return Failure(error.message, error.hint, error.exit_code)


def raise_failure(failure: Failure) -> NoReturn:
    """Raise the error of the peer as ours."""
    kind = _CLASSES.get(failure.exit_code, StackError)
    error = kind(failure.message, hint=failure.hint)
    if failure.exit_code not in _CLASSES and failure.exit_code != EXIT_FAILED:
        error.exit_code = failure.exit_code
    raise error
