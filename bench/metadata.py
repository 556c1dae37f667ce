"""Create, cold stat, unlink, rename: on one node, on three at once, beside xfs on a loop file."""

from __future__ import annotations

import json
import subprocess
import sys

from lab.demo_work import all_at_once, last_json
from lab.topology import MOUNT_POINT, Host, Lab

FILES = 2000
VERBS = ("create", "stat", "rename", "unlink")
PROGRAM = r"""
import json, os, sys, time
top, verb, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.makedirs(top, exist_ok=True)
begin = time.perf_counter()
for i in range(count):
    name = f"{top}/f{i}"
    if verb == "create":
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    elif verb == "stat":
        os.stat(name)
    elif verb == "rename":
        os.rename(name, f"{top}/r{i}")
    else:
        os.unlink(f"{top}/r{i}")
print(json.dumps({"rate": count / (time.perf_counter() - begin)}))
"""


def _rates(lab: Lab, nodes: list[Host], verb: str, owner_shift: int) -> float:
    """Operations a second and node; node i works in the directory of node i + shift."""
    commands = []
    for number, _node in enumerate(nodes):
        owner = nodes[(number + owner_shift) % len(nodes)]
        top = f"{MOUNT_POINT}/bench-meta-{len(nodes)}/{owner.name}"
        commands.append((nodes[number], [sys.executable, "-c", PROGRAM, top, verb, str(FILES)]))
    outputs = all_at_once(lab, commands, 600)
    return sum(last_json(o)["rate"] for o in outputs) / len(outputs)


def _xfs(verb_rates: dict[str, float], directory: str) -> None:
    """The same program on xfs on a loop file of this machine."""
    image, top = f"{directory}/xfs.img", f"{directory}/xfs"
    commands = [
        ["truncate", "-s", "1G", image],
        ["mkfs.xfs", "-q", image],
        ["mkdir", "-p", top],
        ["mount", "-o", "loop", image, top],
    ]
    for argv in commands:
        subprocess.run(argv, check=True, capture_output=True)
    try:
        for verb in VERBS:
            argv = [sys.executable, "-c", PROGRAM, f"{top}/d", verb, str(FILES)]
            out = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
            verb_rates[verb] = json.loads(out)["rate"]
    finally:
        subprocess.run(["umount", top], check=True)
        subprocess.run(["rm", image], check=True)


def run(lab: Lab) -> dict:
    """Rates per node. A cold stat is one on a node that has not seen the file."""
    result: dict = {"one node": {}, "three nodes, each": {}, "xfs": {}}
    first, second = lab.nodes[0], lab.nodes[1]
    for verb in VERBS:
        nodes = [second] if verb == "stat" else [first]
        result["one node"][verb] = _one(lab, nodes[0], verb)
    for verb in VERBS:
        result["three nodes, each"][verb] = _rates(lab, lab.nodes, verb, 1 if verb == "stat" else 0)
    _xfs(result["xfs"], str(lab.directory))
    return {k: {v: round(r, 0) for v, r in d.items()} for k, d in result.items()}


def _one(lab: Lab, node: Host, verb: str) -> float:
    top = f"{MOUNT_POINT}/bench-meta-1"
    argv = [sys.executable, "-c", PROGRAM, top, verb, str(FILES)]
    return last_json(all_at_once(lab, [(node, argv)], 600)[0])["rate"]


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    columns = ["operations/s", *result]
    return columns, [[v, *(f"{result[k].get(v, 0):.0f}" for k in result)] for v in VERBS]
