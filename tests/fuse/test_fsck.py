"""fsck.cfs as a command, on the image of a local mount."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from cfs.attributes import BLOCK_BYTES
from tests.fuse.mounting import ROOT, local_mount, scratch

IMAGE_BYTES = 64 << 20


def fsck(*words: object, **how: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cfs.fsck.cli", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **how)


@pytest.fixture
def image():
    """An image with some files; and where the inode of one of them is."""
    with scratch() as directory:
        with local_mount(directory, image_bytes=IMAGE_BYTES) as mount:
            for number in range(20):
                (mount.path / f"file{number}").write_text("x" * 10_000)
            (mount.path / "victim").write_text("short")
            ino = (mount.path / "victim").stat().st_ino
        yield directory, directory / "image", ino


def spoil(path: Path, block: int) -> None:
    with path.open("r+b") as file:
        file.seek(block * BLOCK_BYTES + 300)
        file.write(b"rotten")


def test_a_mounted_image_is_refused(image) -> None:
    directory, path, _ = image
    with local_mount(directory, image_bytes=IMAGE_BYTES):
        for options in ((), ("-y",)):
            ended = fsck(*options, path)
            assert ended.returncode == 8
            assert "is in use" in ended.stderr


def test_a_damaged_image_is_checked_mounted_repaired_and_clean(image) -> None:
    directory, path, ino = image
    assert fsck(path).returncode == 0
    spoil(path, ino)
    before = path.read_bytes()
    ended = fsck("-n", path)
    assert ended.returncode == 4
    assert f"inode {ino}" in ended.stdout
    refused = fsck("-p", path)
    assert refused.returncode == 4
    assert "would lose something" in refused.stderr
    assert path.read_bytes() == before
    with local_mount(directory, image_bytes=IMAGE_BYTES) as mount:
        with pytest.raises(OSError, match="Input/output error"):
            (mount.path / "victim").read_text()
        assert (mount.path / "file7").read_text() == "x" * 10_000
        (mount.path / "new").write_text("y" * 50_000)
        assert mount.log.read_text().count(f"damage: block {ino} ") == 1
    repaired = fsck("-y", "--json", "-C", path)
    assert repaired.returncode == 1, repaired.stderr
    assert json.loads(repaired.stdout)["left_count"] == 0
    assert "checking inodes" in repaired.stderr
    again = fsck(path)
    assert again.returncode == 0
    assert again.stdout.startswith("clean")
    with local_mount(directory, image_bytes=IMAGE_BYTES) as mount:
        assert not (mount.path / "victim").exists()
        assert (mount.path / "new").read_text() == "y" * 50_000


def test_wrong_command_lines_have_exit_code_16_and_a_wreck_8(tmp_path) -> None:
    path = tmp_path / "nothing"
    noise = random.Random(8).randbytes(2 << 20)
    for content in (noise, noise[: 17 * BLOCK_BYTES + 5], b"text\n", b"", bytes(8 << 20)):
        path.write_bytes(content)
        for options in ((), ("-p",), ("-y",)):
            ended = fsck(*options, path)
            assert ended.returncode == 8, (len(content), options, ended.stderr)
            assert "Traceback" not in ended.stderr
            assert path.read_bytes() == content
    assert fsck(tmp_path / "missing").returncode == 8
    assert fsck(tmp_path).returncode == 16
    for words in (("-n", "-y"), ("-p", "-y"), ("--repair",), ("-n", "--repair")):
        assert fsck(*words, path, stdin=subprocess.DEVNULL).returncode == 16
    assert path.read_bytes() == bytes(8 << 20)


def test_a_dump_is_restored_into_an_image_that_fsck_checks(image) -> None:
    directory, path, _ = image
    ctl = [sys.executable, "-m", "cfs.cli"]

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*ctl, *map(str, words)], cwd=ROOT, capture_output=True, text=True)

    dump, copy = directory / "dump", directory / "copy"
    made = run("metadump", "--hash-names", path, dump)
    assert made.returncode == 0, made.stderr
    assert run("metadump", path, dump).returncode == 4
    assert b"victim" not in dump.read_bytes()
    assert run("metarestore", dump, copy).returncode == 0
    assert copy.stat().st_size == IMAGE_BYTES
    assert copy.stat().st_blocks * 512 < IMAGE_BYTES // 4
    assert fsck(copy).returncode == 0
    dump.write_bytes(dump.read_bytes()[:-5])
    copy.unlink()
    assert run("metarestore", dump, copy).returncode == 11
    assert not copy.exists()
