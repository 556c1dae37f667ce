"""What became of data that write() had accepted: reported once to each handle that was open.

A failure of write-behind belongs to nobody's request. It is counted here, and each open handle
keeps a mark: how many failures it has been told of. A failure that nobody has heard of yet is also
told to the next handle, as a local file system does: a program that closes a file and opens it
again to fsync it must hear it.
"""

from __future__ import annotations


class WriteErrors:
    """The failures of one inode on this mount."""

    __slots__ = ("count", "errno", "unheard")

    def __init__(self) -> None:
        self.count = 0
        self.errno = 0
        self.unheard = False

    def note(self, errno: int) -> None:
        """Data was lost."""
        self.count += 1
        self.errno = errno
        self.unheard = True

    def mark(self) -> int:
        """Where a handle that is opened now begins."""
        return self.count - self.unheard

    def hear(self, mark: int) -> tuple[int, int]:
        """(errno or 0, the handle's new mark): what a handle with `mark` has to report."""
        if mark == self.count:
            return 0, mark
        self.unheard = False
        return self.errno, self.count
