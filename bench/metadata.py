"""Create, stat, rename, unlink: on one node, on three in their own directories, on three in one
directory; beside xfs on a loop file, an empty pyfuse3 file system and the first version's figures.
"""

from __future__ import annotations

from collections.abc import Callable

from bench import empty, xfs
from bench.clients import here, on, on_all
from lab import hosts
from lab.topology import MOUNT_POINT, Host, Lab

FILES = 2000
WARM_ROUNDS = 100
CREATE, COLD, WARM, RENAME, UNLINK = "create", "stat, cold", "stat, warm", "rename", "unlink"
VERBS = (CREATE, COLD, WARM, RENAME, UNLINK)
FIRST = {CREATE: 707.0, COLD: 683.0, RENAME: 668.0, UNLINK: 3607.0}
"""One node, as measured at the end of the first version."""

Run = Callable[..., dict]


def _words(verb: str, top: str, prefix: str, files: int) -> list[str]:
    """The client's words for a verb in a directory."""
    if verb == WARM:
        return ["again", top, prefix, str(files), str(WARM_ROUNDS)]
    if verb == UNLINK:
        return ["unlink", top, f"r{prefix}", str(files)]
    return [verb.partition(",")[0], top, prefix, str(files)]


def _one_node(lab: Lab) -> dict[str, float]:
    """A cold stat is one on a node that has not seen the file."""
    first, second = lab.nodes[0], lab.nodes[1]
    top = f"{MOUNT_POINT}/bench-meta-1"
    hosts.run(lab, first, "mkdir", "-p", top)
    rates = {}
    for verb in (CREATE, WARM, COLD):
        node = second if verb == COLD else first
        rates[verb] = on(lab, node, *_words(verb, top, "f", FILES))["rate"]
    # Files of its own, which nobody else has looked at.
    on(lab, first, *_words(CREATE, top, "g", FILES))
    for verb in (RENAME, UNLINK):
        rates[verb] = on(lab, first, *_words(verb, top, "g", FILES))["rate"]
    return rates


def _three_nodes(lab: Lab) -> dict[str, float]:
    """All three together, each in a directory of its own."""
    tops = {node: f"{MOUNT_POINT}/bench-meta-3-{node.name}" for node in lab.nodes}
    for node, top in tops.items():
        hosts.run(lab, node, "mkdir", "-p", top)
    rates = {}
    for verb in (CREATE, WARM, RENAME, UNLINK):
        work = [(node, _words(verb, top, "f", FILES)) for node, top in tops.items()]
        rates[verb] = _together(FILES * (WARM_ROUNDS if verb == WARM else 1), on_all(lab, work))
    for number, node in enumerate(lab.nodes):
        top = tops[lab.nodes[number - 1]]
        on(lab, node, *_words(CREATE, tops[node], "c", FILES))
        tops[node] = top
    work = [(node, _words(COLD, top, "c", FILES)) for node, top in tops.items()]
    rates[COLD] = _together(FILES, on_all(lab, work))
    return rates


def _one_directory(lab: Lab) -> dict[str, float]:
    """All three together in one directory, each with names of its own."""
    top = f"{MOUNT_POINT}/bench-meta-shared"
    hosts.run(lab, lab.nodes[0], "mkdir", "-p", top)
    rates = {}
    files = FILES // 3
    for verb in (CREATE, RENAME, UNLINK):
        work = [(n, _words(verb, top, f"{n.name}-", files)) for n in lab.nodes]
        rates[verb] = _together(files, on_all(lab, work))
    return rates


def _together(each: int, answers: list[dict]) -> float:
    """Operations a second of all until the last one has ended."""
    return each * len(answers) / max(answer["seconds"] for answer in answers)


def _alone(run: Run, top: str, verbs: tuple[str, ...]) -> dict[str, float]:
    return {verb: run(*_words(verb, top, "f", FILES))["rate"] for verb in verbs}


def _empty(lab: Lab, node: Host) -> dict[str, float]:
    with empty.mounted(lab, node) as top:
        return _alone(lambda *words: on(lab, node, *words), top, (CREATE, WARM, RENAME, UNLINK))


def _xfs(lab: Lab) -> dict[str, float]:
    with xfs.mounted(lab) as top:
        return _alone(lambda *words: here(lab, *words), top, (CREATE, WARM, RENAME, UNLINK))


def run(lab: Lab) -> dict:
    """Operations a second."""
    result = {
        "empty pyfuse3": _empty(lab, lab.nodes[0]),
        "one node": _one_node(lab),
        "three nodes in all": _three_nodes(lab),
        "three nodes in one directory": _one_directory(lab),
        "xfs": _xfs(lab),
        "first version, one node": FIRST,
    }
    hosts.run(lab, lab.nodes[0], "sh", "-c", f"rm -rf {MOUNT_POINT}/bench-meta-*", timeout_s=600)
    return {k: {v: round(r) for v, r in d.items()} for k, d in result.items()}


def rows(result: dict) -> tuple[list[str], list[list[str]]]:
    columns = ["operations/s", *result, "aim"]
    aims = {
        CREATE: f">= 0.3 of empty: {0.3 * result['empty pyfuse3'][CREATE]:.0f}; three >= 0.9 of "
        f"one; one directory >= 300",
        WARM: ">= 300000",
    }
    table = []
    for verb in VERBS:
        figures = [str(result[target].get(verb, "")) for target in result]
        table.append([verb, *figures, aims.get(verb, "")])
    return columns, table
