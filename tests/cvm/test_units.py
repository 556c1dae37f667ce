"""Sizes as LVM users write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UsageError
from cvm.units import (
    Amount,
    format_long,
    format_size,
    parse_extent_amount,
    parse_size,
    parse_size_amount,
)

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10G", 10 * GIB), ("10g", 10 * GIB), ("1.5t", 1536 * GIB), ("512", 512 << 20),
        ("8s", 4096), ("100b", 100), ("64k", 65536), ("3GiB", 3 * GIB), (".5g", GIB // 2),
    ],
)  # fmt: skip
def test_sizes(text, size) -> None:
    assert size == parse_size(text)


def test_stripe_sizes_default_to_kibibytes() -> None:
    assert parse_size("64", "k") == 65536


@pytest.mark.parametrize("text", ["", "G", "1x", "-1G", "1 2", "1gg", "9999999999999t", "²"])
def test_bad_sizes(text) -> None:
    with pytest.raises(UsageError):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("100", Amount(extents=100)),
        ("+100", Amount(sign="+", extents=100)),
        ("100%FREE", Amount(percent=100, of="FREE")),
        ("50%vg", Amount(percent=50, of="VG")),
        ("+20%LV", Amount(sign="+", percent=20, of="LV")),
    ],
)
def test_extents(text, amount) -> None:
    assert amount == parse_extent_amount(text)


@pytest.mark.parametrize("text", ["", "0", "x", "50%", "50%OF", "0%VG", "1.5", "²"])
def test_bad_extents(text) -> None:
    with pytest.raises(UsageError):
        parse_extent_amount(text)


def test_signed_sizes() -> None:
    assert parse_size_amount("+1G") == Amount(sign="+", size_bytes=GIB)
    with pytest.raises(UsageError):
        parse_size_amount("0")


@pytest.mark.parametrize(
    ("size", "units", "text"),
    [
        (124 << 20, "r", "124.00m"), (3 * GIB, "r", "3.00g"), (4 * GIB - 1, "r", "<4.00g"),
        (4 * GIB - 1, "h", "4.00g"), (3 * GIB, "m", "3072.00m"), (3 * GIB, "b", "3221225472b"),
        (10**9, "G", "1.00G"), (10**9, "H", "1.00G"), (4096, "s", "8s"), (0, "r", "0"),
        (512, "r", "0.50k"),
    ],
)  # fmt: skip
def test_formats(size, units, text) -> None:
    assert text == format_size(size, units)


def test_without_suffix() -> None:
    assert format_size(3 * GIB, "g", suffix=False) == "3.00"
    with pytest.raises(UsageError):
        format_size(1, "q")


def test_long_format() -> None:
    assert format_long(16 << 20) == "16.00 MiB"


@given(st.integers(0, 1 << 60), st.sampled_from("kmgtpe"))
def test_what_is_written_can_be_read(size, unit) -> None:
    """To within the rounding to two digits."""
    step = 1024 ** ("kmgtpe".index(unit) + 1)
    assert abs(parse_size(format_size(size, unit)) - size) <= step // 100
