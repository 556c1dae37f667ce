"""The list of wanted mounts: who is in it, and when a lost one is due."""

import pytest

from cluster.errors import BusyError, CorruptionError
from node import wanted as w
from node.wanted import Wanted, WantedMount

SECOND = 1_000_000_000
DATA = WantedMount("vg0/data", "/mnt/data", ["noatime"])
HOME = WantedMount("vg0/home", "/mnt/home")
NONE: set[str] = set()


def test_a_mount_is_wanted_until_it_is_unmounted():
    wanted = Wanted([])
    assert wanted.want(0, DATA, 3)
    assert not wanted.want(0, DATA, 3)
    assert wanted.mounts() == [DATA]
    assert not wanted.left(4)
    assert wanted.left(3)
    assert wanted.mounts() == []


def test_the_end_of_an_older_mount_at_the_same_place_changes_nothing():
    """After `umount -l` the old one lives on until its last file is closed."""
    wanted = Wanted([])
    wanted.want(0, DATA, 3)
    wanted.want(5, DATA, 8)
    assert not wanted.left(3)
    wanted.died(6, 3)
    assert wanted.due(10, NONE) == []
    assert wanted.mounts() == [DATA]


def test_what_was_mounted_when_the_power_went_is_due_at_once():
    wanted = Wanted(w.decode_wanted_untrusted(w.encode_wanted([DATA, HOME])))
    assert wanted.due(0, NONE) == [DATA, HOME]
    wanted.started(DATA.mountpoint)
    assert wanted.due(0, NONE) == [HOME]
    wanted.want(1, DATA, 1)
    wanted.ended(1, DATA.mountpoint, "")
    assert wanted.due(1, NONE) == [HOME]
    assert wanted.due(1, {HOME.mountpoint}) == []
    assert wanted.deadline({HOME.mountpoint}) is None


def test_pauses_grow_while_it_fails_and_only_news_is_told():
    wanted = Wanted([DATA])
    now, pauses = 0, []
    for number in range(10):
        assert wanted.due(now, NONE) == [DATA]
        wanted.started(DATA.mountpoint)
        assert wanted.ended(now, DATA.mountpoint, "no such volume") == (number == 0)
        pauses.append((wanted.deadline(NONE) - now) // SECOND)
        now = wanted.deadline(NONE)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    assert wanted.ended(now, DATA.mountpoint, "no quorum")
    assert wanted.rows()[0]["problem"] == "no quorum"


def test_a_mount_that_dies_again_and_again_gets_pauses_and_one_that_lasted_gets_none():
    wanted = Wanted([])
    wanted.want(0, DATA, 1)
    wanted.died(SECOND, 1)
    assert wanted.due(SECOND, NONE) == [DATA]
    wanted.want(2 * SECOND, DATA, 2)
    wanted.died(3 * SECOND, 2)
    assert wanted.due(3 * SECOND, NONE) == []
    assert wanted.deadline(NONE) == 4 * SECOND
    wanted.want(4 * SECOND, DATA, 3)
    wanted.died(4 * SECOND + w.SETTLED_NS, 3)
    assert wanted.due(4 * SECOND + w.SETTLED_NS, NONE) == [DATA]


def test_bounds_and_nonsense():
    wanted = Wanted([WantedMount("v", f"/mnt/{n}") for n in range(w.WANTED_MAX)])
    with pytest.raises(BusyError):
        wanted.want(0, DATA, 1)
    assert wanted.forget("/mnt/7")
    assert not wanted.forget("/mnt/7")
    with pytest.raises(CorruptionError):
        w.decode_wanted_untrusted(b'{"volume": 1}')
