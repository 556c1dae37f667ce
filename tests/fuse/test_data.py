"""Data on a real mount: every way to read and write it gives the same bytes."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import subprocess
import threading

PAGE = mmap.PAGESIZE


def direct_buffer(data):
    """Page-aligned memory for O_DIRECT."""
    buffer = mmap.mmap(-1, max(PAGE, len(data)))
    buffer[: len(data)] = data
    return buffer


def test_random_writes_match_a_model(place, chooser):
    """pwrite, ftruncate, mmap stores, O_DIRECT and fallocate-free holes against a bytearray."""
    model = bytearray()
    path = place / "f"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    direct = os.open(path, os.O_RDWR | os.O_DIRECT)
    for _ in range(300):
        kind = chooser.choice(["write", "write", "truncate", "store", "direct", "read"])
        if kind == "write":
            at, data = chooser.randrange(400_000), chooser.randbytes(chooser.randrange(1, 50_000))
            if at > len(model):
                model.extend(bytes(at - len(model)))
            model[at : at + len(data)] = data
            assert os.pwrite(fd, data, at) == len(data)
        elif kind == "truncate":
            size = chooser.randrange(400_000)
            os.ftruncate(fd, size)
            model[size:] = bytes(max(0, size - len(model)))
        elif kind == "store" and model:
            view = mmap.mmap(fd, len(model))
            at = chooser.randrange(len(model))
            data = chooser.randbytes(min(9000, len(model) - at))
            view[at : at + len(data)] = data
            model[at : at + len(data)] = data
            if chooser.random() < 0.5:
                view.flush()
            view.close()
        elif kind == "direct":
            at, data = chooser.randrange(100) * PAGE, chooser.randbytes(PAGE)
            if at > len(model):
                model.extend(bytes(at - len(model)))
            model[at : at + PAGE] = data
            assert os.pwrite(direct, direct_buffer(data), at) == PAGE
        size = os.fstat(fd).st_size
        assert size == len(model), kind
        at = chooser.randrange(len(model) + 1)
        assert os.pread(fd, 30_000, at) == model[at : at + 30_000], kind
    os.fsync(fd)
    os.close(fd)
    os.close(direct)
    assert path.read_bytes() == model


def test_direct_and_cached_agree(place):
    """O_DIRECT writes are seen by cached readers and mappings, and the other way round."""
    path = place / "f"
    path.write_bytes(b"a" * 3 * PAGE)
    cached = os.open(path, os.O_RDWR)
    direct = os.open(path, os.O_RDWR | os.O_DIRECT)
    view = mmap.mmap(cached, 3 * PAGE)
    assert view[PAGE] == ord("a")
    os.pwrite(direct, direct_buffer(b"b" * PAGE), PAGE)
    assert os.pread(cached, 2, PAGE - 1) == b"ab"
    assert view[PAGE] == ord("b")
    view[2 * PAGE] = ord("c")
    buffer = mmap.mmap(-1, PAGE)
    os.preadv(direct, [buffer], 2 * PAGE)
    assert buffer[:2] == b"ca"


def test_append_by_many(place):
    """Records of 1 byte to 64 KiB appended at once by processes and handles: all whole."""
    path = place / "log"
    path.touch()
    program = (
        "import os,sys\nfd=os.open(sys.argv[1],os.O_WRONLY|os.O_APPEND)\n"
        "me=int(sys.argv[2])\n"
        "for i in range(200):\n"
        "    n=(i*397*(me+1))%65536+16\n"
        "    record=b'%04d%04d%06d'%(me,i,n)+bytes([65+me])*(n-15)+b'\\n'\n"
        "    assert os.write(fd,record)==len(record)\n"
    )
    running = [subprocess.Popen(["python3", "-c", program, path, str(n)]) for n in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    found, data, at = set(), path.read_bytes(), 0
    while at < len(data):
        me, number, size = (
            int(data[at : at + 4]),
            int(data[at + 4 : at + 8]),
            int(data[at + 8 : at + 14]),
        )
        assert data[at + 14 : at + size] == bytes([65 + me]) * (size - 15) + b"\n"
        found.add((me, number))
        at += size
    assert found == {(me, number) for me in range(4) for number in range(200)}


def test_append_is_seen_by_cached_readers(place):
    """What O_APPEND wrote is in every reader's view, also in a page that was cached before."""
    path = place / "log"
    path.write_bytes(b"start")
    reader = os.open(path, os.O_RDONLY)
    appender = os.open(path, os.O_WRONLY | os.O_APPEND)
    late = os.open(path, os.O_RDWR)
    expected = b"start"
    fcntl.fcntl(late, fcntl.F_SETFL, os.O_APPEND)
    for number in range(100):
        assert os.pread(reader, 1 << 20, 0) == expected
        text = b"%d," % number
        os.write(appender if number % 3 else late, text)
        expected += text
    assert os.pread(reader, 1 << 20, 0) == expected
    assert os.fstat(reader).st_size == len(expected)


def test_an_append_in_parts_keeps_its_order(place):
    """Past the page cache the kernel sends the parts of a long write all at once, also those of one
    that goes to the end of file."""
    part = 1 << 20
    buffer = mmap.mmap(-1, 4 * part)
    for number in range(4):
        buffer[number * part : (number + 1) * part] = bytes([65 + number]) * part
    for attempt in range(16):
        path = place / f"f{attempt}"
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_DIRECT)
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND | os.O_DIRECT)
        for _ in range(2):
            assert os.write(fd, buffer) == len(buffer)
        os.close(fd)
        assert path.read_bytes() == 2 * bytes(buffer)
        path.unlink()


def test_open_truncates(place):
    """O_TRUNC empties a file, also under a reader and a mapping."""
    path = place / "f"
    path.write_bytes(b"x" * 10_000)
    reader = os.open(path, os.O_RDONLY)
    assert len(os.pread(reader, 20_000, 0)) == 10_000
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))
    assert os.pread(reader, 20_000, 0) == b""
    assert os.fstat(reader).st_size == 0


def test_holes_are_zero(place):
    """A file larger than what was written reads as zeroes in between."""
    path = place / "f"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.pwrite(fd, b"end", 100 << 20)
    assert os.pread(fd, 4096, 50 << 20) == bytes(4096)
    assert os.fstat(fd).st_size == (100 << 20) + 3
    assert os.fstat(fd).st_blocks * 512 < 1 << 20
    view = mmap.mmap(fd, 1 << 20, offset=10 << 20)
    view[5000:5003] = b"mid"
    view.flush()
    view.close()
    assert os.pread(fd, 5, (10 << 20) + 4999) == b"\0mid\0"


def test_truncate_zeroes_the_tail(place):
    """What was cut off does not come back when the file grows again."""
    path = place / "f"
    path.write_bytes(b"z" * 10_000)
    os.truncate(path, 100)
    os.truncate(path, 10_000)
    assert path.read_bytes() == b"z" * 100 + bytes(9_900)


def test_suid_is_cleared_by_writing(place):
    """An unprivileged write takes suid and sgid away."""
    path = place / "f"
    path.write_bytes(b"x")
    os.chown(path, 65534, 65534)
    os.chmod(path, 0o6777)
    os.chmod(place, 0o777)
    for parent in (place.parent, place.parent.parent):
        os.chmod(parent, 0o755)
    program = (
        f"import os; os.setgid(65533); os.setuid(65533); open({str(path)!r}, 'r+b').write(b'y')"
    )
    subprocess.run(["python3", "-c", program], check=True)
    assert os.stat(path).st_mode & 0o7777 == 0o777
    assert path.read_bytes() == b"y"


def test_sync_writes(place):
    """O_SYNC and O_DSYNC writes, fsync and fdatasync of files and directories succeed."""
    for flag in (os.O_SYNC, os.O_DSYNC):
        fd = os.open(place / "f", os.O_CREAT | os.O_RDWR | flag)
        for number in range(20):
            assert os.pwrite(fd, b"data", number * 1000) == 4
        os.fsync(fd)
        os.fdatasync(fd)
        os.close(fd)
    directory = os.open(place, os.O_RDONLY)
    os.fsync(directory)
    os.close(directory)


def test_big_file(place, chooser):
    """64 MiB written, read in other sizes, and again after the page cache has been dropped."""
    path = place / "big"
    block = chooser.randbytes(1 << 20)
    with path.open("wb", buffering=0) as file:
        for number in range(64):
            file.write(number.to_bytes(8, "little") + block[8:])
    for size in (1 << 20, 300_000):
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            data = b"".join(iter(lambda f=file, s=size: f.read(s), b""))
        for number in range(64):
            piece = data[number << 20 : (number + 1) << 20]
            assert piece == number.to_bytes(8, "little") + block[8:]


def test_parallel_writers_of_disjoint_ranges(place, chooser):
    """Threads that write their own stripes at once, small and ragged: every byte arrives."""
    path = place / "f"
    path.touch()
    seeds = [chooser.randrange(1 << 30) for _ in range(4)]

    def work(number):
        fd = os.open(path, os.O_RDWR)
        for index in range(200):
            os.pwrite(fd, bytes([65 + number]) * 1000, (index * 4 + number) * 1000)
        os.close(fd)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(seeds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() == b"".join(bytes([65 + n]) * 1000 for n in range(4)) * 200


def test_no_space_is_an_error_not_a_loss(place):
    """A full file system says ENOSPC; what it accepted before is there; freed space is usable."""
    filler = place / "filler"
    fd = os.open(filler, os.O_CREAT | os.O_WRONLY)
    block = b"f" * (1 << 20)
    written = 0
    code = 0
    while not code:
        try:
            written += os.write(fd, block)
        except OSError as error:
            code = error.errno
    assert code == errno.ENOSPC
    os.close(fd)
    with filler.open("rb") as file:
        size = sum(len(piece) for piece in iter(lambda: file.read(1 << 20), b""))
    assert written <= size < written + (1 << 20)
    os.unlink(filler)
    (place / "after").write_bytes(block)
    assert (place / "after").read_bytes() == block
