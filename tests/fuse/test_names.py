"""Names and attributes on a real mount, as POSIX says."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import subprocess
import time

import pytest

RENAME_NOREPLACE = 1
libc = ctypes.CDLL(None, use_errno=True)


def rename2(old, new, flags):
    """renameat2(2)."""
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), "renameat2")


def fails(code, call, *arguments):
    """The call fails with this errno."""
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno == code, errno.errorcode[caught.value.errno]


def test_create_and_stat(place):
    """A new file has the mode, owner, link count and times that it should."""
    os.umask(0o022)
    before = time.time_ns()
    fd = os.open(place / "a", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    found = os.fstat(fd)
    os.close(fd)
    assert (found.st_mode, found.st_nlink, found.st_size) == (stat.S_IFREG | 0o644, 1, 0)
    assert (os.getuid(), os.getgid()) == (found.st_uid, found.st_gid)
    assert abs(found.st_mtime_ns - before) < 10**9
    fails(errno.EEXIST, os.open, place / "a", os.O_CREAT | os.O_EXCL)
    fails(errno.ENOENT, os.stat, place / "b")
    fails(errno.ENOTDIR, os.stat, place / "a" / "b")
    fails(errno.ENAMETOOLONG, os.stat, place / ("x" * 256))
    (place / ("y" * 255)).touch()


def test_chmod_chown_utimens(place):
    """setattr of each field, times to the nanosecond."""
    path = place / "a"
    path.touch()
    os.chmod(path, 0o4751)
    assert os.stat(path).st_mode & 0o7777 == 0o4751
    os.chown(path, 1234, 4321)
    assert (os.stat(path).st_uid, os.stat(path).st_gid) == (1234, 4321)
    os.utime(path, ns=(1_000_000_000_000_000_001, 1_500_000_000_123_456_789))
    found = os.stat(path)
    assert (found.st_atime_ns, found.st_mtime_ns) == (
        1_000_000_000_000_000_001,
        1_500_000_000_123_456_789,
    )
    changed = found.st_ctime_ns
    os.chmod(path, 0o600)
    assert os.stat(path).st_ctime_ns > changed
    assert os.stat(path).st_mtime_ns == 1_500_000_000_123_456_789


def test_kinds_of_nodes(place):
    """mknod makes pipes, sockets, devices and files."""
    devices = {stat.S_IFCHR: os.makedev(1, 3), stat.S_IFBLK: os.makedev(7, 0)}
    for kind in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFREG, *devices):
        device = devices.get(kind, 0)
        path = place / str(kind)
        os.mknod(path, kind | 0o640, device)
        found = os.lstat(path)
        assert stat.S_IFMT(found.st_mode) == kind
        assert found.st_rdev == device
    assert (place / str(stat.S_IFCHR)).read_bytes() == b""  # /dev/null


def test_directories(place):
    """mkdir, rmdir, link counts, and what must not be removed."""
    os.mkdir(place / "d", 0o755)
    assert os.stat(place).st_nlink == 3
    os.mkdir(place / "d" / "e")
    fails(errno.ENOTEMPTY, os.rmdir, place / "d")
    fails(errno.EEXIST, os.mkdir, place / "d")
    fails(errno.EISDIR, os.unlink, place / "d")
    (place / "f").touch()
    fails(errno.ENOTDIR, os.rmdir, place / "f")
    os.rmdir(place / "d" / "e")
    os.rmdir(place / "d")
    assert os.stat(place).st_nlink == 2
    assert os.listdir(place) == ["f"]


def test_setgid_directory(place):
    """In a setgid directory new files take its group, new directories also the bit."""
    os.chown(place, 0, 777)
    os.chmod(place, 0o2775)
    (place / "f").touch()
    (place / "d").mkdir()
    assert os.stat(place / "f").st_gid == 777
    assert os.stat(place / "d").st_gid == 777
    assert os.stat(place / "d").st_mode & stat.S_ISGID


def test_links(place):
    """Hard and symbolic links."""
    (place / "a").write_bytes(b"text")
    os.link(place / "a", place / "b")
    assert os.stat(place / "a").st_nlink == 2
    assert os.stat(place / "a").st_ino == os.stat(place / "b").st_ino
    os.unlink(place / "a")
    assert (place / "b").read_bytes() == b"text"
    assert os.stat(place / "b").st_nlink == 1
    os.symlink("b", place / "s")
    assert os.readlink(place / "s") == "b"
    assert (place / "s").read_bytes() == b"text"
    assert os.lstat(place / "s").st_size == 1
    long = "x/" * 1500
    os.symlink(long, place / "long")
    assert os.readlink(place / "long") == long
    os.symlink("loop", place / "loop")
    fails(errno.ELOOP, os.stat, place / "loop")
    fails(errno.EPERM, os.link, place, place / "dirlink")


def test_unlinked_file_lives_while_open(place):
    """An open file without a name keeps its data."""
    fd = os.open(place / "a", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"before")
    os.unlink(place / "a")
    assert os.listdir(place) == []
    os.write(fd, b" after")
    assert os.pread(fd, 100, 0) == b"before after"
    assert os.fstat(fd).st_nlink == 0
    (place / "a").write_bytes(b"another")
    assert os.pread(fd, 100, 0) == b"before after"
    os.close(fd)


def test_rename_cases(place):
    """Over nothing, a file, a directory, itself; into itself; between directories."""
    for name in ("d1", "d2", "d3"):
        (place / name).mkdir()
    (place / "a").write_bytes(b"a")
    (place / "b").write_bytes(b"b")
    os.rename(place / "a", place / "c")
    os.rename(place / "c", place / "b")
    assert (place / "b").read_bytes() == b"a"
    os.rename(place / "b", place / "d1" / "b")
    assert (place / "d1" / "b").read_bytes() == b"a"
    fails(errno.ENOTEMPTY, os.rename, place / "d2", place / "d1")
    fails(errno.EISDIR, os.rename, place / "d1" / "b", place / "d2")
    fails(errno.ENOTDIR, os.rename, place / "d2", place / "d1" / "b")
    fails(errno.EINVAL, os.rename, place / "d1", place / "d1" / "x")
    os.rename(place / "d1", place / "d2")
    assert sorted(os.listdir(place)) == ["d2", "d3"]
    os.rename(place / "d2", place / "d3" / "moved")
    assert os.stat(place).st_nlink == 3
    assert os.stat(place / "d3").st_nlink == 3
    assert os.path.samefile(place / "d3" / "moved" / "..", place / "d3")
    os.link(place / "d3" / "moved" / "b", place / "same")
    os.rename(place / "same", place / "d3" / "moved" / "b")
    assert (place / "same").exists(), "rename of two links of one inode does nothing"
    fails(errno.ENOENT, os.rename, place / "none", place / "x")


def test_rename_noreplace(place):
    """RENAME_NOREPLACE refuses an existing target; other flags are EINVAL."""
    (place / "a").write_bytes(b"a")
    (place / "b").write_bytes(b"b")
    fails(errno.EEXIST, rename2, place / "a", place / "b", RENAME_NOREPLACE)
    rename2(place / "a", place / "c", RENAME_NOREPLACE)
    assert sorted(os.listdir(place)) == ["b", "c"]
    fails(errno.EINVAL, rename2, place / "b", place / "c", 4)


def test_readdir_under_change(place, chooser):
    """What is there all the time is listed exactly once, whatever comes and goes meanwhile."""
    stable = {f"stable-{number}" for number in range(1000)}
    for name in stable:
        (place / name).touch()
    doomed = [f"doomed-{number}" for number in range(500)]
    for name in doomed:
        (place / name).touch()
    seen = []
    with os.scandir(place) as entries:
        for count, entry in enumerate(entries):
            seen.append(entry.name)
            if count % 3 == 0 and doomed:
                os.unlink(place / doomed.pop(chooser.randrange(len(doomed))))
            if count % 5 == 0:
                (place / f"new-{count}").touch()
            if count > 10_000:
                break
    assert len(seen) == len(set(seen))
    assert stable <= set(seen)
    for name in os.listdir(place):
        os.unlink(place / name)
    assert os.listdir(place) == []


def test_readdir_offsets_are_stable(place):
    """seekdir to a remembered place goes on with the entry that followed it."""
    for number in range(300):
        (place / f"{number:03}").touch()
    names = subprocess.run(["ls", "-fa", place], capture_output=True, text=True).stdout.split()
    again = subprocess.run(["ls", "-fa", place], capture_output=True, text=True).stdout.split()
    assert names == again
    assert len(set(names)) == 302


def test_permissions(place):
    """The kernel checks modes: another user may do only what they allow."""
    os.chmod(place, 0o755)
    (place / "secret").write_bytes(b"x")
    os.chmod(place / "secret", 0o600)
    program = (
        "import os,sys\nos.setgid(65534); os.setuid(65534)\n"
        f"p={str(place)!r}\n"
        "for call in (lambda: open(p+'/secret'), lambda: open(p+'/new','w'),"
        " lambda: os.chmod(p,0o777), lambda: os.unlink(p+'/secret')):\n"
        "    try: call(); print('allowed'); sys.exit(1)\n"
        "    except PermissionError: pass\n"
    )
    os.chmod(place.parent, 0o755)
    os.chmod(place.parent.parent, 0o755)
    done = subprocess.run(["python3", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_statfs_counts(place):
    """A written file takes space, a removed one gives it back."""
    before = os.statvfs(place)
    (place / "big").write_bytes(bytes(8 << 20))
    fd = os.open(place / "big", os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    during = os.statvfs(place)
    taken = (before.f_bavail - during.f_bavail) * before.f_frsize
    assert 8 << 20 <= taken < 12 << 20
    assert before.f_namemax == 255
