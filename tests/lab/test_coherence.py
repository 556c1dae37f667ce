"""0 stale: reads by all means from all nodes while one of them dies. The long run of the same judge
is `python -m tests.stress`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from lab import cluster, hosts
from lab.judge import Board
from lab.topology import MOUNT_POINT, Lab

CELLS = 64
CHECKS = 20_000
JUDGE = [sys.executable, "-m", "lab.judge"]


def test_no_stale_read_while_a_node_dies(ready: Lab, tmp_path: Path) -> None:
    """Versioned cells of all kinds (see lab.judge_cells), written and read by all means."""
    seed = 20
    print(f"seed {seed}")
    lab, top, path = ready, f"{MOUNT_POINT}/judge", tmp_path / "board"
    arguments = [top, "--board", str(path), "--cells", str(CELLS), "--seed", str(seed)]
    hosts.run(lab, lab.nodes[0], *JUDGE, *arguments, "--prepare")
    board = Board(path, CELLS)
    victim = lab.nodes[1]
    running = {
        node.name: hosts.popen(
            lab,
            node,
            *JUDGE,
            *arguments,
            "--writer",
            str(node.index),
            "--checks",
            str(CHECKS),
            "--seconds",
            "40",
            stdout=subprocess.PIPE,
        )
        for node in lab.nodes
    }
    try:
        for process in running.values():
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n"

        def busy() -> bool:
            return sum(board.get(cell).committed for cell in range(CELLS)) > 20

        hosts.wait_for(busy, 35, "the judges write")
        board.mark_dead(victim.index)
        cluster.power_cut(lab, victim)
        total = 0
        for name, process in running.items():
            output, _ = process.communicate(timeout=300)
            if name == victim.name:
                continue
            result = json.loads(output.splitlines()[-1])
            assert result["stale"] == 0, result
            assert not result["lost"], result
            total += result["total"]
        print(f"{total} checks")
        assert total >= 500
    finally:
        for process in running.values():
            if process.poll() is None:
                process.kill()
            process.wait()
