"""What a file with a history may hold, and that a wrong byte in one is seen."""

from __future__ import annotations

import msgspec
import pytest

from lab.judge_history import History, Ledger, WrongContentError, possible

OLD, NEW = b"a" * 5000, b"b" * 6000


@pytest.mark.parametrize(
    ("found", "may_be"),
    [
        (OLD, True),
        (NEW, True),
        (b"b" * 100 + b"a" * 4900, True),
        (b"a" * 5000 + bytes(1000), True),
        (b"b" * 5500, True),
        (b"b" * 6001, False),
        (b"a" * 4999, False),
        (b"a" * 4999 + b"c", False),
        (bytes(5000), False),
    ],
)
def test_each_byte_is_one_of_those_written(found, may_be):
    assert possible(found, [OLD, NEW]) is may_be


class TestLedger:
    @pytest.fixture
    def dead(self):
        return set()

    @pytest.fixture
    def ledger(self, tmp_path, dead):
        ledger = Ledger(tmp_path, tmp_path / "side", 0, 1, dead.__contains__)
        ledger.prepare()
        ledger.reads = ["pieces"]
        self.file = tmp_path / "history-0"
        self.side = tmp_path / "side"
        return ledger

    def record(self, *images, makers):
        self.side.write_bytes(msgspec.msgpack.encode(History(list(images), makers)))

    @pytest.mark.parametrize("content", [NEW[:-1] + b"x", NEW[:-1], NEW + b"b", OLD])
    def test_anything_but_the_newest_image_is_wrong(self, ledger, content):
        self.record(OLD, NEW, makers=[0, 2])
        self.file.write_bytes(NEW)
        assert ledger.read() == "pieces"
        self.file.write_bytes(content)
        with pytest.raises(WrongContentError, match="history 0"):
            ledger.read()

    def test_after_a_death_an_older_image_is_right_and_counts_from_then_on(self, ledger, dead):
        self.record(OLD, NEW, makers=[0, 2])
        self.file.write_bytes(OLD)
        dead.add(2)
        ledger.read()
        self.file.write_bytes(NEW)
        with pytest.raises(WrongContentError):
            ledger.read()

    def test_a_byte_that_nobody_wrote_is_wrong_after_a_death_too(self, ledger, dead):
        self.record(OLD, NEW, makers=[0, 2])
        self.file.write_bytes(OLD[:-1] + b"x")
        dead.add(2)
        with pytest.raises(WrongContentError, match="after a death"):
            ledger.read()
