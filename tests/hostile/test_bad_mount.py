"""mount.cfs and umount.fuse.cfs with bad input: exit codes of mount(8), nothing mounted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cfs.mkfs_plan import Choices, plan

ROOT = Path(__file__).parents[2]
MOUNT = "mount.cfs -o local {dir}/image {dir}/mnt"
ROWS = [
    ("no words", "mount.cfs", 1, "a volume and a directory are needed.*mount.cfs --help"),
    ("a word too much", MOUNT + " more", 1, "a volume and a directory"),
    ("an unknown flag", MOUNT + " -x", 1, "unknown option -x"),
    ("an option without a value", MOUNT + " -o", 1, "-o needs a value"),
    ("an unknown mount option", MOUNT + " -o colour=red", 1, "'colour=red'"),
    ("a mode that is none", MOUNT + " -o mmap=maybe", 1, "mmap=maybe"),
    ("a number that is none", MOUNT + " -o read_ahead_kb=x", 1, "read_ahead_kb=x"),
    ("a number too large", MOUNT + " -o commit_ms=1001", 1, "commit_ms.*1000"),
    ("no mount point", MOUNT.replace("mnt", "nowhere"), 32, "nowhere does not exist.*mkdir"),
    ("a file as mount point", MOUNT.replace("/mnt", "/file"), 32, "file is not a directory"),
    ("no image", MOUNT.replace("image", "none"), 32, "none"),
    ("a directory as image", MOUNT.replace("image", "mnt"), 32, "mnt"),
    ("an image of something else", MOUNT.replace("image", "noise"), 32, "noise|block|superblock"),
    ("an empty image", MOUNT.replace("image", "file"), 32, "no cfs file system fits"),
    ("a volume without clusterd", "mount.cfs vg0/vol0 {dir}/mnt", 32, "clusterd"),
    ("umount of nothing", "umount.fuse.cfs", 1, "one directory.*umount.fuse.cfs --help"),
    ("umount of what is not mounted", "umount.fuse.cfs {dir}/mnt", 32, "not mounted"),
    ("umount of what does not exist", "umount.fuse.cfs {dir}/nowhere", 32, "not mounted"),
]
ENTRY = {"mount.cfs": "cfs.mount.cli", "umount.fuse.cfs": "cfs.mount.umount_cli"}


@pytest.fixture
def place(tmp_path):
    image = bytearray(4096 * 4096)
    for block, data in plan(4096, Choices(bytes(16), bytes(16), 0)).writes:
        image[block * 4096 : block * 4096 + len(data)] = data
    (tmp_path / "image").write_bytes(image)
    (tmp_path / "noise").write_bytes(os.urandom(4 << 20))
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "mnt").mkdir()
    (tmp_path / "other").mkdir()
    return tmp_path


def start(place, typed: str):
    tool, *words = typed.replace("{dir}", str(place)).split()
    code = f"from {ENTRY[tool]} import main; main()"
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "CFS_RUN_DIR": str(place / "run"),
        "CFS_STATE_DIR": str(place / "state"),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], cwd="/", env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def type_in(place, typed: str):
    with start(place, typed) as process:
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def refused(place, typed: str, code: int, words: str) -> None:
    image = (place / "image").read_bytes()
    done = type_in(place, typed)
    assert done.returncode == code, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert re.search(words, done.stderr, re.DOTALL), done.stderr
    assert len(done.stderr.splitlines()) <= 2, done.stderr
    assert done.stderr.startswith(typed.split()[0] + ": ")
    assert (place / "image").read_bytes() == image


@pytest.mark.parametrize(("typed", "code", "words"), [pytest.param(*r[1:], id=r[0]) for r in ROWS])
def test_bad_input(place, typed, code, words):
    """The table above."""
    refused(place, typed, code, words)
    assert str(place) not in Path("/proc/self/mountinfo").read_text()


def test_help():
    """--help is no error."""
    for tool in ENTRY:
        done = type_in(Path("/nowhere"), f"{tool} --help")
        assert (done.returncode, done.stderr) == (0, "")
        assert f"usage: {tool}" in done.stdout


def test_mounting_twice(place):
    """At the same place, at another place, mkfs and fsck over it: refused with the holder; the
    first mount goes on."""
    done = type_in(place, MOUNT)
    assert done.returncode == 0, done.stderr
    try:
        (place / "mnt/file").write_text("precious")
        typed = (
            (MOUNT, "is mounted at .*mnt \\(pid \\d+\\).*umount"),
            (MOUNT.replace("mnt", "other"), "image is in use"),
            ("umount.fuse.cfs -f {dir}/mnt", "would be lost.*umount.fuse.cfs -f --yes"),
        )
        for words, complaint in typed:
            done = type_in(place, words)
            assert done.returncode == 32, done.stderr
            assert re.search(complaint, done.stderr, re.DOTALL), done.stderr
        assert (place / "mnt/file").read_text() == "precious"
    finally:
        assert type_in(place, "umount.fuse.cfs {dir}/mnt").returncode == 0


def test_an_unmount_says_that_another_mount_namespace_keeps_it_from_ending(place):
    """A container that started meanwhile has a copy of the mount."""
    done = type_in(place, MOUNT)
    assert done.returncode == 0, done.stderr
    shell = ["unshare", "--mount", "sh", "-c", "echo made; read line"]
    with subprocess.Popen(
        shell, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as container:
        try:
            assert container.stdout.readline() == "made\n"
            with start(place, "umount.fuse.cfs {dir}/mnt") as umount:
                said = f"{place}/mnt: goes on in the mount namespace of process {container.pid}"
                assert said in umount.stderr.readline()
                assert umount.poll() is None
                container.communicate("\n", 60)
                assert umount.wait(60) == 0
        finally:
            container.kill()
