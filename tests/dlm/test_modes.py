"""The published tables, written out a second time and compared cell by cell."""

import pytest

from cluster.locks import Mode
from dlm import modes
from dlm.modes import COMPATIBLE, COVERS, LVB_DIRECTION, QUECVT_LEGAL, Flags

NL, CR, CW, PR, PW, EX = Mode
ALL = list(Mode)

COMPATIBLE_PAIRS = {
    NL: {NL, CR, CW, PR, PW, EX},
    CR: {NL, CR, CW, PR, PW},
    CW: {NL, CR, CW},
    PR: {NL, CR, PR},
    PW: {NL, CR},
    EX: {NL},
}

LVB_TABLE = """
1 1 1 1 1 1
- 1 1 1 1 1
- - 1 1 1 1
- - - 1 1 1
0 0 0 0 0 1
0 0 0 0 0 0
"""

QUECVT_PAIRS = {
    NL: {CR, CW, PR, PW, EX},
    CR: {CW, PR, PW, EX},
    CW: {PR, PW, EX},
    PR: {CW, PW, EX},
    PW: {EX},
    EX: set(),
}


@pytest.mark.parametrize("granted", ALL)
@pytest.mark.parametrize("requested", ALL)
def test_compatibility(granted, requested):
    assert COMPATIBLE[granted][requested] == (requested in COMPATIBLE_PAIRS[granted])
    assert COMPATIBLE[granted][requested] == COMPATIBLE[requested][granted]


@pytest.mark.parametrize("granted", ALL)
@pytest.mark.parametrize("requested", ALL)
def test_lvb_direction(granted, requested):
    rows = [line.split() for line in LVB_TABLE.strip().splitlines()]
    meaning = {"1": modes.READ_LVB, "0": modes.WRITE_LVB, "-": modes.KEEP_LVB}
    assert LVB_DIRECTION[granted][requested] == meaning[rows[granted][requested]]


@pytest.mark.parametrize("granted", ALL)
@pytest.mark.parametrize("requested", ALL)
def test_quecvt_legality(granted, requested):
    assert QUECVT_LEGAL[granted][requested] == (requested in QUECVT_PAIRS[granted])
    valid = modes.convert_is_valid(granted, requested, Flags.QUECVT)
    assert valid == (requested in QUECVT_PAIRS[granted])


@pytest.mark.parametrize("held", ALL)
@pytest.mark.parametrize("wanted", ALL)
def test_covering_means_excluding_as_much(held, wanted):
    weaker = all(COMPATIBLE[wanted][x] for x in ALL if COMPATIBLE[held][x])
    assert COVERS[held][wanted] == weaker
    if {held, wanted} != {PR, CW}:
        assert COVERS[held][wanted] == (wanted <= held)


@pytest.mark.parametrize("held", ALL)
@pytest.mark.parametrize("waiting", range(64))
def test_strongest_beside(held, waiting):
    mode = modes.strongest_beside(held, waiting)
    waiters = [x for x in ALL if waiting >> x & 1]
    assert COVERS[held][mode]
    assert all(COMPATIBLE[mode][x] for x in waiters)
    for other in ALL:
        if COVERS[held][other] and all(COMPATIBLE[other][x] for x in waiters):
            assert COVERS[mode][other] or {mode, other} == {PR, CW}


def test_flag_values_are_libdlm_s():
    assert Flags.NOQUEUE == 0x1
    assert Flags.VALBLK == 0x8
    assert Flags.QUECVT == 0x10
    assert Flags.NOQUEUEBAST == 0x800
    assert Flags.FORCEUNLOCK == 0x20000


def test_flags_that_make_no_sense():
    assert not modes.request_is_valid(PR, Flags.EXPEDITE)
    assert modes.request_is_valid(NL, Flags.EXPEDITE)
    assert not modes.request_is_valid(NL, Flags.EXPEDITE | Flags.NOQUEUE)
    assert not modes.request_is_valid(EX, Flags.QUECVT)
    assert not modes.request_is_valid(EX, Flags.PERSISTENT)
    assert not modes.request_is_valid(EX, Flags.TIMEOUT)
    assert not modes.request_is_valid(EX, Flags.NOQUEUEBAST)
    assert not modes.convert_is_valid(PR, EX, Flags.CONVDEADLK | Flags.NOQUEUE)
    assert not modes.convert_is_valid(PR, EX, Flags.EXPEDITE)
    assert not modes.unlock_is_valid(Flags.NOQUEUE)
    assert modes.unlock_is_valid(Flags.FORCEUNLOCK | Flags.IVVALBLK)
