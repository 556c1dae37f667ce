"""C below Python: checksums, the block I/O ring, the lease gate, and the FUSE session extension.

| module | what |
|---|---|
| `checksum` | CRC-32C, of many blocks in one call |
| `parity` | XOR of buffers |
| `gate` | the lease word in shared memory (rules R5, G2) |
| `buffers`, `ring`, `ring_io` | aligned memory; block I/O in batches; the same for trio |
| `nbd`, `link` | the server's and the client's side of an NBD connection in transmission |
| `notify` | invalidations of a FUSE mount's kernel caches, from any thread or process |
| `requests` | the shared table of a mount's unanswered requests |
| `fuse`, `fuse_io` | the session extension below pyfuse3: **only in mount processes** |
| `process` | mlockall, PR_SET_IO_FLUSHER and the like |

`native.fuse` and the trio helpers are not imported here.
"""

from native.buffers import AlignedPool, aligned
from native.checksum import crc32c, crc32c_blocks, crc32c_verify
from native.gate import Gate, Word, create_gate_memory
from native.parity import xor_into
from native.ring import Ring, RingFullError

__all__ = [
    "AlignedPool",
    "Gate",
    "Ring",
    "RingFullError",
    "Word",
    "aligned",
    "crc32c",
    "crc32c_blocks",
    "crc32c_verify",
    "create_gate_memory",
    "xor_into",
]
