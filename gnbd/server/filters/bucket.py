"""A token bucket that is paid afterwards: whoever takes more than there is owes time."""

from __future__ import annotations

SECOND_NS = 1_000_000_000


class Bucket:
    """Fills with `per_s` tokens a second up to `burst` (at least one second's thousandth)."""

    def __init__(self, per_s: int, burst: int, now_ns: int) -> None:
        assert per_s > 0
        self._per_s = per_s
        self._burst = max(burst, 1)
        self._tokens = float(self._burst)
        self._at_ns = now_ns

    def _fill(self, now_ns: int) -> None:
        passed = max(0, now_ns - self._at_ns) * self._per_s / SECOND_NS
        self._tokens = min(float(self._burst), self._tokens + passed)
        self._at_ns = now_ns

    def take(self, now_ns: int, amount: int) -> None:
        """Never refused; it may become a debt."""
        self._fill(now_ns)
        self._tokens -= amount

    def owed_ns(self, now_ns: int) -> int:
        """How long until the debt is paid; 0: there is none."""
        self._fill(now_ns)
        return max(0, round(-self._tokens * SECOND_NS / self._per_s))
