"""Parity and process settings."""

import os
import random
import signal
import subprocess
import sys

import pytest

from native import parity, process


@pytest.mark.parametrize("length", [0, 1, 63, 4096, 8192, 20001])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_xor_into(length, count):
    rng = random.Random(length + count)
    target, *sources = [rng.randbytes(length) for _ in range(count + 1)]
    number = int.from_bytes(target, "big")
    for source in sources:
        number ^= int.from_bytes(source, "big")
    result = bytearray(target)
    parity.xor_into(result, sources)
    assert result == number.to_bytes(length, "big")


def test_xor_refuses_other_lengths_and_itself():
    buffer = bytearray(8)
    with pytest.raises(ValueError, match="same length"):
        parity.xor_into(buffer, [bytes(7)])
    with pytest.raises(ValueError, match="destination"):
        parity.xor_into(buffer, [buffer])


def test_process_settings_hold():
    code = (
        "from native import process; flusher = process.set_io_flusher(); process.lock_memory();"
        "process.set_parent_death_signal(9); process.set_parent_death_signal(0);"
        "b = bytearray(1 << 20); s = open('/proc/self/status').read();"
        "f = dict(l.split(':') for l in s.splitlines());"
        "assert flusher == bool(int(f['CapEff'], 16) >> 24 & 1);"
        "print(f['VmLck'].split()[0])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) > 1000


def test_memory_is_kept():
    """What was freed is used again: no page of it is new. In a process of its own, for good."""
    program = """
import resource
from native.process import keep_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def use():
    kept = [bytes(bytearray(512 << 10)) for _ in range(16)]

keep_memory(64 << 20)
use()
before = faults()
for _ in range(50):
    use()
print(faults() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert int(done.stdout) < 2048, "less than the pages of one round"


def test_fatal_signal_pending():
    assert not process.fatal_signal_pending(os.getpid())
    stopped = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not process.fatal_signal_pending(stopped.pid)
    finally:
        stopped.send_signal(signal.SIGKILL)
        stopped.wait()
    assert process.fatal_signal_pending(stopped.pid)
