"""What a check found and what became of it."""

from __future__ import annotations

import msgspec

ERRORS_MAX = 1000


class Report(msgspec.Struct):
    """Errors in the order they were met; counts for the summary line."""

    errors: list[str] = []
    notes: list[str] = []
    error_count: int = 0
    lossy_count: int = 0
    """Errors whose repair loses something."""
    fixed_count: int = 0
    left_count: int = 0
    """Errors that are still there: nothing was repaired, or it was refused or impossible."""
    unusable: bool = False
    """There is nothing to check: no superblock, or a device that is too short."""
    inodes: int = 0
    directories: int = 0
    names: int = 0
    data_blocks: int = 0
    free_blocks: int = 0
    total_blocks: int = 0
    reconnected: int = 0

    def error(self, text: str) -> None:
        self.error_count += 1
        if len(self.errors) < ERRORS_MAX:
            self.errors.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    @property
    def clean(self) -> bool:
        return not self.error_count
