"""Which seed notices a seeded bug."""

from __future__ import annotations

from collections.abc import Callable, Iterable


def hunt(
    run: Callable[[int], object], seeds: Iterable[int], kind: type[Exception] = AssertionError
) -> tuple[int, Exception] | None:
    """The first seed that notices the bug in place, and what it says. An error that is not of
    `kind` is no finding but a broken world."""
    for seed in seeds:
        try:
            run(seed)
        except kind as error:
            return seed, error
    return None
