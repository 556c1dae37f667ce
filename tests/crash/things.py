"""What the workload changes, and what must be true of it after a crash.

A `Thing` is a file, a block of a file, a name... with a history of states. Its changes never
overlap in time, whichever node makes them. A state is on record with the time when its change
began; a *mark* says that from some moment on (a sync had returned) no earlier state may be found.
After a crash at T every thing must be in a state between its last mark before T and its last change
that had begun.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable
from typing import Any

import msgspec

from tests.crash.content import (
    BLOCK,
    STREAM_BYTES_MAX,
    attribute_bytes,
    commit_bytes,
    sector_versions,
    stream,
)

Command = list[list[Any]]
Tree = dict[bytes, tuple[Any, ...]]
NEVER_NS = 1 << 62


class History(msgspec.Struct):
    """`states[i]` may be found from `begins[i]` on, until a mark with a higher index."""

    kind: str
    name: str
    seed: int
    begins: list[int] = []
    states: list[Any] = []
    marks: list[tuple[int, int]] = []
    until_ns: int = NEVER_NS
    """From then on nobody can say what is to be found: a change was under way to something of which
    a part had gone with a mount."""

    def is_ready(self, crash_ns: int) -> bool:
        """Whether it had been made by then, and can be judged."""
        return bool(self.marks) and self.marks[0][0] < crash_ns <= self.until_ns

    def allowed(self, crash_ns: int) -> list[Any]:
        """The states that may be found after a crash at that moment."""
        end = bisect_left(self.begins, crash_ns)
        low = 0
        for at_ns, index in self.marks:
            if at_ns < crash_ns:
                low = max(low, index)
        return self.states[low:end]


class Change(msgspec.Struct):
    """What to do next to a thing, and what is true of it when that has been done."""

    commands: Command
    state: Any
    durable: bool


class Thing:
    """One subject of the workload. `prepare` makes it before the recording of states begins."""

    kind = ""

    def __init__(self, history: History) -> None:
        self.history = history
        self.name = history.name
        self.seed = history.seed

    @property
    def state(self) -> Any:
        return self.history.states[-1]

    def prepare(self) -> Change:
        """Bring it into its first state, durably."""
        raise NotImplementedError

    def change(self, rng: random.Random) -> Change:
        raise NotImplementedError

    def wrong(self, tree: Tree, allowed: list[Any]) -> str:
        """What is wrong in a tree that was found; nothing if it is one of the allowed states."""
        raise NotImplementedError


def _content(tree: Tree, name: str) -> bytes | None:
    found = tree.get(b"/" + name.encode())
    return found[1] if found is not None and found[0] == "file" else None


def _parent(name: str) -> str:
    return name.rpartition("/")[0] or "."


SYNCS = ("none", "none", "fsync", "fsync", "fdatasync", "dsync", "osync")


class Appended(Thing):
    """A log file: its content is always the beginning of one stream. State: its length."""

    kind = "appended"

    def prepare(self) -> Change:
        commands = [["append", self.name, self.seed, 0, 100, "fsync"], ["sync", _parent(self.name)]]
        return Change(commands, 100, True)

    def change(self, rng: random.Random) -> Change:
        kind = rng.random()
        if kind < 0.15:
            return Change([["sync", self.name, rng.choice(["fsync", "fdatasync"])]], None, True)
        if self.state > 600_000 or kind < 0.25:
            length = rng.randrange(self.state + 1)
            how = rng.choice(["none", "fsync", "fdatasync"])
            return Change([["truncate", self.name, length, how]], length, how != "none")
        length = rng.choice([1, 10, 100, 500, 3000, 4096, 9000, 40_000, 130_000])
        how = rng.choice(SYNCS)
        command = ["append", self.name, self.seed, self.state, length, how]
        assert self.state + length <= STREAM_BYTES_MAX
        return Change([command], self.state + length, how != "none")

    def wrong(self, tree: Tree, allowed: list[Any]) -> str:
        content = _content(tree, self.name)
        if content is None:
            return "it is gone"
        if len(content) not in allowed:
            return f"length {len(content)}"
        wanted = stream(self.seed, 0, len(content))
        if content != wanted:
            at = next(i for i, (a, b) in enumerate(zip(content, wanted, strict=True)) if a != b)
            return f"byte {at} of {len(content)} was never written"
        return ""


class Committed(Thing):
    """Write new, fsync, rename over the old one, fsync the directory. State: the version."""

    kind = "committed"

    def prepare(self) -> Change:
        return Change(self._replace(0, "fsync", durable=True), 0, True)

    def _replace(self, version: int, how: str, *, durable: bool) -> Command:
        new = f"{self.name}.new"
        commands: Command = [["fresh", new, self.seed, version, how], ["rename", new, self.name]]
        if durable:
            commands.append(["sync", _parent(self.name)])
        return commands

    def change(self, rng: random.Random) -> Change:
        durable = rng.random() < 0.6
        # Without an fsync of the new file: its data goes to the disk before the rename does.
        how = "fsync" if durable else rng.choice(["none", "fsync", "fdatasync"])
        return Change(self._replace(self.state + 1, how, durable=durable), self.state + 1, durable)

    def wrong(self, tree: Tree, allowed: list[Any]) -> str:
        content = _content(tree, self.name)
        if content is None:
            return "it is gone"
        if not any(content == commit_bytes(self.seed, version) for version in allowed):
            return f"{len(content)} bytes that are none of its versions"
        return ""


class InPlace(Thing):
    """A block of a file of a fixed length. State: the version."""

    BLOCKS: int

    def __init__(self, history: History) -> None:
        super().__init__(history)
        self.file, _, index = self.name.rpartition(":")
        self.index = int(index)

    def _make_file(self) -> Command:
        """The first block brings the file."""
        if self.index:
            return []
        return [
            ["append", self.file, 0, 0, 0, "none"],
            ["truncate", self.file, self.BLOCKS * BLOCK, "fsync"],
            ["sync", _parent(self.file)],
        ]

    def wrong(self, tree: Tree, allowed: list[Any]) -> str:
        content = _content(tree, self.file)
        if content is None or len(content) != self.BLOCKS * BLOCK:
            return f"its file has {len(content or b'')} bytes"
        data = content[self.index * BLOCK : (self.index + 1) * BLOCK]
        versions = sector_versions(self.seed, self.index, data)
        if not set(versions) <= set(allowed):
            return f"its sectors have the versions {versions}"
        return ""


class Block(InPlace):
    """A block of a file that is overwritten in place; a sector of it is the old or the new one."""

    kind = "block"
    BLOCKS = 12

    def prepare(self) -> Change:
        commands = [*self._make_file(), ["block", self.file, self.seed, self.index, 0, "fsync"]]
        return Change(commands, 0, True)

    def change(self, rng: random.Random) -> Change:
        how = rng.choice(["none", "fsync", "fdatasync", "dsync", "direct", "msync"])
        command = ["block", self.file, self.seed, self.index, self.state + 1, how]
        return Change([command], self.state + 1, how != "none")


class Sparse(InPlace):
    """A block of a file that is a hole, allocated, written, punched out, zeroed. Version 0 are
    zeroes. Never what the disk held there before."""

    kind = "sparse"
    BLOCKS = 6

    def prepare(self) -> Change:
        return Change([*self._make_file(), ["sync", self.file]], 0, True)

    def change(self, rng: random.Random) -> Change:
        kind = rng.choice(["write", "write", "write", "punch", "zero", "allocate"])
        how = rng.choice(["none", "none", "fsync", "fdatasync", "dsync", "direct", "msync"])
        if kind == "write":
            version = max(self.history.states) + 1
            command = ["block", self.file, self.seed, self.index, version, how]
            return Change([command], version, how != "none")
        if how not in ("fsync", "fdatasync"):
            how = "none"
        state = None if kind == "allocate" else 0
        return Change([["range", self.file, kind, self.index, how]], state, how != "none")


class Attributed(Thing):
    """An extended attribute. State: the version, 0 for none."""

    kind = "attributed"

    def prepare(self) -> Change:
        commands: Command = [["touch", self.name], ["sync", _parent(self.name)]]
        return Change(commands, 0, True)

    def change(self, rng: random.Random) -> Change:
        version = max(self.history.states) + 1
        if self.state and rng.random() < 0.3:
            version = 0
        how = rng.choice(["none", "none", "fsync"])
        return Change([["attribute", self.name, self.seed, version, how]], version, how != "none")

    def wrong(self, tree: Tree, allowed: list[Any]) -> str:
        value = tree.get(attribute_key(self.name), (b"",))[0]
        wanted = [attribute_bytes(self.seed, version) if version else b"" for version in allowed]
        return "" if value in wanted else f"its value has {len(value)} bytes"


def attribute_key(name: str) -> bytes:
    """Where `tests.crash.verify` puts the attribute of a file into the tree."""
    return b"/" + name.encode() + b"\0user.v"


class Swapped(Thing):
    """Two files whose names are exchanged. State: how often, modulo 2."""

    kind = "swapped"

    def prepare(self) -> Change:
        commands: Command = [
            ["fresh", f"{self.name}.{number}", self.seed, number, "fsync"] for number in (0, 1)
        ]
        return Change([*commands, ["sync", _parent(self.name)]], 0, True)

    def change(self, rng: random.Random) -> Change:
        commands: Command = [["exchange", f"{self.name}.0", f"{self.name}.1"]]
        durable = rng.random() < 0.4
        if durable:
            commands.append(["sync", _parent(self.name)])
        return Change(commands, 1 - self.state, durable)

    def wrong(self, tree: Tree, allowed: list[Any]) -> str:
        found = [_content(tree, f"{self.name}.{number}") for number in (0, 1)]
        both = [commit_bytes(self.seed, number) for number in (0, 1)]
        states = [state for state, wanted in enumerate((both, both[::-1])) if found == wanted]
        return "" if set(states) & set(allowed) else f"its names lead to {states}"


class Nameless(Thing):
    """A file that has no name until it is whole. State: the version that is there, -1 for none."""

    kind = "nameless"

    def prepare(self) -> Change:
        commands: Command = [["nameless", self.name, self.seed, 0], ["sync", _parent(self.name)]]
        return Change(commands, 0, True)

    def change(self, rng: random.Random) -> Change:
        durable = rng.random() < 0.3
        sync: Command = [["sync", _parent(self.name)]] if durable else []
        if self.state >= 0:
            return Change([["unlink", self.name], *sync], -1, durable)
        version = max(self.history.states) + 1
        return Change([["nameless", self.name, self.seed, version], *sync], version, durable)

    def wrong(self, tree: Tree, allowed: list[Any]) -> str:
        content = _content(tree, self.name)
        if content is None:
            return "" if -1 in allowed else "it is gone"
        if not any(v >= 0 and content == commit_bytes(self.seed, v) for v in allowed):
            return f"{len(content)} bytes that are none of its versions"
        return ""


class Name(Thing):
    """A name in a directory that comes and goes. State: whether it is there."""

    kind = "name"

    def prepare(self) -> Change:
        return Change([["touch", self.name], ["sync", _parent(self.name)]], True, True)

    def change(self, rng: random.Random) -> Change:
        if rng.random() < 0.2:
            return Change([["sync", _parent(self.name)]], None, True)
        commands: Command = [["unlink" if self.state else "touch", self.name]]
        durable = rng.random() < 0.3
        if durable:
            commands.append(["sync", _parent(self.name)])
        return Change(commands, not self.state, durable)

    def wrong(self, tree: Tree, allowed: list[Any]) -> str:
        there = b"/" + self.name.encode() in tree
        return "" if there in allowed else ("it is there" if there else "it is not there")


class Folder(Name):
    """A directory with something in it that comes and goes."""

    kind = "folder"

    def prepare(self) -> Change:
        return Change([*self._make(), ["sync", _parent(self.name)]], True, True)

    def _make(self) -> Command:
        return [["mkdir", self.name], ["symlink", "somewhere", f"{self.name}/inside"]]

    def change(self, rng: random.Random) -> Change:
        take = [["unlink", f"{self.name}/inside"], ["rmdir", self.name]]
        commands: Command = take if self.state else self._make()
        durable = rng.random() < 0.3
        if durable:
            commands.append(["sync", _parent(self.name)])
        return Change(commands, not self.state, durable)


class Mover(Thing):
    """A file or a directory that travels between directories. State: where it is."""

    kind = "mover"
    PLACES = 3

    def _places(self) -> list[str]:
        top, _, name = self.name.rpartition("/")
        return [f"{top}/place{number}/{name}" for number in range(self.PLACES)]

    def prepare(self) -> Change:
        first = self._places()[0]
        if self.seed % 2:
            commands: Command = [["mkdir", first]]
        else:
            commands = [["fresh", first, self.seed, 1, "fsync"]]
        return Change([*commands, ["sync", _parent(first)]], first, True)

    def change(self, rng: random.Random) -> Change:
        target = rng.choice([place for place in self._places() if place != self.state])
        commands: Command = [["rename", self.state, target]]
        durable = rng.random() < 0.4
        if durable:
            commands.append(["sync", _parent(rng.choice([self.state, target]))])
        return Change(commands, target, durable)

    def wrong(self, tree: Tree, allowed: list[Any]) -> str:
        found = [place for place in self._places() if b"/" + place.encode() in tree]
        if len(found) != 1:
            return f"it is at {found}"
        if found[0] not in allowed:
            return f"it is at {found[0]}"
        if not self.seed % 2 and _content(tree, found[0]) != commit_bytes(self.seed, 1):
            return "its content has changed"
        return ""


class Linked(Thing):
    """A file with up to four names. State: which of them are there."""

    kind = "linked"
    NAMES = 4

    def prepare(self) -> Change:
        commands: Command = [["fresh", f"{self.name}.0", self.seed, 1, "fsync"]]
        return Change([*commands, ["sync", _parent(self.name)]], [0], True)

    def change(self, rng: random.Random) -> Change:
        names = set(self.state)
        number = rng.randrange(self.NAMES)
        if number in names and len(names) > 1:
            commands: Command = [["unlink", f"{self.name}.{number}"]]
            names.discard(number)
        else:
            number = rng.choice([n for n in range(self.NAMES) if n not in names] or [number])
            if number in names:
                return Change([["sync", _parent(self.name)]], None, True)
            commands = [["link", f"{self.name}.{min(names)}", f"{self.name}.{number}"]]
            names.add(number)
        durable = rng.random() < 0.4
        if durable:
            commands.append(["sync", _parent(self.name)])
        return Change(commands, sorted(names), durable)

    def wrong(self, tree: Tree, allowed: list[Any]) -> str:
        contents = [_content(tree, f"{self.name}.{number}") for number in range(self.NAMES)]
        names = [number for number, content in enumerate(contents) if content is not None]
        if names not in allowed:
            return f"its names are {names}"
        if any(contents[number] != commit_bytes(self.seed, 1) for number in names):
            return "its content has changed"
        return ""


class Sequence(Thing):
    """Names made one after another by one node: what is found has no gap (a journal keeps the
    order). State: how many."""

    kind = "sequence"

    def prepare(self) -> Change:
        return Change([["mkdir", self.name], ["sync", _parent(self.name)]], 0, True)

    def change(self, rng: random.Random) -> Change:
        commands: Command = [["touch", f"{self.name}/{self.state:06d}"]]
        durable = rng.random() < 0.1
        if durable:
            commands.append(["sync", self.name])
        return Change(commands, self.state + 1, durable)

    def wrong(self, tree: Tree, allowed: list[Any]) -> str:
        prefix = f"/{self.name}/".encode()
        found = sorted(int(path[len(prefix) :]) for path in tree if path.startswith(prefix))
        if found != list(range(len(found))):
            return f"there are gaps: {found[-20:]}"
        return "" if len(found) in allowed else f"there are {len(found)}"


class Churn(Thing):
    """Files written and deleted, so that blocks change their use all the time. State: the version
    that is there, -1 for none."""

    kind = "churn"

    def prepare(self) -> Change:
        return Change([["fresh", self.name, self.seed, 0, "fsync"]], 0, True)

    def change(self, rng: random.Random) -> Change:
        last = max(state for state in self.history.states)
        if self.state >= 0:
            hold = [["hold", f"{self.name}.held", self.seed]] if rng.random() < 0.3 else []
            return Change([["unlink", self.name], *hold], -1, False)
        how = rng.choice(SYNCS)
        return Change([["fresh", self.name, self.seed, last + 1, how]], last + 1, how != "none")

    def wrong(self, tree: Tree, allowed: list[Any]) -> str:
        content = _content(tree, self.name)
        if content is None:
            return "" if -1 in allowed else "it is gone"
        # `fresh` makes the name, then writes: in between the file is empty.
        if content == b"" and self._unsynced(allowed):
            return ""
        if not any(v >= 0 and content == commit_bytes(self.seed, v) for v in allowed):
            return f"{len(content)} bytes that are none of its versions"
        return ""

    @staticmethod
    def _unsynced(allowed: list[Any]) -> bool:
        return len(allowed) > 1 or allowed == [-1]


KINDS: dict[str, Callable[[History], Thing]] = {
    kind.kind: kind
    for kind in (
        Appended,
        Committed,
        Block,
        Name,
        Folder,
        Mover,
        Linked,
        Sequence,
        Churn,
        Sparse,
        Attributed,
        Swapped,
        Nameless,
    )
}
