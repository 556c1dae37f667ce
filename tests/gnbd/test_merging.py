"""Small requests that touch go out as one."""

from __future__ import annotations

from collections import deque

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from gnbd import protocol as p
from gnbd.client.core import ClientCore
from gnbd.client.lanes import Request
from gnbd.client.merging import MERGED_BYTES_MAX, PART_BYTES_MAX, merged
from lab.block_server import export_toml, running
from tests.gnbd.test_client_io import MEMBERS, opened

BLOCK = 4096
_LENGTHS = (512, BLOCK, PART_BYTES_MAX, PART_BYTES_MAX + 512)


class Told:
    """A waiter that remembers."""

    def __init__(self) -> None:
        self.errors: list[object] = []

    def done(self, error: object) -> None:
        self.errors.append(error)


def request(kind: int, offset: int, length: int = BLOCK, flags: int = 0) -> Request:
    data = bytes([offset // 512 % 251]) * length if kind == p.CMD_WRITE else None
    return Request(kind, offset, length, data, flags, Told())


def content(one: Request) -> tuple[int, int, int, int, bytes | None]:
    data = None if one.data is None else bytes(one.data)
    return one.kind, one.offset, one.length, one.flags, data


@given(
    st.lists(
        st.tuples(
            st.sampled_from((p.CMD_READ, p.CMD_WRITE, p.CMD_FLUSH, p.CMD_TRIM)),
            st.sampled_from(_LENGTHS),
            st.sampled_from((0, 0, 0, p.CMD_FLAG_FUA)),
            st.sampled_from((0, 0, 0, BLOCK)),
        ),
        max_size=60,
    )
)
def test_nothing_changes_but_the_number_of_requests(steps):
    """Kinds, flags, bytes and the order of all of them stay; what is together touches."""
    at, waiting = 0, deque()
    for kind, length, flags, gap in steps:
        at += gap
        waiting.append(request(kind, at, length, flags))
        at += length
    before, found = [content(one) for one in waiting], []
    while waiting:
        whole = merged(waiting.popleft(), waiting)
        found += whole.parts or [whole]
        if whole.parts:
            assert whole.length <= MERGED_BYTES_MAX
            assert whole.kind in (p.CMD_READ, p.CMD_WRITE)
            assert {one.flags for one in whole.parts} == {whole.flags}
            end = whole.offset
            for one in whole.parts:
                assert one.offset == end
                end += one.length
            assert end == whole.offset + whole.length
            if whole.kind == p.CMD_WRITE:
                assert whole.data == b"".join(one.data for one in whole.parts)
    assert [content(one) for one in found] == before


def up() -> ClientCore:
    core = ClientCore(1, 1)
    core.logged_in(core.paths[0], core.required, 1, 1 << 30)
    core.lane_up(core.paths[0], 0)
    return core


def test_readers_get_their_own_bytes():
    core = up()
    requests = [request(p.CMD_READ, index * BLOCK) for index in range(3)]
    requests[1].into = memoryview(bytearray(BLOCK))
    for one in requests:
        core.submit(one)
    ((lane, whole),) = core.assign(0)
    whole.result = b"".join(bytes([65 + index]) * BLOCK for index in range(3))
    core.completed(lane, whole.cookie, 0, 0)
    assert requests[0].result == b"A" * BLOCK
    assert requests[1].into == b"B" * BLOCK
    assert requests[2].result == b"C" * BLOCK
    assert [one.waiter for one in requests] == [None] * 3
    assert core.all_requests() == []


@pytest.mark.parametrize("kind", [p.CMD_READ, p.CMD_WRITE])
def test_an_error_is_told_to_who_it_belongs_to(kind):
    core = up()
    requests = [request(kind, index * BLOCK) for index in range(3)]
    told = [one.waiter for one in requests]
    for one in requests:
        core.submit(one)
    ((lane, whole),) = core.assign(0)
    core.completed(lane, whole.cookie, p.EIO, 0)
    assert [one.errors for one in told] == [[], [], []]
    alone = core.assign(0)
    assert [one for _, one in alone] == requests
    for lane, one in alone:
        one.result = bytes(BLOCK)
        core.completed(lane, one.cookie, p.EIO if one is requests[1] else 0, 0)
    assert [len(one.errors) for one in told] == [1, 1, 1]
    assert [one.errors[0] is None for one in told] == [True, False, True]


def test_what_was_merged_is_kept_and_sent_again():
    """Over a lost path as one, after a server's restart as what it was."""
    core = up()
    requests = [request(p.CMD_WRITE, index * BLOCK) for index in range(3)]
    told = [one.waiter for one in requests]
    for one in requests:
        core.submit(one)
    core.assign(0)
    core.path_lost(core.paths[0], 0)
    core.logged_in(core.paths[0], core.required, 1, 1 << 30)
    lane = core.lane_up(core.paths[0], 0)
    ((_, whole),) = core.assign(0)
    assert whole.parts == requests
    core.completed(lane, whole.cookie, 0, 0)
    assert [one.errors for one in told] == [[None]] * 3
    assert core.retained.bytes == 3 * BLOCK
    core.check()


def test_what_waits_for_a_sequence_number_is_not_drawn_before_it():
    """A lost request comes back to its neighbour, which came after the declaration."""
    core = ClientCore(2, 1)
    for path in core.paths:
        core.logged_in(path, core.required, 1, 1 << 30)
        core.lane_up(path, 0)
    early, late = request(p.CMD_WRITE, 0), request(p.CMD_WRITE, BLOCK)
    core.submit(early)
    ((lane, _),) = core.assign(0)
    core.path_lost(lane.path, 0)
    core.submit(Request(p.CMD_SEQUENCE, 1))
    core.submit(late)
    ((_, declaring),) = core.assign(0)
    assert declaring.kind == p.CMD_SEQUENCE
    core.drained(lane.path, lane.generation)
    assert [one for _, one in core.assign(0)] == [early]


def test_at_a_real_server(tmp_path):
    parts = [(index * BLOCK, bytes([index]) * BLOCK) for index in range(32)]

    async def body(server):
        async with opened(server) as device:
            await device.write_many(parts)
            assert await device.read_many([(at, BLOCK) for at, _ in parts]) == [
                data for _, data in parts
            ]
            (path,) = device.stats()
            assert path.requests < len(parts)

    exports = export_toml("disk0", tmp_path / "d", "cluster", "1M")
    with running(tmp_path, exports) as server:
        server.install(1, MEMBERS)
        trio.run(body, server)
    assert (tmp_path / "d").read_bytes()[: 32 * BLOCK] == b"".join(data for _, data in parts)
