"""The faults of a campaign: what strikes a host of the lab, and what mends it."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from lab import cluster, hosts, network
from lab.judge import NODES_MAX
from lab.topology import NETWORKS, Host, Lab

Deed = Callable[[Lab, Host], None]


@dataclass(frozen=True)
class Fault:
    """`loses`: the host, a node, may lose what it has not made durable; its judges are dead from
    then on. After any other fault they must go on as if nothing had been."""

    name: str
    kind: str
    loses: bool
    strike: Deed
    mend: Deed


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended by itself
        os.kill(pid, number)


def _signal(program: str, number: signal.Signals) -> Deed:
    def send(lab: Lab, host: Host) -> None:
        for pid in hosts.find(lab, host, program):
            _kill(pid, number)

    return send


def _cables(*numbers: int, up: bool) -> Deed:
    def pull(lab: Lab, host: Host) -> None:
        for number in numbers:
            network.set_cable(lab, host, number, up=up)

    return pull


def _freeze(*, frozen: bool) -> Deed:
    return lambda lab, host: hosts.freeze(lab, host, frozen=frozen)


def killed_alone(writer: int) -> bool:
    """Whether "kill judge" kills this judge: every second one, and those use no io_uring."""
    return writer // NODES_MAX % 2 == 0


def _kill_judges(lab: Lab, host: Host) -> None:
    for pid, words in hosts.processes(lab, host).items():
        if "lab.judge" in words and "--no-uring" in words:
            _kill(pid, signal.SIGKILL)


def _nothing(_lab: Lab, _host: Host) -> None:
    """It comes back by itself."""


FAULTS = (
    Fault("kill judge", "node", True, _kill_judges, _nothing),
    Fault("kill mount", "node", True, _signal("mount.cfs", signal.SIGKILL), _nothing),
    Fault(
        "stop mount", "node", True,
        _signal("mount.cfs", signal.SIGSTOP), _signal("mount.cfs", signal.SIGCONT),
    ),
    Fault("kill clusterd", "node", True, _signal("clusterd", signal.SIGKILL), cluster.start),
    Fault("cut node", "node", True, cluster.power_cut, cluster.start),
    Fault("freeze node", "node", True, _freeze(frozen=True), _freeze(frozen=False)),
    Fault("unplug node", "node", True, _cables(*NETWORKS, up=False), _cables(*NETWORKS, up=True)),
    Fault("one cable of node", "node", False, _cables(1, up=False), _cables(1, up=True)),
    Fault("kill server", "server", False, _signal("gnbd-server", signal.SIGKILL), cluster.start),
    Fault(
        "stop server", "server", False,
        _signal("gnbd-server", signal.SIGSTOP), _signal("gnbd-server", signal.SIGCONT),
    ),
    Fault("cut server", "server", False, cluster.power_cut, cluster.start),
    Fault(
        "unplug server", "server", False, _cables(*NETWORKS, up=False), _cables(*NETWORKS, up=True)
    ),
    Fault("one cable of server", "server", False, _cables(2, up=False), _cables(2, up=True)),
)  # fmt: skip
