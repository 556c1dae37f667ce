"""Every call of libnbd's Python module against an export of 128 MiB; run by Debian's own python3,
which has that module: /usr/bin/python3 libnbd_calls.py URI [UNIX-SOCKET]. Silent when all is well.
"""

import contextlib
import errno
import select
import sys

import nbd

MIB = 1 << 20
SIZE = 128 * MIB
ERRORS_OF = {"base:allocation": {0, 3}, "x-cfs:reservation": {2}}


@contextlib.contextmanager
def connected(uri, *contexts, **settings):
    """A handle in transmission."""
    handle = nbd.NBD()
    for name, value in settings.items():
        getattr(handle, f"set_{name}")(value)
    for context in contexts:
        handle.add_meta_context(context)
    handle.connect_uri(uri)
    yield handle
    if not handle.aio_is_closed():
        handle.shutdown()


def refused(number, call, *arguments, **more):
    """The call must fail with this errno."""
    found = None
    try:
        call(*arguments, **more)
    except nbd.Error as error:
        found = error.errnum
    assert found == number, (call, found, number)


def negotiate(uri):
    """Option mode: LIST, INFO, contexts, GO; refusals leave the haggling alive."""
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.set_full_info(True)
    handle.set_export_name("plain")
    handle.connect_uri(uri)
    assert handle.aio_is_negotiating()
    assert handle.get_protocol() == "newstyle-fixed"
    assert not handle.get_tls_negotiated()
    assert handle.get_structured_replies_negotiated()
    names = []
    handle.opt_list(lambda name, description: names.append((name, description)) and 0)
    assert ("plain", "a disk for everybody") in names, names
    assert "secret" not in dict(names)
    handle.set_export_name("secret")
    refused(errno.ENOTSUP, handle.opt_info)  # what libnbd 1.14 makes of any refusal
    handle.set_export_name("nothing")
    refused(errno.ENOENT, handle.opt_go)
    handle.set_export_name("plain")
    contexts = []
    handle.opt_list_meta_context(lambda name: contexts.append(name) and 0)
    assert set(contexts) == set(ERRORS_OF), contexts
    for context in contexts:
        handle.add_meta_context(context)
    handle.opt_info()
    assert handle.get_size() == SIZE
    assert handle.get_canonical_export_name() == "plain"
    assert handle.get_export_description() == "a disk for everybody"
    handle.opt_go()
    assert handle.can_meta_context("base:allocation")
    assert handle.can_meta_context("x-cfs:reservation")
    handle.shutdown()
    handle = nbd.NBD()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    handle.opt_abort()
    assert handle.aio_is_closed()


def flags(uri):
    """What the export says of itself."""
    with connected(uri) as h:
        assert not h.is_read_only()
        assert not h.is_rotational()
        for name in ("flush", "fua", "trim", "zero", "fast_zero", "df", "cache", "multi_conn"):
            assert getattr(h, f"can_{name}")(), name
        assert h.get_size() == SIZE
        sizes = [h.get_block_size(which) for which in (0, 1, 2)]
        assert sizes == [1, 4096, 64 * MIB], sizes
    with connected(uri, request_structured_replies=False) as h:
        assert not h.can_df()
        assert not h.get_structured_replies_negotiated()
        h.pwrite(b"simple" * 100, 7 * MIB)
        assert h.pread(600, 7 * MIB) == b"simple" * 100
    with connected(uri, handshake_flags=nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE) as h:
        assert h.get_size() == SIZE
    with connected(uri, handshake_flags=0) as h:  # EXPORT_NAME, with padding
        assert h.get_size() == SIZE
        assert h.get_protocol() == "newstyle"


def commands(uri):
    """Each command with each of its flags."""
    with connected(uri, "base:allocation", "x-cfs:reservation") as h:
        h.trim(4 * MIB, 0)
        h.trim(MIB, 0, nbd.CMD_FLAG_FUA)
        h.pwrite(b"a" * 65536, MIB)
        h.pwrite(b"b" * 4097, MIB + 4095, nbd.CMD_FLAG_FUA)
        h.flush()
        assert h.pread(8192, MIB) == b"a" * 4095 + b"b" * 4097
        chunks = []

        def chunk(data, offset, status, error):
            assert error.value == 0
            chunks.append((offset, status, bytes(data)))
            return 0

        got = h.pread_structured(2 * MIB, 0, chunk)
        assert {s for _, s, _ in chunks} == {nbd.READ_DATA, nbd.READ_HOLE}, chunks
        assert sum(len(d) for o, s, d in chunks if s == nbd.READ_DATA) == 65536
        whole = h.pread_structured(2 * MIB, 0, lambda *_: 0, nbd.CMD_FLAG_DF)
        assert got == whole
        h.zero(4096, MIB)
        h.zero(4096, MIB + 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
        h.zero(4096, MIB + 8192, nbd.CMD_FLAG_FAST_ZERO)
        assert h.pread(12288, MIB) == bytes(12288)
        h.cache(MIB, 0)
        statuses = {}

        def extent(context, offset, entries, error):
            assert error.value == 0
            statuses.setdefault(context, []).append((offset, entries))
            return 0

        h.block_status(4 * MIB, 0, extent)
        for context, allowed in ERRORS_OF.items():
            ((offset, entries),) = statuses[context]
            assert offset == 0
            assert set(entries[1::2]) <= allowed, entries
            assert sum(entries[::2]) >= MIB
        statuses.clear()
        h.block_status(4 * MIB, 0, extent, nbd.CMD_FLAG_REQ_ONE)
        assert len(statuses["base:allocation"][0][1]) == 2


def errors(uri):
    """What may not be asked, as the protocol lists the errors; the connection goes on."""
    with connected(uri, strict_mode=0) as h:
        refused(errno.EINVAL, h.pread, 2, SIZE - 1)
        refused(errno.ENOSPC, h.pwrite, b"ab", SIZE - 1)
        refused(errno.ENOSPC, h.zero, 2, SIZE - 1)
        refused(errno.EINVAL, h.trim, 2, SIZE - 1)
        refused(errno.EINVAL, h.cache, 2, SIZE - 1)
        refused(errno.EINVAL, h.block_status, 2, SIZE - 1, lambda *_: 0)
        refused(errno.EINVAL, h.flush, 1 << 9)
        refused(errno.EINVAL, h.pwrite, b"ab", 0, nbd.CMD_FLAG_NO_HOLE)
        h.flush(nbd.CMD_FLAG_FUA)
        h.cache(4096, 0, nbd.CMD_FLAG_FUA)
        h.pread_structured(4096, 0, lambda *_: 0, nbd.CMD_FLAG_FUA)
        h.pwrite(b"fine", 0)
        assert h.pread(4, 0) == b"fine"


def asynchronous(uri):
    """64 requests in flight by the aio calls, completed in any order."""
    with connected(uri) as h:
        data = [bytes([i]) * 8192 for i in range(64)]

        def finish(cookies):
            while cookies:
                h.poll(-1)
                cookies -= {c for c in cookies if h.aio_command_completed(c)}

        def numbers(call):
            return {call(i) for i in range(64)}

        sources = [nbd.Buffer.from_bytearray(piece) for piece in data]
        finish(numbers(lambda i: h.aio_pwrite(sources[i], 8 * MIB + i * 8192)))
        buffers = [nbd.Buffer(8192) for _ in data]
        finish(numbers(lambda i: h.aio_pread(buffers[i], 8 * MIB + i * 8192)))
        assert [b.to_bytearray() for b in buffers] == data
        finish(
            {
                h.aio_flush(),
                h.aio_cache(4096, 0),
                h.aio_zero(8192, 8 * MIB),
                h.aio_trim(8192, 9 * MIB),
            }
        )
        buffer = nbd.Buffer(8192)
        finish({h.aio_pread_structured(buffer, 8 * MIB, lambda *_: 0)})
        assert buffer.to_bytearray() == bytes(8192)
        h.aio_disconnect(0)
        poll = select.poll()
        poll.register(h.aio_get_fd(), select.POLLIN)
        while not h.aio_is_closed():
            assert poll.poll(20_000), "the server hangs up after DISC"
            h.aio_notify_read()


def large(uri):
    """Requests up to the largest that the server says it takes."""
    with connected(uri) as h:
        data = bytes(range(256)) * (64 * MIB // 256)
        h.pwrite(data, 64 * MIB)
        assert h.pread(64 * MIB, 64 * MIB) == data
        h.trim(64 * MIB, 64 * MIB)
        assert h.pread(64 * MIB, 64 * MIB) == bytes(64 * MIB)


if __name__ == "__main__":
    for judge in (negotiate, flags, commands, errors, asynchronous, large):
        target = sys.argv[1] if judge is negotiate else f"{sys.argv[1]}/plain"
        judge(target)
    if len(sys.argv) > 2:
        commands(f"nbd+unix:///plain?socket={sys.argv[2]}")
