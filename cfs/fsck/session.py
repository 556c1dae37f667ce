"""Who decides about a repair, and who hears how far it is."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable

from cfs.fsck.report import Report
from cluster.errors import StackError

Ask = Callable[[str], Awaitable[bool]]
Show = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""
NOTHING: Show = lambda what, done, total: None  # noqa: E731


class Consent(enum.Enum):
    """What may be repaired."""

    NOTHING = "nothing"
    """A check. Repairs are tried in memory, so that one fault is not told as many."""
    SAFE = "safe"
    """What loses nothing; anything else ends the run before the first write (`-p`)."""
    ASK = "ask"
    """What loses nothing, and the rest after a question."""
    ALL = "all"


class NeedsHumanError(StackError):
    """A repair would lose something and nobody may be asked."""

    default_hint = "nothing was changed; run fsck.cfs --repair without -p"


async def _never(question: str) -> bool:
    return False


class Session:
    """One run of fsck: its report, its consent, its progress."""

    def __init__(
        self,
        report: Report,
        consent: Consent = Consent.NOTHING,
        ask: Ask = _never,
        show: Show = NOTHING,
    ) -> None:
        self.report = report
        self.consent = consent
        self.ask = ask
        self.show = show
        self._refused: set[str] = set()
        """What was answered with no is not asked again in a later round."""

    @property
    def refused(self) -> bool:
        """Something was answered with no: what belongs to it is not known, so nothing is freed."""
        return bool(self._refused)

    @property
    def repairing(self) -> bool:
        return self.consent is not Consent.NOTHING

    async def fix(self, text: str, remedy: str, *, lossy: bool = False) -> bool:
        """Report an error; whether to repair it as `remedy` says. Raises NeedsHumanError."""
        if text in self._refused:
            return False
        self.report.error(text)
        self.report.lossy_count += lossy
        if self.consent is Consent.NOTHING:
            self.report.left_count += 1
            return True
        if lossy and self.consent is Consent.SAFE:
            raise NeedsHumanError(f"{text}: the repair would lose something ({remedy})")
        if lossy and self.consent is Consent.ASK and not await self.ask(f"{text}. {remedy}"):
            self.report.left_count += 1
            self._refused.add(text)
            return False
        self.report.fixed_count += 1
        return True

    def give_up(self, text: str) -> None:
        """Report an error that cannot be repaired."""
        self.report.error(text)
        self.report.left_count += 1
