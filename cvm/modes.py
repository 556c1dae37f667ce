"""Activation modes of volumes. They are modes of the lock manager under a volume's name: which of
them go together is the compatibility of the locks. Pure."""

from __future__ import annotations

from cluster.errors import UsageError
from cluster.locks import Mode
from cvm.seams import Opener

MODES = {
    "sharedread": Mode.CR,
    "sharedwrite": Mode.CW,
    "readonly": Mode.PR,
    "exclusivewrite": Mode.PW,
    "exclusive": Mode.EX,
}
"""Names of CVM; `exclusive` keeps even readers out."""

COMPATIBLE = {
    Mode.CR: {Mode.CR, Mode.CW, Mode.PR, Mode.PW},
    Mode.CW: {Mode.CR, Mode.CW},
    Mode.PR: {Mode.CR, Mode.PR},
    Mode.PW: {Mode.CR},
    Mode.EX: set[Mode](),
}

ACTIVATION = "activation"


def check_mode(mode: str) -> Mode:
    """The lock mode of an activation mode. Raises UsageError."""
    found = MODES.get(mode)
    if found is None:
        raise UsageError(f'Unknown mode "{mode}".', hint=f"modes: {', '.join(MODES)}")
    return found


def conflict(new: Opener, other: Opener) -> bool:
    """True when `new` may not have the volume while `other` has it.

    A node's activation reserves the volume for that node: it does not stand against what the
    node's own instances do with it.
    """
    if new.instance == other.instance:
        return False
    same_node = new.instance.node == other.instance.node
    if same_node and ACTIVATION in (new.title, other.title):
        return False
    return check_mode(other.mode) not in COMPATIBLE[check_mode(new.mode)]
