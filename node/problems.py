"""What is wrong on this node at the moment, in sentences, for `clusterctl status` and the events.

Pure. A problem has a key, so that it is told once; it lasts until it is cleared, or for a time
when only its repetition shows that it lasts.
"""

from __future__ import annotations

PROBLEMS_MAX = 256


class Problems:
    """The problems of one node, oldest first."""

    def __init__(self) -> None:
        self._texts: dict[str, tuple[str, int | None]] = {}

    def found(self, now_ns: int, key: str, text: str, lasts_ns: int | None = None) -> bool:
        """Note a problem; true if it is a new one."""
        self._drop_ended(now_ns)
        before = self._texts.get(key)
        if before is None and len(self._texts) >= PROBLEMS_MAX:
            return False
        self._texts[key] = (text, None if lasts_ns is None else now_ns + lasts_ns)
        return before is None or before[0] != text

    def over(self, key: str) -> bool:
        """It is mended; true if it was known."""
        return self._texts.pop(key, None) is not None

    def texts(self, now_ns: int) -> list[str]:
        """What is wrong now."""
        self._drop_ended(now_ns)
        return [text for text, _end_ns in self._texts.values()]

    def _drop_ended(self, now_ns: int) -> None:
        for key, (_text, end_ns) in list(self._texts.items()):
            if end_ns is not None and end_ns <= now_ns:
                del self._texts[key]
