"""The table of byte ranges against a model that knows each byte."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.ids import Incarnation, Instance, InstanceNo, NodeId
from dlm.ranges import END, READ, WRITE, Owner, Ranges, RangeTable, Waiter

BYTES = 24
OWNERS = [
    Owner(Instance(NodeId(node), Incarnation(1), InstanceNo(1)), key)
    for node, key in ((1, 1), (1, 2), (2, 1))
]
PUT, UNLOCK, WAIT, WITHDRAW = "put", "unlock", "wait", "withdraw"


def spans():
    """Ranges in a small file; some reach to the end of all files."""
    ends = st.integers(0, BYTES - 1)
    return st.tuples(ends, ends | st.just(END)).map(lambda span: (min(span), max(span)))


operations = st.lists(
    st.tuples(
        st.sampled_from([PUT, PUT, UNLOCK, WAIT, WITHDRAW]),
        st.sampled_from(OWNERS),
        spans(),
        st.sampled_from([READ, WRITE]),
    ),
    max_size=40,
)


class Model:
    """A dictionary from byte to mode per owner; byte BYTES stands for the rest of the file."""

    def __init__(self):
        self.locks = {owner: {} for owner in OWNERS}
        self.waiting = []

    @staticmethod
    def bytes_of(span):
        return range(span[0], min(span[1], BYTES) + 1)

    def free(self, owner, span, kind):
        return not any(
            byte in locks and WRITE in (kind, locks[byte])
            for other, locks in self.locks.items()
            if other != owner
            for byte in self.bytes_of(span)
        )

    def put(self, owner, span, kind):
        self.locks[owner].update(dict.fromkeys(self.bytes_of(span), kind))

    def unlock(self, owner, span):
        for byte in self.bytes_of(span):
            self.locks[owner].pop(byte, None)

    def retry(self):
        granted = []
        again = True
        while again:
            again = False
            for item in self.waiting:
                number, owner, span, kind = item
                if self.free(owner, span, kind):
                    self.waiting.remove(item)
                    self.put(owner, span, kind)
                    granted.append(number)
                    again = True
                    break
        return granted


def as_bytes(table, owner):
    """A table's locks as the model has them."""
    ranges = table.owners.get(owner)
    return {
        byte: row[2]
        for row in (ranges.rows if ranges else ())
        for byte in Model.bytes_of((row[0], row[1]))
    }


@given(operations)
def test_the_table_is_the_model(steps):
    table, model = RangeTable(), Model()
    for number, (what, owner, span, kind) in enumerate(steps):
        free = table.free(owner, *span, kind)
        assert free == model.free(owner, span, kind)
        conflict = table.conflict(owner, *span, kind)
        assert (conflict is None) == free
        if conflict is not None:
            assert not table.free(owner, conflict[1][0], conflict[1][1], kind)
            assert conflict[1][0] <= span[1]
            assert conflict[1][1] >= span[0]
        if what == UNLOCK:
            table.remove(owner, *span)
            model.unlock(owner, span)
        elif what == WITHDRAW:
            expected = [one for one in model.waiting if one[1].instance == owner.instance]
            if expected:
                gone = table.withdraw(owner.instance, expected[0][0])
                assert gone.number == expected[0][0]
                model.waiting.remove(expected[0])
            assert table.withdraw(owner.instance, number) is None
        elif free:
            table.put(owner, *span, kind)
            model.put(owner, span, kind)
        elif what == WAIT:
            waiter = Waiter(owner, number, *span, kind, 0)
            others = {o for o in OWNERS if o != owner}
            clear = {o for o in others if table.owners.get(o) is None}
            blockers = set(table.conflicting(owner, *span, kind))
            assert blockers
            assert blockers <= others - clear
            table.waiters.append(waiter)
            model.waiting.append((number, owner, span, kind))
        granted = [waiter.number for waiter in table.retry()]
        assert sorted(granted) == sorted(model.retry())
        table.check()
        for one in OWNERS:
            assert as_bytes(table, one) == model.locks[one]


@given(operations)
def test_a_member_that_goes_takes_all_it_has(steps):
    table = RangeTable()
    for number, (_what, owner, span, kind) in enumerate(steps):
        if table.free(owner, *span, kind):
            table.put(owner, *span, kind)
        else:
            table.waiters.append(Waiter(owner, number, *span, kind, 0))
    gone = OWNERS[0].instance
    table.forget_waiters(gone)
    table.forget_owners(gone)
    table.retry()
    table.check()
    assert all(owner.instance != gone for owner in table.owners)
    assert all(waiter.owner.instance != gone for waiter in table.waiters)


def test_split_merge_upgrade_and_the_end_of_file():
    ranges = Ranges()
    ranges.put(0, END, READ)
    ranges.put(10, 19, WRITE)
    assert ranges.rows == [(0, 9, READ), (10, 19, WRITE), (20, END, READ)]
    ranges.put(15, 24, READ)
    assert ranges.rows == [(0, 9, READ), (10, 14, WRITE), (15, END, READ)]
    ranges.remove(12, 30)
    assert ranges.rows == [(0, 9, READ), (10, 11, WRITE), (31, END, READ)]
    ranges.put(10, 11, READ)
    assert ranges.rows == [(0, 11, READ), (31, END, READ)]
    assert ranges.within(5, 40) == [(5, 11, READ), (31, 40, READ)]
    ranges.put(12, 30, READ)
    assert ranges.rows == [(0, END, READ)]
    ranges.remove(0, END)
    assert ranges.rows == []


def test_a_downgrade_lets_readers_in_and_waiters_go_first():
    table = RangeTable()
    one, two, three = OWNERS
    table.put(one, 0, 9, WRITE)
    table.waiters.append(Waiter(two, 1, 0, 4, READ, 0))
    table.waiters.append(Waiter(three, 2, 3, 9, WRITE, 0))
    assert table.retry() == []
    table.put(one, 0, 9, READ)
    assert [waiter.number for waiter in table.retry()] == [1]
    table.remove(one)
    table.remove(two, 3, 4)
    assert [waiter.number for waiter in table.retry()] == [2]
    assert table.conflict(one, 0, END, READ) == (three, (3, 9, WRITE))
    assert table.conflict(one, 0, 2, READ) is None
    assert table.conflict(one, 0, 2, WRITE) == (two, (0, 2, READ))
