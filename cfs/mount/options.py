"""What mount.cfs is asked to do: the command line of mount(8) and its helpers, and `-o` options."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cluster.errors import UsageError

READ_AHEAD_KB = 1024
READ_AHEAD_KB_MAX = 16384
EXIT_MOUNTED = 0
EXIT_USAGE = 1
EXIT_SYSTEM = 2
EXIT_BUG = 4
EXIT_FAILED = 32

KERNEL_OPTIONS = frozenset({"ro", "rw", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "sync"})
IGNORED_OPTIONS = frozenset(
    {"defaults", "auto", "noauto", "user", "nouser", "_netdev", "nofail", "users",
     "allow_other", "default_permissions"}
)  # fmt: skip

HINT = "see: mount.cfs --help"
USAGE = """\
usage: mount.cfs VOLUME DIRECTORY [-f] [-v] [-o OPTION,...]

VOLUME is VG/LV. Options besides those of mount(8):
  local               mount an image file or block device without a cluster
  mmap=coherent|off   shared writable mappings follow the cluster (default), or do not exist
  noatime|relatime    reading does not move the access time (default), or does if it is older than
                      the last change or a day; only reads that the kernel does not serve itself
  locks=cluster|local flock and fcntl locks hold on all nodes (default), or on one node each
  read_ahead_kb=N     how far the kernel reads ahead (default 1024)
  log=FILE            where messages go once the file system is mounted
  commit_ms=N         longest time an unsynced change stays in memory (at most 1000)
  no_epoch            do without what Linux 6.16 offers (for tests)
  test_demote_ms=N    give random locks up every N ms (for tests)
"""


class MountArguments(msgspec.Struct, frozen=True):
    """One mount, as asked for."""

    volume: str
    mountpoint: str
    foreground: bool = False
    verbose: bool = False
    local: bool = False
    mmap_coherent: bool = True
    access_times: bool = False
    locks_wanted: bool = True
    read_ahead_kb: int = READ_AHEAD_KB
    log_path: str = ""
    commit_ms: int = 1000
    use_epoch: bool = True
    test_demote_ms: float = 0.0
    kernel_options: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    """As given."""

    @property
    def read_only(self) -> bool:
        return "ro" in self.kernel_options

    @property
    def cluster_locks(self) -> bool:
        """Whether locks of files are ours; those of one machine alone the kernel does better."""
        return self.locks_wanted and not self.local


def parse_arguments(arguments: Sequence[str]) -> MountArguments:
    """Understand `mount.cfs` and the helper interface of mount(8). Raises UsageError."""
    words: list[str] = []
    options: list[str] = []
    fields: dict[str, object] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word in ("-o", "-t", "-N"):
            if not rest:
                raise UsageError(f"{word} needs a value", hint=HINT)
            value = rest.pop(0)
            if word == "-o":
                options += value.split(",")
        elif word.startswith("-o"):
            options += word[2:].split(",")
        elif word == "-f":
            fields["foreground"] = True
        elif word == "-v":
            fields["verbose"] = True
        elif word in ("-n", "-s", "-w"):
            continue
        elif word == "-r":
            options.append("ro")
        elif word.startswith("-") and word != "-":
            raise UsageError(f"unknown option {word}", hint=HINT)
        else:
            words.append(word)
    if len(words) != 2:
        raise UsageError("a volume and a directory are needed", hint=HINT)
    kernel = [option for option in options if option in KERNEL_OPTIONS]
    for option in options:
        _take_option(option, fields)
    return MountArguments(
        words[0],
        words[1],
        kernel_options=tuple(kernel),
        options=tuple(options),
        **fields,  # type: ignore[arg-type]
    )


def _take_option(option: str, fields: dict[str, object]) -> None:
    if not option or option in KERNEL_OPTIONS or option in IGNORED_OPTIONS:
        return
    name, _, value = option.partition("=")
    if option.startswith(("x-", "comment=", "X-")):
        return
    if option == "local":
        fields["local"] = True
    elif option in ("noatime", "relatime", "atime"):
        fields["access_times"] = option != "noatime"
    elif option == "no_epoch":
        fields["use_epoch"] = False
    elif name == "mmap" and value in ("coherent", "off"):
        fields["mmap_coherent"] = value == "coherent"
    elif name == "locks" and value in ("cluster", "local"):
        fields["locks_wanted"] = value == "cluster"
    elif name == "read_ahead_kb":
        fields["read_ahead_kb"] = _number(option, value, READ_AHEAD_KB_MAX)
    elif name == "commit_ms":
        fields["commit_ms"] = max(1, _number(option, value, 1000))
    elif name == "test_demote_ms":
        fields["test_demote_ms"] = float(_number(option, value, 1_000_000))
    elif name == "log" and value:
        fields["log_path"] = value
    else:
        raise UsageError(f"unknown mount option {option!r}", hint=HINT)


def _number(option: str, value: str, most: int) -> int:
    if not value.isdecimal() or int(value) > most:
        raise UsageError(f"{option!r} is not a number up to {most}", hint=HINT)
    return int(value)


def fuse_options(arguments: MountArguments) -> set[str]:
    """Options of the FUSE mount itself."""
    options = {"default_permissions", "allow_other", "subtype=cfs", "suid", "dev"}
    options.add(f"fsname={arguments.volume}")
    options |= set(arguments.kernel_options) - {"sync"}
    if not arguments.access_times:
        options.add("noatime")
    for off, on in (("nosuid", "suid"), ("nodev", "dev"), ("ro", "rw")):
        if off in options:
            options.discard(on)
    return options
