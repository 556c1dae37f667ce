"""Persistent reservations of a block device through the kernel: layouts and judgement. Pure.

`linux/pr.h`, little endian as the machine:

| ioctl | number | struct |
|---|---|---|
| REGISTER | 'p' 200 | old_key u64, new_key u64, flags u32, pad u32 |
| RESERVE, RELEASE | 'p' 201, 202 | key u64, type u32, flags u32 |
| PREEMPT, PREEMPT_ABORT | 'p' 203, 204 | old_key u64, new_key u64, type u32, flags u32 |
| CLEAR | 'p' 205 | key u64, flags u32, pad u32 |
| READ_KEYS | 'p' 206 | generation u32, num_keys u32, keys_ptr u64 |
| READ_RESERVATION | 'p' 207 | key u64, generation u32, type u32 |

The key of a life is made of node and incarnation, so that a preempted one is never taken for its
successor. All lives hold the device together (write exclusive, all registrants).
"""

from __future__ import annotations

import struct

from cluster.ids import Incarnation, NodeId
from fencing.methods import Outcome, Verdict

REGISTRATION = struct.Struct("=QQII")
RESERVATION = struct.Struct("=QII")
PREEMPTION = struct.Struct("=QQII")
CLEARING = struct.Struct("=QII")
READ_KEYS = struct.Struct("=IIQ")
READ_RESERVATION = struct.Struct("=QII")


def _ioctl(direction: int, number: int, layout: struct.Struct) -> int:
    return direction << 30 | layout.size << 16 | ord("p") << 8 | number


_WRITE, _READ = 1, 2
PR_REGISTER = _ioctl(_WRITE, 200, REGISTRATION)
PR_RESERVE = _ioctl(_WRITE, 201, RESERVATION)
PR_RELEASE = _ioctl(_WRITE, 202, RESERVATION)
PR_PREEMPT = _ioctl(_WRITE, 203, PREEMPTION)
PR_PREEMPT_ABORT = _ioctl(_WRITE, 204, PREEMPTION)
PR_CLEAR = _ioctl(_WRITE, 205, CLEARING)
PR_READ_KEYS = _ioctl(_WRITE | _READ, 206, READ_KEYS)
PR_READ_RESERVATION = _ioctl(_READ, 207, READ_RESERVATION)

FLAG_IGNORE_KEY = 1
WRITE_EXCLUSIVE_ALL_REGISTRANTS = 5
REGISTRANTS_ONLY = (3, 4, 5, 6)
"""Types (of the kernel, not of SPC) under which a nexus without registration does not write."""

SUCCESS, CONFLICT = 0, 0x18
STATUS_TEXTS = {
    0x02: "I/O error",
    0x18: "reservation conflict",
    0xE0000: "the path failed, it may be tried again",
    0xF0000: "the path failed fast",
    0x10000: "the path failed",
}
KEYS_MAX = 4096
KEY_MAGIC = 0x43 << 56
INCARNATION_BITS = 40


def key_of(node: NodeId, incarnation: Incarnation) -> int:
    """The registration key of one life of a node."""
    return KEY_MAGIC | node << INCARNATION_BITS | incarnation & (1 << INCARNATION_BITS) - 1


def status_text(status: int) -> str:
    """A status of the device in words."""
    return STATUS_TEXTS.get(status, f"status {status:#x}")


def judge_preempt(
    device: str, status: int, mine: int, victim: int, keys: list[int] | None, held: int | None
) -> Outcome:
    """What is known after PREEMPT AND ABORT. `keys` and `held` (type of the reservation, 0 for
    none) as read afterwards, None where the kernel cannot read them."""
    if keys is not None and victim in keys:
        return Outcome(Verdict.FAILED, f"{device}: key {victim:#x} is still registered")
    if status == SUCCESS:
        seen = "" if keys is None else ", and its key is gone"
        return Outcome(Verdict.PROVEN, f"{device}: preempted and aborted {victim:#x}{seen}")
    if status != CONFLICT:
        return Outcome(Verdict.FAILED, f"{device}: {status_text(status)}")
    if keys is None or held is None:
        return Outcome(
            Verdict.FAILED,
            f"{device}: reservation conflict, and this kernel cannot read who is registered",
        )
    if mine not in keys:
        return Outcome(Verdict.FAILED, f"{device}: this node itself is not registered")
    if held not in REGISTRANTS_ONLY:
        return Outcome(Verdict.FAILED, f"{device}: nothing keeps out who is not registered")
    return Outcome(
        Verdict.PROVEN, f"{device}: {victim:#x} is not registered, and only registrants write"
    )
