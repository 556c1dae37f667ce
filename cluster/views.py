"""Which view a node wishes for: the best clique of nodes that all reach each other.

Best: the most present members (a joining node never drives a member out), then the most nodes, then
the lowest ids. An edge needs both ends to say that they reach the other. Sets are bit masks.
"""

from __future__ import annotations

from cluster.ids import NODE_ID_MAX

STEPS_MAX = 4096


def best_clique(me: int, candidates: list[int], members: list[int], reach: dict[int, int]) -> int:
    """The best clique that contains `me`, as a mask. `reach[n]` is the mask that node n reaches."""
    among = _mask(candidates) | 1 << me
    adjacent = {
        node: _mask(
            [
                other
                for other in _bits(among)
                if other != node
                and reach.get(node, 0) >> other & 1
                and reach.get(other, 0) >> node & 1
            ]
        )
        for node in _bits(among)
    }
    search = _Search(_mask(members), adjacent)
    search.extend(1 << me, adjacent[me])
    return search.best


class _Search:
    """Branch and bound; after STEPS_MAX steps the best found so far stands (any clique is safe)."""

    def __init__(self, members: int, adjacent: dict[int, int]) -> None:
        self.best = 0
        self._members = members
        self._adjacent = adjacent
        self._steps = 0

    def _rank(self, mask: int) -> tuple[int, int, int]:
        lowest_first = 0
        for node in _bits(mask):
            lowest_first |= 1 << (NODE_ID_MAX - node)
        return ((mask & self._members).bit_count(), mask.bit_count(), lowest_first)

    def extend(self, clique: int, rest: int) -> None:
        self._steps += 1
        for node in _bits(rest):
            if rest & ~self._adjacent[node] == 1 << node:
                clique |= 1 << node
                rest &= ~(1 << node)
        if not rest:
            if self._rank(clique) > self._rank(self.best):
                self.best = clique
            return
        bound = self._rank(clique | rest)
        if self._steps > STEPS_MAX or bound[:2] < self._rank(self.best)[:2]:
            return
        node = max(_bits(rest), key=lambda n: ((self._adjacent[n] & rest).bit_count(), -n))
        self.extend(clique | 1 << node, rest & self._adjacent[node])
        self.extend(clique, rest & ~(1 << node))


def _mask(nodes: list[int]) -> int:
    mask = 0
    for node in nodes:
        mask |= 1 << node
    return mask


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(NODE_ID_MAX + 1) if mask >> bit & 1]
