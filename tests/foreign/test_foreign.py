"""Foreign suites on a local mount, a few seconds each; the file system is whole afterwards."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.foreign.suites import DEVIATIONS, SUITES, Result, judge
from tests.fuse.mounting import ROOT, local_mount, scratch


@pytest.fixture(scope="module")
def mounted():
    """One mount for all of them, checked when they are done."""
    with scratch() as directory:
        with local_mount(directory, image_bytes=4 << 30) as mount:
            yield mount
        check(directory / "image")


def check(image):
    """No suite leaves damage behind."""
    done = subprocess.run(
        [sys.executable, "-m", "cfs.fsck.cli", "-n", image],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.parametrize("suite", SUITES)
def test_suite(mounted, suite):
    """Nothing fails and nothing is left out but what the tables say."""
    place = mounted.path / suite
    place.mkdir()
    assert not judge(suite, SUITES[suite](place, False))


def test_judgement():
    """A failure, a test left out for a new reason and a deviation that is gone are all seen."""
    expected = {name: "gives up" for of, name in DEVIATIONS if of == "stress-ng"}
    assert judge("stress-ng", Result(skipped=dict(expected))) == []
    assert len(judge("stress-ng", Result(skipped={**expected, "link": "gives up"}))) == 1
    assert len(judge("stress-ng", Result(skipped=dict(expected), failed={"dir": "no"}))) == 1
    assert len(judge("stress-ng", Result())) == len(expected)
    assert judge("dbench", Result()) == []
    absent = {"test_sqlite3": "not in the package"}
    assert judge("python", Result(skipped={**absent, "a": "Win32 specific tests"})) == []
    assert len(judge("python", Result(skipped={**absent, "a": "no xattr support"}))) == 1
