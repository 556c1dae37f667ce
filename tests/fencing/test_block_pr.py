"""Kernel reservations: a fake ioctl layer over the reservation machine, and a real loop device."""

from __future__ import annotations

import ctypes
import errno
import subprocess

import pytest

from cluster.errors import StackError
from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from fencing import block_pr as pr
from fencing.block_pr_io import fence_disks, open_disk, register_on_disks
from fencing.methods import Verdict
from fencing.reservations import Request, Reservations, ServiceAction, Status
from tests.hostile.disks import loop_device

SPC_TYPE = {1: 1, 2: 3, 3: 5, 4: 6, 5: 7, 6: 8}
KERNEL_TYPE = {spc: kernel for kernel, spc in SPC_TYPE.items()} | {0: 0}


def life(node, incarnation=1):
    return NodeId(node), Incarnation(incarnation)


def nexus(who):
    return Instance(who[0], who[1], InstanceNo(0))


class FakeDisk:
    """A LUN whose reservations are `fencing.reservations`; `at(node)` is its ioctl as one node."""

    def __init__(self, *, reads=True, broken=0):
        self.table = Reservations()
        self.reads = reads
        self.broken = broken

    def at(self, who):
        def ioctl(_fd, request, argument):
            return self._ioctl(nexus(who), request, argument)

        return ioctl

    def _ioctl(self, who, request, argument):
        if self.broken:
            return self.broken
        if request in (pr.PR_READ_KEYS, pr.PR_READ_RESERVATION) and not self.reads:
            raise OSError(errno.ENOTTY, "no such ioctl")
        if request == pr.PR_READ_KEYS:
            _, room, pointer = pr.READ_KEYS.unpack(argument)
            generation, keys = self.table.read_keys()
            into = (ctypes.c_uint64 * room).from_address(pointer)
            into[: len(keys)] = keys
            argument[:] = pr.READ_KEYS.pack(generation, len(keys), pointer)
            return 0
        if request == pr.PR_READ_RESERVATION:
            held = self.table.read_reservation() or (0, 0, 0)
            argument[:] = pr.READ_RESERVATION.pack(held[1], held[0], KERNEL_TYPE[int(held[2])])
            return 0
        status = self.table.execute(self._request(who, request, argument)).status
        return {Status.GOOD: 0, Status.RESERVATION_CONFLICT: 0x18}.get(status, 2)

    @staticmethod
    def _request(who, request, argument):
        if request == pr.PR_REGISTER:
            old, new, flags, _ = pr.REGISTRATION.unpack(argument)
            action = ServiceAction.REGISTER_AND_IGNORE if flags else ServiceAction.REGISTER
            return Request(who, int(action), old, new, aptpl=True)
        if request == pr.PR_RESERVE:
            key, kind, _ = pr.RESERVATION.unpack(argument)
            return Request(who, int(ServiceAction.RESERVE), key, type=SPC_TYPE[kind])
        if request == pr.PR_CLEAR:
            return Request(who, int(ServiceAction.CLEAR), pr.CLEARING.unpack(argument)[0])
        assert request == pr.PR_PREEMPT_ABORT
        old, new, kind, _ = pr.PREEMPTION.unpack(argument)
        return Request(who, int(ServiceAction.PREEMPT_AND_ABORT), new, old, type=SPC_TYPE[kind])


@pytest.fixture
def path(tmp_path):
    """Something to open; the ioctls are fake."""
    file = tmp_path / "lun"
    file.write_bytes(bytes(512))
    return str(file)


def test_numbers_of_the_kernel_header(tmp_path):
    """The numbers that the compiler makes of include/uapi/linux/pr.h."""
    source = (
        "#include <linux/pr.h>\n#include <sys/ioctl.h>\n#include <stdio.h>\nint main(void) { "
        'printf("%lu %lu %lu %lu %lu %lu\\n", (unsigned long)IOC_PR_REGISTER,'
        "(unsigned long)IOC_PR_RESERVE, (unsigned long)IOC_PR_RELEASE,"
        "(unsigned long)IOC_PR_PREEMPT, (unsigned long)IOC_PR_PREEMPT_ABORT,"
        "(unsigned long)IOC_PR_CLEAR); return PR_WRITE_EXCLUSIVE_ALL_REGS != 5; }"
    )
    (tmp_path / "numbers.c").write_text(source)
    program = str(tmp_path / "numbers")
    subprocess.run(["gcc", "-o", program, program + ".c"], check=True)
    done = subprocess.run([program], capture_output=True, check=True)
    assert [int(word) for word in done.stdout.split()] == [
        pr.PR_REGISTER, pr.PR_RESERVE, pr.PR_RELEASE, pr.PR_PREEMPT, pr.PR_PREEMPT_ABORT,
        pr.PR_CLEAR,
    ]  # fmt: skip


def test_a_fenced_life_is_out_and_its_successor_can_come(path):
    disk = FakeDisk()
    for who in (life(1), life(2)):
        assert register_on_disks([path], who, disk.at(who)) == ""
    outcome = fence_disks([path], life(1), life(2), disk.at(life(1)))
    assert outcome.verdict is Verdict.PROVEN, outcome
    assert "its key is gone" in outcome.text
    assert disk.table.access(nexus(life(2))) == 1  # reads, does not write
    again = fence_disks([path], life(1), life(2), disk.at(life(1)))
    assert again.verdict is Verdict.PROVEN
    assert "only registrants write" in again.text
    assert register_on_disks([path], life(2, 2), disk.at(life(2, 2))) == ""
    assert disk.table.access(nexus(life(2, 2))) == 3


def test_who_was_put_out_does_not_fight_back(path):
    """The loser of a split preempts nobody: it is not registered, and does not register again."""
    disk = FakeDisk()
    for who in (life(1), life(2)):
        register_on_disks([path], who, disk.at(who))
    assert fence_disks([path], life(1), life(2), disk.at(life(1))).verdict is Verdict.PROVEN
    loser = fence_disks([path], life(2), life(1), disk.at(life(2)))
    assert loser.verdict is Verdict.FAILED
    assert "still registered" in loser.text
    assert disk.table.access(nexus(life(1))) == 3


def test_an_old_kernel_cannot_prove_a_conflict(path):
    """Without READ KEYS a good PREEMPT AND ABORT proves it; a conflict proves nothing."""
    disk = FakeDisk(reads=False)
    for who in (life(1), life(2)):
        register_on_disks([path], who, disk.at(who))
    first = fence_disks([path], life(1), life(2), disk.at(life(1)))
    assert first.verdict is Verdict.PROVEN
    second = fence_disks([path], life(1), life(2), disk.at(life(1)))
    assert second.verdict is Verdict.FAILED
    assert "cannot read who is registered" in second.text


@pytest.mark.parametrize("mine", [True, False])
def test_a_conflict_without_a_reservation_proves_nothing(path, mine):
    """Nothing keeps out who is not registered; and who is not registered itself knows nothing."""
    disk = FakeDisk()
    if mine:
        with open_disk(path, disk.at(life(1))) as lun:
            assert lun.register(pr.key_of(*life(1))) == 0
    outcome = fence_disks([path], life(1), life(2), disk.at(life(1)))
    assert outcome.verdict is Verdict.FAILED
    assert ("nothing keeps out" if mine else "itself is not registered") in outcome.text


@pytest.mark.parametrize("status", [2, 0x18, 0xE0000, 0xF0000, 0x10000, 77])
def test_every_other_status_is_a_failure(path, status):
    disk = FakeDisk(reads=False, broken=status)
    assert fence_disks([path], life(1), life(2), disk.at(life(1))).verdict is Verdict.FAILED
    assert register_on_disks([path], life(1), disk.at(life(1))) != ""


def test_all_devices_or_none(path, tmp_path):
    good = FakeDisk()
    for who in (life(1), life(2)):
        register_on_disks([path], who, good.at(who))
    missing = str(tmp_path / "missing")
    outcome = fence_disks([path, missing], life(1), life(2), good.at(life(1)))
    assert outcome.verdict is Verdict.FAILED
    assert "cannot open" in outcome.text


def test_clear_and_two_keys(path):
    disk = FakeDisk()
    register_on_disks([path], life(1), disk.at(life(1)))
    with open_disk(path, disk.at(life(1))) as lun:
        assert lun.read_keys() == [pr.key_of(*life(1))]
        assert lun.read_reservation() == pr.WRITE_EXCLUSIVE_ALL_REGISTRANTS
        assert lun.clear(pr.key_of(*life(1))) == 0
        assert lun.read_keys() == []
        assert lun.read_reservation() == 0
    assert len({pr.key_of(*life(n, i)) for n in (1, 2, 64) for i in (1, 2, 256)}) == 9


@pytest.fixture
def loop(tmp_path):
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    with loop_device(image) as device:
        yield str(device)


def test_a_loop_device_has_no_reservations(loop):
    """The kernel's answer for a device without them: a clean failure, never a success."""
    outcome = fence_disks([loop], life(1), life(2))
    assert outcome.verdict is Verdict.FAILED
    assert outcome.text == f"{loop} has no persistent reservations"
    assert register_on_disks([loop], life(1)) == f"{loop} has no persistent reservations"
    with open_disk(loop) as lun:
        assert lun.read_keys() is None
        assert lun.read_reservation() is None


def test_a_file_is_no_device(path):
    assert "no persistent reservations" in register_on_disks([path], life(1))
    with pytest.raises(StackError, match="cannot open"), open_disk(path + "x"):
        pass
