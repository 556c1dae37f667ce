"""A host of the lab: a holder process, its private mounts, its control group.

The holder keeps the mount and UTS namespaces of a host alive. Everything that runs on the host
enters the namespaces of the holder and the host's control group, so that a power cut (`kill`) and a
pause (`freeze`) take all of it at one stroke. Directories of a host survive its power cut; /run
does not.

    host sees         comes from
    /run              DIR/hosts/NAME/run      (emptied at boot)
    /var/lib/cfs      DIR/hosts/NAME/state
    /srv              DIR/hosts/NAME/srv      (disks of a storage host)
    /usr/local/sbin   DIR/hosts/NAME/sbin     (our commands, as packaging/install links them)
    /mnt/cfs          the mount point
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.errors import StackError
from lab.topology import MOUNT_POINT, Host, Lab

END_S = 60.0
"""The most that processes take to stop or to end on a busy machine."""
BIN = Path(sys.executable).parent
INSTALL = Path(__file__).resolve().parent.parent / "packaging" / "install"
_ENTER = 'echo $$ > "$1/cgroup.procs"; pid=$2; shift 2; exec nsenter -t "$pid" -m -n -u -- "$@"'
_BOOT = """
set -e
mount --make-rprivate /
mkdir -p /mnt/cfs /var/lib/cfs
mount --bind "$1/run" /run
mount --bind "$1/state" /var/lib/cfs
mount --bind "$1/srv" /srv
mount --bind "$1/sbin" /usr/local/sbin
hostname "$2"
mkdir -p /run/cfs
mountpoint -q /sys/fs/fuse/connections || mount -t fusectl none /sys/fs/fuse/connections || true
echo ready
exec sleep infinity
"""


def environment() -> dict[str, str]:
    """What every process of a host gets: our commands first in PATH."""
    path = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    kept = {k: v for k, v in os.environ.items() if k in ("TERM", "LANG", "LC_ALL", "HOME")}
    return {**kept, "PATH": path, "CFS_RUN_DIR": "/run/cfs", "CFS_STATE_DIR": "/var/lib/cfs"}


def cgroup_root() -> Path:
    """Where cgroup2 is mounted, wherever that is. Raises StackError when it is not."""
    for line in Path("/proc/mounts").read_text().splitlines():
        _device, place, kind, *_rest = line.split()
        if kind == "cgroup2":
            return Path(place)
    raise StackError(
        "no cgroup2 file system is mounted", hint="mount -t cgroup2 none /sys/fs/cgroup"
    )


def lab_cgroup(tag: str) -> Path:
    return cgroup_root() / f"cfs-lab-{tag}"


def host_cgroup(lab: Lab, host: Host) -> Path:
    return lab_cgroup(lab.tag) / host.name


def _stat_fields(pid: int) -> list[str]:
    """Fields 3 and up of /proc/PID/stat; empty when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text[text.rindex(")") + 2 :].split()


def _state(pid: int) -> str:
    """R, S, D, Z, ... or nothing."""
    return next(iter(_stat_fields(pid)), "")


def _start_time(pid: int) -> int | None:
    """Tells a living process from a later one with the same number."""
    fields = _stat_fields(pid)
    return None if not fields or fields[0] == "Z" else int(fields[19])


def holder_pid(lab: Lab, host: Host) -> int | None:
    """The living holder of a host, or None when the host is off."""
    entry = lab.state.holders.get(host.name)
    if entry is None or _start_time(entry[0]) != entry[1]:
        return None
    return entry[0]


def boot(lab: Lab, host: Host) -> None:
    """Make the host's namespaces and mounts (services are started by `lab.cluster`)."""
    if holder_pid(lab, host) is not None:
        return
    directory = lab.host_directory(host)
    shutil.rmtree(directory / "run", ignore_errors=True)
    for name in ("run", "state", "srv", "log", "sbin"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    subprocess.run([INSTALL, directory / "sbin"], check=True, stdout=subprocess.DEVNULL)
    group = host_cgroup(lab, host)
    group.mkdir(parents=True, exist_ok=True)
    freeze(lab, host, frozen=False)
    join = 'echo $$ > "$1/cgroup.procs"; shift; exec "$@"'
    command = [
        "sh",
        "-c",
        join,
        "sh",
        str(group),
        "nsenter",
        f"--net=/run/netns/{lab.namespace(host.name)}",
        "unshare",
        "-m",
        "-u",
        "sh",
        "-c",
        _BOOT,
        "holder",
        str(directory),
        host.name,
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env=environment(),
    )
    assert process.stdout is not None
    if process.stdout.readline() != b"ready\n":
        raise StackError(f"could not make the namespaces of {host.name}")
    started = _start_time(process.pid)
    assert started is not None
    lab.state.holders[host.name] = (process.pid, started)
    lab.save()


def command_on(lab: Lab, host: Host, argv: Sequence[str]) -> list[str]:
    """The argument vector that runs `argv` on a host. Raises StackError when the host is off."""
    pid = holder_pid(lab, host)
    if pid is None:
        raise StackError(f"{host.name} is off", hint=f"cfs-lab start {host.name}")
    return ["sh", "-c", _ENTER, "sh", str(host_cgroup(lab, host)), str(pid), *argv]


def run(
    lab: Lab, host: Host, *argv: str, check: bool = True, timeout_s: float = 120.0, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run a command on a host to its end and capture its streams."""
    result = subprocess.run(
        command_on(lab, host, argv),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        input=text,
    )
    if check and result.returncode != 0:
        detail = (result.stderr.strip() or result.stdout.strip())[-2000:]
        raise StackError(f"{host.name}: {' '.join(argv)[:200]}: exit {result.returncode}: {detail}")
    return result


def popen(lab: Lab, host: Host, *argv: str, stdout: int | None = None) -> subprocess.Popen[str]:
    """Start a command on a host; the caller waits for it or kills the host."""
    return subprocess.Popen(
        command_on(lab, host, argv),
        text=True,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT if stdout is not None else None,
    )


def daemon(lab: Lab, host: Host, log_name: str, *argv: str) -> None:
    """Start a daemon on a host; its output goes to the host's log directory."""
    path = lab.host_directory(host) / "log" / f"{log_name}.log"
    with path.open("ab") as log:
        subprocess.Popen(
            command_on(lab, host, argv),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment(),
        )


def processes(lab: Lab, host: Host) -> dict[int, list[str]]:
    """The processes of a host by pid: their argument vectors."""
    result = {}
    try:
        pids = (host_cgroup(lab, host) / "cgroup.procs").read_text().split()
    except OSError:
        return {}
    for pid in pids:
        try:
            raw = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if raw:
            result[int(pid)] = raw.decode(errors="replace").rstrip("\0").split("\0")
    return result


def find(lab: Lab, host: Host, program: str) -> list[int]:
    """Pids of a program (by the base name of any of its first three arguments) on a host."""
    return [
        pid
        for pid, argv in processes(lab, host).items()
        if any(Path(word).name == program for word in argv[:3]) and Path(argv[0]).name != "sh"
    ]


def freeze(lab: Lab, host: Host, *, frozen: bool) -> None:
    """Stop or continue every process of a host at once. A process that waits in the kernel for its
    frozen mount cannot be frozen as well: the host counts as frozen with it."""
    group = host_cgroup(lab, host)
    if not (group / "cgroup.freeze").exists():
        return
    (group / "cgroup.freeze").write_text("1" if frozen else "0")
    wanted = f"frozen {int(frozen)}"

    def settled() -> bool:
        if wanted in (group / "cgroup.events").read_text().splitlines():
            return True
        return frozen and any(_state(pid) == "D" for pid in processes(lab, host))

    wait_for(settled, END_S, f"{host.name}: {wanted}")


def is_frozen(lab: Lab, host: Host) -> bool:
    try:
        return (host_cgroup(lab, host) / "cgroup.freeze").read_text().strip() == "1"
    except OSError:
        return False


def kill_all(group: Path) -> None:
    """SIGKILL every process of a control group and wait until they are gone."""
    if not group.exists():
        return

    def empty() -> bool:
        # Again and again: a process that is just being started enters its group by itself.
        (group / "cgroup.kill").write_text("1")
        return "populated 0" in (group / "cgroup.events").read_text().splitlines()

    wait_for(empty, END_S, f"{group} empty")


def remove_group(tag: str) -> None:
    """Kill and remove the control groups of a lab."""
    top = lab_cgroup(tag)
    if not top.exists():
        return
    kill_all(top)
    for group in [*(child for child in sorted(top.iterdir()) if child.is_dir()), top]:
        wait_for(lambda group=group: _removed(group), END_S, f"{group} removed")  # type: ignore[misc]


def _removed(group: Path) -> bool:
    """Try to remove an empty control group; its last process may still be on its way out."""
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        return False
    return True


def wait_for(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Poll a condition until it holds; returns the seconds it took. Raises StackError."""
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > timeout_s:
            raise StackError(f"waited {timeout_s:.0f} s in vain for: {what}")
        time.sleep(0.01)
    return time.monotonic() - begin


def mount_point_in_use(lab: Lab, host: Host) -> bool:
    """True when something is mounted on /mnt/cfs of the host (also a dead mount)."""
    pid = holder_pid(lab, host)
    if pid is None:
        return False
    mounts = Path(f"/proc/{pid}/mounts").read_text().splitlines()
    return any(line.split()[1] == MOUNT_POINT for line in mounts)
