"""umount.fuse.cfs, the helper of umount(8): unmount, and return when the last byte is written.

`-f` ends the mount without writing. umount(8) hands `-f` on but has no way to say "lose it", so
the consent is an option of this command alone: `umount -f` lists what would be lost and refuses.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys

from cfs.mount.options import EXIT_FAILED, EXIT_MOUNTED, EXIT_USAGE
from cfs.mount.system_io import (
    MNT_DETACH,
    MNT_FORCE,
    fuse_mounts,
    mounted_minor,
    noted_process,
    seen_by,
    unmount,
)
from cluster.control_client_io import call
from cluster.errors import RefusedError, StackError
from cluster.paths_io import run_dir

ANSWER_S = 10.0
END_S = 30.0
FORGET_S = 10.0
QUIET_S = 2.0
USAGE = """usage: umount.fuse.cfs [-f [--yes]] [-l] DIRECTORY

Unmount; wait for the last write.
  -f     end the mount without writing: list what is lost, and refuse
  --yes  with -f: lose it; programs that use the mount get ENOTCONN
  -l     take the mount out of the tree now; it ends when nobody uses it any more"""


def main() -> None:
    """Entry point of umount.fuse.cfs. Exit codes are those of umount(8)."""
    typed = sys.argv[1:]
    words = [word for word in typed if not word.startswith("-")]
    flags = (MNT_FORCE if "-f" in typed else 0) | (MNT_DETACH if "-l" in typed else 0)
    if {"-h", "--help"} & set(typed):
        print(USAGE)
        sys.exit(EXIT_MOUNTED)
    if len(words) != 1:
        _complain("one directory is needed", "see: umount.fuse.cfs --help")
        sys.exit(EXIT_USAGE)
    mountpoint = os.path.realpath(words[0]) if flags == 0 else os.path.abspath(words[0])
    minor = mounted_minor(mountpoint)
    if minor < 0:
        _forget(mountpoint)
        _complain(f"{mountpoint}: not mounted")
        sys.exit(EXIT_FAILED)
    watch = _watch(minor)
    if flags & MNT_FORCE and watch >= 0:
        try:
            _discard(mountpoint, minor, watch, consent="--yes" in typed)
        except StackError as error:
            _complain(f"{mountpoint}: {error.message}", error.hint)
            sys.exit(EXIT_FAILED)
        if mounted_minor(mountpoint) != minor:
            _forget(mountpoint)
            sys.exit(EXIT_MOUNTED)
        flags |= MNT_DETACH
    code = unmount(mountpoint, flags)
    if code:
        _complain(f"{mountpoint}: {os.strerror(code)}")
        sys.exit(EXIT_FAILED)
    if watch >= 0 and not flags:
        _wait(mountpoint, minor, watch)
    _forget(mountpoint)
    sys.exit(EXIT_MOUNTED)


def _wait(mountpoint: str, minor: int, watch: int) -> None:
    """Until the mount process has ended; says so if not the last bytes but a copy of the mount in
    another mount namespace (a container that started meanwhile) keeps it."""
    if select.select([watch], [], [], QUIET_S)[0]:
        return
    pid = seen_by(minor)
    if pid:
        _complain(
            f"{mountpoint}: goes on in the mount namespace of process {pid}",
            "waiting for the end of that namespace, or for its umount",
        )
    select.select([watch], [], [])


def _complain(message: str, hint: str = "") -> None:
    print(f"umount.fuse.cfs: {message}", file=sys.stderr)
    if hint:
        print(f"  hint: {hint}", file=sys.stderr)


def _forget(mountpoint: str) -> None:
    """It may have been lost: clusterd is not to bring it back. One that ends cleanly says so
    itself."""
    with contextlib.suppress(StackError):
        call("mounts.forget", {"mountpoint": mountpoint}, timeout_s=FORGET_S)


def _watch(minor: int) -> int:
    """A descriptor that becomes readable when the process of a mount has ended; -1: there is
    none, or it is unknown."""
    pid = noted_process(run_dir(), minor)
    try:
        return os.pidfd_open(pid) if pid else -1
    except OSError:
        return -1


def _discard(mountpoint: str, minor: int, watch: int, *, consent: bool) -> None:
    """Show what is lost; with `consent` end the mount process. Raises RefusedError without it. A
    mount that does not answer, or is outside of a cluster, cannot say what it would lose; the
    unmount by force that comes next ends it all the same."""
    from cfs.cli import show_losses

    verb = "cfs.abandon" if consent else "cfs.losses"
    answered = False
    local = any(number == minor and source.startswith("/") for source, _, number in fuse_mounts())
    try:
        if not local:
            show_losses(call(verb, {"mountpoint": mountpoint}, timeout_s=ANSWER_S))
            answered = True
    except StackError as error:
        _complain(f"{mountpoint}: {error.message}")
    if not answered:
        print("what is lost is not known: everything that is not synced")
    if not consent:
        again = f"to lose it: umount.fuse.cfs -f --yes {mountpoint}"
        raise RefusedError("not unmounted: what is listed would be lost", hint=again)
    if answered:
        select.select([watch], [], [], END_S)


if __name__ == "__main__":
    main()
