"""Abort of FUSE connections through fusectl, which need not be mounted anywhere.

Where /sys/fs/fuse/connections is empty (a private namespace, a container) fusectl is mounted by
the mount API without a place in the tree: the descriptor of the detached mount is enough.
"""

from __future__ import annotations

import ctypes
import os
import select

from cluster.errors import StackError

_CONNECTIONS = "/sys/fs/fuse/connections"
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_CMD_CREATE = 6
_libc = ctypes.CDLL(None, use_errno=True)


def _system_call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def open_connections() -> int:
    """A directory descriptor of fusectl; the caller keeps it. Raises StackError."""
    if os.path.isdir(_CONNECTIONS) and os.path.ismount(_CONNECTIONS):
        return os.open(_CONNECTIONS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        context = _system_call(_SYS_FSOPEN, b"fusectl", 1)
        try:
            _system_call(_SYS_FSCONFIG, context, _CMD_CREATE, None, None, 0)
            return _system_call(_SYS_FSMOUNT, context, 1, 0)
        finally:
            os.close(context)
    except OSError as error:
        raise StackError(
            f"no access to FUSE connections: {error.strerror}",
            hint="mount -t fusectl none /sys/fs/fuse/connections",
        ) from error


def is_connected(fuse_fd: int) -> bool:
    """Whether the connection behind a /dev/fuse descriptor is alive."""
    poll = select.poll()
    poll.register(fuse_fd, 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def abort(connections: int, minor: int, fuse_fd: int) -> bool:
    """Abort one connection. False if it does not exist any more; then its number may already
    be that of a mount of somebody else."""
    if not is_connected(fuse_fd):
        return False
    try:
        fd = os.open(f"{minor}/abort", os.O_WRONLY | os.O_CLOEXEC, dir_fd=connections)
    except FileNotFoundError:
        return False
    try:
        os.write(fd, b"1")
    finally:
        os.close(fd)
    return True
