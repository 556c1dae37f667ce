"""Messages between the members of a lockspace, and their encoding.

One mesh payload is a `Batch`: the sender's view (epoch, seq) and messages in order, msgpack arrays;
each message is an array whose first item is its tag. A lock is named by its owner's instance and
a number that the owner never uses twice, so no identity has to be exchanged, and it survives a
change of the master. Every operation has an `op` number rising per lock; `state` rises with each
message of the master about a lock. So whatever is sent twice is recognised.

| tag | message | direction | says |
|---|---|---|---|
| 1 | Request | owner to master or directory | a new lock; `probe`: tell me if it is queued |
| 2 | Convert | owner to master | change the mode; carries the value block when it writes it |
| 3 | Unlock | owner to master | give the lock back |
| 4 | Cancel | owner to master | give up operation `op` |
| 5 | Reply | master to owner | the end of `op`, also when it had to wait; or QUEUED |
| 6 | Bast | master to owner | the lock blocks `waiting` (bit set), the highest of it is `mode` |
| 7 | Redirect | master or directory to owner | ask `master` instead (you: be it; none: ask again) |
| 8 | Remove | master to directory | the last lock is gone |
| 9 | Removed | directory to master | forgotten |
| 10 | Sync | all to all | the last message before this one was the last of my old view |
| 11 | DirPush | master to new directory | I am the master of these |
| 12 | LockPush | owner to new master | what I hold and what I wait for |
| 13 | Pushed | all to all | my pushes of this view are out |
| 14 | Recovered | all to all | what I took over in this view is open |
| 15 | LvbNote | leaving master to owners | the value blocks as I leave them |
| 16 | LeaveMark, 17 LeaveAck | leaver to all, all to leaver | have you got my notes? |
| 18 | Query, 19 Answer | any | `dlmctl` looks at a resource on all members |
| 20 | RangeLock | owner to keeper | lock, try or test bytes |
| 21 | RangeUnlock | owner to keeper | give bytes back; `rows` are what is there again |
| 22 | RangeCancel | owner to keeper | wait no longer for `number` |
| 23 | RangeReply | keeper to owner | the end of `number`; who is in the way |
| 24 | RangeKeeper | keeper to all | I keep the name: do not ask for its lock |
| 25 | RangeEnlist, 26 RangeEnlisted | new keeper to all, all to it | what do you hold? |
| 27 | RangeResigned | keeper to owner | I do not keep the name in that tenure |
| 28 | RangeChase | any to keeper | who stands in the way of the last operation of `path`? |
| 29 | RangeChased | keeper to owner | what does `key`, which stands in the way, wait for? |
| 30 | RangeCycle | keeper to owner | the chase has come back to you |
| 31 | RangeConfirm, 32 RangeConfirmed | keeper to owner, owner to keeper | do you still hold it? |
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from cluster.decoding import BROKEN
from cluster.errors import ProtocolError
from cluster.ids import Instance
from cluster.locks import Mode
from dlm.modes import LVB_BYTES, NAME_BYTES_MAX, Result

MESSAGES_MAX = 1 << 20
PUSH_LOCKS_MAX = 1024
"""Locks or names in one push message."""
TEXT_BYTES_MAX = 1 << 20
HOPS_MAX = 64
"""Operations in one chain of waiting."""

Name = Annotated[bytes, msgspec.Meta(min_length=1, max_length=NAME_BYTES_MAX)]
Lvb = Annotated[bytes, msgspec.Meta(min_length=LVB_BYTES, max_length=LVB_BYTES)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Text = Annotated[bytes, msgspec.Meta(max_length=TEXT_BYTES_MAX)]
NO_MODE = -1
HeldMode = Annotated[int, msgspec.Meta(ge=NO_MODE, le=5)]


class Request(msgspec.Struct, array_like=True, tag=1, gc=False):
    lock: Count
    op: Count
    name: Name
    mode: Mode
    flags: Count = 0
    probe: bool = False
    age_ns: Count = 0


class Convert(msgspec.Struct, array_like=True, tag=2, gc=False):
    lock: Count
    op: Count
    mode: Mode
    flags: Count = 0
    lvb: Lvb | None = None


class Unlock(msgspec.Struct, array_like=True, tag=3, gc=False):
    lock: Count
    op: Count
    flags: Count = 0
    lvb: Lvb | None = None


class Cancel(msgspec.Struct, array_like=True, tag=4, gc=False):
    lock: Count
    op: Count


class Reply(msgspec.Struct, array_like=True, tag=5, gc=False):
    lock: Count
    op: Count
    state: Count
    result: Result
    mode: HeldMode
    status: Count = 0
    lvb: Lvb | None = None
    lvb_seq: Count = 0
    epoch: Count = 0
    grant: Count = 0


class Bast(msgspec.Struct, array_like=True, tag=6, gc=False):
    lock: Count
    op: Count
    state: Count
    mode: Mode
    waiting: Count


class Redirect(msgspec.Struct, array_like=True, tag=7, gc=False):
    lock: Count
    op: Count
    name: Name
    master: Instance | None
    floor: Count = 0


class Remove(msgspec.Struct, array_like=True, tag=8, gc=False):
    name: Name
    floor: Count


class Removed(msgspec.Struct, array_like=True, tag=9, gc=False):
    name: Name


class Sync(msgspec.Struct, array_like=True, tag=10, gc=False):
    pass


class DirPush(msgspec.Struct, array_like=True, tag=11, gc=False):
    names: list[Name]


LVB_STALE, LVB_CURRENT, LVB_INVALID = 0, 1, 2


class PushedLock(msgspec.Struct, array_like=True, gc=False):
    """One lock as its owner sees it; the owner is right. The modes may be -1. `granted` is what it
    holds for sure; `had` is more if a conversion under way may already have taken that away.
    `lvb_known`: the copy is the last written value (1), is known to be invalid (2), or is only
    what the owner once read (0)."""

    lock: Count
    op: Count
    name: Name
    granted: HeldMode
    had: HeldMode
    requested: HeldMode
    flags: Count = 0
    age_ns: Count = 0
    lvb: Lvb | None = None
    lvb_seq: Count = 0
    lvb_known: Count = LVB_STALE
    uses_lvb: bool = False


class LockPush(msgspec.Struct, array_like=True, tag=12, gc=False):
    locks: list[PushedLock]


class Pushed(msgspec.Struct, array_like=True, tag=13, gc=False):
    pass


class Recovered(msgspec.Struct, array_like=True, tag=14, gc=False):
    pass


class LvbNote(msgspec.Struct, array_like=True, tag=15, gc=False):
    lock: Count
    lvb: Lvb
    lvb_seq: Count
    valid: bool


class LeaveMark(msgspec.Struct, array_like=True, tag=16, gc=False):
    round: Count


class LeaveAck(msgspec.Struct, array_like=True, tag=17, gc=False):
    round: Count


class Query(msgspec.Struct, array_like=True, tag=18, gc=False):
    id: Count
    name: Annotated[bytes, msgspec.Meta(max_length=NAME_BYTES_MAX)]


class Answer(msgspec.Struct, array_like=True, tag=19, gc=False):
    id: Count
    text: Text


Tenure = tuple[Count, Count]
RangeRow = tuple[Count, Count, Count]
"""First byte, last byte, READ or WRITE."""
Key = Count


class _OfTenure(msgspec.Struct, array_like=True, gc=False):
    """About a name as it is kept in one tenure: out of date in another one (`dlm.range_locks`)."""

    name: Name
    tenure: Tenure


class _OfOperation(_OfTenure):
    """`number`: of an owner's operation; of a keeper's question."""

    number: Count


class RangeLock(_OfOperation, tag=20):
    key: Key
    start: Count
    end: Count
    kind: Count
    wait: bool
    pid: Count
    test: bool = False


class RangeUnlock(_OfOperation, tag=21):
    """`number` 0: the owner has given it back, and waits for no answer."""

    key: Key
    start: Count
    end: Count
    rows: list[RangeRow] = []


class RangeCancel(_OfOperation, tag=22):
    pass


class RangeConflict(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A lock that is in the way, and who holds it."""

    instance: Instance
    key: Key
    pid: Count
    start: Count
    end: Count
    kind: Count


class RangeReply(_OfOperation, tag=23):
    result: Result
    conflict: RangeConflict | None = None


class RangeKeeper(_OfTenure, tag=24):
    pass


class RangeEnlist(_OfTenure, tag=25):
    pass


class RangeEnlisted(_OfTenure, tag=26):
    """`rows`: owner's key, pid, first byte, last byte, READ or WRITE."""

    rows: list[tuple[Key, Count, Count, Count, Count]]
    last: bool = True


class RangeResigned(_OfTenure, tag=27):
    pass


class RangeHop(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """One waiting operation in a chain of them, and for how long it has waited."""

    instance: Instance
    key: Key
    number: Count
    name: Name
    age_ns: Count


Path = Annotated[list[RangeHop], msgspec.Meta(min_length=1, max_length=HOPS_MAX)]


class RangeChase(msgspec.Struct, array_like=True, tag=28, gc=False):
    name: Name
    path: Path
    at: Count
    verify: bool


class RangeChased(msgspec.Struct, array_like=True, tag=29, gc=False):
    """`wanted`: what stands in the way is a lock of `key` on these bytes of `name`."""

    key: Key
    path: Path
    at: Count
    verify: bool
    name: Name
    wanted: RangeRow


class RangeCycle(msgspec.Struct, array_like=True, tag=30, gc=False):
    """Of the first owner of the path; `wanted` as of RangeChased."""

    path: Path
    verified: bool
    name: Name
    wanted: RangeRow


class RangeConfirm(_OfOperation, tag=31):
    """Is it still so? What the receiver has given back is on its way before its answer."""


class RangeConfirmed(_OfOperation, tag=32):
    pass


RangeMessage = (
    RangeLock
    | RangeUnlock
    | RangeCancel
    | RangeReply
    | RangeKeeper
    | RangeEnlist
    | RangeEnlisted
    | RangeResigned
    | RangeChase
    | RangeChased
    | RangeCycle
    | RangeConfirm
    | RangeConfirmed
)
ToMaster = Request | Convert | Unlock | Cancel
ToOwner = Reply | Bast | Redirect | LvbNote
ToDirectory = Remove | Removed
RecoveryMessage = Sync | DirPush | LockPush | Pushed | Recovered | LeaveMark | LeaveAck
Message = ToMaster | ToOwner | ToDirectory | RecoveryMessage | Query | Answer | RangeMessage


class Batch(msgspec.Struct, array_like=True, gc=False):
    """One payload of the mesh."""

    epoch: Count
    seq: Count
    messages: Annotated[list[Message], msgspec.Meta(max_length=MESSAGES_MAX)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Batch)


def encode(batch: Batch) -> bytes:
    return _encoder.encode(batch)


def decode_untrusted(payload: bytes) -> Batch:
    """Raises ProtocolError. Lengths of names and value blocks and all numbers are checked here."""
    try:
        return _decoder.decode(payload)
    except BROKEN as error:
        raise ProtocolError(f"not a lock manager message: {error}") from error
