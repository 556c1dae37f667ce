"""mount.cfs: mount a volume of the cluster (or an image on one machine) at a directory.

`mount.cfs VOLUME DIRECTORY [-o OPTIONS] [-f]`; the same as `cfs` for `mount -t fuse.cfs`. The
command returns when the file system is mounted and can be used; the process that serves it stays in
the background unless `-f` is given. Exit codes are those of mount(8).
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import sys
from pathlib import Path

from cfs.mount.options import (
    EXIT_BUG,
    EXIT_FAILED,
    EXIT_MOUNTED,
    EXIT_SYSTEM,
    EXIT_USAGE,
    USAGE,
    MountArguments,
    parse_arguments,
)
from cfs.mount.system_io import (
    StatusPipe,
    daemonise,
    fuse_mounts,
    noted_process,
    redirect_output,
    settle_process,
)
from cluster.errors import (
    BusyError,
    NotFoundError,
    NotPermittedError,
    StackError,
    UsageError,
    os_failure,
)
from cluster.paths_io import run_dir
from cluster.tool_cli import need_root

log = logging.getLogger("cfs.mount")


def _say(message: str) -> None:
    print(f"mount.cfs: {message}", file=sys.stderr, flush=True)


class Status(StatusPipe):
    """Reports to the waiting command, then lets go of the terminal."""

    def __init__(self, arguments: MountArguments, descriptor: int) -> None:
        super().__init__(descriptor)
        self._arguments = arguments
        self.done = False

    def report(self, exit_code: int, message: str = "") -> None:
        if self.done:
            return
        self.done = True
        if not self._arguments.foreground:
            if exit_code == EXIT_MOUNTED:
                redirect_output(log_path(self._arguments))
            super().report(exit_code, message)
        elif exit_code != EXIT_MOUNTED:
            _say(message)
        else:
            _say(f"{self._arguments.volume} is mounted at {self._arguments.mountpoint}")
            notify_ready()


def log_path(arguments: MountArguments) -> Path:
    """Where the messages of a background mount go."""
    if arguments.log_path:
        return Path(arguments.log_path)
    return run_dir() / f"mount-{arguments.mountpoint.strip('/').replace('/', '-')}.log"


def notify_ready() -> None:
    """Tell systemd, if it waits."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect("\0" + address[1:] if address.startswith("@") else address)
        sock.send(b"READY=1")


def _after_start(code: int, message: str) -> int:
    """What the command that was started says, from the report of its daemon."""
    if code < 0:
        _say("the mount process died; see its log")
        return EXIT_BUG
    if message:
        _say(message)
    return code


def run(arguments: MountArguments, status: Status) -> int:
    """Be the mount process until the mount ends."""
    # Heavy imports only now: in the process that stays, with the session extension first.
    import trio

    from cfs.filesystem import FileSystem
    from cfs.mount.process_io import Mount, OpenBackend
    from cfs.runtime_io import TrioRuntime

    open_backend: OpenBackend
    if arguments.local:
        from cfs.mount.local_io import open_local

        open_backend = open_local
    else:
        from cfs.mount.cluster_io import open_cluster

        open_backend = open_cluster

    async def live() -> int:
        mount = Mount(arguments)
        code = await mount.run(open_backend, FileSystem.mount, TrioRuntime, status)
        if mount.failure and not status.done:
            raise StackError(mount.failure)
        return code

    return trio.run(live)


def main(words: list[str] | None = None) -> None:
    """Entry point of mount.cfs."""
    typed = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(typed):
        print(USAGE)
        sys.exit(EXIT_MOUNTED)
    try:
        arguments = _absolute(parse_arguments(typed))
        need_root("mount.cfs", "use sudo")
    except (UsageError, NotPermittedError) as error:
        _complain(error)
        sys.exit(EXIT_USAGE)
    try:
        _check_places(arguments)
    except StackError as error:
        _complain(error)
        sys.exit(EXIT_FAILED)
    sys.exit(_main(arguments))


def _complain(error: StackError) -> None:
    _say(error.message + (f"\n  hint: {error.hint}" if error.hint else ""))


def _check_places(arguments: MountArguments) -> None:
    """Refuse before anything is started. Raises StackError. A mount that is there is not touched:
    it may be frozen."""
    for source, place, minor in fuse_mounts():
        pid = noted_process(run_dir(), minor)
        if pid and place == arguments.mountpoint:
            raise BusyError(
                f"{source} is mounted at {place} (pid {pid})", hint=f"umount {place} first"
            )
        if pid and source == arguments.volume and not arguments.local:
            raise BusyError(
                f"{source} is mounted on this node already, at {place} (pid {pid})",
                hint=f"to see it at a second place: mount --bind {place} {arguments.mountpoint}",
            )
    where = arguments.mountpoint
    try:
        is_directory = stat.S_ISDIR(os.stat(where).st_mode)
    except FileNotFoundError:
        raise NotFoundError(f"mount point {where} does not exist", hint=f"mkdir {where}") from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return  # what a dead mount left behind; ours goes on top
        raise os_failure(error, f"mount point {where}") from error
    if not is_directory:
        raise UsageError(f"mount point {where} is not a directory")


def _absolute(arguments: MountArguments) -> MountArguments:
    """The process will work in `/`."""
    import msgspec

    changes: dict[str, str] = {"mountpoint": os.path.realpath(arguments.mountpoint)}
    if arguments.local:
        changes["volume"] = os.path.realpath(arguments.volume)
    if arguments.log_path:
        changes["log_path"] = os.path.abspath(arguments.log_path)
    return msgspec.structs.replace(arguments, **changes)


def _main(arguments: MountArguments) -> int:
    pipe = StatusPipe() if arguments.foreground else daemonise(_after_start)
    status = Status(arguments, pipe.take())
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.INFO,
        format="%(asctime)s %(name)s %(levelname)s %(message)s",
    )
    # Threads and pyfuse3 leave nothing behind that needs an orderly exit, but may hang in one.
    code = EXIT_FAILED
    try:
        settle_process()
        code = run(arguments, status)
    except BaseException as error:
        code = _failed(error, status)
    finally:
        logging.shutdown()
        sys.stderr.flush()
        os._exit(code)


def _failed(error: BaseException, status: Status) -> int:
    """Say why the mount process ends."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, StackError):
        text = f"{error.message} ({error.hint})" if error.hint else error.message
        if status.done:
            log.error("%s", text)
        status.report(EXIT_FAILED, text)
        return EXIT_FAILED
    log.exception("the mount process failed", exc_info=error)
    status.report(EXIT_SYSTEM, f"{type(error).__name__}: {error}")
    return EXIT_SYSTEM


def helper_main() -> None:
    """Entry point of `cfs`, which `mount -t fuse.cfs` calls with the same arguments."""
    if len(sys.argv) == 1:
        print(USAGE, file=sys.stderr)
        sys.exit(EXIT_USAGE)
    main()


if __name__ == "__main__":
    main()
