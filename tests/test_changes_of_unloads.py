"""What the transitions of unloads and twins change, word by word; see `row_changes`."""

from __future__ import annotations

import pytest
from row_changes import CAUSE, Cases, Operation, RowChanges
from row_changes import it as it  # the fixture

from mpmm.shared_state.layout import Instance

CASES = Cases()


@CASES.case("""
    member 2: BELL=1
    model 1: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0
    instance 1: STATE=UNLOADING HOLDER=3 SINCE=now
    UNLOAD_BEGAN: model=1 row=1 value=500
    wake member 2 BELL
""")
def unload(it: RowChanges) -> Operation:
    row = it.idle()
    return lambda t: it.to.unloads.begin(t, row, 2, False)


@CASES.case("""
    header: EVICTIONS=31
    member 2: BELL=1
    model 1: LOADED=1 IDLE=1 UNLOADING=1 IDLE_HEAD=2 EVICTIONS=104
    instance 1: PREVIOUS=0
    instance 2: STATE=UNLOADING HOLDER=3 SINCE=now
    UNLOAD_BEGAN: model=1 row=2 value=500 CHEAPEST_RELOAD 1/2/3/4 2/6
    wake member 2 BELL
""")
def evict(it: RowChanges) -> Operation:
    _, row = it.idle(handle=b"2"), it.idle()
    return lambda t: it.to.unloads.begin(t, row, 2, True, CAUSE)


@CASES.case("""
    header: EVICTIONS=31
    member 1: BELL=1
    model 1: LOADED=0 IDLE=0 UNLOADING=1 EVICTIONS=104
    instance 1: STATE=UNLOADING HOLDER=2 SINCE=now
    UNLOAD_BEGAN: model=1 row=1 value=500
    wake member 1 BELL
""")
def evict_an_object(it: RowChanges) -> Operation:
    row = it.idle(handle=b"")
    return lambda t: it.to.unloads.begin(t, row, 2, True)


@CASES.case("""
    header: EVICTIONS=32
    member 2: BELL=2
    member 3: INSTANCE=3
    model 1: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0 EVICTIONS=104
    model 2: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0 EVICTIONS=204
    instance 1: STATE=UNLOADING HOLDER=3 SERVER=0 MB=0 SINCE=now
    instance 2: STATE=UNLOADING HOLDER=3 SERVER=4 DEVICES=2 MB=500 SINCE=now LOADED_AT=now-16
    UNLOAD_BEGAN: model=2 row=2 value=500 CHEAPEST_RELOAD 1/2/3/4 2/6
    UNLOAD_BEGAN: model=1 row=1 value=0 CHEAPEST_RELOAD 1/2/3/4 2/6
    wake member 2 BELL
    wake member 2 BELL
""")
def evict_with_its_twins(it: RowChanges) -> Operation:
    row, _ = it.idle(server=3), it.idle(model=2, devices=(0,))
    return lambda t: it.to.unloads.begin(t, row, 2, True, CAUSE)


@CASES.case("""
    member 2: BELL=1
    member 3: INSTANCE=3
    model 1: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0
    instance 1: STATE=UNLOADING HOLDER=3 SERVER=0 MB=0 SINCE=now
    instance 2: SERVER=4 DEVICES=2 MB=500 LOADED_AT=now-16
    UNLOAD_BEGAN: model=1 row=1 value=0
    wake member 2 BELL
""")
def unload_beside_a_twin_that_stays(it: RowChanges) -> Operation:
    row, _ = it.idle(server=3), it.idle(model=2, devices=(0,))
    return lambda t: it.to.unloads.begin(t, row, 2, False)


@CASES.case("""
    member 2: BELL=1
    model 2: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0
    instance 2: STATE=UNLOADING HOLDER=3 SINCE=now
    UNLOAD_BEGAN: model=2 row=2 value=0
    wake member 2 BELL
""")
def unload_beside_a_twin_that_has_the_memory(it: RowChanges) -> Operation:
    _, row = it.idle(server=3), it.idle(model=2, devices=(0,))
    return lambda t: it.to.unloads.begin(t, row, 2, False)


@CASES.case("""
    header: EVICTIONS=31
    member 2: BELL=1
    member 3: INSTANCE=3
    model 1: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0 EVICTIONS=104
    instance 1: STATE=UNLOADING HOLDER=3 SERVER=0 MB=0 SINCE=now SHARES=0 SHARES[1]=0
    instance 2: SERVER=4 DEVICES=3 MB=500 LOADED_AT=now-21 SHARES=250 SHARES[1]=250
    UNLOAD_BEGAN: model=1 row=1 value=0
    wake member 2 BELL
""")
def evict_beside_twins_of_which_one_is_in_use_and_one_pinned(it: RowChanges) -> Operation:
    row, _, _ = it.idle(server=3, devices=(0, 1)), it.active(model=2, devices=(0,)), it.idle(model=0, devices=(1,))
    return lambda t: it.to.unloads.begin(t, row, 2, True)


@CASES.case("""
    member 2: BELL=1
    model 1: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0
    instance 1: STATE=UNLOADING HOLDER=3 SINCE=now
    UNLOAD_BEGAN: model=1 row=1 value=500
    wake member 2 BELL
""")
def unload_beside_a_twin_where_another_runs_alone(it: RowChanges) -> Operation:
    row, _ = it.idle(), it.active(model=2, devices=(0,))
    alone = it.loading(model=2)
    it.do(lambda t: it.to.isolation.begin(t, alone))
    return lambda t: it.to.unloads.begin(t, row, 2, False)


@CASES.case("""
    member 2: BELL=1
    model 1: LOADED=1 IDLE=0 UNLOADING=1 IDLE_HEAD=0 USED_AT=now SEATS=1
    instance 1: STATE=UNLOADING HOLDER=3 SEATS=1 SINCE=now NEXT=0
    instance 2: STATE=FREE SEAT_OF=0 SINCE=now
    instance 3: UNLOAD_ON_RELEASE=2
    UNLOAD_BEGAN: model=1 row=1 value=500
    wake member 2 BELL
""")
def unload_with_seats(it: RowChanges) -> Operation:
    it.users(3)
    row = it.idle()
    it.do(lambda t: it.to.holds.take_idle(t, row + 2, 3))
    return lambda t: it.to.unloads.begin(t, row, 2, False)


@CASES.case("""
    member 2: BELL=1
    model 1: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0
    instance 1: STATE=UNLOADING HOLDER=3 SINCE=now
    UNLOAD_BEGAN: model=1 row=1 value=500 ASKED 0/0/0/0 0/0
    wake member 2 BELL
""")
def ask_to_unload_an_idle_one(it: RowChanges) -> Operation:
    row = it.idle()
    return lambda t: it.to.unloads.ask(t, row, 2)


@CASES.case("""
    member 2: BELL=2
    model 1: UNLOADING=1 SUSPENDED=0
    instance 1: STATE=UNLOADING HOLDER=3 SINCE=now DEVICE_MB=0
    UNLOAD_BEGAN: model=1 row=1 value=0 ASKED 0/0/0/0 0/0
    wake member 2 BELL
""")
def ask_to_unload_a_suspended_one(it: RowChanges) -> Operation:
    row = it.suspended()
    return lambda t: it.to.unloads.ask(t, row, 2)


@CASES.case("""
    model 1: LOADED=2 IDLE=0 IDLE_HEAD=0 USED_AT=now SEATS=1
    instance 1: SEATS=1 UNLOAD_ON_RELEASE=2
    instance 2: STATE=FREE SEAT_OF=0 SINCE=now
    instance 3: UNLOAD_ON_RELEASE=2
    UNLOAD_ON_RELEASE: model=1 row=1 value=500 ASKED 0/0/0/0 0/0
""")
def ask_to_unload_one_in_use_with_seats(it: RowChanges) -> Operation:
    it.users(3)
    row = it.active()
    it.do(lambda t: it.to.holds.take_idle(t, row + 2, 3))
    return lambda t: it.to.unloads.ask(t, row, 2)


@CASES.case("")
def ask_to_unload_what_is_lost(it: RowChanges) -> Operation:
    row = it.active(server=3)
    it.do(lambda t: it.to.members.reap(t, 3))
    return lambda t: it.to.unloads.ask(t, row, 2)


@CASES.case("""
    member 1: BELL=1
    instance 1: HOLDER=2 HANDED_AT=now
    wake member 1 BELL
""")
def hand_over_an_unload(it: RowChanges) -> Operation:
    row = it.unloading()
    return lambda t: it.to.unloads.hand_over(t, row, 1)


@CASES.case("""
    instance 1: UNLOAD_LATE=1
""")
def an_unload_is_late(it: RowChanges) -> Operation:
    row = it.unloading()
    return lambda t: it.to.unloads.note_late(t, row)


@CASES.case("""
    model 1: UNLOADING=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 0: RETURNING_MB=250 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=250 RETURNS[2]=nan
    device 1: RETURNING_MB=250 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=250 RETURNS[2]=800
    UNLOAD_ENDED: model=1 row=1 value=500
""")
def end_an_unload(it: RowChanges) -> Operation:
    row = it.unloading(devices=(0, 1))
    it.sample(1, 800.0)
    it.do(lambda t: it.to.unloads.hand_over(t, row, 1))
    it.do(lambda t: it.to.unloads.note_late(t, row))
    return lambda t: it.to.unloads.end(t, row)


@CASES.case("""
    model 1: UNLOADING=0 USED_AT=now
    instance 1: STATE=FREE MB=0 SINCE=now
    instance 2: MB=500
    device 1: CONFIGURED_AT=now
    UNLOAD_ENDED: model=1 row=1 value=0
""")
def end_an_unload_before_that_of_a_twin(it: RowChanges) -> Operation:
    row, last = it.idle(), it.idle(model=2, devices=(0,))
    it.do(lambda t: it.to.unloads.begin(t, row, 2, True))
    it.poke(it.tables.instance(row) + Instance.MB, 500.0)
    it.poke(it.tables.instance(last) + Instance.MB, 0.0)
    return lambda t: it.to.unloads.end(t, row)


@CASES.case("""
    model 1: UNLOADING=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: CONFIGURED_AT=now
    UNLOAD_ENDED: model=1 row=1 value=500
""")
def end_an_unload_while_nobody_measures(it: RowChanges) -> Operation:
    row = it.unloading()
    it.do(lambda t: it.to.members.lead(t, 1, b"booked", (False, False, True)))
    return lambda t: it.to.unloads.end(t, row)


@CASES.case("""
    header: EVICTIONS=31
    member 1: BELL=1
    model 1: LOADED=2 IDLE=2 UNLOADING=1 EVICTIONS=104
    instance 1: STATE=UNLOADING HOLDER=2 SINCE=now
    UNLOAD_BEGAN: model=1 row=1 value=500
    wake member 1 BELL
""")
def evict_an_object_beside_another_one(it: RowChanges) -> Operation:
    row, _, _ = it.idle(handle=b""), it.idle(handle=b""), it.idle()
    return lambda t: it.to.unloads.begin(t, row, 2, True)


@CASES.case("""
    header: ACTIVE=3
    member 1: BELL=1
    model 1: LOADED=2 ACTIVE=2 UNLOADING=1 HOLD_S=11.4
    instance 1: STATE=UNLOADING SINCE=now
    RELEASED: model=1 row=1 value=6
    UNLOAD_BEGAN: model=1 row=1 value=500 ASKED 0/0/0/0 0/0
    wake member 1 BELL
""")
def unload_with_a_seat_that_is_unloaded_already(it: RowChanges) -> Operation:
    it.users(3)
    row = it.active()
    for seat in (row + 1, row + 2):
        it.take(seat)
    it.do(lambda t: it.to.unloads.ask(t, row, 2))
    return lambda t: it.to.holds.release(t, row)


@CASES.case("""
    header: ACTIVE=2
    model 1: LOADED=1 ACTIVE=1 USED_AT=now HOLD_S=10.29 SEATS=1
    instance 1: SEATS=1
    instance 2: STATE=FREE HOLDER=0 SEAT_OF=0 SINCE=now PREVIOUS=0
    RELEASED: model=1 row=2 value=3
""")
def release_one_of_two_seats_of_what_is_unloaded(it: RowChanges) -> Operation:
    it.users(3)
    row = it.idle()
    for seat in (row + 1, row + 2):
        it.take(seat)
    it.do(lambda t: it.to.unloads.begin(t, row, 2, False))
    return lambda t: it.to.holds.release(t, row + 1)


@CASES.case("""
    member 2: BELL=1
    model 2: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0
    instance 1: DEVICES=2 MB=500 LOADED_AT=now-7
    instance 2: DEVICES=2
    instance 3: STATE=UNLOADING HOLDER=3 MB=0 SINCE=now
    UNLOAD_BEGAN: model=2 row=3 value=0
    wake member 2 BELL
""")
def unload_what_leaves_its_memory_to_a_twin_with_seats(it: RowChanges) -> Operation:
    it.users(2)
    other, row = it.idle(devices=(0,)), it.idle(model=2)
    it.poke(it.tables.instance(other) + Instance.MB, 0.0)
    it.poke(it.tables.instance(row) + Instance.MB, 500.0)
    return lambda t: it.to.unloads.begin(t, row, 2, False)


@CASES.case("""
    header: ISOLATED=0
    member 2: BELL=1
    model 1: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0
    instance 1: STATE=UNLOADING HOLDER=3 MB=0 SINCE=now
    instance 2: DEVICES=2 MB=500 LOADED_AT=now-11
    device 0: ISOLATED=0
    ISOLATION_ENDED: model=2 row=2 value=0
    UNLOAD_BEGAN: model=1 row=1 value=0
    wake member 2 BELL
""")
def unload_what_leaves_its_memory_to_a_twin_that_runs_alone(it: RowChanges) -> Operation:
    row, twin = it.idle(), it.loading(model=2, devices=(0,))
    it.do(lambda t: it.to.isolation.begin(t, twin))
    it.do(lambda t: it.to.loads.end(t, twin, b"handle", 500.0, 0, False))
    return lambda t: it.to.unloads.begin(t, row, 2, False)


@CASES.case("""
    header: EVICTIONS=33
    member 2: BELL=3
    member 3: INSTANCE=4
    model 1: LOADED=0 IDLE=0 UNLOADING=2 IDLE_HEAD=0 EVICTIONS=105
    model 2: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0 EVICTIONS=204
    instance 1: STATE=UNLOADING HOLDER=3 SERVER=0 MB=0 SINCE=now
    instance 2: STATE=UNLOADING HOLDER=3 SINCE=now
    instance 3: STATE=UNLOADING HOLDER=3 SERVER=4 MB=500 SINCE=now LOADED_AT=now-25 NEXT=0
    UNLOAD_BEGAN: model=1 row=1 value=0
    UNLOAD_BEGAN: model=1 row=3 value=500
    UNLOAD_BEGAN: model=2 row=2 value=0
    wake member 2 BELL
    wake member 2 BELL
    wake member 2 BELL
""")
def evict_three_twins(it: RowChanges) -> Operation:
    _, row, _ = it.idle(server=3), it.idle(model=2, devices=(0,)), it.idle()
    return lambda t: it.to.unloads.begin(t, row, 2, True)


@CASES.case("""
    model 1: UNLOADING=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    UNLOAD_ENDED: model=1 row=1 value=500
""")
def end_an_unload_before_that_of_a_twin_where_another_runs_alone(it: RowChanges) -> Operation:
    row, last = it.idle(), it.idle(model=2, devices=(0,))
    it.do(lambda t: it.to.unloads.begin(t, row, 2, True))
    it.poke(it.tables.instance(row) + Instance.MB, 500.0)
    it.poke(it.tables.instance(last) + Instance.MB, 0.0)
    alone = it.loading(model=2)
    it.do(lambda t: it.to.isolation.begin(t, alone))
    return lambda t: it.to.unloads.end(t, row)


@CASES.case("""
    model 2: UNLOADING=0 USED_AT=now
    instance 1: MB=500
    instance 3: STATE=FREE MB=0 SINCE=now
    device 1: CONFIGURED_AT=now
    UNLOAD_ENDED: model=2 row=3 value=0
""")
def end_an_unload_after_that_of_a_twin_with_seats(it: RowChanges) -> Operation:
    """A twin whose seat is in use is unloaded after it, and the memory left to that."""
    it.users(2)
    first, last = it.idle(), it.idle(model=2)
    it.take(first + 1)
    for row in (first, last):
        it.begin_unload(row)
    it.poke(it.tables.instance(last) + Instance.MB, 500.0)
    it.poke(it.tables.instance(first) + Instance.MB, 0.0)
    return lambda t: it.to.unloads.end(t, last)


@CASES.case("""
    returns ([1, 3], [1, 2, 3, 4, 6], [0, 5, 7])
""")
def which_of_the_copies_are_twins(it: RowChanges) -> Operation:
    """No object is one, and none whose handle only ends like another; a seat, which nobody asks for, has its copy."""
    it.users(2)
    for handle in (b"a", b"a", b"ab and so on", b"cb and so on"):
        it.active(handle=handle)
    return lambda t: (
        sorted(it.to.twins.any_of_all()),
        [row for row in range(8) if it.to.twins.any_of(row)],
        [row for row in range(8) if it.to.twins.unloads_handle(row)],
    )


@CASES.case("""
    returns [1, 2]
""")
def which_of_two_copies_are_twins(it: RowChanges) -> Operation:
    it.poke(it.tables.instance(0) + Instance.STATE, Instance.UNLOADING)
    it.active(handle=b"a"), it.idle(handle=b"a")
    found = it.to.twins.any_of_all()
    it.poke(it.tables.instance(0) + Instance.STATE, Instance.ACTIVE)
    return lambda t: sorted(found)


@CASES.case("""
    returns ([], [3, 4], [False, False, False])
""")
def which_of_the_copies_of_one_handle_are_twins(it: RowChanges) -> Operation:
    """Of three pairs each has one that is no twin: it is lost, unloaded, or loads."""
    for handle in (b"a", b"b"):
        it.active(handle=handle)
    lost, unloading, loading = it.active(handle=b"a"), it.unloading(handle=b"b"), it.loading()
    it.poke(it.tables.instance(lost) + Instance.UNLOAD_ON_RELEASE, Instance.LOST)
    return lambda t: (
        sorted(it.to.twins.any_of_all()),
        [row for row in range(8) if it.to.twins.any_of(row)],
        [it.to.twins.unloads_handle(row) for row in (lost, unloading, loading)],
    )


@CASES.case("""
    returns ([False, False, True, True], [False, False, False, False])
""")
def which_of_the_unloads_is_the_last_of_a_handle(it: RowChanges) -> Operation:
    """The one in the last row of the table, unless that has lost its server, or the seats of another are in use."""
    rows = [it.unloading(handle=b"a") for _ in range(4)]
    it.poke(it.tables.instance(rows[3]) + Instance.UNLOAD_ON_RELEASE, Instance.LOST)
    before = [it.to.twins.unloads_handle(row) for row in rows]
    it.poke(it.tables.instance(rows[0]) + Instance.SEATS, 1)
    after = [it.to.twins.unloads_handle(row) for row in rows]
    it.poke(it.tables.instance(rows[0]) + Instance.SEATS, 0)
    return lambda t: (before, after)


@CASES.case("""
    model 1: UNLOADING=1 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    UNLOAD_ENDED: model=1 row=1 value=500
""")
def end_the_unload_of_an_object_while_another_one_is_unloaded(it: RowChanges) -> Operation:
    row = it.unloading(handle=b"")
    it.unloading(handle=b"", devices=(0,))
    return lambda t: it.to.unloads.end(t, row)


@CASES.case("""
    model 1: UNLOADING=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: RETURNING_MB=0.5 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=0.5 RETURNS[2]=nan
    UNLOAD_ENDED: model=1 row=1 value=0.5
""")
def end_the_unload_of_a_very_small_one(it: RowChanges) -> Operation:
    row = it.unloading(mb=100.5)
    return lambda t: it.to.unloads.end(t, row)


@pytest.mark.parametrize("name", CASES.names)
def test_a_transition_of_unloads_changes_just_what_it_is_to(it: RowChanges, name: str) -> None:
    CASES.check(it, name)
