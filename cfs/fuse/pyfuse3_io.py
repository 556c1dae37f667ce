"""pyfuse3 on top of our session extension: always import pyfuse3 from here.

`native.fuse` interposes symbols of libfuse and therefore has to be loaded first.
"""

from __future__ import annotations

import native.fuse

# isort: split
import pyfuse3

fuse = native.fuse

__all__ = ["fuse", "pyfuse3"]
