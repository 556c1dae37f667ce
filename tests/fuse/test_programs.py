"""Other people's programs on a local mount, while locks are taken away at random."""

from __future__ import annotations

import hashlib
import os
import subprocess

import pytest

from tests.fuse.mounting import ROOT, local_mount, scratch


@pytest.fixture(scope="module", params=["", "test_demote_ms=5"], ids=["calm", "demoted"])
def mounted(request):
    """A quiet mount, and one whose locks go away all the time."""
    with scratch() as directory, local_mount(directory, *filter(None, [request.param])) as mount:
        yield mount


def run(*words, cwd=None):
    """A command that must succeed."""
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, timeout=120,
        env={**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "HOME": "/nonexistent"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_git(place):
    """init, add, commit, modify, commit, fsck, clone, status."""
    tree = place / "tree"
    tree.mkdir()
    for package in ("cluster", "cfs"):
        run("cp", "-r", ROOT / package, tree)
    author = ("-c", "user.name=n", "-c", "user.email=e", "-c", "gc.auto=0")
    run("git", "init", "-q", cwd=tree)
    run("git", "add", ".", cwd=tree)
    run("git", *author, "commit", "-qm", "one", cwd=tree)
    (tree / "cluster" / "ids.py").write_text("changed")
    run("git", *author, "commit", "-qam", "two", cwd=tree)
    run("git", "fsck", "--strict", cwd=tree)
    assert run("git", "status", "--short", cwd=tree) == ""
    run("git", "clone", "-q", tree, place / "clone")
    run("diff", "-r", "--exclude=.git", tree, place / "clone")


def test_fio_verify(place):
    """fio writes and verifies, cached, direct and through mmap."""
    for number, (engine, direct, size) in enumerate(
        [("psync", 0, "4k"), ("psync", 1, "4k"), ("libaio", 1, "64k"), ("mmap", 0, "4k")]
    ):
        run(
            "fio", "--name=v", f"--filename={place}/f{number}", f"--ioengine={engine}",
            f"--direct={direct}", f"--bs={size}", "--size=8m", "--rw=randwrite", "--iodepth=8",
            "--verify=crc32c", "--verify_fatal=1", "--do_verify=1", "--end_fsync=1",
            "--verify_state_save=0",
        )  # fmt: skip


def test_tar_and_compare(place):
    """A tree packed and unpacked is the same, twice."""
    run("tar", "-C", ROOT, "-cf", place / "a.tar", "cluster", "cvm", "dlm", "cfs")
    for name in ("x", "y"):
        (place / name).mkdir()
        run("tar", "-C", place / name, "-xf", place / "a.tar")
    run("diff", "-r", place / "x", place / "y")
    for package in ("cluster", "cvm"):
        for path in sorted((ROOT / package).glob("*.py")):
            there = (place / "x" / package / path.name).read_bytes()
            assert (
                hashlib.sha256(there).digest()
                == hashlib.sha256((place / "y" / package / path.name).read_bytes()).digest()
            )


def test_sqlite(place):
    """A data base in rollback-journal mode keeps its sums."""
    program = (
        "import sqlite3,sys\n"
        "c=sqlite3.connect(sys.argv[1],isolation_level=None)\n"
        "c.execute('create table t(k integer primary key, v integer)')\n"
        "for n in range(60):\n"
        "    c.execute('begin immediate')\n"
        "    c.executemany('insert into t(v) values(?)',[(n,)]*20)\n"
        "    c.execute('commit')\n"
        "assert c.execute('select count(*),sum(v) from t').fetchone()==(1200,20*sum(range(60)))\n"
        "assert c.execute('pragma integrity_check').fetchone()==('ok',)\n"
    )
    run("python3", "-c", program, place / "db")
