"""The state file of a server: all of it, or a clear error."""

from __future__ import annotations

import pytest

from cluster.control import MemberInfo
from cluster.errors import CorruptionError
from cluster.ids import Epoch, Incarnation, Instance, InstanceNo, NodeId
from fencing.admission import InstallRecord
from fencing.reservations import Registration, ReservationState
from fencing.store import ExportState, ServerState, decode_state_untrusted, encode_state
from fencing.store_io import StateFile

ME = Instance(NodeId(1), Incarnation(2), InstanceNo(3))
STATE = ServerState(
    start_count=4,
    record=InstallRecord(
        Epoch(9),
        [MemberInfo(NodeId(1), Incarnation(2), [InstanceNo(3)], InstanceNo(4), "n1")],
        {},
        {NodeId(2): Incarnation(8)},
        1000,
    ),
    exports={"disk0": ExportState(ReservationState([Registration(ME, 5)], None, 7), 11)},
)


def test_round_trip(tmp_path):
    """What is saved is loaded; a server that never stored anything starts fresh."""
    file = StateFile(tmp_path / "state")
    assert file.load() == ServerState()
    file.save(STATE)
    assert file.load() == STATE


def test_every_flipped_byte_and_every_cut_is_noticed():
    """No damage becomes an empty table."""
    data = encode_state(STATE)
    for index in range(len(data)):
        damaged = bytearray(data)
        damaged[index] ^= 0x40
        with pytest.raises(CorruptionError):
            decode_state_untrusted(bytes(damaged))
        with pytest.raises(CorruptionError):
            decode_state_untrusted(data[:index])


def test_the_error_names_the_file(tmp_path):
    """The admin learns which file, and what it would mean to remove it."""
    path = tmp_path / "fencing.state"
    path.write_bytes(b"garbage")
    with pytest.raises(CorruptionError, match=str(path)) as caught:
        StateFile(path).load()
    assert "bars" in caught.value.hint
