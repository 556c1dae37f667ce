"""Sizes as people write them: `4G`, `512 MiB`, `64k`, or a plain number. Pure.

(`cvmctl` reads sizes as LVM does: cvm/units.py.)
"""

from __future__ import annotations

import re

from cluster.errors import ConfigError

SIZE_BYTES_MAX = 1 << 62
_UNITS = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SIZE = re.compile(r"([0-9]{1,40})\s*([kmgtpe]?)(i?b)?", re.IGNORECASE | re.ASCII)


def parse_size(value: str | int, default_unit: str = "") -> int:
    """Bytes; `default_unit` counts for a number without one. Raises ConfigError."""
    text = str(value).strip()
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text!r} is not a size", hint="sizes look like 64k, 512M, 4G")
    size = int(found[1]) << _UNITS[found[2].lower() or ("b" if found[3] else default_unit)]
    if size > SIZE_BYTES_MAX:
        raise ConfigError(f"{text!r} is too large for a size")
    return size
