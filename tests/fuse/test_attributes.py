"""Attributes beyond stat(): extended ones, access control lists, flags, nameless files, birth."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import stat
import struct
import subprocess
import sys
import time

import pytest

from tests.fuse.mounting import local_mount, scratch
from tests.fuse.test_names import fails, rename2

RENAME_EXCHANGE = 2
AT_FDCWD, AT_SYMLINK_FOLLOW, AT_EMPTY_PATH = -100, 0x400, 0x1000
STATX_BTIME = 0x800
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
COPY = (
    "import os,sys\nsource=os.open(sys.argv[1],os.O_RDONLY)\n"
    "assert os.copy_file_range(source,os.open(sys.argv[2],os.O_WRONLY),9000)\n"
)
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def open_to_all(mounted):
    """Other users reach the mount."""
    mounted.path.parent.chmod(0o711)


def run(*words, **how):
    """A program's output; it must succeed."""
    words = [str(word) for word in words]
    return subprocess.run(words, check=True, capture_output=True, text=True, **how).stdout


def as_user(*words, uid=1000, gid=1000, groups=()):
    """The same as a user; (exit code, output)."""
    extra = ["--groups", ",".join(map(str, groups))] if groups else ["--clear-groups"]
    command = ["setpriv", "--reuid", str(uid), "--regid", str(gid), *extra]
    command += [str(word) for word in words]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def wait_until(condition, deadline_s=60):
    """Wait for a condition."""
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def link_descriptor(descriptor, path):
    """linkat(2) of an open file."""
    source = f"/proc/self/fd/{descriptor}".encode()
    if libc.linkat(AT_FDCWD, source, AT_FDCWD, os.fsencode(path), AT_SYMLINK_FOLLOW):
        raise OSError(ctypes.get_errno(), "linkat")


def birth_ns(path):
    """The time of birth, by statx(2)."""
    buffer = ctypes.create_string_buffer(256)
    if libc.statx(AT_FDCWD, os.fsencode(path), 0, STATX_BTIME, buffer):
        raise OSError(ctypes.get_errno(), "statx")
    assert struct.unpack_from("=I", buffer)[0] & STATX_BTIME
    seconds, ns = struct.unpack_from("=qI", buffer, 80)
    return seconds * 10**9 + ns


def test_extended_attributes(place):
    """Sizes, flags and errors of the system calls are those of a local file system."""
    path = place / "f"
    path.touch()
    fails(errno.ENODATA, os.getxattr, path, "user.a")
    fails(errno.ENODATA, os.setxattr, path, "user.a", b"1", os.XATTR_REPLACE)
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    fails(errno.EEXIST, os.setxattr, path, "user.a", b"1", os.XATTR_CREATE)
    os.setxattr(path, "user.a", b"22", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b"22"
    for size in (0, 4032, 4033, 65535, 65536):
        value = os.urandom(size)
        os.setxattr(path, "user.large", value)
        assert os.getxattr(path, "user.large") == value
    fails(errno.E2BIG, os.setxattr, path, "user.large", bytes(65537))
    longest = "user." + "n" * 250
    os.setxattr(path, longest, b"")
    fails(errno.ERANGE, os.setxattr, path, longest + "n", b"")
    fails(errno.EOPNOTSUPP, os.setxattr, path, "system.other", b"")
    fails(errno.EOPNOTSUPP, os.setxattr, path, "other.a", b"")
    assert set(os.listxattr(path)) == {"user.a", "user.large", longest}
    small = ctypes.create_string_buffer(10)
    for call, arguments in (
        (libc.getxattr, (os.fsencode(path), b"user.large", small, 10)),
        (libc.listxattr, (os.fsencode(path), small, 10)),
    ):
        assert call(*arguments) == -1
        assert ctypes.get_errno() == errno.ERANGE
    os.removexattr(path, "user.a")
    fails(errno.ENODATA, os.removexattr, path, "user.a")
    link = place / "link"
    link.symlink_to("f")
    fails(errno.EPERM, lambda: os.setxattr(link, "user.a", b"", follow_symlinks=False))
    os.setxattr(link, "trusted.a", b"1", follow_symlinks=False)
    assert os.listxattr(link, follow_symlinks=False) == ["trusted.a"]


def test_attributes_that_only_the_privileged_see(place):
    """trusted.* belongs to CAP_SYS_ADMIN."""
    path = place / "f"
    path.touch(0o666)
    os.setxattr(path, "trusted.secret", b"1")
    os.setxattr(path, "user.open", b"1")
    assert set(os.listxattr(path)) == {"trusted.secret", "user.open"}
    code, found = as_user("getfattr", "-m", "-", "--absolute-names", path)
    assert code == 0
    assert "user.open" in found
    assert "secret" not in found
    code, _ = as_user("setfattr", "-n", "trusted.b", "-v", "1", path)
    assert code != 0
    os.setxattr(path, "security.test", b"x")
    assert os.getxattr(path, "security.test") == b"x"


def test_access_lists_decide(place):
    """setfacl lets one user in, chmod moves the mask, the kernel hears of each change."""
    path = place / "f"
    path.write_text("content")
    os.chmod(path, 0o600)
    assert as_user("cat", path)[0] != 0
    run("setfacl", "-m", "u:1000:r", path)
    assert as_user("cat", path) == (0, "content")
    assert os.stat(path).st_mode & 0o777 == 0o640
    os.chmod(path, 0o600)
    assert as_user("cat", path)[0] != 0
    assert "user:1000:r--" in run("getfacl", "-n", "--absolute-names", path)
    os.chmod(path, 0o640)
    assert as_user("cat", path)[0] == 0
    run("setfacl", "-m", "u:1000:0,g:55:r", path)
    assert as_user("cat", path)[0] != 0
    assert as_user("cat", path, uid=1001, groups=(55,))[0] == 0
    run("setfacl", "-b", path)
    assert ACCESS not in os.listxattr(path)
    assert as_user("cat", path, uid=1001, groups=(55,))[0] != 0


def test_default_lists_are_handed_down(place):
    """A default list takes the place of the umask; without one the umask counts."""
    old = os.umask(0o077)
    try:
        (place / "plain").touch(0o666)
        assert os.stat(place / "plain").st_mode & 0o777 == 0o600
        run("setfacl", "-d", "-m", "u:1000:rwx,o::0", place)
        (place / "f").touch(0o666)
        (place / "d").mkdir(0o777)
        os.mkfifo(place / "fifo", 0o666)
    finally:
        os.umask(old)
    assert os.stat(place / "f").st_mode & 0o777 == 0o660
    assert os.stat(place / "fifo").st_mode & 0o777 == 0o660
    assert os.stat(place / "d").st_mode & 0o777 == 0o770
    assert os.getxattr(place / "d", DEFAULT) == os.getxattr(place, DEFAULT)
    assert DEFAULT not in os.listxattr(place / "f")
    assert "user:1000:rwx" in run("getfacl", "-n", "--absolute-names", place / "f")
    fails(errno.EACCES, os.setxattr, place / "f", DEFAULT, os.getxattr(place, DEFAULT))


def test_setgid_and_sticky_directories(place):
    """Groups are inherited; names in a sticky directory belong to their owners."""
    shared = place / "shared"
    shared.mkdir()
    os.chown(shared, 0, 555)
    os.chmod(shared, 0o3777)
    (shared / "sub").mkdir()
    (shared / "f").touch()
    assert os.stat(shared / "f").st_gid == 555
    assert os.stat(shared / "sub").st_gid == 555
    assert os.stat(shared / "sub").st_mode & stat.S_ISGID
    assert as_user("rm", "-f", shared / "f")[0] != 0
    assert as_user("mv", shared / "f", shared / "g")[0] != 0
    assert as_user("touch", shared / "mine")[0] == 0
    assert as_user("rm", "-f", shared / "mine")[0] == 0
    assert as_user("rm", "-f", shared / "mine", uid=1001)[0] == 0  # it is gone


@pytest.mark.parametrize(
    "how", ["write", "append", "truncate", "open", "chown", "fallocate", "copy"]
)
def test_writers_lose_privileges(place, how):
    """set-user-id goes when somebody without CAP_FSETID changes a file, capabilities always."""
    path = place / "program"
    path.write_bytes(b"x")
    command = {
        "write": ["dd", "if=/dev/zero", f"of={path}", "count=1", "conv=notrunc"],
        "append": ["sh", "-c", f"echo x >> {path}"],
        "truncate": ["truncate", "-s", "0", path],
        "open": ["sh", "-c", f": > {path}"],
        "chown": ["chown", "1000:1000", path],
        "fallocate": ["fallocate", "-l", "100000", path],
        "copy": ["/usr/bin/python3", "-c", COPY, place / "source", path],
    }[how]
    (place / "source").write_bytes(bytes(9000))

    def arm():
        os.chown(path, 1000, 1000)
        os.chmod(path, 0o6777)
        os.setxattr(path, "security.capability", struct.pack("<5I", 0x2000000, 1, 0, 0, 0))

    arm()
    assert as_user(*command)[0] == 0
    assert os.stat(path).st_mode & 0o7777 == 0o777
    assert "security.capability" not in os.listxattr(path)
    arm()
    run(*command)
    assert os.stat(path).st_mode & 0o7000 == (0 if how == "chown" else 0o6000)
    assert "security.capability" not in os.listxattr(path)


def test_a_program_that_was_written_to_runs_without_privileges(place):
    """The kernel does not run it with the set-user-id bit that it remembers."""
    path = place / "id"
    shutil.copy("/usr/bin/id", path)
    os.chown(path, 1000, 1000)
    os.chmod(path, 0o4777)
    assert as_user(path, "-u", uid=1001) == (0, "1000\n")
    write = f"dd if=/dev/zero of={path} bs=1 count=1 seek={path.stat().st_size} conv=notrunc"
    assert as_user("sh", "-c", f"{write} status=none; {path} -u", uid=1001) == (0, "1001\n")


def test_immutable_and_append_only(place):
    """chattr and lsattr work, and root obeys."""
    path = place / "f"
    path.write_text("old")
    kept = path.open("r+")
    run("chattr", "+i", path)
    assert run("lsattr", path).split()[0].count("i") == 1
    for call in (
        lambda: path.open("w"),
        lambda: path.open("a"),
        lambda: os.truncate(path, 0),
        lambda: os.chmod(path, 0o600),
        lambda: os.utime(path),
        lambda: os.unlink(path),
        lambda: os.rename(path, place / "g"),
        lambda: os.link(path, place / "g"),
        lambda: os.setxattr(path, "user.a", b""),
        lambda: os.write(kept.fileno(), b"new"),
    ):
        fails(errno.EPERM, call)
    assert path.read_text() == "old"
    run("chattr", "=a", path)
    fails(errno.EPERM, path.open, "r+")
    fails(errno.EPERM, path.open, "w")
    with path.open("a") as file:
        file.write("new")
    assert path.read_text() == "oldnew"
    os.utime(path)
    fails(errno.EPERM, os.utime, path, (1, 1))
    run("chattr", "=", path)
    kept.close()
    assert as_user("chattr", "+i", path)[0] != 0
    sub = place / "sub"
    sub.mkdir()
    (sub / "in").touch()
    run("chattr", "+a", sub)
    (sub / "more").touch()
    fails(errno.EPERM, os.unlink, sub / "in")
    run("chattr", "-a", sub)
    assert run("lsattr", "-v", path).split()[0].isdecimal()
    assert subprocess.run(["chattr", "+c", path], capture_output=True).returncode != 0


def test_nameless_files(place):
    """O_TMPFILE: no name until linkat(2), never one with O_EXCL."""
    place.chmod(0o2777)
    os.chown(place, 0, 77)
    descriptor = os.open(place, os.O_TMPFILE | os.O_RDWR, 0o640)
    assert os.listdir(place) == []
    found = os.fstat(descriptor)
    assert (found.st_nlink, found.st_gid, found.st_mode & 0o777) == (0, 77, 0o640)
    os.write(descriptor, b"x" * 10_000)
    link_descriptor(descriptor, place / "named")
    assert os.fstat(descriptor).st_nlink == 1
    os.close(descriptor)
    assert (place / "named").read_bytes() == b"x" * 10_000
    descriptor = os.open(place, os.O_TMPFILE | os.O_WRONLY | os.O_EXCL)
    fails(errno.ENOENT, link_descriptor, descriptor, place / "other")
    os.close(descriptor)
    descriptor = os.open(place / "named", os.O_RDONLY)
    os.unlink(place / "named")
    fails(errno.ENOENT, link_descriptor, descriptor, place / "other")
    os.close(descriptor)


def test_what_has_been_removed_still_has_attributes(place):
    """An O_PATH handle, a working directory, an open directory, after unlink, rmdir, rename."""
    directory, file, replaced = place / "d", place / "f", place / "r"
    directory.mkdir(0o750)
    for path in (file, replaced):
        path.write_bytes(b"x" * 10_000)
    handles = [os.open(path, os.O_PATH) for path in (directory, file, replaced)]
    opened = os.open(directory, os.O_RDONLY)
    before = [os.fstat(handle) for handle in handles]
    program = (
        "import os,sys\nos.chdir(sys.argv[1])\nprint('here',flush=True)\ninput()\n"
        "assert os.stat('.').st_nlink == 0\nassert os.listdir('.') == []\n"
        "for call in (os.getcwd, lambda: os.mkdir('sub'), lambda: open('f','w')):\n"
        "    try: call()\n    except FileNotFoundError: continue\n    sys.exit(1)\n"
    )
    words = [sys.executable, "-c", program, directory]
    inside = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert inside.stdout.readline() == "here\n"
    directory.rmdir()
    file.unlink()
    (place / "new").touch()
    os.rename(place / "new", replaced)
    assert os.listdir(opened) == []
    os.close(opened)
    assert inside.communicate("go\n")[0] == ""
    assert inside.returncode == 0
    for handle, old in zip(handles, before, strict=True):
        found = os.fstat(handle)
        assert (found.st_nlink, found.st_ino, found.st_mode) == (0, old.st_ino, old.st_mode)
        os.close(handle)


def test_time_of_birth(place):
    """statx tells it, and nothing changes it."""
    before = time.time_ns()
    path = place / "f"
    path.touch()
    born = birth_ns(path)
    assert abs(born - before) < 60 * 10**9
    os.utime(path, ns=(1, 1))
    path.write_text("x")
    os.rename(path, place / "g")
    assert birth_ns(place / "g") == born
    assert birth_ns(place) <= born


def test_exchange(place):
    """RENAME_EXCHANGE of different types in different directories."""
    for name in ("one", "two"):
        (place / name).mkdir()
    (place / "one" / "f").write_text("file")
    (place / "two" / "d").mkdir()
    (place / "two" / "d" / "in").touch()
    rename2(place / "one" / "f", place / "two" / "d", RENAME_EXCHANGE)
    assert (place / "two" / "d").read_text() == "file"
    assert os.listdir(place / "one" / "f") == ["in"]
    assert [os.stat(place / name).st_nlink for name in ("one", "two")] == [3, 2]
    fails(errno.ENOENT, rename2, place / "one", place / "three", RENAME_EXCHANGE)
    fails(errno.EINVAL, rename2, place / "one", place / "one" / "f", RENAME_EXCHANGE)
    fails(errno.EINVAL, rename2, place / "one", place / "two", RENAME_EXCHANGE | 1)


def test_access_times():
    """noatime without an option; with relatime a read moves a time that is older than a change."""
    with scratch() as directory:
        for option, moves in (("rw", False), ("relatime", True)):
            with local_mount(directory, option) as mount:
                path = mount.path / option
                path.write_text("content")
                (mount.path / f"{option}.link").symlink_to(option)
                inner = mount.path / f"{option}.d"
                inner.mkdir()
                places = (path, mount.path / f"{option}.link", inner)
                for each in places:
                    os.utime(each, ns=(1, 1), follow_symlinks=False)
                path.read_text()
                os.readlink(places[1])
                os.listdir(inner)
                if moves:
                    for each in places:
                        wait_until(lambda e=each: os.lstat(e).st_atime_ns > os.lstat(e).st_mtime_ns)
                    assert os.stat(path).st_atime_ns >= os.stat(path).st_ctime_ns
                else:
                    assert [os.lstat(each).st_atime_ns for each in places] == [1, 1, 1]


def test_names_and_paths_as_long_as_they_may_be(place):
    """255 bytes of any kind but "/", and paths of 4095."""
    for name in (b"n" * 255, bytes(range(1, 47)) + bytes(range(48, 256)), "ü".encode() * 127):
        path = os.fsencode(place) + b"/" + name
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        assert name in os.listdir(os.fsencode(place))
        os.unlink(path)
        fails(errno.ENAMETOOLONG, os.open, path + b"x" * 255, os.O_CREAT)
    at, total = str(place), 4095
    while total - len(at) > 256:
        at += "/" + "d" * min(255, total - len(at) - 3)
        os.mkdir(at)
    longest = at + "/" + "f" * (total - len(at) - 1)
    assert len(longest) == total
    with open(longest, "w") as file:
        file.write("deep")
    os.rename(longest, longest[:-1] + "g")
    os.setxattr(longest[:-1] + "g", "user.a", b"1")
    fails(errno.ENAMETOOLONG, os.stat, longest + "x")
    assert run("find", place, "-type", "f").strip().endswith("g")
    shutil.rmtree(place / os.listdir(place)[0])
