"""Lock modes, flags and results: the published tables of VMS and the Linux lock manager.

Invariants: the tables are symmetric where the literature says so, and every rule elsewhere in the
package asks these tables; nobody compares mode numbers, because CW and PR exclude each other and
the order of the numbers is not an order of strength.
"""

from __future__ import annotations

import enum
from typing import Final

from cluster.locks import Mode

NL, CR, CW, PR, PW, EX = Mode.NL, Mode.CR, Mode.CW, Mode.PR, Mode.PW, Mode.EX

NAME_BYTES_MAX = 64
LVB_BYTES = 64
LVB_ZERO = bytes(LVB_BYTES)

COMPATIBLE: tuple[tuple[bool, ...], ...] = tuple(
    tuple(cell == "1" for cell in row)
    for row in ("111111", "111110", "111000", "110100", "110000", "100000")
)
"""COMPATIBLE[granted][requested]."""

READ_LVB, WRITE_LVB, KEEP_LVB = 1, 0, -1

LVB_NEW = READ_LVB
LVB_DIRECTION: tuple[tuple[int, ...], ...] = (
    (1, 1, 1, 1, 1, 1),
    (-1, 1, 1, 1, 1, 1),
    (-1, -1, 1, 1, 1, 1),
    (-1, -1, -1, 1, 1, 1),
    (0, 0, 0, 0, 0, 1),
    (0, 0, 0, 0, 0, 0),
)
"""LVB_DIRECTION[granted][requested]: 1 resource to caller, 0 caller to resource, -1 nothing."""

QUECVT_LEGAL: tuple[tuple[bool, ...], ...] = tuple(
    tuple(cell == "1" for cell in row)
    for row in ("011111", "001111", "000111", "001011", "000001", "000000")
)
"""QUECVT_LEGAL[granted][requested]: the flag makes sense only where the conversion can wait."""


def _excluded(mode: int) -> int:
    return sum(1 << other for other in range(6) if not COMPATIBLE[mode][other])


EXCLUDES: tuple[int, ...] = tuple(_excluded(mode) for mode in range(6))
"""EXCLUDES[mode]: bit set of the modes that are not compatible with it."""

COVERS: tuple[tuple[bool, ...], ...] = tuple(
    tuple(EXCLUDES[held] & EXCLUDES[wanted] == EXCLUDES[wanted] for wanted in range(6))
    for held in range(6)
)
"""COVERS[held][wanted]: whoever holds `held` may do everything that `wanted` allows."""

COVER_BITS: tuple[int, ...] = tuple(
    sum(1 << wanted for wanted in range(6) if COVERS[held][wanted]) for held in range(6)
)


def meet(one: Mode, two: Mode) -> Mode:
    """The strongest mode that both cover: what is held while a conversion between them is under
    way. Differs from both only for PR and CW."""
    for mode in (EX, PW, PR, CW, CR):
        if COVERS[one][mode] and COVERS[two][mode]:
            return mode
    return NL


WRITE_MODES = frozenset({CW, PW, EX})
"""What a dead holder could have been writing under."""

LVB_WRITERS = frozenset({PW, EX})


def goes_down(granted: Mode, requested: Mode) -> bool:
    """Whether a conversion gives something up and takes nothing: it needs nobody's leave."""
    return COVERS[granted][requested]


def strongest_beside(held: Mode, waiting: int) -> Mode:
    """The strongest mode covered by `held` that is compatible with every mode of a bit set."""
    for mode in (EX, PW, PR, CW, CR):
        if COVERS[held][mode] and not EXCLUDES[mode] & waiting:
            return mode
    return NL


MODES: tuple[Mode, ...] = tuple(Mode)
"""MODES[number] is much cheaper than Mode(number)."""


class Flags:
    """Values as in libdlm. Plain integers: they are tested several times per operation, and an
    `enum.IntFlag` costs a microsecond each time."""

    NONE: Final = 0
    NOQUEUE: Final = 0x1
    CANCEL: Final = 0x2
    CONVERT: Final = 0x4
    VALBLK: Final = 0x8
    QUECVT: Final = 0x10
    IVVALBLK: Final = 0x20
    CONVDEADLK: Final = 0x40
    PERSISTENT: Final = 0x80
    NODLCKWT: Final = 0x100
    NODLCKBLK: Final = 0x200
    EXPEDITE: Final = 0x400
    NOQUEUEBAST: Final = 0x800
    HEADQUE: Final = 0x1000
    NOORDER: Final = 0x2000
    ORPHAN: Final = 0x4000
    ALTPR: Final = 0x8000
    ALTCW: Final = 0x10000
    FORCEUNLOCK: Final = 0x20000
    TIMEOUT: Final = 0x40000


UNSUPPORTED = Flags.PERSISTENT | Flags.ORPHAN | Flags.TIMEOUT | Flags.NODLCKBLK


class Status:
    """What the master says beside the result of a grant."""

    NONE: Final = 0
    DEMOTED: Final = 1
    VALNOTVALID: Final = 2
    ALTMODE: Final = 4


class Result(enum.IntEnum):
    """How an operation ended. The negative numbers are Linux's errno values."""

    GRANTED = 0
    AGAIN = -11
    BUSY = -16
    INVALID = -22
    DEADLOCK = -35
    NO_LOCK = -2
    FULL = -37
    CANCELLED = -0x10001
    UNLOCKED = -0x10002
    QUEUED = -115


def request_is_valid(mode: Mode, flags: int) -> bool:
    """The rules for the flags of a new request."""
    if flags & (UNSUPPORTED | Flags.CANCEL | Flags.CONVERT | Flags.QUECVT | Flags.CONVDEADLK):
        return False
    if flags & (Flags.FORCEUNLOCK | Flags.IVVALBLK):
        return False
    if flags & Flags.EXPEDITE and (mode != NL or flags & (Flags.NOQUEUE | Flags.NOQUEUEBAST)):
        return False
    return _alternatives_are_valid(flags)


def convert_is_valid(granted: Mode, mode: Mode, flags: int) -> bool:
    """The rules for the flags of a conversion."""
    if flags & (UNSUPPORTED | Flags.CANCEL | Flags.EXPEDITE | Flags.FORCEUNLOCK):
        return False
    if flags & Flags.QUECVT and not QUECVT_LEGAL[granted][mode]:
        return False
    if flags & Flags.CONVDEADLK and flags & Flags.NOQUEUE:
        return False
    return _alternatives_are_valid(flags)


def _alternatives_are_valid(flags: int) -> bool:
    if flags & Flags.NOQUEUEBAST and not flags & Flags.NOQUEUE:
        return False
    return not (flags & Flags.ALTPR and flags & Flags.ALTCW)


def unlock_is_valid(flags: int) -> bool:
    """The rules for the flags of an unlock."""
    allowed = Flags.VALBLK | Flags.IVVALBLK | Flags.FORCEUNLOCK
    return not flags & ~allowed
