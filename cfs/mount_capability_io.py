"""What a caller may do, where the kernel leaves the question to the file system."""

from __future__ import annotations

from native.requests import Request

CAP_FSETID = 4
"""Keep set-user-id and set-group-id of a file that one changes."""
CAP_SYS_ADMIN = 21
"""See trusted attributes."""


def has_capability(request: Request, capability: int) -> bool:
    """Whether the caller of this request has a capability. Where its process cannot be seen (it is
    in another PID namespace, or gone) root has it and nobody else."""
    try:
        with open(f"/proc/{request.pid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("CapEff:"):
                    return bool(int(line.split()[1], 16) >> capability & 1)
    except OSError:
        pass
    return request.uid == 0
