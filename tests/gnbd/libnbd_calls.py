"""Every call of libnbd's Python module against an export of 128 MiB; run by Debian's own python3,
which has that module: /usr/bin/python3 libnbd_calls.py URI [UNIX-SOCKET]. Silent when all is well.
With a socket it also demands that no call was left out but those of `LOCAL`.
"""

import contextlib
import errno
import select
import socket
import sys
from urllib.parse import urlsplit

import nbd

MIB = 1 << 20
SIZE = 128 * MIB
ERRORS_OF = {"base:allocation": {0, 3}, "x-cfs:reservation": {2}}
LOCAL = {
    "clear_debug_callback", "get_debug", "set_debug", "set_debug_callback", "get_handle_name",
    "set_handle_name", "get_package_name", "get_version", "get_private_data",
    "set_private_data", "supports_uri", "supports_tls", "get_pread_initialize",
    "set_pread_initialize", "get_request_block_size", "set_request_block_size",
    "get_handshake_flags", "get_request_structured_replies", "get_strict_mode", "get_full_info",
    "get_opt_mode", "get_export_name", "get_uri", "set_uri_allow_local_file",
    "set_uri_allow_tls", "set_uri_allow_transports", "aio_connect", "connect_command",
    "aio_connect_command", "kill_subprocess", "connect_vsock", "aio_connect_vsock",
    "connect_systemd_socket_activation", "aio_connect_systemd_socket_activation", "get_tls",
    "set_tls", "set_tls_certificates", "set_tls_psk_file", "get_tls_username",
    "set_tls_username", "get_tls_verify_peer", "set_tls_verify_peer",
}  # fmt: skip
"""Settings of the handle, servers that libnbd starts itself, and TLS, which test_tls.py has."""
used = set()


class Handle(nbd.NBD):
    """Notes what is called."""

    def __getattribute__(self, name):
        used.add(name)
        return super().__getattribute__(name)


@contextlib.contextmanager
def connected(uri, *contexts, **settings):
    """A handle in transmission."""
    handle = Handle()
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
    handle = Handle()
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
    handle = Handle()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    handle.opt_abort()
    assert handle.aio_is_closed()


def wait_until(handle, condition):
    """Let libnbd work."""
    while not condition():
        assert handle.poll(20_000) == 1, "the server answers"


def work(handle, condition):
    """The same by a poll of our own."""
    poll = select.poll()
    while not condition():
        directions = handle.aio_get_direction()
        wanted = select.POLLIN if directions & nbd.AIO_DIRECTION_READ else 0
        wanted |= select.POLLOUT if directions & nbd.AIO_DIRECTION_WRITE else 0
        poll.register(handle.aio_get_fd(), wanted)
        ready = poll.poll(20_000)
        assert ready, "the server answers, and hangs up after DISC"
        if ready[0][1] & (select.POLLIN | select.POLLHUP):
            handle.aio_notify_read()
        else:
            handle.aio_notify_write()


def negotiate_asynchronously(uri):
    """The same by the aio calls."""
    handle = Handle()
    handle.set_opt_mode(True)
    assert handle.aio_is_created()
    handle.aio_connect_uri(uri)
    assert handle.aio_is_connecting() or handle.aio_is_negotiating()
    wait_until(handle, handle.aio_is_negotiating)
    names, contexts, ends = [], [], []

    def end(error):
        assert error.value == 0
        ends.append(1)
        return 1

    handle.aio_opt_list(lambda name, _: names.append(name) and 0, end)
    wait_until(handle, lambda: len(ends) == 1)
    assert "plain" in names
    handle.set_export_name("plain")
    handle.aio_opt_list_meta_context(lambda name: contexts.append(name) and 0, end)
    wait_until(handle, lambda: len(ends) == 2)
    assert set(contexts) == set(ERRORS_OF)
    handle.add_meta_context("nothing:known")
    handle.clear_meta_contexts()
    handle.add_meta_context("base:allocation")
    assert handle.get_nr_meta_contexts() == 1
    assert handle.get_meta_context(0) == "base:allocation"
    handle.aio_opt_info(end)
    wait_until(handle, lambda: len(ends) == 3)
    assert handle.get_size() == SIZE
    handle.aio_opt_go(end)
    wait_until(handle, lambda: len(ends) == 4 and handle.aio_is_ready())
    assert handle.can_meta_context("base:allocation")
    assert "READY" in handle.connection_state()
    handle.shutdown()
    handle = Handle()
    handle.set_opt_mode(True)
    handle.connect_uri(uri)
    handle.aio_opt_abort()
    wait_until(handle, handle.aio_is_closed)


def connections(uri, path):
    """Every way to connect."""
    where = urlsplit(uri)
    host, port = where.hostname, str(where.port)

    def tcp():
        return socket.create_connection((host, where.port)).detach()

    for name, arguments in (
        ("connect_tcp", (host, port)), ("connect_unix", (path,)), ("connect_socket", (tcp(),)),
        ("aio_connect_tcp", (host, port)), ("aio_connect_unix", (path,)),
        ("aio_connect_socket", (tcp(),)),
    ):  # fmt: skip
        handle = Handle()
        handle.set_export_name("plain")
        getattr(handle, name)(*arguments)
        wait_until(handle, handle.aio_is_ready)
        assert handle.get_size() == SIZE, name
        handle.shutdown()


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
    with connected(uri, "base:allocation") as h:
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
        entries = []
        seen = h.aio_block_status(MIB, 0, lambda *arguments: entries.append(arguments) or 0)
        assert h.aio_in_flight() == 1
        wait_until(h, lambda: h.aio_peek_command_completed() == seen)
        assert h.aio_command_completed(seen)
        assert entries
        assert not h.aio_in_flight()
        assert not h.aio_is_dead()
        assert not h.aio_is_processing()
        h.aio_disconnect(0)
        work(h, h.aio_is_closed)


def large(uri):
    """Requests up to the largest that the server says it takes."""
    with connected(uri) as h:
        data = bytes(range(256)) * (64 * MIB // 256)
        cookie = h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), 64 * MIB)
        work(h, lambda: h.aio_command_completed(cookie))
        assert h.pread(64 * MIB, 64 * MIB) == data
        h.trim(64 * MIB, 64 * MIB)
        assert h.pread(64 * MIB, 64 * MIB) == bytes(64 * MIB)


if __name__ == "__main__":
    for judge in (negotiate, negotiate_asynchronously):
        judge(sys.argv[1])
    for judge in (flags, commands, errors, asynchronous, large):
        judge(f"{sys.argv[1]}/plain")
    if len(sys.argv) > 2:
        commands(f"nbd+unix:///plain?socket={sys.argv[2]}")
        connections(*sys.argv[1:])
        public = {name for name in dir(nbd.NBD) if not name.startswith("_")}
        left_out = public - used - LOCAL
        assert not left_out, left_out
