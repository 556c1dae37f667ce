"""`torn`: the first `bytes` bytes (none given: half) of a write that the chooser takes are applied,
then the server dies, as a host does in the middle of a write. Next to the file the prefix stays;
above `volatile` it is lost with the rest.
"""

from __future__ import annotations

import os
import signal

from gnbd.server.filters.chooser_io import Choosing


class Torn(Choosing):
    """Dies once."""

    kind = "torn"

    def write(self, offset: int, view: memoryview, fua: bool) -> None:
        if self._chooser.takes("write", offset, len(view)):
            length = int(self.spec.parameters.get("bytes", len(view) // 2))
            length -= length % self.alignment
            if length:
                self.below.write(offset, view[:length], False)
            os.kill(os.getpid(), signal.SIGKILL)
        self.below.write(offset, view, fua)
