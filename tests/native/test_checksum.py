"""CRC-32C: published vectors and another implementation as the oracle, for each of ours in turn."""

import os
import random
from array import array

import google_crc32c
import pytest

from native import checksum

# RFC 3720 appendix B.4 and the check value of the catalogue of CRCs.
PUBLISHED = [
    (b"", 0x00000000),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]


@pytest.fixture(params=checksum.IMPLEMENTATIONS)
def implementation(request):
    if request.param in checksum.implementations():
        yield checksum.select_implementation(request.param)
        checksum.select_implementation()
    else:  # another architecture: the choice is refused and the best one stays
        with pytest.raises(ValueError, match="cannot run"):
            checksum.select_implementation(request.param)
        yield checksum.select_implementation()


def test_published_vectors(implementation):
    for data, expected in PUBLISHED:
        assert checksum.crc32c(data) == expected


def test_every_length_and_alignment_agrees_with_the_oracle(implementation):
    pool = random.Random(7).randbytes(6000)
    lengths = [*range(0, 600), 1023, 4080, 4095, 4096, 4097, 5000, 5500]
    for length in lengths:
        start = length % 17
        part = pool[start : start + length]
        assert checksum.crc32c(memoryview(pool)[start : start + length]) == google_crc32c.value(
            part
        )


def test_a_checksum_continues_from_a_seed(implementation):
    data = random.Random(8).randbytes(9000)
    for cut in (0, 1, 255, 256, 257, 4096, 9000):
        assert checksum.crc32c(data[cut:], checksum.crc32c(data[:cut])) == google_crc32c.value(data)


def test_blocks_of_one_buffer_and_of_many(implementation):
    data = os.urandom(5 * 4096 + 100)
    expected = [google_crc32c.value(data[at : at + 4096]) for at in range(0, len(data), 4096)]
    assert list(checksum.crc32c_blocks(data, 4096)) == expected
    assert list(checksum.crc32c_blocks(bytearray(data), 4096)) == expected
    parts = [data[:8192], b"", memoryview(data)[8192:]]
    assert list(checksum.crc32c_blocks(parts, 4096)) == expected
    assert list(checksum.crc32c_blocks(b"", 4096)) == []


def test_verify_names_the_first_wrong_block(implementation):
    data = bytearray(os.urandom(4 * 512 + 3))
    sums = checksum.crc32c_blocks(data, 512)
    assert checksum.crc32c_verify(data, 512, sums) is None
    data[2 * 512 + 5] ^= 1
    assert checksum.crc32c_verify(data, 512, sums) == 2
    with pytest.raises(ValueError, match="one 32-bit checksum per block"):
        checksum.crc32c_verify(data, 512, array("I", [0]))


def test_the_best_implementation_is_the_default():
    assert checksum.select_implementation() == checksum.implementations()[-1]
