"""What seems to be on a device: asked before anything is overwritten.

libblkid knows some hundred file systems, partition tables, RAID and encryption formats. It runs as
`blkid` in a process of its own, for the bytes are a stranger's; it sees a sparse copy of the first
and the last MiB of the device, which is where all of them begin.
"""

from __future__ import annotations

import os
import subprocess

import trio

from cluster.device import BlockDevice
from cluster.errors import StackError

END_BYTES = 1 << 20
_PIECE_BYTES = 128 << 10
_BLKID_S = 30.0
_FOUND, _NOTHING, _AMBIVALENT = 0, 2, 8
_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


_OURS = (
    ("cvm physical volume", 0, b"CVM-PV01"),
    ("cfs file system", 16 * 4096, b"CFSb"),
)
"""What libblkid does not know; the formats stand in cvm/metadata.py and cfs/format.py."""


async def signature(device: BlockDevice) -> str:
    """What is on the device, in words ("ext4 file system 'home'"); empty if it looks unused. Raises
    DeviceError, and StackError if `blkid` cannot be asked."""
    copy = os.memfd_create("signatures", os.MFD_CLOEXEC)
    try:
        size = device.size_bytes
        os.ftruncate(copy, size)
        for start, end in ((0, min(size, END_BYTES)), (max(END_BYTES, size - END_BYTES), size)):
            for offset in range(start, end, _PIECE_BYTES):
                data = await device.read(offset, min(_PIECE_BYTES, end - offset))
                os.pwrite(copy, data, offset)
        for name, offset, magic in _OURS:
            if os.pread(copy, len(magic), offset) == magic:
                return name
        return await trio.to_thread.run_sync(_ask_blkid, copy)
    finally:
        os.close(copy)


def _ask_blkid(copy: int) -> str:
    words = ["blkid", "--probe", "--output", "export", f"/proc/self/fd/{copy}"]
    try:
        done = subprocess.run(
            words, pass_fds=[copy], env=_ENVIRONMENT, stdin=subprocess.DEVNULL,
            capture_output=True, timeout=_BLKID_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StackError(f"cannot ask blkid what is there: {error}") from error
    if done.returncode == _AMBIVALENT:
        return "several file systems or partition tables"
    if done.returncode == _NOTHING:
        return ""
    if done.returncode != _FOUND:
        raise StackError(f"blkid: {done.stderr.decode(errors='replace').strip()}")
    lines = done.stdout.decode(errors="replace").splitlines()
    return _words(dict(line.split("=", 1) for line in lines if "=" in line))


def _words(found: dict[str, str]) -> str:
    kind, usage = found.get("TYPE", ""), found.get("USAGE", "")
    if kind:
        thing = {"filesystem": "file system", "raid": "member", "crypto": "encryption"}
        label = f" {found['LABEL']!r}" if found.get("LABEL") else ""
        return f"{kind} {thing.get(usage, '')}".strip() + label
    return f"{found['PTTYPE']} partition table" if "PTTYPE" in found else ""
