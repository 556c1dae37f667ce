"""The way around locked pages: what counts as dropped, and what never does."""

import random

from cfs.fuse.kernel_cache import EVERYTHING, edge_pages, page_span
from native.requests import READ_LOCKOWNER, WRITE_CACHE, Opcode, PendingRequest
from node.guard_detour import WAITING_LOOKS, Detour

PAGE = 4096


def row(opcode, offset=0, size=0, flags=0):
    return PendingRequest(1, 5, 1, offset, 0, size, opcode, flags, 1, False, False)


READ = row(Opcode.READ, 2 * PAGE, 2 * PAGE)
RAGGED = row(Opcode.WRITE, 8 * PAGE + 10, 20)


def finish(pieces):
    for piece in pieces:
        if not piece.edge:
            piece.finished = len(piece.spans)


def test_pages_of_a_read_are_left_out():
    detour = Detour()
    (piece,) = detour.look([READ], complete=False)
    assert piece.spans == [(0, 2 * PAGE), (4 * PAGE, EVERYTHING[1])]
    assert not detour.covered
    finish([piece])
    assert detour.look([READ], complete=False) == []
    assert detour.covered


def test_a_read_past_the_cache_locks_nothing():
    (piece,) = Detour().look([row(Opcode.READ, 0, PAGE, READ_LOCKOWNER)], complete=True)
    assert piece.spans == [EVERYTHING]


def test_a_read_that_comes_later_starts_the_rest_anew():
    detour = Detour()
    (first,) = detour.look([], complete=True)
    assert first.spans == [EVERYTHING]
    (second,) = detour.look([READ], complete=True)
    assert first.stopped
    assert second.spans == [(0, 2 * PAGE), (4 * PAGE, EVERYTHING[1])]


def waiting_edge(detour, rows):
    """The edge piece of RAGGED, whose thread has been seen waiting often enough."""
    edge, rest = detour.look(rows, complete=True)
    assert (edge.edge, edge.spans) == (True, [(8 * PAGE, 9 * PAGE)])
    finish([rest])
    edge.waiting = WAITING_LOOKS
    return edge


def test_the_locked_edge_of_a_write_is_left_behind():
    detour = Detour()
    waiting_edge(detour, [RAGGED])
    detour.look([RAGGED], complete=True)
    assert detour.covered


def test_an_edge_that_is_not_locked_has_to_go():
    detour = Detour()
    edge = waiting_edge(detour, [RAGGED])
    edge.waiting = WAITING_LOOKS - 1
    detour.look([RAGGED], complete=True)
    assert not detour.covered
    edge.finished = 1
    detour.look([RAGGED], complete=True)
    assert detour.covered


def test_an_edge_that_may_wait_for_a_write_back_is_not_left_behind():
    """Its page would be dirty, and dirty pages hold data."""
    for rows, complete in (
        ([RAGGED], False),
        ([RAGGED, row(Opcode.WRITE, 8 * PAGE, PAGE, WRITE_CACHE)], True),
        ([RAGGED, row(Opcode.SETATTR)], True),
        ([], True),
    ):
        detour = Detour()
        waiting_edge(detour, [RAGGED])
        detour.look(rows, complete=complete)
        assert not detour.covered, rows


def test_random_histories_drop_every_page_that_is_not_locked():
    """Pages are locked without data, or hold data; a piece stops at a locked page."""
    for seed in range(200):
        rng = random.Random(seed)
        pages = 24
        rows, locked = [], set()
        for _ in range(rng.randrange(5)):
            start = rng.randrange(pages * PAGE)
            size = rng.randrange(1, 5 * PAGE)
            if rng.random() < 0.5:
                rows.append(row(Opcode.READ, start & -PAGE, size))
                spans = [page_span(start & -PAGE, (start & -PAGE) + size)]
            else:
                rows.append(row(Opcode.WRITE, start, size))
                spans = [s for s in edge_pages(start, start + size) if rng.random() < 0.5]
            locked |= {p for a, b in spans for p in range(a // PAGE, b // PAGE)}
        valid = {p for p in range(pages + 6) if p not in locked}
        detour, live, seen = Detour(), [], rng.randrange(len(rows) + 1)
        for _ in range(60):
            live += detour.look(rows[:seen], complete=seen == len(rows))
            if detour.covered:
                break
            seen = min(len(rows), seen + rng.randrange(2))
            for piece in live:
                while piece.finished < len(piece.spans):
                    start, end = (at // PAGE for at in piece.spans[piece.finished])
                    if any(start <= page < end for page in locked):
                        piece.waiting += 1
                        break
                    valid -= {page for page in valid if start <= page < end}
                    piece.finished += 1
                    if piece.stopped or rng.random() < 0.3:
                        break
        assert detour.covered, seed
        assert not valid, seed
