"""C below Python: checksums, the block I/O ring, the lease gate, and the FUSE session extension.

`native.fuse` is not imported here: only mount processes load it, before pyfuse3.
"""

from native.checksum import crc32c, crc32c_blocks, crc32c_verify

__all__ = ["crc32c", "crc32c_blocks", "crc32c_verify"]
