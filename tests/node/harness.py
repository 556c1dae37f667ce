"""Real clusterds on addresses of 127/8: one state and run directory per node, no namespaces."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import trio

from cluster import control_client_io
from cluster.control_io import open_session
from cluster.errors import StackError

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 90.0


def wait_until(condition, what, timeout_s=WAIT_S):
    """Poll until `condition` is true; its last value is returned."""
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(StackError):
            value = condition()
            if value:
                return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {timeout_s} s: {what}")
        time.sleep(0.02)


def children(pid):
    """Pids of the children of a process."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(word) for word in path.read_text().split()]
    except OSError:
        return []


class Node:
    """One node: its directories and its clusterd."""

    def __init__(self, cluster, number):
        self.cluster = cluster
        self.number = number
        self.name = f"n{number}"
        self.base = cluster.base / self.name
        self.run_dir = self.base / "run"
        self.addresses = [f"127.{cluster.octet}.{number}.{net}" for net in (1, 2)]
        self.process = None
        self.guard = None
        self.more_config = ""
        """For the end of node.toml, before the first start."""
        self.more_path = []
        """Where its processes look for modules first."""

    @property
    def environment(self):
        return {
            **os.environ,
            "CFS_RUN_DIR": str(self.run_dir),
            "CFS_STATE_DIR": str(self.base / "state"),
            "PYTHONPATH": ":".join(map(str, [*self.more_path, ROOT])),
        }

    def ctl(self, *args, check=True):
        """Run clusterctl; gives its output."""
        done = subprocess.run(
            [sys.executable, "-m", "node.cli", *args],
            env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"clusterctl {args}: {done.stderr}\n{self.logs()}")
        return done

    def tool(self, module, *args):
        """Run another command-line tool on this node; gives its output."""
        code = f"from {module} import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *args],
            env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise AssertionError(f"{module} {args}: {done.stdout}{done.stderr}\n{self.logs()}")
        return done.stdout

    def command(self):
        return [sys.executable, "-m", "node.daemon"]

    def start(self):
        """Start clusterd; returns when its socket answers."""
        self.base.mkdir(parents=True, exist_ok=True)
        if self.more_config:
            with (self.base / "state/node.toml").open("a") as file:
                file.write(self.more_config)
            self.more_config = ""
        with (self.base / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                env=self.environment, cwd=ROOT, stderr=log, stdout=log,
            )  # fmt: skip
        self.cluster.started.append(self.process)
        try:
            wait_until(self._answers, f"{self.name} answers")
        except AssertionError as error:
            raise AssertionError(f"{error}, {self.process.poll()}\n{self.logs()}") from None
        self.guard = next(iter(children(self.process.pid)))

    def _answers(self):
        if self.process.poll() is not None:
            raise AssertionError(f"{self.name} has ended")
        return self.call("cluster.status")

    def call(self, method, params=None, timeout_s=30.0):
        return control_client_io.call(method, params or {}, self.run_dir, timeout_s)

    def status(self):
        return self.call("cluster.status")

    def members(self):
        """Node ids of a quorate view, or an empty list."""
        status = self.status()
        return [m["id"] for m in status["members"]] if status["quorate"] else []

    def events(self, name=None):
        found = self.call("cluster.events")
        return [e for e in found if name is None or e["event"] == name]

    def kill(self):
        """A power cut: clusterd and guard at once."""
        for pid in (self.guard, self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def logs(self):
        path = self.base / "log"
        return path.read_text() if path.exists() else ""


class Cluster:
    """Some nodes; everything that was started is killed at the end."""

    def __init__(self, base):
        self.base = base
        self.octet, self._claim = _own_octet()
        self.nodes = {}
        self.servers = {}
        self.started = []

    def node(self, number):
        return self.nodes.setdefault(number, Node(self, number))

    def found(self):
        """The first node, running and quorate."""
        node = self.node(1)
        node.ctl(
            "init", "--name", "test", "--node", "n1", "--id", "1", "--profile", "fast",
            *_addresses(node),
        )  # fmt: skip
        node.start()
        wait_until(lambda: node.members() == [1], "the founder is quorate")
        return node

    def join(self, number):
        """Invite and start one more node; returns when it is a member everywhere."""
        first, node = self.node(1), self.node(number)
        token = first.ctl("invite", node.name, "--id", str(number), *_addresses(node)).stdout
        node.ctl("join", token.strip())
        node.start()
        wait_until(lambda: number in node.members(), f"{node.name} is a member")
        return node

    def up(self, count, voters=True):
        """`count` nodes in one view, all of them voters."""
        self.found()
        for number in range(2, count + 1):
            self.join(number)
            if voters:
                self.node(1).ctl("voter", "add", f"n{number}")
        self.wait_view(range(1, count + 1))
        return [self.node(n) for n in range(1, count + 1)]

    def wait_view(self, numbers, timeout_s=WAIT_S):
        """All named nodes have a quorate view of exactly these."""
        wanted = sorted(numbers)
        for number in wanted:
            node = self.node(number)
            wait_until(
                lambda node=node: sorted(node.members()) == wanted,
                f"{node.name} has view {wanted}", timeout_s,
            )  # fmt: skip

    def close(self):
        for process in self.started:
            for pid in [*children(process.pid), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        self._claim.close()


def _own_octet():
    """A part of 127/8 that no other cluster of this machine uses, and the socket that says so."""
    octets = list(range(40, 250))
    random.SystemRandom().shuffle(octets)
    for octet in octets:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0cfs-tests-127.{octet}")
        except OSError:
            claim.close()
        else:
            return octet, claim
    raise AssertionError("every part of 127/8 is taken")


def _addresses(node):
    return [word for address in node.addresses for word in ("--address", address)]


class Server:
    """A gnbd-server process with one file as disk."""

    def __init__(self, cluster, number):
        self.cluster = cluster
        cluster.servers[number] = self
        self.number = number
        self.name = f"s{number}"
        self.base = cluster.base / self.name
        self.addresses = [f"127.{cluster.octet}.{200 + number}.{net}" for net in (1, 2)]
        self.process = None

    def configure(self, size="256M", filters=("volatile",), head="", more=""):
        self.base.mkdir(parents=True)
        listen = json.dumps(self.addresses)
        (self.base / "exports.toml").write_text(
            f'state_dir = "{self.base}/state"\nlisten = {listen}\n{head}'
            f'[[exports]]\nname = "disk0"\npath = "{self.base}/disk0"\nsize = "{size}"\n'
            f'access = "cluster"\nfilters = {json.dumps(list(filters))}\n{more}'
        )
        token = (
            self.cluster.node(1)
            .ctl("server", "add", self.name, "--id", str(128 + self.number), *_addresses(self))
            .stdout.strip()
        )
        done = self._command("--join", token, str(self.base / "exports.toml"))
        output = subprocess.run(done, cwd=ROOT, capture_output=True, text=True, check=False)
        assert output.returncode == 0, output.stderr

    def _command(self, *args):
        code = "from gnbd.server.cli import server_main; server_main()"
        return [sys.executable, "-c", code, *args]

    def start(self):
        with (self.base / "log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command(str(self.base / "exports.toml")), cwd=ROOT, stdout=log, stderr=log
            )
        self.cluster.started.append(self.process)
        first = self.cluster.node(1)

        def installed():
            return 128 + self.number in first.status()["installed"]

        wait_until(installed, f"{self.name} has installed the view")

    def kill(self):
        self.process.kill()
        self.process.wait()


class Instance:
    """A registered instance in a thread of its own, as a mount would be."""

    def __init__(self, node, group=None, port=1, handlers=None):
        self.node = node
        self.group = group
        self.port = port
        self.handlers = handlers or {}
        self.events = []
        self.granted = None
        self._token = None
        self._scope = None
        self._clean = False
        self._thread = threading.Thread(target=trio.run, args=(self._main,), daemon=True)
        self._thread.start()
        wait_until(lambda: self.granted, "the instance is registered")

    async def _main(self):
        async def echo(params):
            return {"echo": params["text"], "instance": self.granted["instance"]}

        handlers = {"dlm.echo": echo, **self.handlers}
        async with open_session(
            self.node.run_dir, handlers, lambda *event: self.events.append(event)
        ) as session:
            granted = await session.call("instance.register", {"kind": "mount", "title": "/m"})
            if self.group:
                await session.call(
                    "group.join",
                    {"group": self.group, "addresses": self.node.addresses, "port": self.port},
                )
            self._token = trio.lowlevel.current_trio_token()
            self._session = session
            self._scope = trio.CancelScope()
            self.granted = granted
            with self._scope:
                await session.closed.wait()
            if self._clean:
                with contextlib.suppress(StackError):
                    await session.call("instance.leave")

    def stop(self, clean):
        self._clean = clean
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join(60)

    def call(self, method, params):
        async def work():
            return await self._session.call(method, params)

        return trio.from_thread.run(work, trio_token=self._token)

    def group_events(self, kind=None):
        found = [data for name, data in self.events if name == "group"]
        return [e for e in found if kind is None or e["kind"] == kind]
