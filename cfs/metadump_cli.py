"""Files of `cfsctl metadump` and `cfsctl metarestore`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import BinaryIO

import trio

from cfs.attributes import BLOCK_BYTES
from cfs.fsck.progress_cli import ProgressShow
from cfs.metadump import DUMP_HEADER, dump, read_header_untrusted, read_record_untrusted
from cfs.volume_io import with_device
from cluster.device import BlockDevice
from cluster.errors import RefusedError, os_failure

KEY_BYTES = 32


@contextmanager
def _new_file(path: str) -> Iterator[BinaryIO]:
    """A file that was not there; it goes away again if what is written to it does not end well."""
    try:
        file = open(path, "xb")  # noqa: SIM115 (closed below)
    except FileExistsError:
        raise RefusedError(f"{path} exists", hint="choose another name") from None
    except OSError as error:
        raise os_failure(error, f"cannot write {path}") from error
    try:
        with file:
            yield file
    except BaseException:
        os.unlink(path)
        raise


def write_dump(target: str, output: str, *, hash_names: bool, local: bool) -> int:
    """Dump the metadata of a volume or image into a new file; how many blocks."""
    key = os.urandom(KEY_BYTES) if hash_names else b""
    blocks = 0
    with _new_file(output) as file, ProgressShow(always=False, never=False) as progress:

        async def work(device: BlockDevice) -> None:
            nonlocal blocks
            blocks = await dump(
                device, key, file.write, lambda count: progress("dumping blocks", count, 0)
            )

        trio.run(partial(with_device, writing=False), target, local, "fsck", work)
    return blocks


def restore_dump(source: str, image: str) -> int:
    """Make a sparse image from a dump; how many blocks it holds."""
    blocks = 0
    with open(source, "rb") as file:
        info = read_header_untrusted(file.read(DUMP_HEADER.size))
        with _new_file(image) as target:
            target.truncate(info.device_blocks * BLOCK_BYTES)
            while record := read_record_untrusted(info, file.read):
                target.seek(record[0] * BLOCK_BYTES)
                target.write(record[1])
                blocks += len(record[1]) // BLOCK_BYTES
    return blocks
