"""clusterd mounts again what was lost: after a power cut, a bar, or the death of a mount process.

What an earlier mount has left at the place (aborted, its process gone) is taken out of the tree
first; who still has files of it open gets ENOTCONN.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import trio

from cfs.mount.system_io import MNT_DETACH, mount_source, unmount
from cluster.control_io import Handler
from cluster.errors import StackError
from cluster.events import EventName
from cluster.ids import InstanceNo
from cluster.paths_io import boottime_ns
from node.clusterd_io import Clusterd
from node.files_io import NodeFiles
from node.wanted import Wanted, WantedMount

ATTEMPT_S = 180.0
LEFTOVERS_MAX = 16
PROBLEM_MAX = 500
FILE_SYSTEM = "fuse.cfs"


class Remounts:
    """The wanted mounts of this node."""

    def __init__(self, daemon: Clusterd, files: NodeFiles) -> None:
        self._daemon = daemon
        self._files = files
        self._changed = trio.Event()
        self.wanted = Wanted(files.wanted())
        daemon.on_instance_over = self._over

    def handlers(self) -> Mapping[str, Handler]:
        """The methods of every session."""
        return {"mounts.list": self._list, "mounts.forget": self._forget}

    async def _list(self, _params: dict[str, Any]) -> Any:
        return self.wanted.rows()

    async def _forget(self, params: dict[str, Any]) -> dict[str, bool]:
        forgotten = self.wanted.forget(str(params["mountpoint"]))
        if forgotten:
            self._save()
        return {"forgotten": forgotten}

    def mounted(self, number: InstanceNo, mount: WantedMount) -> None:
        """An instance has mounted and wants to be kept. Raises BusyError."""
        if self.wanted.want(boottime_ns(), mount, number):
            self._save()

    def _over(self, number: InstanceNo, clean: bool) -> None:
        if not clean:
            self.wanted.died(boottime_ns(), number)
            self._changed.set()
        elif self.wanted.left(number):
            try:
                self._save()
            except StackError as error:  # then it is mounted again after a failure: no harm
                self._daemon.problem("mounts", error.message)

    def _save(self) -> None:
        # Small and rare; a command must not report a mount that would be forgotten.
        self._files.save_wanted(self.wanted.mounts())
        self._daemon.problem("mounts", "")

    async def run(self) -> None:
        """Mount what is due, for ever."""
        daemon = self._daemon
        async with trio.open_nursery() as nursery:
            while True:
                self._changed = trio.Event()
                if daemon.admitted and daemon.view.quorate:
                    for mount in self.wanted.due(boottime_ns(), self._taken()):
                        self.wanted.started(mount.mountpoint)
                        nursery.start_soon(self._attempt, mount)
                await self._wait()

    def _taken(self) -> set[str]:
        return {one.mountpoint for one in self._daemon.instances.live() if one.mountpoint}

    async def _wait(self) -> None:
        due_ns = self.wanted.deadline(self._taken())
        pause_s = float("inf") if due_ns is None else max(0.0, (due_ns - boottime_ns()) / 1e9)
        ready = self._daemon.admitted and self._daemon.view.quorate
        with trio.move_on_after(pause_s if ready else float("inf")):
            async with trio.open_nursery() as nursery:

                async def end_with(event: trio.Event) -> None:
                    await event.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(end_with, self._changed)
                nursery.start_soon(end_with, self._daemon.changed)

    async def _attempt(self, mount: WantedMount) -> None:
        try:
            problem = await trio.to_thread.run_sync(take_away, mount)
            if not problem:
                problem = await self._mount(mount)
        except (OSError, StackError) as error:
            problem = str(error)
        news = self.wanted.ended(boottime_ns(), mount.mountpoint, problem)
        if news and problem:
            text = f"{mount.volume} cannot be mounted at {mount.mountpoint}: {problem}"
            self._daemon.note(EventName.MOUNT_FAILED, text)
        elif news:
            text = f"{mount.volume} is mounted at {mount.mountpoint} again"
            self._daemon.note(EventName.MOUNT_BACK, text)
        self._changed.set()

    async def _mount(self, mount: WantedMount) -> str:
        """Run mount.cfs; "" or why it failed."""
        with trio.move_on_after(ATTEMPT_S):
            done = await trio.run_process(
                mount_command(mount), stdin=b"", capture_stderr=True, stdout=subprocess.DEVNULL,
                check=False, env={**os.environ, "NOTIFY_SOCKET": ""},
            )  # fmt: skip
            text = done.stderr.decode(errors="replace").strip()[-PROBLEM_MAX:]
            return "" if done.returncode == 0 else text or f"exit code {done.returncode}"
        return f"no end in {ATTEMPT_S:.0f} s"


def mount_command(mount: WantedMount) -> list[str]:
    """The command line that mounts it."""
    beside = Path(sys.executable).parent / "mount.cfs"
    program = str(beside) if beside.exists() else shutil.which("mount.cfs") or "mount.cfs"
    options = ["-o", ",".join(mount.options)] if mount.options else []
    return [program, mount.volume, mount.mountpoint, *options]


def take_away(mount: WantedMount) -> str:
    """Take what dead mounts of ours have left out of the tree; "" or why it cannot be done."""
    for _ in range(LEFTOVERS_MAX):
        kind, source = mount_source(mount.mountpoint)
        if not kind:
            break
        if (kind, source) != (FILE_SYSTEM, mount.volume):
            return f"{source} ({kind}) is mounted there"
        error = unmount(mount.mountpoint, MNT_DETACH)
        if error:
            return f"a dead mount cannot be taken away: {os.strerror(error)}"
    return "" if os.path.isdir(mount.mountpoint) else "no such directory"
