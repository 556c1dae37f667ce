"""clusterd: one per node. Reads node.toml, starts the guard, joins, serves the control socket.

Ends with 0 after a clean leave (SIGTERM with nothing running, `clusterctl leave`), with 1 when the
guard died, with 2 for a wrong configuration. When this life was put out of the cluster it starts
anew in the same process id, with a higher incarnation.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Mapping

import click
import trio

from cluster.config import NodeConfig
from cluster.control_io import Handler, Session, serve_sessions
from cluster.errors import BusyError, StackError
from cluster.paths_io import control_socket, lock_directory, make_directory, run_dir
from cluster.tool_cli import ToolCommand, need_root
from node.admin_io import Admin
from node.clusterd_io import Clusterd, RestartNeeded, restart_process
from node.fence_admin_io import FenceAdmin
from node.fencer_io import Fencing
from node.files_io import NodeFiles
from node.instances_io import Instances
from node.notify_io import notify
from node.remount_io import Remounts
from node.volumes_io import Volumes

STOP_S = 5.0
FORWARDED = ("dlm.", "cfs.")


class _Methods(dict[str, Handler]):
    """The table of one session; whole families of methods are found by their prefix."""

    def __init__(
        self, table: Mapping[str, Handler], instances: Instances, volumes: Volumes
    ) -> None:
        super().__init__(table)
        self._instances = instances
        self._volumes = volumes

    def get(self, method: str, default: object = None) -> Handler | None:  # type: ignore[override]
        if method in self:
            return self[method]
        if method.startswith("cvm."):
            return lambda params: self._volumes.call(method, params)
        if method.startswith(FORWARDED):
            return lambda params: self._instances.forward(method, params)
        return None


async def _serve(files: NodeFiles, config: NodeConfig) -> None:
    incarnation = files.next_incarnation()
    stop = trio.Event()
    daemon = Clusterd(files, config, incarnation)
    volumes = Volumes(daemon)
    remounts = Remounts(daemon, files)
    instances = Instances(daemon, volumes, remounts)
    admin = Admin(daemon, remounts, stop)
    fencing = Fencing(daemon)
    fence_admin = FenceAdmin(daemon, fencing)

    def attach(session: Session) -> Mapping[str, Handler]:
        table = {**admin.handlers(session), **instances.handlers(session)}
        table |= {**remounts.handlers(), **fence_admin.handlers()}
        return _Methods(table, instances, volumes)

    async with trio.open_nursery() as nursery:
        await nursery.start(daemon.run)
        nursery.start_soon(volumes.run)
        nursery.start_soon(instances.watch)
        nursery.start_soon(fencing.run)
        await nursery.start(serve_sessions, control_socket(), attach, instances.detach)
        nursery.start_soon(remounts.run)
        nursery.start_soon(_report_status, daemon)
        nursery.start_soon(_stop_on_signal, admin, stop)
        gc.collect()
        gc.freeze()
        print(f"clusterd: {config.node.name} ready", file=sys.stderr, flush=True)
        notify("READY=1")
        await stop.wait()
        # One beat, so that the answer of `cluster.leave` leaves before the socket closes.
        await trio.sleep(daemon.timing.heartbeat_ms / 1000)
        notify("STOPPING=1")
        control_socket().unlink(missing_ok=True)
        with trio.CancelScope(shield=True):
            await daemon.guard.close()
        nursery.cancel_scope.cancel()


async def _report_status(daemon: Clusterd) -> None:
    """systemctl status shows the view."""
    shown = ""
    while True:
        view = daemon.view
        quorum = "quorate" if view.quorate else "NOT quorate"
        present = f"{len(view.members)}/{len(daemon.state.nodes)} nodes"
        text = f"view {view.epoch}, {present}, {quorum}"
        if text != shown:
            shown = text
            notify(f"STATUS={text}")
        await daemon.wait_changed()


async def _stop_on_signal(admin: Admin, stop: trio.Event) -> None:
    """SIGTERM and SIGINT: leave cleanly if nothing runs here, else stop at once."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async for _number in signals:
            try:
                with trio.move_on_after(STOP_S):
                    await admin.leave()
            except BusyError as error:
                print(f"clusterd: {error.message}; stopping", file=sys.stderr, flush=True)
            except StackError as error:
                print(f"clusterd: no clean leave: {error.message}", file=sys.stderr, flush=True)
            stop.set()


def _find(group: BaseException, kind: type[BaseException]) -> BaseException | None:
    """An exception of `kind` inside (nested) groups."""
    if isinstance(group, kind):
        return group
    if isinstance(group, BaseExceptionGroup):
        for inner in group.exceptions:
            found = _find(inner, kind)
            if found is not None:
                return found
    return None


@click.command(cls=ToolCommand, name="clusterd")
def main() -> None:
    """The cluster daemon of this node, in the foreground.

    It reads node.toml, which `clusterctl init` or `clusterctl join` has made in /var/lib/cfs
    (CFS_STATE_DIR), serves clusterd.sock in /run/cfs (CFS_RUN_DIR), and ends cleanly on SIGTERM.
    """
    need_root("clusterd", "it opens sockets of the system and serves mounts")
    try:
        files = NodeFiles()
        config = files.config()
        files.check(config)
        lock = lock_directory(files.directory, "clusterd")
        make_directory(run_dir())
        trio.run(_serve, files, config)
        os.close(lock)
    except BaseException as error:
        restart = _find(error, RestartNeeded)
        if isinstance(restart, RestartNeeded):
            restart_process(restart)
        stack = _find(error, StackError)
        if stack is None:
            traceback.print_exc()  # a bug, or a disk that nobody expected to fail
        raise stack or error from error


if __name__ == "__main__":
    main()
