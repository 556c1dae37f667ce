"""Where every task of the mount process is: logged on SIGUSR2, to understand one that hangs."""

from __future__ import annotations

from typing import Any

import trio


def describe_tasks() -> list[str]:
    """One line per task, indented by nursery: its name and its innermost frames."""
    lines: list[str] = []
    root = trio.lowlevel.current_root_task()
    if root is not None:
        _walk(root, 0, lines)
    return lines


def _walk(task: trio.lowlevel.Task, depth: int, lines: list[str]) -> None:
    lines.append(f"{'  ' * depth}{task.name}: {' > '.join(_frames(task.coro)[-5:])}")
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            _walk(child, depth + 1, lines)


def _frames(awaited: Any) -> list[str]:
    found = []
    while awaited is not None:
        for kind in ("cr", "gi", "ag"):
            frame = getattr(awaited, f"{kind}_frame", None)
            if frame is not None:
                code = frame.f_code
                found.append(f"{code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}")
                break
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return found
