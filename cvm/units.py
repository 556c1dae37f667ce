"""Sizes as LVM writes and reads them. Pure.

Input (`parse_size`): a number with an optional unit, in any case: b bytes, s sectors of 512, k m g
t p e powers of 1024; without a unit MiB (KiB for stripe sizes). The amounts add LVM's
`-L [+]SIZE`, `-l [+]EXTENTS` and `-l [+]PERCENT%{FREE|VG|PVS|LV}`.
Output (`format_size`): `--units` of LVM: h and r human readable (r marks values that were rounded
up with `<`), b s k m g t p e fixed; capitals use powers of 1000.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

import msgspec

from cluster.errors import UsageError

SIZE_BYTES_MAX = 1 << 62
_POWERS = "kmgtpe"
_AMOUNT = re.compile(r"^([+-]?)([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*%\s*([A-Za-z]+)$")
_NUMBER = re.compile(r"^([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)$")
_LONG_NAMES = {"iB": "", "ib": "", "IB": "", "B": "", "b": ""}


class Amount(msgspec.Struct, frozen=True):
    """How much space a command asks for: exactly one of bytes, extents, percent.

    `sign` is `+` (in addition), `-` or empty (absolute). `of` is FREE, VG, PVS or LV.
    """

    sign: str = ""
    size_bytes: int | None = None
    extents: int | None = None
    percent: int | None = None
    of: str = ""


def _multiplier(unit: str, text: str) -> int:
    letter = unit[:1].lower()
    rest = unit[1:]
    if rest and rest not in _LONG_NAMES:
        raise UsageError(f"Invalid size {text}: unknown unit {unit}.", hint=_HINT)
    if letter == "b" and not rest:
        return 1
    if letter == "s" and not rest:
        return 512
    if letter and letter in _POWERS:
        return int(1024 ** (_POWERS.index(letter) + 1))
    raise UsageError(f"Invalid size {text}: unknown unit {unit}.", hint=_HINT)


_HINT = "sizes look like 512m, 10G, 1.5t; units are b s k m g t p e"


def parse_size(text: str, default_unit: str = "m") -> int:
    """Bytes of a size like `10G`. Raises UsageError."""
    match = _NUMBER.match(text.strip())
    if match is None:
        raise UsageError(f"Invalid size {text}.", hint=_HINT)
    try:
        number = Decimal(match[1])
    except InvalidOperation as error:
        raise UsageError(f"Invalid size {text}.", hint=_HINT) from error
    size = int(number * _multiplier(match[2] or default_unit, text))
    if size > SIZE_BYTES_MAX:
        raise UsageError(f"Size {text} is too large.", hint=_HINT)
    return size


def _split_sign(text: str) -> tuple[str, str]:
    text = text.strip()
    return (text[0], text[1:]) if text[:1] in ("+", "-") else ("", text)


def parse_size_amount(text: str) -> Amount:
    """The value of `-L`: `10G`, `+1G`, `-1G`."""
    sign, rest = _split_sign(text)
    size = parse_size(rest)
    if size == 0:
        raise UsageError("Unable to use a size of zero.", hint=_HINT)
    return Amount(sign=sign, size_bytes=size)


def parse_extent_amount(text: str) -> Amount:
    """The value of `-l`: `100`, `+100`, `100%FREE`, `+50%VG`."""
    match = _AMOUNT.match(text.strip())
    hint = "extents look like 100, +100, 50%VG, 100%FREE, 80%PVS, +20%LV"
    if match is not None:
        percent = int(Decimal(match[2]))
        of = match[3].upper()
        if of not in ("FREE", "VG", "PVS", "LV") or percent <= 0:
            raise UsageError(f"Invalid extents {text}.", hint=hint)
        return Amount(sign=match[1], percent=percent, of=of)
    sign, rest = _split_sign(text)
    if not rest.isascii() or not rest.isdigit() or int(rest) == 0:
        raise UsageError(f"Invalid extents {text}.", hint=hint)
    return Amount(sign=sign, extents=int(rest))


def format_size(size_bytes: int, units: str = "r", *, suffix: bool = True) -> str:
    """A size in LVM's `--units` notation: 3221225472 with `g` is `3.00g`. Raises UsageError."""
    if len(units) != 1 or units.lower() not in "hrbskmgtpe":
        raise UsageError(
            f"Invalid units {units}.", hint="units are h r b s k m g t p e (or capitals)"
        )
    base = 1000 if units.isupper() and units not in "BS" else 1024
    letter = units.lower()
    if letter in "bs":
        number = size_bytes if letter == "b" else size_bytes // 512
        return f"{number}{units if suffix else ''}"
    human = letter in "hr"
    if human:
        if size_bytes == 0:
            return "0"
        power = 0
        while power < len(_POWERS) - 1 and size_bytes >= base ** (power + 2):
            power += 1
        letter_out = _POWERS[power].upper() if units.isupper() else _POWERS[power]
    else:
        power = _POWERS.index(letter)
        letter_out = units
    value = Decimal(size_bytes) / Decimal(base ** (power + 1))
    rounded = value.quantize(Decimal("0.01"))
    mark = "<" if letter == "r" and rounded > value else ""
    return f"{mark}{rounded}{letter_out if suffix else ''}"


def format_long(size_bytes: int) -> str:
    """A size in a message: `16.00 MiB`."""
    power = 0
    while power < len(_POWERS) - 1 and size_bytes >= 1024 ** (power + 2):
        power += 1
    value = Decimal(size_bytes) / Decimal(1024 ** (power + 1))
    rounded = value.quantize(Decimal("0.01"))
    mark = "<" if rounded > value else ""
    return f"{mark}{rounded} {_POWERS[power].upper()}iB"
