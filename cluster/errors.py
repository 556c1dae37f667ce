"""Errors of the whole stack: a sentence, an exit code, and a hint that says what to do.

Assertions are for our own bugs; these classes are for the world's. docs/exit-codes.md explains the
codes; `cvmctl` has LVM's, `fsck.cfs` those of e2fsck, `mount.cfs` those of mount(8).
"""

from __future__ import annotations

import errno

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_NOT_QUORATE = 3
EXIT_REFUSED = 4
EXIT_BUSY = 5
EXIT_UNREACHABLE = 6
EXIT_NOT_FOUND = 7
EXIT_FOREIGN = 8
EXIT_NOT_PERMITTED = 9
EXIT_NO_SPACE = 10
EXIT_DAMAGED = 11


class StackError(Exception):
    """Something failed."""

    exit_code = EXIT_FAILED
    default_hint = ""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint or self.default_hint

    @property
    def message(self) -> str:
        return str(self.args[0])


class UsageError(StackError):
    """The request makes no sense as it was given."""

    exit_code = EXIT_USAGE


class ConfigError(UsageError):
    """A configuration file is wrong; the message names the key path."""


class NotQuorateError(StackError):
    """The register cannot be decided at the moment."""

    exit_code = EXIT_NOT_QUORATE
    default_hint = "wait until a majority of the voters is back; see: clusterctl status"


class RefusedError(StackError):
    """The request would destroy something and was not confirmed."""

    exit_code = EXIT_REFUSED
    default_hint = "say --yes (or --force) if you mean it"


class BusyError(StackError):
    """Somebody else holds what the request needs."""

    exit_code = EXIT_BUSY


class UnreachableError(StackError):
    """The daemon does not answer."""

    exit_code = EXIT_UNREACHABLE
    default_hint = "is clusterd running? see: systemctl status clusterd"


class NotFoundError(StackError):
    """Nothing is called by that name: no such node, server, volume, export, file."""

    exit_code = EXIT_NOT_FOUND


class ForeignError(StackError):
    """It belongs to another cluster, or the key of this one is not believed."""

    exit_code = EXIT_FOREIGN


class NotPermittedError(StackError):
    """This user may not do that."""

    exit_code = EXIT_NOT_PERMITTED
    default_hint = "run it as root"


class NoSpaceError(StackError):
    """A disk is full, or too small for what shall go on it."""

    exit_code = EXIT_NO_SPACE


class ProtocolError(StackError):
    """A peer sent bytes that break the protocol; its connection is closed."""


class AuthenticationError(ProtocolError):
    """A message does not carry the right authentication code. `claimed_sender`: who pretends to
    have sent it to this cluster, with another key; 0 if unknown."""

    def __init__(self, message: str, *, hint: str = "", claimed_sender: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.claimed_sender = claimed_sender

    exit_code = EXIT_FOREIGN


class CorruptionError(StackError):
    """Stored bytes fail their checksum or make no sense. `block` names them if that is known."""

    def __init__(self, message: str, *, hint: str = "", block: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.block = block

    exit_code = EXIT_DAMAGED


class DeviceError(StackError):
    """A block device answered a request with an I/O error."""


class BarredError(StackError):
    """This instance is barred for ever; its process must end and come back as a new one."""

    default_hint = "mount again; see: clusterctl events"


_OS_KINDS: dict[int, type[StackError]] = {
    errno.ENOSPC: NoSpaceError,
    errno.EDQUOT: NoSpaceError,
    errno.EACCES: NotPermittedError,
    errno.EPERM: NotPermittedError,
    errno.ENOENT: NotFoundError,
}


def connect_failure(error: OSError, where: object) -> StackError:
    """Why a daemon's socket cannot be reached."""
    text = f"cannot reach clusterd at {where}: {error.strerror or error}"
    return (NotPermittedError if error.errno == errno.EACCES else UnreachableError)(text)


def os_failure(error: OSError, doing: str = "") -> StackError:
    """An error of the operating system as one of ours. `doing`: "cannot write /x"."""
    what = error.strerror or str(error)
    where = doing or (str(error.filename) if error.filename else "")
    text = f"{where}: {what}" if where else what
    return _OS_KINDS.get(error.errno or 0, StackError)(text)
