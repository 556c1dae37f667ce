"""Fencing on SCSI and NVMe disks through the kernel's reservation ioctls (`block_pr`)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cluster.errors import DeviceError, StackError, os_failure
from cluster.ids import Incarnation, NodeId
from fencing import block_pr as pr
from fencing.methods import Outcome, Verdict

Ioctl = Callable[[int, int, bytearray], int]
"""(descriptor, request, argument changed in place) -> status. Raises OSError."""


def kernel_ioctl(fd: int, request: int, argument: bytearray) -> int:
    """The real one."""
    status: int = fcntl.ioctl(fd, request, argument, True)
    return status


class Disk:
    """One open device."""

    def __init__(self, path: str, fd: int, ioctl: Ioctl) -> None:
        self.path = path
        self._fd = fd
        self._ioctl = ioctl

    def register(self, key: int) -> int:
        """REGISTER AND IGNORE EXISTING KEY."""
        return self._call(pr.PR_REGISTER, pr.REGISTRATION.pack(0, key, pr.FLAG_IGNORE_KEY, 0))

    def reserve(self, key: int, kind: int) -> int:
        """RESERVE."""
        return self._call(pr.PR_RESERVE, pr.RESERVATION.pack(key, kind, 0))

    def preempt_and_abort(self, mine: int, victim: int, kind: int) -> int:
        """PREEMPT AND ABORT."""
        return self._call(pr.PR_PREEMPT_ABORT, pr.PREEMPTION.pack(victim, mine, kind, 0))

    def clear(self, key: int) -> int:
        """CLEAR: every registration and the reservation go."""
        return self._call(pr.PR_CLEAR, pr.CLEARING.pack(key, 0, 0))

    def read_keys(self) -> list[int] | None:
        """READ KEYS; None where the kernel has no such call."""
        table = (ctypes.c_uint64 * pr.KEYS_MAX)()
        argument = bytearray(pr.READ_KEYS.pack(0, pr.KEYS_MAX, ctypes.addressof(table)))
        if not self._read(pr.PR_READ_KEYS, argument):
            return None
        count = pr.READ_KEYS.unpack(argument)[1]
        return list(table[: min(count, pr.KEYS_MAX)]) if count <= pr.KEYS_MAX else None

    def read_reservation(self) -> int | None:
        """The type of the reservation, 0 for none; None where the kernel has no such call."""
        argument = bytearray(pr.READ_RESERVATION.size)
        if not self._read(pr.PR_READ_RESERVATION, argument):
            return None
        kind: int = pr.READ_RESERVATION.unpack(argument)[2]
        return kind

    def _read(self, request: int, argument: bytearray) -> bool:
        try:
            return self._ioctl(self._fd, request, argument) == pr.SUCCESS
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL):
                return False
            raise

    def _call(self, request: int, argument: bytes) -> int:
        try:
            return self._ioctl(self._fd, request, bytearray(argument))
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
                raise DeviceError(f"{self.path} has no persistent reservations") from error
            raise


@contextmanager
def open_disk(path: str, ioctl: Ioctl = kernel_ioctl) -> Iterator[Disk]:
    """Raises StackError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise os_failure(error, f"cannot open {path}") from error
    try:
        yield Disk(path, fd, ioctl)
    except OSError as error:
        raise os_failure(error, f"{path}: persistent reservation") from error
    finally:
        os.close(fd)


def fence_disks(
    devices: list[str], me: tuple[NodeId, Incarnation], victim: tuple[NodeId, Incarnation],
    ioctl: Ioctl = kernel_ioctl,
) -> Outcome:  # fmt: skip
    """Put the victim's life out on every device. Never registers this node first: if somebody put
    *us* out there, we are the ones who lost."""
    mine, theirs = pr.key_of(*me), pr.key_of(*victim)
    proofs = []
    for path in devices:
        try:
            with open_disk(path, ioctl) as disk:
                status = disk.preempt_and_abort(mine, theirs, pr.WRITE_EXCLUSIVE_ALL_REGISTRANTS)
                outcome = pr.judge_preempt(
                    path, status, mine, theirs, disk.read_keys(), disk.read_reservation()
                )
        except StackError as error:
            return Outcome(Verdict.FAILED, error.message)
        if outcome.verdict is not Verdict.PROVEN:
            return outcome
        proofs.append(outcome.text)
    return Outcome(Verdict.PROVEN, "; ".join(proofs))


def register_on_disks(
    devices: list[str], me: tuple[NodeId, Incarnation], ioctl: Ioctl = kernel_ioctl
) -> str:
    """Register this life and hold the devices together; what went wrong, or an empty text."""
    key = pr.key_of(*me)
    for path in devices:
        try:
            with open_disk(path, ioctl) as disk:
                status = disk.register(key)
                if status == pr.SUCCESS:
                    status = disk.reserve(key, pr.WRITE_EXCLUSIVE_ALL_REGISTRANTS)
        except StackError as error:
            return error.message
        if status != pr.SUCCESS:
            return f"{path}: {pr.status_text(status)}"
    return ""
