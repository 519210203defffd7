"""What the transitions of holds change, word by word; see `row_changes`."""

from __future__ import annotations

import pytest
from row_changes import Cases, Operation, RowChanges
from row_changes import it as it  # the fixture

from mpmm.shared_state.layout import Instance

CASES = Cases()


@CASES.case("""
    header: ACTIVE=2 HITS=11
    model 1: ACTIVE=1 IDLE=2 IDLE_HEAD=3 HITS=102
    instance 2: PREVIOUS=0
    instance 3: STATE=ACTIVE HOLDER=3 SINCE=now USES=2
    HIT: model=1 row=3 value=0
""")
def take_the_newest_of_three(it: RowChanges) -> Operation:
    _, _, row = it.idle(), it.idle(handle=b"2"), it.idle(handle=b"3")
    return lambda t: it.to.holds.take_idle(t, row, 3)


@CASES.case("""
    header: ACTIVE=2 HITS=11
    model 1: ACTIVE=1 IDLE=2 HITS=102
    instance 1: PREVIOUS=4
    instance 2: STATE=ACTIVE HOLDER=3 SINCE=now USES=2
    instance 3: NEXT=2
    HIT: model=1 row=2 value=0
""")
def take_the_middle_one_of_three(it: RowChanges) -> Operation:
    _, row, _ = it.idle(), it.idle(handle=b"2"), it.idle(handle=b"3")
    return lambda t: it.to.holds.take_idle(t, row, 3)


@CASES.case("""
    header: ACTIVE=2 HITS=11
    model 1: ACTIVE=1 IDLE=2 HITS=102
    instance 1: STATE=ACTIVE HOLDER=3 SINCE=now USES=2
    instance 2: NEXT=0
    HIT: model=1 row=1 value=0
""")
def take_the_oldest_of_three(it: RowChanges) -> Operation:
    row, _, _ = it.idle(), it.idle(handle=b"2"), it.idle(handle=b"3")
    return lambda t: it.to.holds.take_idle(t, row, 3)


@CASES.case("""
    header: ACTIVE=2 HITS=11
    model 1: ACTIVE=1 IDLE=0 HITS=102
    instance 1: STATE=ACTIVE HOLDER=2 SINCE=now USES=2
    HIT: model=1 row=1 value=0
""")
def take_an_object(it: RowChanges) -> Operation:
    row = it.idle(handle=b"")
    return lambda t: it.to.holds.take_idle(t, row, 2)


@CASES.case("""
    header: ACTIVE=1
    model 1: ACTIVE=0 IDLE=2 IDLE_HEAD=3 HOLD_S=10.29
    instance 1: PREVIOUS=3
    instance 2: STATE=IDLE HOLDER=0 SINCE=now NEXT=2
    RELEASED: model=1 row=2 value=3
""")
def release_beside_an_idle_one(it: RowChanges) -> Operation:
    it.idle(handle=b"2")
    row = it.active()
    return lambda t: it.to.holds.release(t, row)


@CASES.case("""
    header: ACTIVE=1
    model 1: ACTIVE=0 IDLE=1 IDLE_HEAD=2
    instance 1: STATE=IDLE HOLDER=0 SINCE=now
    RELEASED: model=1 row=1 value=3
""")
def release_unused(it: RowChanges) -> Operation:
    row = it.active()
    return lambda t: it.to.holds.release(t, row, used=False)


@CASES.case("""
    header: ACTIVE=1
    model 1: ACTIVE=0 IDLE=1 HOLD_S=11.1
    instance 1: STATE=IDLE HOLDER=0 SINCE=now
    RELEASED: model=1 row=1 value=3
""")
def release_an_object(it: RowChanges) -> Operation:
    row = it.active(handle=b"")
    return lambda t: it.to.holds.release(t, row)


@CASES.case("""
    header: ACTIVE=1 ISOLATED=0
    model 1: ACTIVE=0 IDLE=1 IDLE_HEAD=2 HOLD_S=10.9
    instance 1: STATE=IDLE HOLDER=0 SINCE=now
    device 1: ISOLATED=0
    ISOLATION_ENDED: model=1 row=1 value=0
    RELEASED: model=1 row=1 value=1
""")
def release_what_ran_alone(it: RowChanges) -> Operation:
    row = it.loading()
    it.do(lambda t: it.to.isolation.begin(t, row))
    it.do(lambda t: it.to.loads.end(t, row, b"handle", 400.0, 0, False))
    return lambda t: it.to.holds.release(t, row)


@CASES.case("""
    header: ACTIVE=1
    member 1: BELL=1
    model 1: LOADED=0 ACTIVE=0 UNLOADING=1 HOLD_S=11.2
    instance 1: STATE=UNLOADING SINCE=now
    RELEASED: model=1 row=1 value=4
    UNLOAD_BEGAN: model=1 row=1 value=500 ASKED 0/0/0/0 0/0
    wake member 1 BELL
""")
def release_what_is_to_be_unloaded(it: RowChanges) -> Operation:
    row = it.active()
    it.do(lambda t: it.to.unloads.ask(t, row, 2))
    return lambda t: it.to.holds.release(t, row)


@CASES.case("""
    header: ACTIVE=1
    member 1: BELL=1
    model 1: LOADED=0 ACTIVE=0 UNLOADING=1 HOLD_S=11.2
    instance 1: STATE=UNLOADING SINCE=now
    RELEASED: model=1 row=1 value=4
    UNLOAD_BEGAN: model=1 row=1 value=500 ASKED 0/0/0/0 0/0
    wake member 1 BELL
""")
def release_an_object_that_is_to_be_unloaded(it: RowChanges) -> Operation:
    row = it.active(handle=b"")
    it.do(lambda t: it.to.unloads.ask(t, row, 2))
    return lambda t: it.to.holds.release(t, row)


@CASES.case("""
    header: ACTIVE=1
    model 1: LOADED=0 ACTIVE=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: CONFIGURED_AT=now
    RELEASED: model=1 row=1 value=4
""")
def release_what_has_lost_its_server(it: RowChanges) -> Operation:
    row = it.active(server=3)
    it.do(lambda t: it.to.members.reap(t, 3))
    return lambda t: it.to.holds.release(t, row)


@CASES.case("""
    header: ACTIVE=1
    member 1: BELL=1
    model 1: LOADED=0 ACTIVE=0 UNLOADING=1
    instance 1: STATE=UNLOADING SINCE=now
    RELEASED: model=1 row=1 value=3
    wake member 1 BELL
""")
def release_what_has_lost_an_unknown_server(it: RowChanges) -> Operation:
    row = it.active()
    it.poke(it.tables.instance(row) + Instance.UNLOAD_ON_RELEASE, Instance.LOST)
    return lambda t: it.to.holds.release(t, row)


@CASES.case("""
    header: ACTIVE=1
    member 1: BELL=2
    model 1: LOADED=0 ACTIVE=0 USED_AT=now HOLD_S=10.47 SEATS=0
    instance 1: SEATS=0 SINCE=now
    instance 2: STATE=FREE HOLDER=0 SEAT_OF=0 SINCE=now
    RELEASED: model=1 row=2 value=3
    wake member 1 BELL
""")
def release_the_last_seat_of_what_is_to_be_unloaded(it: RowChanges) -> Operation:
    it.users(2)
    row = it.active()
    it.do(lambda t: it.to.holds.take_idle(t, row + 1, 3))
    it.do(lambda t: it.to.unloads.ask(t, row, 2))
    it.do(lambda t: it.to.holds.release(t, row))
    return lambda t: it.to.holds.release(t, row + 1)


@CASES.case("""
    header: ACTIVE=1
    model 1: LOADED=0 ACTIVE=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    LOST: model=1 row=1 value=500
""")
def discard(it: RowChanges) -> Operation:
    row = it.active()
    return lambda t: it.to.holds.discard(t, row)


@CASES.case("""
    header: ACTIVE=2
    model 1: ACTIVE=1 IDLE=1 IDLE_HEAD=3 HOLD_S=10.9
    instance 2: STATE=IDLE HOLDER=0 SINCE=now
    RELEASED: model=1 row=2 value=1
""")
def release_a_seat(it: RowChanges) -> Operation:
    it.users(2)
    row = it.active()
    it.do(lambda t: it.to.holds.take_idle(t, row + 1, 3))
    return lambda t: it.to.holds.release(t, row + 1)


@CASES.case("""
    header: ACTIVE=1
    model 1: ACTIVE=0 IDLE=2 IDLE_HEAD=2 HOLD_S=9.361
    instance 1: STATE=IDLE HOLDER=0 SINCE=now NEXT=3 PREVIOUS=0
    instance 2: PREVIOUS=2
    RELEASED: model=1 row=1 value=1
""")
def release_what_was_the_second_of_the_list(it: RowChanges) -> Operation:
    row, _ = it.idle(), it.idle(handle=b"2")
    it.do(lambda t: it.to.holds.take_idle(t, row, 2))
    return lambda t: it.to.holds.release(t, row)


@CASES.case("""
    header: ACTIVE=1
    member 1: BELL=1
    model 1: LOADED=0 ACTIVE=0 UNLOADING=1
    instance 1: STATE=UNLOADING SINCE=now
    RELEASED: model=1 row=1 value=3
    wake member 1 BELL
""")
def release_what_is_lost_while_its_server_is_known(it: RowChanges) -> Operation:
    row = it.active(server=3)
    it.poke(it.tables.instance(row) + Instance.UNLOAD_ON_RELEASE, Instance.LOST)
    return lambda t: it.to.holds.release(t, row)


@CASES.case("""
    header: ACTIVE=2
    model 1: LOADED=1 ACTIVE=1 IDLE=0 IDLE_HEAD=0 USED_AT=now SEATS=0
    instance 1: STATE=FREE SEATS=0 SINCE=now
    instance 2: SEAT_OF=0 UNLOAD_ON_RELEASE=1
    instance 3: STATE=FREE SEAT_OF=0 SINCE=now
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    LOST: model=1 row=1 value=500
""")
def discard_what_has_seats_in_use(it: RowChanges) -> Operation:
    it.users(3)
    row = it.active()
    it.do(lambda t: it.to.holds.take_idle(t, row + 1, 3))
    return lambda t: it.to.holds.discard(t, row)


@CASES.case("""
    header: ACTIVE=1 ISOLATED=0
    model 1: LOADED=0 ACTIVE=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: RETURNING_MB=400 RETURN_COUNT=1 ISOLATED=0 CONFIGURED_AT=now RETURNS=now RETURNS[1]=400
      RETURNS[2]=nan
    LOST: model=1 row=1 value=400
    ISOLATION_ENDED: model=1 row=1 value=0
""")
def discard_what_runs_alone(it: RowChanges) -> Operation:
    row = it.loading()
    it.do(lambda t: it.to.isolation.begin(t, row))
    it.do(lambda t: it.to.loads.end(t, row, b"handle", 400.0, 0, False))
    return lambda t: it.to.holds.discard(t, row)


@CASES.case("""
    header: ACTIVE=3 HITS=11
    model 1: ACTIVE=2 IDLE=0 IDLE_HEAD=0 HITS=102
    instance 2: STATE=ACTIVE HOLDER=2 SINCE=now USES=2
    HIT: model=1 row=2 value=0
""")
def take_one_of_several_in_use(it: RowChanges) -> Operation:
    it.active(handle=b"2")
    row = it.idle()
    return lambda t: it.to.holds.take_idle(t, row, 2)


@CASES.case("""
    model 1: LOADED=2 IDLE=1 USED_AT=now SEATS=1
    instance 1: SEATS=1
    instance 2: STATE=FREE SEAT_OF=0 SINCE=now
    instance 3: NEXT=0
""")
def free_a_seat(it: RowChanges) -> Operation:
    it.users(3)
    row = it.active()
    return lambda t: it.to.seats.free(t, row + 1)


@pytest.mark.parametrize("name", CASES.names)
def test_a_transition_of_holds_changes_just_what_it_is_to(it: RowChanges, name: str) -> None:
    CASES.check(it, name)
