"""What is remembered of fences: own view kept, newest records only, damage is an error."""

from __future__ import annotations

import msgspec
import pytest

from cluster.errors import ProtocolError
from cluster.guard_events import Peer, Sighting
from fencing.methods import Attempt, Verdict
from fencing.records import (
    MS,
    RECORDS_MAX,
    FenceBook,
    FenceRecord,
    LinkBook,
    LinkSeen,
    decode_book_untrusted,
    decode_record_untrusted,
)


def record(node, incarnation=1, **more):
    return FenceRecord(
        epoch=incarnation, node=node, name=f"n{node}", incarnation=incarnation, reason="expelled",
        proposed_by="n1", wall_ms=5, **{"seen_by": "n1", **more},
    )  # fmt: skip


def test_a_report_keeps_what_was_seen_here():
    book = FenceBook()
    book.put(record(2, links=[LinkSeen(1, False, 900)], lease_ms=40))
    assert book.open()
    attempt = Attempt(1, "servers", 1, 0, 3, Verdict.PROVEN, "s1")
    told = record(2, seen_by="n3", tried_by="n3", attempts=[attempt], verdict="proven", level=1)
    assert book.reported(told)
    mine = book.newest(2)
    assert (mine.seen_by, mine.lease_ms, mine.tried_by) == ("n1", 40, "n3")
    assert mine.links == [LinkSeen(1, False, 900)]
    assert not book.open()
    assert not book.reported(record(2, verdict="failed"))  # the first verdict stands
    assert book.newest(2).verdict == "proven"


def test_bounded_and_durable():
    book = FenceBook()
    for incarnation in range(1, RECORDS_MAX + 11):
        book.put(record(2, incarnation))
    again = decode_book_untrusted(book.encode())
    assert again.records() == book.records()
    assert len(again.records()) == RECORDS_MAX
    assert again.newest(2).incarnation == RECORDS_MAX + 10
    assert again.find((2, 1)) is None


def test_a_late_report_about_an_old_life_displaces_no_newer_one():
    """Else that one would be new again when the register is looked at, and be fenced again."""
    book = FenceBook()
    newer = [record(2, incarnation) for incarnation in range(11, RECORDS_MAX + 11)]
    for one in newer:
        book.put(one)
    book.reported(record(3, 1, verdict="proven", level=1))
    assert book.records() == newer


def test_bytes_of_strangers():
    good = msgspec.msgpack.encode(record(2))
    assert decode_record_untrusted(good) == record(2)
    for cut in range(len(good)):
        with pytest.raises(ProtocolError):
            decode_record_untrusted(good[:cut])
    with pytest.raises(ProtocolError):
        decode_book_untrusted(b"\x01")


def sighting(**links):
    peers = [
        Peer(
            node=int(name[1:]), incarnation=1, alive=True, epoch=1, version=1, config_epoch=1,
            reach=[], servers=[], running=[], stalled=[], purged=[], links=up,
        )
        for name, up in links.items()
    ]  # fmt: skip
    return Sighting(peers=peers, voters=[], witnessed=[], stalled=[], late_ms=0)


def test_links_since_when():
    links = LinkBook()
    assert links.seen(0, 2) == []
    links.note(0, sighting(n2=[True, True]))
    links.note(10 * MS, sighting(n2=[True, False]))
    links.note(30 * MS, sighting(n2=[True, False]))
    assert links.seen(50 * MS, 2) == [LinkSeen(1, True, 50), LinkSeen(2, False, 40)]
    links.note(60 * MS, sighting())  # the guard does not list it any more
    assert links.seen(70 * MS, 2) == [LinkSeen(1, False, 10), LinkSeen(2, False, 60)]
