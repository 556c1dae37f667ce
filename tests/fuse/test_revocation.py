"""Nothing stale is read while locks come and go, by no way of reading (rules of section 2.4)."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.fuse.mounting import ROOT, Mounted, scratch

SECONDS = 3
CLIENT = ROOT / "tests" / "fuse" / "stale_reader.py"


@pytest.mark.parametrize(
    ("pause_ms", "kinds", "options"),
    [
        (20, {"pread": 4, "mmap": 2}, ""),
        (5, {"pread": 2, "mmap": 2, "direct": 1}, ""),
        (5, {"write": 3, "pread": 1, "mmap": 1}, ""),
        (5, {"write": 2, "store": 2, "pread": 1}, ""),
        (5, {"pread": 2, "mmap": 1, "write": 1}, "no_epoch"),
        (10, {"mmap-direct": 2, "mmap-append": 1}, ""),
    ],
)
def test_no_stale_data(chooser, pause_ms, kinds, options):
    """Another node replaces the file at every revocation; local counters never go back."""
    seed = chooser.randrange(1 << 30)
    with scratch() as directory:
        versions = directory / "versions"
        versions.write_bytes(bytes(4096))
        path = directory / "mnt"
        path.mkdir()
        words = [
            "-m",
            "tests.fuse.revoke_mount",
            str(path),
            str(versions),
            str(pause_ms),
            str(seed),
        ]
        if options:
            words += ["-o", options]
        mounted = Mounted(words, path, directory / "log")
        try:
            clients = {
                kind: subprocess.Popen(
                    [sys.executable, CLIENT, path / "f", versions, kind, str(threads),
                     str(SECONDS), str(seed)],
                    stdout=subprocess.PIPE, text=True,
                )
                for kind, threads in kinds.items()
            }  # fmt: skip
            results = {kind: client.communicate(timeout=60)[0] for kind, client in clients.items()}
            assert mounted.close() == 0, mounted.log.read_text()
        finally:
            mounted.destroy()
        print(results, re.findall("VERSION.*", mounted.log.read_text()))
        for kind, text in results.items():
            reads, stale, _newest = map(int, text.split())
            assert reads > 0, kind
            assert stale == 0, (kind, text)
