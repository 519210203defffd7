"""What each transition changes, word by word: rows, events and wake-ups, and nothing else.

Each case makes rows, and an operation on them; its table says all that this changes: `now` is the time of the
operation, and other times are some seconds from that.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
from row_changes import SECOND_NS, RowChanges

from mpmm.policy.suspension import Unsuspendable
from mpmm.policy.view import Reason
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Device, Header, Instance, Member, Model, Ticket
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.transaction import Transaction
from mpmm.text.display_names import set_display_name

Operation = Callable[[Transaction], Any]
CASES: dict[str, tuple[Callable[[RowChanges], Operation], str]] = {}
CAUSE = Cause(Reason.CHEAPEST_RELOAD, 1.0, 2.0, 3.0, 4.0, 2, 6)


def case(expected: str) -> Callable[[Callable[[RowChanges], Operation]], Callable[[RowChanges], Operation]]:
    """Have a case tested: what its operation changes is this."""

    def keep(make: Callable[[RowChanges], Operation]) -> Callable[[RowChanges], Operation]:
        assert make.__name__ not in CASES
        CASES[make.__name__] = (make, expected)
        return make

    return keep


@pytest.fixture
def it() -> Iterator[RowChanges]:
    with closing(RowChanges()) as made:
        yield made


# ---- holds -------------------------------------------------------------------------------------------------


@case("""
    header: ACTIVE=2 HITS=11
    model 1: ACTIVE=1 IDLE=2 IDLE_HEAD=3 HITS=102
    instance 2: PREVIOUS=0
    instance 3: STATE=ACTIVE HOLDER=3 SINCE=now USES=2
    HIT: model=1 row=3 value=0
""")
def take_the_newest_of_three(it: RowChanges) -> Operation:
    _, _, row = it.idle(), it.idle(handle=b"2"), it.idle(handle=b"3")
    return lambda t: it.to.holds.take_idle(t, row, 3)


@case("""
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


@case("""
    header: ACTIVE=2 HITS=11
    model 1: ACTIVE=1 IDLE=2 HITS=102
    instance 1: STATE=ACTIVE HOLDER=3 SINCE=now USES=2
    instance 2: NEXT=0
    HIT: model=1 row=1 value=0
""")
def take_the_oldest_of_three(it: RowChanges) -> Operation:
    row, _, _ = it.idle(), it.idle(handle=b"2"), it.idle(handle=b"3")
    return lambda t: it.to.holds.take_idle(t, row, 3)


@case("""
    header: ACTIVE=2 HITS=11
    model 1: ACTIVE=1 IDLE=0 HITS=102
    instance 1: STATE=ACTIVE HOLDER=2 SINCE=now USES=2
    HIT: model=1 row=1 value=0
""")
def take_an_object(it: RowChanges) -> Operation:
    row = it.idle(handle=b"")
    return lambda t: it.to.holds.take_idle(t, row, 2)


@case("""
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


@case("""
    header: ACTIVE=1
    model 1: ACTIVE=0 IDLE=1 IDLE_HEAD=2
    instance 1: STATE=IDLE HOLDER=0 SINCE=now
    RELEASED: model=1 row=1 value=3
""")
def release_unused(it: RowChanges) -> Operation:
    row = it.active()
    return lambda t: it.to.holds.release(t, row, used=False)


@case("""
    header: ACTIVE=1
    model 1: ACTIVE=0 IDLE=1 HOLD_S=11.1
    instance 1: STATE=IDLE HOLDER=0 SINCE=now
    RELEASED: model=1 row=1 value=3
""")
def release_an_object(it: RowChanges) -> Operation:
    row = it.active(handle=b"")
    return lambda t: it.to.holds.release(t, row)


@case("""
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


@case("""
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


@case("""
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


@case("""
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


@case("""
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


@case("""
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


@case("""
    header: ACTIVE=1
    model 1: LOADED=0 ACTIVE=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    LOST: model=1 row=1 value=500
""")
def discard(it: RowChanges) -> Operation:
    row = it.active()
    return lambda t: it.to.holds.discard(t, row)


# ---- loads -------------------------------------------------------------------------------------------------


@case("""
    header: LOADING=1 ENDS[2]=2
    model 1: LOADING=1 USED_AT=now
    instance 1: STATE=LOADING MODEL=1 GENERATION=10 HOLDER=3 DEVICES=2 MB=600 RESERVED_MB=600 SINCE=now
    LOAD_BEGAN: on=10 model=1 row=1 value=600
    returns 1
""")
def begin_to_load(it: RowChanges) -> Operation:
    return lambda t: it.to.loads.begin(t, 1, 2, 0b10, 600.0, False)


@case("""
    header: LOADING=1 ISOLATED=3 ENDS[2]=2
    model 1: LOADING=1 USED_AT=now
    instance 1: STATE=LOADING MODEL=1 GENERATION=10 HOLDER=3 DEVICES=3 MB=600 RESERVED_MB=600 SINCE=now
      SHARES=300 SHARES[1]=300
    device 0: ISOLATED=2 BASELINE_MB=nan
    device 1: ISOLATED=2 BASELINE_MB=nan
    ISOLATION_BEGAN: model=1 row=1 value=0
    LOAD_BEGAN: on=11 model=1 row=1 ticket=7 value=600 CHEAPEST_RELOAD 1/2/3/4 2/6
    returns 1
""")
def begin_to_load_alone_on_two_devices(it: RowChanges) -> Operation:
    return lambda t: it.to.loads.begin(t, 1, 2, 0b11, 600.0, True, CAUSE, 8)


@case("""
    header: LOADING=1
    model 2: LOADING=1 USED_AT=now
    instance 1: STATE=LOADING MODEL=2 GENERATION=11 HOLDER=2 SERVER=0 DEVICES=2 MB=100 RESERVED_MB=100 SINCE=now
      LOADED_AT=0 HAS_SERVER=0 USES=0 SHARES=0 SHARES[1]=0 HANDLE=0
    LOAD_BEGAN: on=10 model=2 row=1 value=100
    returns 1
""")
def begin_to_load_into_the_row_of_another_copy(it: RowChanges) -> Operation:
    row = it.unloading(server=3, devices=(0, 1))
    it.do(lambda t: it.to.unloads.end(t, row))
    return lambda t: it.to.loads.begin(t, 2, 1, 0b10, 100.0, False)


@case("""
    member 4: INSTANCE=2
    instance 1: SERVER=5
""")
def link_a_server(it: RowChanges) -> Operation:
    row = it.loading()
    return lambda t: it.to.loads.link_server(t, row, 4)


@case("""
    header: ACTIVE=2 LOADING=0 LOADS=22
    model 1: LOADED=1 ACTIVE=1 LOADING=0 LOADS=103 SHARES=1 LOAD_S=10.2 FAILURES=0 FAILED_AT=0
    instance 1: STATE=ACTIVE SERVER=5 MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now HAS_SERVER=1 USES=1 HANDLE=13
      HANDLE[1]='a long h' HANDLE[2]='andle'
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=1 value=3
    returns False
""")
def end_a_load_of_a_handle(it: RowChanges) -> Operation:
    row = it.loading()
    it.do(lambda t: it.to.models.note_failure(t, 1))
    return lambda t: it.to.loads.end(t, row, b"a long handle", 500.0, 5, True)


@case("""
    header: ACTIVE=2 LOADING=0 LOADS=22
    model 1: LOADED=1 ACTIVE=1 LOADING=0 LOADS=103 LOAD_S=10.1
    instance 1: STATE=ACTIVE OWNER=2 MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=1 value=2
    returns False
""")
def end_a_load_of_an_object(it: RowChanges) -> Operation:
    row = it.loading()
    return lambda t: it.to.loads.end(t, row, b"", 500.0, 0, False)


@case("""
    header: ACTIVE=2 LOADING=0 LOADS=22
    model 1: LOADED=1 ACTIVE=1 LOADING=0 LOADS=103 SHARES=1 LOAD_S=2
    instance 1: STATE=ACTIVE MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1 HANDLE=6 HANDLE[1]='handle'
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=1 value=2
    returns False
""")
def end_the_first_load_of_a_model(it: RowChanges) -> Operation:
    row = it.loading()
    it.poke(it.tables.model(1) + Model.LOAD_S, 0.0)
    return lambda t: it.to.loads.end(t, row, b"handle", 500.0, 0, False)


@case("""
    header: ACTIVE=2 LOADING=0 LOADS=22
    model 1: LOADED=1 ACTIVE=1 LOADING=0 LOADS=103 SHARES=1 LOAD_S=10.1
    instance 1: STATE=ACTIVE MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1 SHARES=250 SHARES[1]=250
      HANDLE=6 HANDLE[1]='handle'
    device 0: CONFIGURED_AT=now
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=1 value=2
    returns False
""")
def end_a_load_on_two_devices(it: RowChanges) -> Operation:
    row = it.loading(devices=(0, 1))
    return lambda t: it.to.loads.end(t, row, b"handle", 500.0, 0, False)


@case("""
    header: ACTIVE=2 LOADING=0 LOADS=22
    model 1: LOADED=1 ACTIVE=1 LOADING=0 LOADS=103 SHARES=1 LOAD_S=10.1
    instance 1: STATE=ACTIVE MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1 SHARES[1]=200 HANDLE=6
      HANDLE[1]='handle'
    device 0: CONFIGURED_AT=now
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=1 value=2
    returns False
""")
def end_a_load_of_unequal_shares(it: RowChanges) -> Operation:
    row = it.loading(devices=(0, 1))
    return lambda t: it.to.loads.end(t, row, b"handle", 500.0, 0, False, (300.0, 200.0))


@case("""
    header: ACTIVE=3 LOADING=0 LOADS=23
    model 2: LOADED=1 ACTIVE=1 LOADING=0 LOADS=203 SHARES=1 LOAD_S=19.1
    instance 2: STATE=ACTIVE MB=0 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1 SHARES=0 SHARES[1]=0 HANDLE=6
      HANDLE[1]='handle'
    device 0: CONFIGURED_AT=now
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=2 row=2 value=2
    returns True
""")
def end_a_load_of_a_twin(it: RowChanges) -> Operation:
    it.active(devices=(0, 1))
    row = it.loading(model=2, devices=(0, 1))
    return lambda t: it.to.loads.end(t, row, b"handle", 500.0, 0, False, (300.0, 200.0))


@case("""
    header: ACTIVE=2 LOADING=0 LOADS=22 ENDS[2]=4
    model 1: LOADED=3 ACTIVE=1 IDLE=2 LOADING=0 IDLE_HEAD=4 LOADS=103 SHARES=1 LOAD_S=10.2 SEATS=2
    instance 1: STATE=ACTIVE SERVER=5 SEATS=2 MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now HAS_SERVER=1 USES=1
      HANDLE=6 HANDLE[1]='handle'
    instance 2: STATE=IDLE MODEL=1 GENERATION=11 DEVICES=2 SEAT_OF=2 SINCE=now LOADED_AT=now PREVIOUS=4
      HAS_SERVER=1 HANDLE=6 HANDLE[1]='handle'
    instance 3: STATE=IDLE MODEL=1 GENERATION=12 DEVICES=2 SEAT_OF=2 SINCE=now LOADED_AT=now NEXT=3 HAS_SERVER=1
      HANDLE=6 HANDLE[1]='handle'
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=1 value=3
    returns False
""")
def end_a_load_for_three_users(it: RowChanges) -> Operation:
    row = it.loading()
    it.users(3)
    return lambda t: it.to.loads.end(t, row, b"handle", 500.0, 5, True)


@case("""
    header: ACTIVE=2 LOADING=0 LOADS=22 ENDS[2]=3
    model 1: LOADED=2 ACTIVE=1 IDLE=1 LOADING=0 LOADS=103 LOAD_S=10.2 SEATS=1
    instance 1: STATE=ACTIVE OWNER=2 SEATS=1 MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1
    instance 2: STATE=IDLE MODEL=1 GENERATION=11 OWNER=2 DEVICES=2 SEAT_OF=2 SINCE=now LOADED_AT=now
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=1 value=3
    returns False
""")
def end_a_load_of_an_object_for_two_users(it: RowChanges) -> Operation:
    row = it.loading()
    it.users(2)
    return lambda t: it.to.loads.end(t, row, b"", 500.0, 0, False)


@case("""
    header: ACTIVE=2 LOADING=0 LOADS=22 ENDS[2]=8
    model 1: LOADED=7 ACTIVE=1 IDLE=6 LOADING=0 IDLE_HEAD=8 LOADS=103 SHARES=1 LOAD_S=10.2 SEATS=6
    instance 1: STATE=ACTIVE SEATS=6 MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1 HANDLE=6
      HANDLE[1]='handle'
    instance 2: STATE=IDLE MODEL=1 GENERATION=11 DEVICES=2 SEAT_OF=2 SINCE=now LOADED_AT=now PREVIOUS=4 HANDLE=6
      HANDLE[1]='handle'
    instance 3: STATE=IDLE MODEL=1 GENERATION=12 DEVICES=2 SEAT_OF=2 SINCE=now LOADED_AT=now NEXT=3 PREVIOUS=5
      HANDLE=6 HANDLE[1]='handle'
    instance 4: STATE=IDLE MODEL=1 GENERATION=13 DEVICES=2 SEAT_OF=2 SINCE=now LOADED_AT=now NEXT=4 PREVIOUS=6
      HANDLE=6 HANDLE[1]='handle'
    instance 5: STATE=IDLE MODEL=1 GENERATION=14 DEVICES=2 SEAT_OF=2 SINCE=now LOADED_AT=now NEXT=5 PREVIOUS=7
      HANDLE=6 HANDLE[1]='handle'
    instance 6: STATE=IDLE MODEL=1 GENERATION=15 DEVICES=2 SEAT_OF=2 SINCE=now LOADED_AT=now NEXT=6 PREVIOUS=8
      HANDLE=6 HANDLE[1]='handle'
    instance 7: STATE=IDLE MODEL=1 GENERATION=16 DEVICES=2 SEAT_OF=2 SINCE=now LOADED_AT=now NEXT=7 HANDLE=6
      HANDLE[1]='handle'
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=1 value=3
    returns False
""")
def end_a_load_for_more_users_than_there_are_rows(it: RowChanges) -> Operation:
    row = it.loading()
    it.users(100)
    return lambda t: it.to.loads.end(t, row, b"handle", 500.0, 0, False)


@case("""
    header: ACTIVE=2 LOADING=0 LOADS=22
    model 1: LOADED=1 ACTIVE=1 LOADING=0 LOADS=103 SHARES=1 LOAD_S=10.3
    instance 1: STATE=ACTIVE MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1 HANDLE=6 HANDLE[1]='handle'
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=1 value=4
    returns False
""")
def end_a_load_that_is_to_be_unloaded(it: RowChanges) -> Operation:
    row = it.loading()
    it.users(3)
    it.do(lambda t: it.to.unloads.ask(t, row, 2))
    return lambda t: it.to.loads.end(t, row, b"handle", 500.0, 0, False)


@case("""
    header: ACTIVE=2 LOADING=0 LOADS=24 STEADY=0
    member 0: BELL=1
    member 1: BELL=1
    member 2: BELL=3
    model 1: LOADED=1 ACTIVE=1 LOADING=0 LOADS=105 LOAD_S=8.661
    instance 1: SINCE=now
    instance 3: STATE=ACTIVE MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1 STEADY=0 HANDLE=6
      HANDLE[1]='handle'
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=3 value=3
    wake member 0 BELL
    wake member 1 BELL
    wake member 2 BELL
    returns False
""")
def end_a_steady_load(it: RowChanges) -> Operation:
    waits, other = it.unloading(handle=b"2"), it.unloading(handle=b"3", devices=(0,))
    row = it.loading()
    it.do(lambda t: it.to.isolation.begin_steady(t, row))
    assert it.tables.instances[waits].state == it.tables.instances[other].state
    return lambda t: it.to.loads.end(t, row, b"handle", 500.0, 0, False)


@case("""
    header: STEADY=3
    instance 1: STEADY=1
""")
def begin_a_steady_load(it: RowChanges) -> Operation:
    row = it.loading(devices=(0, 1))
    return lambda t: it.to.isolation.begin_steady(t, row)


@case("""
    header: LOADING=0 FAILED_LOADS=41
    model 1: LOADING=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: CONFIGURED_AT=now
    LOAD_FAILED: model=1 row=1 value=2
""")
def fail_to_load(it: RowChanges) -> Operation:
    row = it.loading()
    return lambda t: it.to.loads.fail(t, row)


@case("""
    header: LOADING=0 FAILED_LOADS=41
    model 1: LOADING=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: RETURNING_MB=600 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=600 RETURNS[2]=nan
    LOAD_FAILED: model=1 row=1 value=2
""")
def give_up_a_load(it: RowChanges) -> Operation:
    row = it.loading()
    return lambda t: it.to.loads.give_up(t, row)


@case("""
    header: LOADING=0 ISOLATED=0 FAILED_LOADS=41
    member 0: BELL=1
    model 1: LOADING=0 UNLOADING=1
    instance 1: STATE=UNLOADING HOLDER=1 RESERVED_MB=0 SINCE=now HANDLE=15 HANDLE[1]='tag of a' HANDLE[2]='
      server'
    device 1: ISOLATED=0
    LOAD_FAILED: model=1 row=1 value=4
    ISOLATION_ENDED: model=1 row=1 value=0
    wake member 0 BELL
""")
def give_up_a_load_with_a_server(it: RowChanges) -> Operation:
    row = it.loading()
    it.do(lambda t: it.to.isolation.begin(t, row))
    it.do(lambda t: it.to.loads.link_server(t, row, 3))
    return lambda t: it.to.loads.give_up(t, row)


@case("""
    header: LOADING=0 FAILED_LOADS=41
    model 1: LOADING=0 UNLOADING=1
    instance 1: STATE=UNLOADING RESERVED_MB=0 SINCE=now HANDLE=15 HANDLE[1]='tag of a' HANDLE[2]=' server'
    LOAD_FAILED: model=1 row=1 value=3
""")
def abandon_a_load_with_a_server(it: RowChanges) -> Operation:
    row = it.loading()
    it.do(lambda t: it.to.loads.link_server(t, row, 3))
    return lambda t: it.to.loads.abandon(t, row)


# ---- unloads -----------------------------------------------------------------------------------------------


@case("""
    member 2: BELL=1
    model 1: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0
    instance 1: STATE=UNLOADING HOLDER=3 SINCE=now
    UNLOAD_BEGAN: model=1 row=1 value=500
    wake member 2 BELL
""")
def unload(it: RowChanges) -> Operation:
    row = it.idle()
    return lambda t: it.to.unloads.begin(t, row, 2, False)


@case("""
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


@case("""
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


@case("""
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


@case("""
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


@case("""
    member 2: BELL=1
    model 2: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0
    instance 2: STATE=UNLOADING HOLDER=3 SINCE=now
    UNLOAD_BEGAN: model=2 row=2 value=0
    wake member 2 BELL
""")
def unload_beside_a_twin_that_has_the_memory(it: RowChanges) -> Operation:
    _, row = it.idle(server=3), it.idle(model=2, devices=(0,))
    return lambda t: it.to.unloads.begin(t, row, 2, False)


@case("""
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


@case("""
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


@case("""
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


@case("""
    member 2: BELL=1
    model 1: LOADED=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0
    instance 1: STATE=UNLOADING HOLDER=3 SINCE=now
    UNLOAD_BEGAN: model=1 row=1 value=500 ASKED 0/0/0/0 0/0
    wake member 2 BELL
""")
def ask_to_unload_an_idle_one(it: RowChanges) -> Operation:
    row = it.idle()
    return lambda t: it.to.unloads.ask(t, row, 2)


@case("""
    member 2: BELL=2
    model 1: UNLOADING=1 SUSPENDED=0
    instance 1: STATE=UNLOADING HOLDER=3 SINCE=now DEVICE_MB=0
    UNLOAD_BEGAN: model=1 row=1 value=0 ASKED 0/0/0/0 0/0
    wake member 2 BELL
""")
def ask_to_unload_a_suspended_one(it: RowChanges) -> Operation:
    row = it.suspended()
    return lambda t: it.to.unloads.ask(t, row, 2)


@case("""
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


@case("")
def ask_to_unload_what_is_lost(it: RowChanges) -> Operation:
    row = it.active(server=3)
    it.do(lambda t: it.to.members.reap(t, 3))
    return lambda t: it.to.unloads.ask(t, row, 2)


@case("""
    member 1: BELL=1
    instance 1: HOLDER=2 HANDED_AT=now
    wake member 1 BELL
""")
def hand_over_an_unload(it: RowChanges) -> Operation:
    row = it.unloading()
    return lambda t: it.to.unloads.hand_over(t, row, 1)


@case("""
    instance 1: UNLOAD_LATE=1
""")
def an_unload_is_late(it: RowChanges) -> Operation:
    row = it.unloading()
    return lambda t: it.to.unloads.note_late(t, row)


@case("""
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


@case("""
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


@case("""
    model 1: UNLOADING=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: CONFIGURED_AT=now
    UNLOAD_ENDED: model=1 row=1 value=500
""")
def end_an_unload_while_nobody_measures(it: RowChanges) -> Operation:
    row = it.unloading()
    it.do(lambda t: it.to.members.lead(t, 1, b"booked", (False, False, True)))
    return lambda t: it.to.unloads.end(t, row)


# ---- suspensions -------------------------------------------------------------------------------------------


@case("""
    instance 1: WAY=2
""")
def note_how_it_is_suspended(it: RowChanges) -> Operation:
    row = it.active()
    return lambda t: it.to.suspensions.note_way(t, row, 2)


@case("""
    model 1: SUSPEND_S=3 RESUME_S=1.5
""")
def expect_a_suspension_to_take(it: RowChanges) -> Operation:
    return lambda t: it.to.suspensions.expect(t, 1, 3.0, 1.5)


@case("")
def expect_nothing_of_a_suspension(it: RowChanges) -> Operation:
    return lambda t: it.to.suspensions.expect(t, 1, 0.0, 0.0)


@case("""
    member 2: BELL=1
    model 1: LOADED=0 IDLE=0 IDLE_HEAD=0 SUSPENDED=1
    instance 1: STATE=SUSPENDING HOLDER=3 SINCE=now DEVICE_MB=500 HOST_MB=500
    SUSPEND_BEGAN: model=1 row=1 value=500
    wake member 2 BELL
""")
def suspend(it: RowChanges) -> Operation:
    row = it.idle()
    it.do(lambda t: it.to.suspensions.note_way(t, row, 1))
    return lambda t: it.to.suspensions.begin(t, row, 2, False)


@case("""
    header: EVICTIONS=31
    member 2: BELL=1
    model 1: LOADED=0 IDLE=0 IDLE_HEAD=0 USED_AT=now EVICTIONS=104 SUSPENDED=1 SEATS=0
    instance 1: STATE=SUSPENDING HOLDER=3 SEATS=0 SINCE=now NEXT=0 DEVICE_MB=500 HOST_MB=500
    instance 2: STATE=FREE SEAT_OF=0 SINCE=now
    SUSPEND_BEGAN: model=1 row=1 value=500 CHEAPEST_RELOAD 1/2/3/4 2/6
    wake member 2 BELL
""")
def evict_to_the_host(it: RowChanges) -> Operation:
    it.users(2)
    row = it.idle()
    it.do(lambda t: it.to.suspensions.note_way(t, row, 1))
    return lambda t: it.to.suspensions.begin(t, row, 2, True, CAUSE)


@case("""
    member 1: BELL=1
    model 1: LOADED=0 IDLE=0 SUSPENDED=1
    instance 1: STATE=SUSPENDING HOLDER=2 SINCE=now DEVICE_MB=500 HOST_MB=500
    SUSPEND_BEGAN: model=1 row=1 value=500
    wake member 1 BELL
""")
def suspend_an_object(it: RowChanges) -> Operation:
    row = it.idle(handle=b"")
    it.do(lambda t: it.to.suspensions.note_way(t, row, 2))
    return lambda t: it.to.suspensions.begin(t, row, 2, False)


@case("""
    header: SUSPENDS=51
    model 1: SUSPENDS=105 SUSPEND_S=12.2
    instance 1: STATE=SUSPENDED HOLDER=0 MB=0 SINCE=now
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    SUSPEND_ENDED: model=1 row=1 value=5
""")
def end_a_suspension(it: RowChanges) -> Operation:
    row = it.suspending()
    return lambda t: it.to.suspensions.end(t, row)


@case("""
    header: SUSPENDS=51
    member 1: BELL=2
    model 1: UNLOADING=1 SUSPENDED=0 SUSPENDS=105 SUSPEND_S=12.3
    instance 1: STATE=UNLOADING MB=0 SINCE=now DEVICE_MB=0
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    SUSPEND_ENDED: model=1 row=1 value=6
    UNLOAD_BEGAN: model=1 row=1 value=0 ASKED 0/0/0/0 0/0
    wake member 1 BELL
""")
def end_a_suspension_of_what_is_to_be_unloaded(it: RowChanges) -> Operation:
    row = it.suspending(handle=b"")
    it.do(lambda t: it.to.unloads.ask(t, row, 2))
    return lambda t: it.to.suspensions.end(t, row)


@case("""
    header: LOADING=1
    model 1: LOADING=1 USED_AT=now SUSPENDED=0
    instance 1: STATE=RESUMING HOLDER=2 MB=500 RESERVED_MB=500 SINCE=now SHARES=250 SHARES[1]=250
    RESUME_BEGAN: on=11 model=1 row=1 ticket=8 value=500 CHEAPEST_RELOAD 1/2/3/4 2/6
""")
def begin_to_resume(it: RowChanges) -> Operation:
    row = it.suspended(devices=(0, 1))
    return lambda t: it.to.suspensions.begin_resume(t, row, 1, CAUSE, 9)


@case("""
    header: ACTIVE=2 LOADING=0 RESUMES=61
    model 1: LOADED=2 ACTIVE=1 IDLE=1 LOADING=0 IDLE_HEAD=3 RESUMES=106 RESUME_S=13.3 SEATS=1
    instance 1: STATE=ACTIVE SEATS=1 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=2 DEVICE_MB=0 HOST_MB=0
    instance 2: STATE=IDLE GENERATION=12 SEAT_OF=2 SINCE=now LOADED_AT=now PREVIOUS=0
    device 1: CONFIGURED_AT=now
    RESUME_ENDED: model=1 row=1 value=7
""")
def end_a_resume(it: RowChanges) -> Operation:
    it.users(2)
    row = it.resuming()
    return lambda t: it.to.suspensions.end_resume(t, row)


@case("""
    header: LOADING=0
    model 1: LOADING=0 SUSPENDED=1
    instance 1: STATE=SUSPENDED HOLDER=0 MB=0 RESERVED_MB=0 SINCE=now
    RESUME_GIVEN_UP: model=1 row=1 value=7
""")
def cancel_a_resume(it: RowChanges) -> Operation:
    row = it.resuming()
    return lambda t: it.to.suspensions.cancel(t, row)


@case("""
    header: LOADING=0
    member 0: BELL=1
    model 1: LOADING=0 UNLOADING=1
    instance 1: STATE=UNLOADING HOLDER=1 MB=0 RESERVED_MB=0 SINCE=now DEVICE_MB=0
    RESUME_GIVEN_UP: model=1 row=1 value=8
    UNLOAD_BEGAN: model=1 row=1 value=0 ASKED 0/0/0/0 0/0
    wake member 0 BELL
""")
def cancel_a_resume_of_what_is_to_be_unloaded(it: RowChanges) -> Operation:
    row = it.resuming()
    it.do(lambda t: it.to.unloads.ask(t, row, 2))
    return lambda t: it.to.suspensions.cancel(t, row)


@case("""
    header: LOADING=0
    member 2: BELL=2
    model 1: LOADING=0 SUSPENDED=1
    instance 1: STATE=SUSPENDING HOLDER=3 RESERVED_MB=0 SINCE=now
    RESUME_GIVEN_UP: model=1 row=1 value=7
    wake member 2 BELL
""")
def turn_back_a_resume(it: RowChanges) -> Operation:
    row = it.resuming()
    return lambda t: it.to.suspensions.turn_back(t, row, 3)


@case("""
    header: LOADING=0
    member 1: BELL=2
    model 1: LOADING=0 SUSPENDED=1
    instance 1: STATE=SUSPENDING RESERVED_MB=0 SINCE=now
    RESUME_GIVEN_UP: model=1 row=1 value=7
    wake member 1 BELL
""")
def turn_back_a_resume_of_an_object(it: RowChanges) -> Operation:
    row = it.resuming(handle=b"")
    return lambda t: it.to.suspensions.turn_back(t, row, 3)


@case("""
    member 1: BELL=1
    instance 1: HOLDER=2 SINCE=now
    wake member 1 BELL
""")
def hand_over_a_suspension(it: RowChanges) -> Operation:
    row = it.suspending()
    return lambda t: it.to.suspensions.hand_over(t, row, 1)


@case("""
    header: SUSPEND_FAILURES=1
    member 2: BELL=2
    model 1: UNLOADING=1 SUSPENDED=0 UNSUSPENDABLE=3
    instance 1: STATE=UNLOADING SINCE=now DEVICE_MB=0
    SUSPEND_FAILED: model=1 row=1 value=5
    log mpmm: a is not suspended any more: timed out
    wake member 2 BELL
""")
def fail_to_suspend(it: RowChanges) -> Operation:
    row = it.suspending()
    return lambda t: it.to.suspensions.fail(t, row, Unsuspendable.TIMED_OUT)


@case("""
    header: LOADING=0 SUSPEND_FAILURES=1
    member 2: BELL=2
    model 1: LOADING=0 UNLOADING=1
    instance 1: STATE=UNLOADING HOLDER=3 RESERVED_MB=0 SINCE=now DEVICE_MB=0
    RESUME_FAILED: model=1 row=1 value=7
    wake member 2 BELL
""")
def fail_to_resume(it: RowChanges) -> Operation:
    row = it.resuming()
    return lambda t: it.to.suspensions.fail(t, row, None, 3)


@case("""
    header: LOADING=0 SUSPEND_FAILURES=1
    member 1: BELL=2
    model 1: LOADING=0 UNLOADING=1
    instance 1: STATE=UNLOADING RESERVED_MB=0 SINCE=now DEVICE_MB=0
    RESUME_FAILED: model=1 row=1 value=7
    wake member 1 BELL
""")
def fail_to_resume_an_object(it: RowChanges) -> Operation:
    row = it.resuming(handle=b"")
    return lambda t: it.to.suspensions.fail(t, row, None, 3)


@case("""
    member 2: BELL=2
    model 1: UNLOADING=1 SUSPENDED=0
    instance 1: STATE=UNLOADING HOLDER=3 SINCE=now DEVICE_MB=0
    UNLOAD_BEGAN: model=1 row=1 value=30 CHEAPEST_RELOAD 1/2/3/4 2/6
    wake member 2 BELL
""")
def drop_what_is_suspended(it: RowChanges) -> Operation:
    row = it.suspended()
    it.do(lambda t: it.to.measurements.set_measured_mb(t, row, 30.0))
    return lambda t: it.to.suspensions.drop(t, row, 2, CAUSE)


@case("""
    member 1: BELL=2
    model 1: UNLOADING=1 SUSPENDED=0
    instance 1: STATE=UNLOADING HOLDER=2 SINCE=now DEVICE_MB=0
    UNLOAD_BEGAN: model=1 row=1 value=0
    wake member 1 BELL
""")
def drop_an_object_that_is_suspended(it: RowChanges) -> Operation:
    row = it.suspended(handle=b"")
    return lambda t: it.to.suspensions.drop(t, row, 2)


# ---- tickets -----------------------------------------------------------------------------------------------


@case("""
    header: NEXT_TICKET=2 WAITING=2 NEWEST_TICKET=1 ENDS[3]=2
    model 1: WAITING=1
    ticket 1: STATE=WAITING NUMBER=1 PRIORITY=1 MODEL=1 MEMBER=3 ENQUEUED=now DEADLINE=now+5 NEED_MB=700 SPAN=1
      RANK=now+100
    QUEUED: model=1 ticket=1 value=700
    returns 1
""")
def wait_for_a_model(it: RowChanges) -> Operation:
    return lambda t: it.to.tickets.enqueue(t, 1, 2, 1, 700.0, it.now + 5 * SECOND_NS)


@case("""
    header: NEXT_TICKET=2 WAITING=2 NEWEST_TICKET=1 ENDS[3]=2
    model 1: WAITING=1
    ticket 1: STATE=WAITING NUMBER=1 PRIORITY=2 MODEL=1 MEMBER=3 ENQUEUED=now DEADLINE=now+5 REASON=33
      NEED_MB=700 PRELOAD=4 FREE_MB=2 COMING_MB=3 SECONDS=4 OTHER=2 ON=6 LOADABLE_ON=1 USABLE_ON=3 SPAN=2
      NESTED=1 RANK=now+90 STEADY=1
    QUEUED: model=1 ticket=1 value=700
    WAITS: model=1 ticket=1 value=0 CHEAPEST_RELOAD 1/2/3/4 2/6
    returns 1
""")
def wait_with_all_that_can_be_said(it: RowChanges) -> Operation:
    return lambda t: it.to.tickets.enqueue(
        *(t, 1, 2, 2, 700.0, it.now + 5 * SECOND_NS, 4, 0b1, 0b11, 2, True, CAUSE, 1, True)
    )


@case("""
    header: NEXT_TICKET=3 WAITING=2
    model 2: WAITING=1
    ticket 1: STATE=WAITING NUMBER=2 PRIORITY=0 MODEL=2 MEMBER=2 ENQUEUED=now DEADLINE=now+9 REASON=0
      NEED_MB=100 PRELOAD=0 HEAD_OF_LINE_AT=0 FREE_MB=0 COMING_MB=0 SECONDS=0 OTHER=0 ON=0 LOADABLE_ON=0
      USABLE_ON=0 SPAN=1 NESTED=0 OVERTAKEN=0 WARNED=0 CALLED_UP=0 RANK=now+100 STEADY=0
    QUEUED: model=2 ticket=2 value=100
    returns 1
""")
def wait_in_the_row_of_another_ticket(it: RowChanges) -> Operation:
    row = it.do(
        lambda t: it.to.tickets.enqueue(
            *(t, 1, 2, 2, 700.0, it.now + 5 * SECOND_NS, 4, 0b1, 0b11, 2, True, CAUSE, 1, True)
        )
    )
    it.do(lambda t: it.to.tickets.warn(t, row, "waits"))
    it.do(lambda t: it.to.tickets.call_up(t, row))
    it.do(lambda t: it.to.tickets.block(t, row))
    it.do(lambda t: it.to.hand_over.leave_queue(t, row))
    it.poke(it.tables.ticket(row) + Ticket.OVERTAKEN, 1)
    return lambda t: it.to.tickets.enqueue(t, 2, 1, 0, 100.0, it.now + 9 * SECOND_NS)


@case("""
    ticket 1: SIGNAL=1 CALLED_UP=now
    wake ticket 1 SIGNAL
""")
def call_up_a_waiter(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.call_up(t, row)


@case("""
    ticket 1: REASON=33 FREE_MB=2 COMING_MB=3 SECONDS=4 OTHER=2 ON=6
    WAITS: model=1 ticket=1 value=2 CHEAPEST_RELOAD 1/2/3/4 2/6
""")
def say_why_one_waits(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.set_reason(t, row, CAUSE)


@case("""
    ticket 1: WARNED=1
    log mpmm NAMESPACE: a of pid 4194306 waits for ever
""")
def warn_of_a_wait(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.warn(t, row, "waits for ever")


@case("")
def warn_of_a_wait_once(it: RowChanges) -> Operation:
    row = it.ticket()
    it.do(lambda t: it.to.tickets.warn(t, row, "waits for ever"))
    return lambda t: it.to.tickets.warn(t, row, "waits for ever")


@case("""
    ticket 1: HEAD_OF_LINE_AT=now
""")
def become_head_of_the_line(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.block(t, row)


@case("""
    ticket 1: HEAD_OF_LINE_AT=0 OVERTAKEN=1
""")
def let_a_load_pass(it: RowChanges) -> Operation:
    row = it.ticket()
    it.do(lambda t: it.to.tickets.block(t, row))
    return lambda t: it.to.tickets.let_pass(t, row)


@case("""
    header: WAITING=1
    model 1: WAITING=0
    ticket 1: STATE=REFUSED SIGNAL=1
    REFUSED: model=1 ticket=1 value=700 CHEAPEST_RELOAD 1/2/3/4 2/6
    wake ticket 1 SIGNAL
""")
def refuse(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.refuse(t, row, CAUSE)


@case("""
    header: WAITING=1
    model 1: WAITING=0
    ticket 1: STATE=ENOUGH SIGNAL=1
    wake ticket 1 SIGNAL
""")
def answer_that_there_are_enough(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.answer_enough(t, row)


@case("""
    ticket 1: DEADLINE=now
""")
def expire_a_ticket(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.expire(t, row)


# ---- pins and models ---------------------------------------------------------------------------------------


@case("""
    header: ENDS[4]=2
    model 1: PINS=1
    pin 1: STATE=1 MODEL=1 MEMBER=3 SINCE=now
    PINNED: model=1 value=2
    returns 1
""")
def pin(it: RowChanges) -> Operation:
    return lambda t: it.to.pins.pin(t, 1, 2)


@case("""
    header: ENDS[4]=2
    model 1: PINS=1
    pin 1: STATE=1 MODEL=1 SINCE=now
    PINNED: model=1 value=-1
    returns 1
""")
def pin_for_the_namespace(it: RowChanges) -> Operation:
    return lambda t: it.to.pins.pin(t, 1, -1)


@case("""
    model 1: USED_AT=now PINS=0
    pin 1: STATE=0
    UNPINNED: model=1 value=2
""")
def unpin(it: RowChanges) -> Operation:
    row = it.do(lambda t: it.to.pins.pin(t, 1, 2))
    return lambda t: it.to.pins.unpin(t, row)


@case("""
    header: ENDS[1]=4
    model 3: STATE=MODEL GENERATION=10 ESTIMATE_MB=nan USED_AT=now EVENTS_BEFORE=10 TAG=11 TAG[1]='a new mo'
      TAG[2]='del'
    returns 3
""")
def claim_a_model(it: RowChanges) -> Operation:
    return lambda t: it.to.models.claim(t, "a new model", b"a new model")


@case("""
    returns 1
""")
def claim_a_model_again(it: RowChanges) -> Operation:
    return lambda t: it.to.models.claim(t, "a", b"a")


@case("""
    model 6: GENERATION=17 USED_AT=now FAILURES=0 FAILED_AT=0 EVENTS_BEFORE=18 TAG=3 TAG[1]='new'
    returns 6
""")
def claim_the_row_of_the_oldest_unused_model(it: RowChanges) -> Operation:
    """Of those with copies, waiters or pins none is taken, nor is a lease."""
    it.leased()
    it.ticket()
    for number in range(4):
        it.claim(f"m{number}")
    it.suspended(model=4)
    it.do(lambda t: it.to.pins.pin(t, 5, 2))
    it.do(lambda t: it.to.models.note_failure(t, 6))
    it.poke(it.tables.model(2) + Model.USED_AT, it.now)
    return lambda t: it.to.models.claim(t, "new", b"new")


@case("""
    header: ENDS[1]=5
    model 4: STATE=MODEL GENERATION=12 ESTIMATE_MB=nan USED_AT=now EVENTS_BEFORE=12 TAG=3 TAG[1]='new'
    returns 4
""")
def claim_a_row_beside_that_of_an_ended_lease(it: RowChanges) -> Operation:
    row = it.leased()
    it.end_lease(row)
    return lambda t: it.to.models.claim(t, "new", b"new")


@case("""
    model 4: STATE=MODEL GENERATION=17 ESTIMATE_MB=nan KNOWN=0 USED_AT=now EVENTS_BEFORE=14 TAG=3 TAG[1]='new'
    returns 4
""")
def claim_the_row_of_the_lease_that_ended_first(it: RowChanges) -> Operation:
    first, second = it.leased(), it.leased(mb=200.0)
    for row in (second, first):
        it.end_lease(row)
    for number in range(3):
        it.claim(f"m{number}")
    return lambda t: it.to.models.claim(t, "new", b"new")


@case("""
    model 3: STATE=MODEL GENERATION=16 ESTIMATE_MB=nan KNOWN=0 USED_AT=now EVENTS_BEFORE=12 TAG=3 TAG[1]='new'
    returns 3
""")
def claim_the_row_of_an_ended_lease(it: RowChanges) -> Operation:
    row = it.leased()
    it.end_lease(row)
    for number in range(4):
        it.claim(f"m{number}")
    return lambda t: it.to.models.claim(t, "new", b"new")


@case("""
    model 3: STATE=MODEL GENERATION=12 ESTIMATE_MB=nan KNOWN=0 USED_AT=now
    returns 3
""")
def claim_the_row_of_an_ended_lease_of_the_same_name(it: RowChanges) -> Operation:
    row = it.leased()
    it.end_lease(row)
    return lambda t: it.to.models.claim(t, "lease", b"lease")


@case("""
    model 3: NAME=17 NAME[1]='the mode' NAME[2]='l of our' NAME[3]='s'
    returns 3
""")
def claim_a_model_that_has_a_name(it: RowChanges) -> Operation:
    tag = "a tag that nobody reads"
    it.claim(tag)
    set_display_name(tag, "the model of ours")
    return lambda t: it.to.models.claim(t, tag, tag.encode())


@case("""
    model 1: KEEP_ALIVE=77
""")
def keep_idle_copies(it: RowChanges) -> Operation:
    return lambda t: it.to.models.keep_alive(t, 1, 77)


@case("""
    model 1: USERS=4
""")
def set_users(it: RowChanges) -> Operation:
    return lambda t: it.to.models.set_users(t, 1, 4)


@case("""
    model 1: FAILURES=2 FAILED_AT=now
""")
def note_a_failure(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.models.note_failure(t, 1))
    return lambda t: it.to.models.note_failure(t, 1)


@case("""
    model 1: FAILURES=0 FAILED_AT=0
""")
def forget_failures(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.models.note_failure(t, 1))
    return lambda t: it.to.models.forget_failures(t, 1)


@case("""
    model 1: SUPERSEDED=1
""")
def supersede(it: RowChanges) -> Operation:
    return lambda t: it.to.models.supersede(t, 1, True)


@case("""
    model 1: SUPERSEDED=0
""")
def supersede_no_more(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.models.supersede(t, 1, True))
    return lambda t: it.to.models.supersede(t, 1, False)


@case("""
    model 1: MEAN_INTERARRIVAL_S=2.5 REQUESTS=44 REQUESTED_AT=now-1
""")
def note_demand(it: RowChanges) -> Operation:
    return lambda t: it.to.models.note_demand(t, 1, 2.5, 44, it.now - SECOND_NS)


# ---- estimates ---------------------------------------------------------------------------------------------


@case("""
    model 1: ESTIMATE_MB=450 KNOWN=1 MEASURED=1 SD_MB=2.5
    ticket 1: PRIORITY=1 NEED_MB=450
    ticket 2: NEED_MB=450
    ESTIMATED: model=1 value=450
""")
def estimate(it: RowChanges) -> Operation:
    for model, priority in ((1, 0), (1, 2), (2, 0)):
        it.ticket(model=model, priority=priority)
    return lambda t: it.to.estimates.estimate(t, 1, 450.0, True, 2.5)


@case("""
    model 1: ESTIMATE_MB=440 MEASURED=0 SD_MB=0
    ESTIMATED: model=1 value=440
""")
def estimate_what_is_known(it: RowChanges) -> Operation:
    it.ticket(priority=0)
    it.do(lambda t: it.to.estimates.estimate(t, 1, 450.0, True, 2.5))
    it.do(lambda t: it.to.estimates.record_out_of_memory(t, 1, 500.0))
    return lambda t: it.to.estimates.estimate(t, 1, 440.0, False)


@case("""
    model 1: ESTIMATE_MB=440 KNOWN=1 AT_LEAST_MB=0
    ESTIMATED: model=1 value=440
""")
def estimate_and_forget_what_ran_out(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.record_out_of_memory(t, 1, 500.0))
    return lambda t: it.to.estimates.estimate(t, 1, 440.0, False, forget_bound=True)


@case("""
    model 1: ESTIMATE_MB=404.5 MEASURED=1 SD_MB=0
    ESTIMATED: model=1 value=404.5
""")
def raise_an_estimate(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False, 2.5))
    return lambda t: it.to.estimates.raise_to(t, 1, 404.5)


@case("")
def raise_no_estimate_for_so_little(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False))
    return lambda t: it.to.estimates.raise_to(t, 1, 404.0)


@case("""
    model 1: ESTIMATE_MB=5 KNOWN=1 MEASURED=1
    ESTIMATED: model=1 value=5
""")
def raise_an_estimate_that_is_none(it: RowChanges) -> Operation:
    return lambda t: it.to.estimates.raise_to(t, 1, 5.0)


@case("""
    model 1: EXPECT_MB=300
    ticket 1: PRIORITY=1 NEED_MB=300
""")
def expect_what_a_user_says(it: RowChanges) -> Operation:
    it.ticket(priority=0)
    return lambda t: it.to.estimates.expect(t, 1, 300.0)


@case("""
    model 1: EXPECT_MB=300
""")
def expect_what_a_user_says_of_a_known_model(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False))
    it.ticket(priority=0)
    return lambda t: it.to.estimates.expect(t, 1, 300.0)


@case("""
    model 1: ESTIMATE_MB=300 EXPECT_MB=300
    ESTIMATED: model=1 value=300
""")
def expect_what_a_user_says_while_nobody_measures(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False))
    it.do(lambda t: it.to.members.lead(t, 1, b"booked", (False, False, True)))
    return lambda t: it.to.estimates.expect(t, 1, 300.0)


@case("""
    model 1: EXPECT_MB=300
""")
def expect_no_more_than_was_measured(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, True))
    it.do(lambda t: it.to.members.lead(t, 1, b"booked", (False, False, True)))
    return lambda t: it.to.estimates.expect(t, 1, 300.0)


@case("")
def expect_what_was_expected(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.expect(t, 1, 300.0))
    it.ticket(priority=0)
    return lambda t: it.to.estimates.expect(t, 1, 300.0)


@case("""
    header: OUT_OF_MEMORY=1
    model 1: AT_LEAST_MB=500
    OUT_OF_MEMORY: model=1 value=400
""")
def run_out_of_memory_in_use(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False))
    return lambda t: it.to.estimates.record_out_of_memory(t, 1, 500.0)


@case("""
    header: OUT_OF_MEMORY=1
    model 1: ESTIMATE_MB=nan KNOWN=0 SD_MB=0 AT_LEAST_MB=400
    OUT_OF_MEMORY: model=1 value=400
""")
def run_out_of_memory_in_a_load(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False, 2.5))
    return lambda t: it.to.estimates.record_out_of_memory(t, 1, 400.0, True)


@case("""
    header: OUT_OF_MEMORY=2
    OUT_OF_MEMORY: model=1 value=400
""")
def run_out_of_less_memory_than_is_expected(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False))
    it.do(lambda t: it.to.estimates.record_out_of_memory(t, 1, 399.0))
    return lambda t: it.to.estimates.record_out_of_memory(t, 1, 398.0, True)


@case("""
    header: OUT_OF_MEMORY=1
    model 1: AT_LEAST_MB=500
    OUT_OF_MEMORY: model=1 value=400
""")
def run_out_of_memory_in_a_load_that_was_measured(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, True))
    return lambda t: it.to.estimates.record_out_of_memory(t, 1, 500.0, True)


@case("""
    header: OBSERVATIONS_MADE=1
    observation 0: STATE=1 COUNT=1 NEXT=1 UPDATED=now PAIRS_USED=2 DEVICE=2 READINGS=900 PAIRS=327681
      PAIRS[1]=458754
""")
def observe_a_configuration(it: RowChanges) -> Operation:
    return lambda t: it.to.estimates.observe(t, [(7, 2), (5, 1)], 900.0, 1)


@case("""
    header: OBSERVATIONS_MADE=3
    observation 1: COUNT=2 NEXT=2 UPDATED=now READINGS[1]=901
""")
def observe_a_configuration_again(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.observe(t, [(7, 2)], 800.0))
    it.do(lambda t: it.to.estimates.observe(t, [(7, 2), (5, 1)], 900.0, 1))
    return lambda t: it.to.estimates.observe(t, [(5, 1), (7, 2)], 901.0, 1)


@case("""
    header: OBSERVATIONS_MADE=2
    observation 1: STATE=1 COUNT=1 NEXT=1 UPDATED=now PAIRS_USED=1 DEVICE=3 READINGS=901 PAIRS=458754
""")
def observe_a_configuration_on_another_device(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.observe(t, [(7, 2)], 900.0, 1))
    return lambda t: it.to.estimates.observe(t, [(7, 2)], 901.0, 2)


@case("""
    header: OBSERVATIONS_MADE=5
    observation 1: UPDATED=now PAIRS_USED=1 DEVICE=0 READINGS=901 PAIRS=589825
""")
def observe_more_than_there_are_rows(it: RowChanges) -> Operation:
    for number in (1, 0, 2, 1):
        it.observe([(7, 2), (8, number)], 900.0, number)
    return lambda t: it.to.estimates.observe(t, [(9, 1)], 901.0)


@case("""
    header: OBSERVATIONS_MADE=21
    observation 0: NEXT=1 UPDATED=now READINGS=950
""")
def observe_more_than_is_kept(it: RowChanges) -> Operation:
    for number in range(20):
        it.observe([(7, 2)], 900.0 + number, 1)
    return lambda t: it.to.estimates.observe(t, [(7, 2)], 950.0, 1)


@case("")
def observe_nothing(it: RowChanges) -> Operation:
    return lambda t: it.to.estimates.observe(t, [], 901.0)


@case("")
def observe_more_models_than_fit(it: RowChanges) -> Operation:
    return lambda t: it.to.estimates.observe(t, [(number, 1) for number in range(65)], 901.0)


@case("""
    header: SOLVED_AT=17
""")
def note_a_solution(it: RowChanges) -> Operation:
    return lambda t: it.to.estimates.note_solution(t, 17)


# ---- devices -----------------------------------------------------------------------------------------------


@case("""
    device 3: STATE=1 TOTAL_MB=5000 EXTERNAL_MB=nan EXTERNAL_LEAST_MB=nan CONFIGURED_AT=now MEASURED=1 UUID=6
      UUID[1]='uuid-9' NAME=5 NAME[1]='gpu 9'
    returns [3, 1]
""")
def describe_a_new_device(it: RowChanges) -> Operation:
    return lambda t: it.to.devices.describe(t, [(b"uuid-9", b"gpu 9", 5000.0), (b"uuid-1", b"gpu", 8999.0)])


@case("""
    device 1: TOTAL_MB=9500 MEASURED=0
    returns [1]
""")
def describe_a_device_that_has_grown(it: RowChanges) -> Operation:
    return lambda t: it.to.devices.describe(t, [(b"uuid-1", b"gpu", 9500.0)], measured=False)


@case("""
    device 0: TOTAL_MB=5000 USED_MB=0 SAMPLED=0 PEAK_MB=0 HIGHEST_MB=0 EXTERNAL_MB=nan EXTERNAL_LEAST_MB=nan
      RING_NEXT=0 CONFIGURED_AT=now UUID[1]='uuid-9' NAME=5 NAME[1]='gpu 9' RING=0
    returns [0, 1]
""")
def describe_other_devices(it: RowChanges) -> Operation:
    """Device 0 is free, and its row another one's; on device 2 lies a copy."""
    it.sample(0, 800.0)
    return lambda t: it.to.devices.describe(t, [(b"uuid-9", b"gpu 9", 5000.0), (b"uuid-1", b"gpu", 8999.0)], True)


@case("""
    device 0: STATE=0
    device 3: TOTAL_MB=0
    returns [1]
""")
def describe_what_can_be_measured_beside_what_was_stated(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.devices.describe(t, [(b"stated", b"stated", 5000.0)], measured=False))
    it.active(devices=(3,))
    return lambda t: it.to.devices.describe(t, [(b"uuid-1", b"gpu", 8999.0)], True)


@case("""
    device 3: STATE=0
""")
def forget_what_was_stated(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.devices.describe(t, [(b"stated", b"stated", 5000.0)], measured=False))
    return lambda t: it.to.devices.forget_stated(t, 3)


@case("")
def forget_nothing_that_was_stated_and_is_in_use(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.devices.describe(t, [(b"stated", b"stated", 5000.0)], measured=False))
    it.active(devices=(3,))
    return lambda t: it.to.devices.forget_stated(t, 3)


@case("")
def forget_nothing_that_is_measured(it: RowChanges) -> Operation:
    return lambda t: it.to.devices.forget_stated(t, 1)


@case("""
    device 1: TRIED=now-1
""")
def try_to_take_a_figure(it: RowChanges) -> Operation:
    return lambda t: it.to.devices.note_try(t, 1, it.now - SECOND_NS)


@case("""
    device 1: UNRELATED_MB=70
""")
def note_what_is_unrelated(it: RowChanges) -> Operation:
    return lambda t: it.to.devices.note_unrelated(t, 1, 70.0)


@case("""
    device 1: USED_MB=800 SAMPLED=now-0.5 PEAK_MB=800 HIGHEST_MB=800 EXTERNAL_MB=300 EXTERNAL_LEAST_MB=300
      RING_NEXT=1 RING=now-0.5 RING[1]=800
    returns True
""")
def take_a_figure(it: RowChanges) -> Operation:
    it.active()
    it.do(lambda t: it.to.devices.note_unrelated(t, 1, 70.0))
    return lambda t: it.to.devices.sample(t, 1, 800.0, it.now - SECOND_NS // 2)


@case("""
    device 1: USED_MB=700 EXTERNAL_MB=700 EXTERNAL_LEAST_MB=700 RING_NEXT=2 RING[2]=now-1 RING[3]=700
    returns True
""")
def take_a_second_figure(it: RowChanges) -> Operation:
    it.sample(1, 800.0)
    return lambda t: it.to.devices.sample(t, 1, 700.0, it.now - SECOND_NS)


@case("""
    returns False
""")
def take_a_figure_that_is_too_old(it: RowChanges) -> Operation:
    it.sample(1, 800.0)
    return lambda t: it.to.devices.sample(t, 1, 700.0, it.now - SECOND_NS - 1)


@case("""
    device 1: USED_MB=600 SAMPLED=now EXTERNAL_MB=600 EXTERNAL_LEAST_MB=600 RING_NEXT=3 RING[4]=now RING[5]=600
    returns True
""")
def take_a_figure_when_an_older_peak_counts_no_more(it: RowChanges) -> Operation:
    it.sample(1, 800.0)
    it.wait(40)
    it.sample(1, 700.0)
    return lambda t: it.to.devices.sample(t, 1, 600.0, it.now)


@case("""
    device 1: USED_MB=600 SAMPLED=now PEAK_MB=600 HIGHEST_MB=600 EXTERNAL_MB=600 EXTERNAL_LEAST_MB=600
      RING_NEXT=0 RING[254]=now RING[255]=600
    returns True
""")
def take_a_figure_into_the_last_place_of_the_ring(it: RowChanges) -> Operation:
    it.poke(it.tables.device(1) + Device.RING_NEXT, Device.RING_LENGTH - 1)
    return lambda t: it.to.devices.sample(t, 1, 600.0, it.now)


@case("""
    device 1: PEAK_MB=700 PEAK_RESET=now
""")
def reset_the_peak_of_a_device(it: RowChanges) -> Operation:
    for row, mb in ((0, 900.0), (1, 800.0), (1, 700.0)):
        it.sample(row, mb)
    return lambda t: it.to.devices.reset_peaks(t, 0b10)


@case("""
    device 0: PEAK_RESET=now
    device 1: PEAK_MB=700 PEAK_RESET=now
    device 2: PEAK_RESET=now
""")
def reset_all_peaks(it: RowChanges) -> Operation:
    for row, mb in ((0, 900.0), (1, 800.0), (1, 700.0)):
        it.sample(row, mb)
    return lambda t: it.to.devices.reset_peaks(t)


@case("""
    device 0: PEAK_RESET=now BASELINE_MB=900
    device 1: PEAK_RESET=now BASELINE_MB=800
""")
def take_a_baseline(it: RowChanges) -> Operation:
    for row, mb in ((0, 900.0), (1, 800.0), (2, 700.0)):
        it.sample(row, mb)
    row = it.loading(devices=(0, 1))
    it.do(lambda t: it.to.isolation.begin(t, row))
    return lambda t: it.to.isolation.set_baseline(t, row)


# ---- what comes back ---------------------------------------------------------------------------------------


def unload_two(it: RowChanges) -> None:
    for row in it.idle(handle=b"1", mb=600.0), it.idle(handle=b"2", mb=400.0):
        it.sample(1, 1100.0)
        it.unload(row)


@case("""
    device 1: USED_MB=700 SAMPLED=now RETURNING_MB=0 EXTERNAL_MB=700 EXTERNAL_LEAST_MB=700 RETURN_COUNT=0
      RING_NEXT=3 RING[4]=now RING[5]=700
    returns True
""")
def memory_comes_back(it: RowChanges) -> Operation:
    unload_two(it)
    return lambda t: it.to.devices.sample(t, 1, 700.0, it.now)


@case("""
    device 1: USED_MB=1000 SAMPLED=now PEAK_MB=1000 RETURNING_MB=0 EXTERNAL_MB=1000 EXTERNAL_LEAST_MB=1000
      RETURN_COUNT=0 RING_NEXT=3 RING[4]=now RING[5]=1000
    returns True
""")
def memory_does_not_come_back(it: RowChanges) -> Operation:
    unload_two(it)
    it.wait(60)
    return lambda t: it.to.devices.sample(t, 1, 1000.0, it.now)


@case("""
    header: WRITTEN_OFF=700
    device 1: USED_MB=1000 SAMPLED=now PEAK_MB=1000 RETURNING_MB=0 EXTERNAL_MB=1000 EXTERNAL_LEAST_MB=1000
      RETURN_COUNT=0 RING_NEXT=3 RING[4]=now RING[5]=1000
    WRITTEN_OFF: value=700
    log mpmm NAMESPACE: 700 MB of 800 MB that were unloaded did not come back in time and are written off;
      memory_return_seconds sets the limit
    returns True
""")
def memory_is_written_off(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.members.lead(t, 2, b"made up", (True, True, False)))
    unload_two(it)
    it.wait(60)
    return lambda t: it.to.devices.sample(t, 1, 1000.0, it.now)


@case("""
    device 1: USED_MB=1000 SAMPLED=now RETURNING_MB=700 RING_NEXT=3 RETURNS[1]=400 RING[4]=now RING[5]=1000
    returns True
""")
def memory_is_late(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.members.lead(t, 2, b"made up", (True, True, False)))
    unload_two(it)
    return lambda t: it.to.devices.sample(t, 1, 1000.0, it.now)


@case("""
    device 1: USED_MB=1000 SAMPLED=now-2 RING_NEXT=3 RING[4]=now-2 RING[5]=1000
    returns True
""")
def a_late_figure_shows_what_comes_back(it: RowChanges) -> Operation:
    """The sample began before the second one was unloaded."""
    unload_two(it)
    return lambda t: it.to.devices.sample(t, 1, 1000.0, it.now - 2 * SECOND_NS, it.now - SECOND_NS)


@case("""
    device 1: RETURNING_MB=0 RETURN_COUNT=0
""")
def no_figure_shows_what_comes_back(it: RowChanges) -> Operation:
    unload_two(it)
    it.wait(60)
    return lambda t: it.to.ledgers.expire(t)


@case("""
    device 1: RETURNING_MB=0 RETURN_COUNT=0
""")
def nobody_measures_what_comes_back(it: RowChanges) -> Operation:
    unload_two(it)
    return lambda t: it.to.ledgers.await_nothing(t)


# ---- measurements ------------------------------------------------------------------------------------------


@case("""
    member 1: MEASURED_MB=70 PEAK_MB=70
""")
def measure_a_worker(it: RowChanges) -> Operation:
    return lambda t: it.to.measurements.measure(t, 1, {0: 30.0, 2: 40.0})


@case("""
    member 1: MEASURED_MB=80
""")
def measure_a_worker_that_has_had_more(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.measurements.measure(t, 1, {0: 90.0}))
    return lambda t: it.to.measurements.measure(t, 1, {0: 80.0})


@case("""
    member 3: MEASURED_MB=520 PEAK_MB=520
    model 1: ESTIMATE_MB=520 KNOWN=1 MEASURED=1
    instance 1: MB=520
    ESTIMATED: model=1 value=520
""")
def measure_a_server(it: RowChanges) -> Operation:
    it.active(server=3)
    return lambda t: it.to.measurements.measure(t, 3, {0: 30.0, 1: 520.0})


@case("""
    member 3: MEASURED_MB=530 PEAK_MB=530 SHARES=210 SHARES[1]=320
    model 1: ESTIMATE_MB=640 KNOWN=1 MEASURED=1
    instance 1: MB=530 SHARES=210 SHARES[1]=320
    ESTIMATED: model=1 value=640
""")
def measure_a_server_on_two_devices(it: RowChanges) -> Operation:
    it.idle(server=3, devices=(0, 1))
    return lambda t: it.to.measurements.measure(t, 3, {0: 210.0, 1: 320.0}, it.now)


@case("""
    member 3: MEASURED_MB=100 PEAK_MB=100
""")
def measure_a_server_before_its_copy_was_loaded(it: RowChanges) -> Operation:
    row = it.active(server=3)
    loaded = it.tables.instances[row].loaded_at
    return lambda t: it.to.measurements.measure(t, 3, {1: 100.0}, loaded)


@case("""
    member 3: MEASURED_MB=100 PEAK_MB=100
    model 1: ESTIMATE_MB=100 KNOWN=1 MEASURED=1
    instance 1: MB=100
    ESTIMATED: model=1 value=100
""")
def measure_a_server_just_after_its_copy_was_loaded(it: RowChanges) -> Operation:
    row = it.active(server=3)
    loaded = it.tables.instances[row].loaded_at
    return lambda t: it.to.measurements.measure(t, 3, {1: 100.0}, loaded + 1)


@case("""
    member 3: MEASURED_MB=100 PEAK_MB=100
""")
def measure_a_server_that_loads(it: RowChanges) -> Operation:
    row = it.loading()
    it.do(lambda t: it.to.loads.link_server(t, row, 3))
    return lambda t: it.to.measurements.measure(t, 3, {1: 100.0})


@case("""
    member 3: MEASURED_MB=40 PEAK_MB=40
    instance 1: MB=40
""")
def measure_a_server_that_is_suspended(it: RowChanges) -> Operation:
    it.suspended(server=3)
    return lambda t: it.to.measurements.measure(t, 3, {1: 40.0}, it.now)


@case("""
    member 3: MEASURED_MB=40 PEAK_MB=40
""")
def measure_a_server_before_it_was_suspended(it: RowChanges) -> Operation:
    row = it.suspended(server=3)
    since = it.tables.instances[row].since
    return lambda t: it.to.measurements.measure(t, 3, {1: 40.0}, since)


@case("""
    member 3: MEASURED_MB=550 PEAK_MB=550
""")
def measure_a_server_whose_copy_is_another_ones(it: RowChanges) -> Operation:
    row = it.active(server=3)
    it.poke(it.tables.instance(row) + Instance.SERVER, 5)
    return lambda t: it.to.measurements.measure(t, 3, {0: 30.0, 1: 520.0})


@case("""
    member 1: MEASURED_MB=nan
""")
def forget_what_a_process_takes(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.measurements.measure(t, 1, {0: 30.0}))
    return lambda t: it.to.measurements.forget(t, 1)


# ---- leases ------------------------------------------------------------------------------------------------


@case("""
    header: NEXT_TICKET=2 WAITING=2 NEWEST_TICKET=1 ENDS[1]=4 ENDS[3]=2
    model 3: STATE=LEASE GENERATION=10 ESTIMATE_MB=250 KNOWN=1 WAITING=1 USED_AT=now EVENTS_BEFORE=10 TAG=1
      TAG[1]='a'
    ticket 1: STATE=WAITING NUMBER=1 PRIORITY=1 MODEL=3 MEMBER=3 ENQUEUED=now DEADLINE=now NEED_MB=250 SPAN=1
      RANK=now+100
    QUEUED: model=3 ticket=1 value=250
    returns 1
""")
def claim_a_lease(it: RowChanges) -> Operation:
    return lambda t: it.to.tickets.enqueue(t, it.to.leases.claim(t, b"a", 250.0), 2, 1, 250.0, it.now)


@case("""
    header: ENDS[2]=2
    instance 1: STATE=LEASED MODEL=3 GENERATION=11 HOLDER=3 DEVICES=3 RESERVED_MB=250 SINCE=now
    device 0: CONFIGURED_AT=now
    device 1: CONFIGURED_AT=now
    LEASED: on=11 model=3 row=1 ticket=7 value=250 CHEAPEST_RELOAD 1/2/3/4 2/6
    returns 1
""")
def begin_a_lease(it: RowChanges) -> Operation:
    model = it.do(lambda t: it.to.leases.claim(t, b"lease", 250.0))
    return lambda t: it.to.leases.begin(t, model, 2, 0b11, 250.0, CAUSE, 8)


@case("""
    instance 1: PROGRAM=4711
""")
def link_a_program(it: RowChanges) -> Operation:
    row = it.leased()
    return lambda t: it.to.leases.link_program(t, row, 4711)


@case("""
    instance 1: MB=80 SHARES=40 SHARES[1]=40
""")
def measure_a_program(it: RowChanges) -> Operation:
    row = it.leased(devices=(0, 1))
    return lambda t: it.to.leases.measure_program(t, row, 80.0)


@case("""
    model 3: STATE=FREE USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 0: CONFIGURED_AT=now
    device 1: CONFIGURED_AT=now
    LEASE_ENDED: model=3 row=1 value=3
""")
def end_a_lease(it: RowChanges) -> Operation:
    row = it.leased(devices=(0, 1))
    return lambda t: it.to.leases.end(t, row)


@case("""
    instance 1: STATE=FREE SINCE=now
    device 1: CONFIGURED_AT=now
    LEASE_ENDED: model=3 row=1 value=5
""")
def end_a_lease_that_another_waits_for(it: RowChanges) -> Operation:
    row = it.leased()
    it.ticket(model=3)
    return lambda t: it.to.leases.end(t, row)


# ---- tickets and instances ---------------------------------------------------------------------------------


@case("""
    header: WAITING=1 ACTIVE=2 HITS=11
    model 1: ACTIVE=1 IDLE=0 WAITING=0 IDLE_HEAD=0 HITS=102
    instance 1: STATE=ACTIVE HOLDER=3 SINCE=now USES=2
    ticket 1: STATE=GRANTED INSTANCE=2 SIGNAL=1
    GRANTED: model=1 row=1 ticket=1 value=2 CHEAPEST_RELOAD 1/2/3/4 2/6
    wake ticket 1 SIGNAL
""")
def grant(it: RowChanges) -> Operation:
    row, waiter = it.idle(), it.ticket()
    return lambda t: it.to.hand_over.grant(t, waiter, row, CAUSE)


@case("""
    header: WAITING=5 ACTIVE=2 HITS=11
    model 1: ACTIVE=1 IDLE=1 WAITING=3 HITS=102
    instance 1: STATE=ACTIVE HOLDER=3 SINCE=now USES=2
    instance 2: NEXT=0
    ticket 1: STATE=GRANTED INSTANCE=2 SIGNAL=2
    ticket 4: SIGNAL=1 CALLED_UP=now
    GRANTED: model=1 row=1 ticket=1 value=11
    wake ticket 1 SIGNAL
    wake ticket 4 SIGNAL
""")
def grant_and_call_up_the_next(it: RowChanges) -> Operation:
    """It is the first one that waits for the same model to use a copy, where another copy is idle."""
    row, _ = it.idle(), it.idle(handle=b"2")
    waiter, *_ = it.ticket(), it.ticket(preload=1), it.ticket(model=2), it.ticket(member=1), it.ticket()
    it.do(lambda t: it.to.tickets.call_up(t, waiter))
    return lambda t: it.to.hand_over.grant(t, waiter, row)


@case("""
    header: WAITING=2 ACTIVE=2 HITS=11
    model 1: ACTIVE=1 IDLE=0 WAITING=1 IDLE_HEAD=0 HITS=102
    instance 1: STATE=ACTIVE HOLDER=3 SINCE=now USES=2
    ticket 1: STATE=GRANTED INSTANCE=2 SIGNAL=2
    GRANTED: model=1 row=1 ticket=1 value=5
    wake ticket 1 SIGNAL
""")
def grant_and_call_up_nobody_for_a_copy_that_is_not_there(it: RowChanges) -> Operation:
    row, waiter = it.idle(), it.ticket()
    it.ticket(member=1)
    it.do(lambda t: it.to.tickets.call_up(t, waiter))
    return lambda t: it.to.hand_over.grant(t, waiter, row)


@case("""
    header: WAITING=1 HITS=11
    model 1: WAITING=0 HITS=102 HOLD_S=11.3
    instance 1: HOLDER=3 SINCE=now USES=2
    ticket 1: STATE=GRANTED INSTANCE=2 SIGNAL=1
    RELEASED: model=1 row=1 value=5
    GRANTED: model=1 row=1 ticket=1 value=2 CHEAPEST_RELOAD 1/2/3/4 2/6
    wake ticket 1 SIGNAL
""")
def hand_over_what_is_in_use(it: RowChanges) -> Operation:
    row, waiter = it.active(), it.ticket()
    return lambda t: it.to.hand_over.from_holder(t, waiter, row, CAUSE)


@case("""
    header: WAITING=2 HITS=11
    model 1: WAITING=1 HITS=102
    instance 2: HOLDER=3 SINCE=now USES=2
    ticket 1: STATE=GRANTED INSTANCE=3 SIGNAL=2
    ticket 2: SIGNAL=1 CALLED_UP=now
    RELEASED: model=1 row=2 value=8
    GRANTED: model=1 row=2 ticket=1 value=5 CHEAPEST_RELOAD 1/2/3/4 2/6
    wake ticket 1 SIGNAL
    wake ticket 2 SIGNAL
""")
def hand_over_what_was_not_used_and_call_up_the_next(it: RowChanges) -> Operation:
    _, row, waiter = it.idle(handle=b"2"), it.active(), it.ticket()
    it.ticket(member=1)
    it.do(lambda t: it.to.tickets.call_up(t, waiter))
    return lambda t: it.to.hand_over.from_holder(t, waiter, row, CAUSE, used=False)


@case("""
    header: WAITING=1 LOADING=1 ISOLATED=3 ENDS[2]=2
    model 1: LOADING=1 WAITING=0 USED_AT=now
    instance 1: STATE=LOADING MODEL=1 GENERATION=10 HOLDER=3 DEVICES=3 MB=800 RESERVED_MB=800 SINCE=now
      SHARES=400 SHARES[1]=400
    ticket 1: STATE=LOAD INSTANCE=2 SIGNAL=1
    device 0: ISOLATED=2 BASELINE_MB=nan
    device 1: ISOLATED=2 BASELINE_MB=nan
    ISOLATION_BEGAN: model=1 row=1 value=0
    LOAD_BEGAN: on=11 model=1 row=1 ticket=1 value=800 CHEAPEST_RELOAD 1/2/3/4 2/6
    wake ticket 1 SIGNAL
    returns 1
""")
def allow_a_load(it: RowChanges) -> Operation:
    waiter = it.ticket()
    return lambda t: it.to.hand_over.allow_load(t, waiter, 0b11, 800.0, True, CAUSE)


@case("""
    header: WAITING=1 LOADING=1 ENDS[2]=2 STEADY=3
    model 1: LOADING=1 WAITING=0 USED_AT=now
    instance 1: STATE=LOADING MODEL=1 GENERATION=10 HOLDER=3 DEVICES=3 MB=800 RESERVED_MB=800 SINCE=now STEADY=1
      SHARES=400 SHARES[1]=400
    ticket 1: STATE=LOAD INSTANCE=2 SIGNAL=1
    LOAD_BEGAN: on=11 model=1 row=1 ticket=1 value=800
    wake ticket 1 SIGNAL
    returns 1
""")
def allow_a_steady_load(it: RowChanges) -> Operation:
    waiter = it.ticket(steady=True)
    return lambda t: it.to.hand_over.allow_load(t, waiter, 0b11, 800.0, False)


@case("""
    header: WAITING=2 LOADING=1 ENDS[2]=3
    model 1: LOADING=1 WAITING=1 USED_AT=now
    instance 2: STATE=LOADING MODEL=1 GENERATION=11 HOLDER=3 DEVICES=2 MB=800 RESERVED_MB=800 SINCE=now
    ticket 1: STATE=LOAD INSTANCE=3 SIGNAL=2
    ticket 2: SIGNAL=1 CALLED_UP=now
    LOAD_BEGAN: on=10 model=1 row=2 ticket=1 value=800
    wake ticket 1 SIGNAL
    wake ticket 2 SIGNAL
    returns 2
""")
def allow_a_load_and_call_up_the_next(it: RowChanges) -> Operation:
    it.idle(handle=b"2")
    waiter, _ = it.ticket(), it.ticket(member=1)
    it.do(lambda t: it.to.tickets.call_up(t, waiter))
    return lambda t: it.to.hand_over.allow_load(t, waiter, 0b10, 800.0, False)


@case("""
    header: WAITING=1 ENDS[2]=2 STEADY=2
    model 3: WAITING=0
    instance 1: STATE=LEASED MODEL=3 GENERATION=11 HOLDER=3 DEVICES=2 RESERVED_MB=250 SINCE=now STEADY=1
    ticket 1: STATE=GRANTED INSTANCE=2 SIGNAL=1
    device 1: CONFIGURED_AT=now
    LEASED: on=10 model=3 row=1 ticket=1 value=250 CHEAPEST_RELOAD 1/2/3/4 2/6
    wake ticket 1 SIGNAL
    returns 1
""")
def allow_a_lease(it: RowChanges) -> Operation:
    model = it.do(lambda t: it.to.leases.claim(t, b"lease", 250.0))
    waiter = it.ticket(model=model, steady=True)
    return lambda t: it.to.hand_over.allow_load(t, waiter, 0b10, 250.0, False, CAUSE)


@case("""
    header: WAITING=1 LOADING=1
    model 1: LOADING=1 WAITING=0 USED_AT=now SUSPENDED=0
    instance 1: STATE=RESUMING HOLDER=3 MB=500 RESERVED_MB=500 SINCE=now
    ticket 1: STATE=LOAD INSTANCE=2 SIGNAL=1
    RESUME_BEGAN: on=10 model=1 row=1 ticket=1 value=500 CHEAPEST_RELOAD 1/2/3/4 2/6
    wake ticket 1 SIGNAL
""")
def allow_a_resume(it: RowChanges) -> Operation:
    row, waiter = it.suspended(), it.ticket()
    return lambda t: it.to.hand_over.allow_resume(t, waiter, row, CAUSE)


@case("""
    header: WAITING=2 LOADING=1
    model 1: LOADING=1 WAITING=1 USED_AT=now SUSPENDED=0
    instance 1: STATE=RESUMING HOLDER=3 MB=500 RESERVED_MB=500 SINCE=now
    ticket 1: STATE=LOAD INSTANCE=2 SIGNAL=2
    ticket 2: SIGNAL=1 CALLED_UP=now
    RESUME_BEGAN: on=10 model=1 row=1 ticket=1 value=500
    wake ticket 1 SIGNAL
    wake ticket 2 SIGNAL
""")
def allow_a_resume_and_call_up_the_next(it: RowChanges) -> Operation:
    row, _, waiter, _ = it.suspended(), it.idle(handle=b"2"), it.ticket(), it.ticket(member=1)
    it.do(lambda t: it.to.tickets.call_up(t, waiter))
    return lambda t: it.to.hand_over.allow_resume(t, waiter, row)


@case("""
    ticket 1: STATE=FREE
""")
def consume_an_answer(it: RowChanges) -> Operation:
    row, waiter = it.idle(), it.ticket()
    it.do(lambda t: it.to.hand_over.grant(t, waiter, row))
    return lambda t: it.to.hand_over.consume_answer(t, waiter)


@case("""
    model 3: STATE=FREE USED_AT=now
    ticket 1: STATE=FREE
""")
def consume_the_refusal_of_a_lease(it: RowChanges) -> Operation:
    model = it.do(lambda t: it.to.leases.claim(t, b"lease", 250.0))
    waiter = it.ticket(model=model)
    it.do(lambda t: it.to.tickets.refuse(t, waiter))
    return lambda t: it.to.hand_over.consume_answer(t, waiter)


@case("""
    header: WAITING=1
    model 1: WAITING=0
    ticket 1: STATE=FREE
    LEFT_QUEUE: model=1 ticket=1 value=2
""")
def leave_the_queue(it: RowChanges) -> Operation:
    waiter = it.ticket()
    return lambda t: it.to.hand_over.leave_queue(t, waiter)


@case("""
    header: WAITING=2
    model 1: WAITING=1
    ticket 1: STATE=FREE
    ticket 2: SIGNAL=1 CALLED_UP=now
    LEFT_QUEUE: model=1 ticket=1 value=5
    wake ticket 2 SIGNAL
""")
def leave_the_queue_when_called_up(it: RowChanges) -> Operation:
    waiter, _ = it.ticket(), it.ticket(member=1)
    it.do(lambda t: it.to.tickets.call_up(t, waiter))
    return lambda t: it.to.hand_over.leave_queue(t, waiter)


@case("""
    header: WAITING=1
    model 3: STATE=FREE WAITING=0 USED_AT=now
    ticket 1: STATE=FREE
    LEFT_QUEUE: model=3 ticket=1 value=2
""")
def leave_the_queue_for_a_lease(it: RowChanges) -> Operation:
    model = it.do(lambda t: it.to.leases.claim(t, b"lease", 250.0))
    waiter = it.ticket(model=model)
    return lambda t: it.to.hand_over.leave_queue(t, waiter)


@case("""
    header: ACTIVE=1
    model 1: ACTIVE=0 IDLE=1 IDLE_HEAD=2 HOLD_S=10.09
    instance 1: STATE=IDLE HOLDER=0 SINCE=now
    ticket 1: STATE=FREE
    LEFT_QUEUE: model=1 ticket=1 value=3
    RELEASED: model=1 row=1 value=1
""")
def leave_a_copy_that_was_granted(it: RowChanges) -> Operation:
    row, waiter = it.idle(), it.ticket()
    it.do(lambda t: it.to.hand_over.grant(t, waiter, row))
    return lambda t: it.to.hand_over.leave_queue(t, waiter)


@case("""
    model 3: STATE=FREE USED_AT=now
    instance 1: STATE=FREE SINCE=now
    ticket 1: STATE=FREE
    device 1: CONFIGURED_AT=now
    LEFT_QUEUE: model=3 ticket=1 value=3
    LEASE_ENDED: model=3 row=1 value=1
""")
def leave_a_lease_that_was_granted(it: RowChanges) -> Operation:
    model = it.do(lambda t: it.to.leases.claim(t, b"lease", 250.0))
    waiter = it.ticket(model=model)
    it.do(lambda t: it.to.hand_over.allow_load(t, waiter, 0b10, 250.0, False))
    return lambda t: it.to.hand_over.leave_queue(t, waiter)


@case("""
    header: LOADING=0 FAILED_LOADS=41
    model 1: LOADING=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    ticket 1: STATE=FREE
    device 1: CONFIGURED_AT=now
    LEFT_QUEUE: model=1 ticket=1 value=3
    LOAD_FAILED: model=1 row=1 value=1
""")
def leave_a_load_that_was_allowed(it: RowChanges) -> Operation:
    waiter = it.ticket()
    it.do(lambda t: it.to.hand_over.allow_load(t, waiter, 0b10, 250.0, False))
    return lambda t: it.to.hand_over.leave_queue(t, waiter)


@case("""
    header: LOADING=0
    model 1: LOADING=0 SUSPENDED=1
    instance 1: STATE=SUSPENDED HOLDER=0 MB=0 RESERVED_MB=0 SINCE=now
    ticket 1: STATE=FREE
    LEFT_QUEUE: model=1 ticket=1 value=3
    RESUME_GIVEN_UP: model=1 row=1 value=1
""")
def leave_a_resume_that_was_allowed(it: RowChanges) -> Operation:
    row, waiter = it.suspended(), it.ticket()
    it.do(lambda t: it.to.hand_over.allow_resume(t, waiter, row))
    return lambda t: it.to.hand_over.leave_queue(t, waiter)


@case("""
    header: WAITING=2 ACTIVE=1
    model 1: LOADED=0 ACTIVE=0 WAITING=1 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    ticket 1: STATE=WAITING INSTANCE=0
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    LOST: model=1 row=1 value=500
""")
def lose_a_copy_that_was_granted(it: RowChanges) -> Operation:
    row, waiter = it.idle(), it.ticket()
    it.do(lambda t: it.to.hand_over.grant(t, waiter, row))
    return lambda t: it.to.holds.discard(t, row)


# ---- members -----------------------------------------------------------------------------------------------


@case("""
    header: ENDS=6
    member 5: STATE=GUEST PID=999 STARTED_WALL=now GENERATION=10 ATTACHED=now MEASURED_MB=nan NAME=9 NAME[1]='a
      progra' NAME[2]='m'
    JOINED: value=5
""")
def join(it: RowChanges) -> Operation:
    return lambda t: it.to.members.join(t, 5, Member.GUEST, 999, it.now, b"a program")


@case("""
    member 3: STATE=WORKER PID=999 STARTED_WALL=now GENERATION=11 ATTACHED=now INSTANCE=0 MEASURED_MB=nan
      PEAK_MB=0 MEASURES=0 NAME=6 NAME[1]='worker'
    JOINED: value=3
""")
def join_in_the_row_of_another_one(it: RowChanges) -> Operation:
    it.active(server=3)
    it.do(lambda t: it.to.measurements.measure(t, 3, {1: 520.0}))
    it.do(lambda t: it.to.members.note_source(t, 3, 2))
    it.do(lambda t: it.to.members.reap(t, 3))
    return lambda t: it.to.members.join(t, 3, Member.WORKER, 999, it.now, b"worker")


@case("""
    member 1: STATE=FREE
    LEFT: value=4.1943e+06
    wake_all_with_news
    returns True
""")
def leave(it: RowChanges) -> Operation:
    return lambda t: it.to.members.leave(t, 1)


@case("""
    header: LEADER=0
    member 1: STATE=FREE
    LEFT: value=4.1943e+06
    wake_all_with_news
    returns True
""")
def the_leader_leaves(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.members.lead(t, 1, b"made up", (True, False, False)))
    return lambda t: it.to.members.leave(t, 1)


@case("""
    header: WAITING=1 ACTIVE=1 LOADING=0 FAILED_LOADS=41 REAPS=1
    member 0: BELL=2
    member 1: STATE=FREE
    model 1: LOADED=1 ACTIVE=0 LOADING=0 WAITING=0 IDLE_HEAD=2 USED_AT=now HOLD_S=13.8049 PINS=0
    model 3: STATE=FREE USED_AT=now
    instance 1: STATE=IDLE HOLDER=0 SINCE=now
    instance 2: STATE=FREE SINCE=now
    instance 3: STATE=FREE SINCE=now
    instance 4: STATE=FREE SINCE=now
    instance 5: HOLDER=1 HANDED_AT=now
    instance 6: HOLDER=1 SINCE=now
    ticket 1: STATE=FREE
    pin 1: STATE=0
    device 1: RETURNING_MB=1100 RETURN_COUNT=2 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
      RETURNS[3]=now RETURNS[4]=600 RETURNS[5]=nan
    LEFT_QUEUE: model=1 ticket=1 value=3
    UNPINNED: model=1 value=1
    RELEASED: model=1 row=1 value=52
    LOAD_FAILED: model=1 row=3 value=40
    LEASE_ENDED: model=3 row=4 value=37
    REAPED: value=4.1943e+06
    wake_all_with_news
    wake member 0 BELL
    wake member 0 BELL
    returns True
""")
def reap_a_worker(it: RowChanges) -> Operation:
    """It has loaded, held, unloaded, suspended and waited, has a lease and a pin, and of others some are left."""
    it.active(handle=b"held")
    it.idle(handle=b"")
    it.loading(member=1)
    it.leased(member=1)
    unloading = it.unloading(handle=b"unloading")
    it.do(lambda t: it.to.unloads.hand_over(t, unloading, 1))
    suspending = it.suspending(handle=b"suspending")
    it.do(lambda t: it.to.suspensions.hand_over(t, suspending, 1))
    it.ticket(member=1)
    it.do(lambda t: it.to.pins.pin(t, 1, 1))
    return lambda t: it.to.members.reap(t, 1)


@case("""
    header: LOADING=0 REAPS=1
    member 0: BELL=1
    member 1: STATE=FREE BELL=1
    model 1: LOADING=0 SUSPENDED=1
    instance 1: STATE=SUSPENDING HOLDER=1 RESERVED_MB=0 SINCE=now
    RESUME_GIVEN_UP: model=1 row=1 value=7
    REAPED: value=4.1943e+06
    wake_all_with_news
    wake member 1 BELL
    wake member 0 BELL
    returns True
""")
def reap_a_worker_that_resumes(it: RowChanges) -> Operation:
    it.resuming()
    return lambda t: it.to.members.reap(t, 1)


@case("""
    header: REAPS=1
    member 3: STATE=FREE
    model 1: LOADED=2 IDLE=0 IDLE_HEAD=0 USED_AT=now SEATS=0
    instance 1: SERVER=0 SEATS=0 MB=0 UNLOAD_ON_RELEASE=1
    instance 2: STATE=FREE SEAT_OF=0 SINCE=now
    instance 3: SEAT_OF=0 UNLOAD_ON_RELEASE=1
    device 1: RETURNING_MB=500 RETURN_COUNT=1 RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    LOST: model=1 row=1 value=500
    REAPED: value=4.19431e+06
    wake_all_with_news
    returns True
""")
def reap_the_server_of_a_copy_in_use(it: RowChanges) -> Operation:
    it.users(3)
    row = it.active(server=3)
    it.do(lambda t: it.to.holds.take_idle(t, row + 2, 3))
    return lambda t: it.to.members.reap(t, 3)


@case("""
    header: REAPS=1
    member 3: STATE=FREE
    model 1: LOADED=0 IDLE=0 IDLE_HEAD=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    LOST: model=1 row=1 value=500
    REAPED: value=4.19431e+06
    wake_all_with_news
    returns True
""")
def reap_the_server_of_an_idle_copy(it: RowChanges) -> Operation:
    it.idle(server=3)
    return lambda t: it.to.members.reap(t, 3)


@case("""
    header: REAPS=1
    member 3: STATE=FREE
    instance 1: SERVER=0 UNLOAD_ON_RELEASE=1
    LOST: model=1 row=1 value=600
    REAPED: value=4.19431e+06
    wake_all_with_news
    returns True
""")
def reap_the_server_of_a_load(it: RowChanges) -> Operation:
    row = it.loading()
    it.do(lambda t: it.to.loads.link_server(t, row, 3))
    return lambda t: it.to.members.reap(t, 3)


@case("""
    header: REAPS=1
    member 3: STATE=FREE
    model 1: USED_AT=now SUSPENDED=0
    instance 1: STATE=FREE SINCE=now
    device 1: CONFIGURED_AT=now
    LOST: model=1 row=1 value=0
    REAPED: value=4.19431e+06
    wake_all_with_news
    returns True
""")
def reap_the_server_of_a_suspended_copy(it: RowChanges) -> Operation:
    it.suspended(server=3)
    return lambda t: it.to.members.reap(t, 3)


@case("""
    member 3: STATE=FREE
    instance 1: SERVER=0 MB=0 UNLOAD_ON_RELEASE=1
    device 1: RETURNING_MB=500 RETURN_COUNT=1 RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    LOST: model=1 row=1 value=500
    LEFT: value=4.19431e+06
    wake_all_with_news
    returns True
""")
def reap_a_server_that_was_ended(it: RowChanges) -> Operation:
    it.unloading(server=3)
    return lambda t: it.to.members.reap(t, 3)


@case("""
    member 4: STATE=FREE
    LEFT: value=4.19431e+06
    wake_all_with_news
    returns True
""")
def reap_a_server_of_nothing(it: RowChanges) -> Operation:
    return lambda t: it.to.members.reap(t, 4)


@case("""
    header: LEADER=2 LEADER_SINCE=now POLLED=now LEADERS=2 SOURCE_COUNTS_NAMED=1 SOURCE_MEASURES_PROCESSES=0
      SOURCE_FREES_LATE=1 SOURCE_NAME[1]='another'
    LEADER: value=1
""")
def lead(it: RowChanges) -> Operation:
    return lambda t: it.to.members.lead(t, 1, b"another", (False, True, False), True)


@case("""
    header: LEADER=2 LEADER_SINCE=now POLLED=now LEADERS=2 SOURCE_MEASURES_PROCESSES=0 SOURCE_ACCOUNTING_ONLY=1
      SOURCE_NAME=6 SOURCE_NAME[1]='booked'
    device 1: RETURNING_MB=0 RETURN_COUNT=0
    LEADER: value=1
""")
def lead_without_a_source(it: RowChanges) -> Operation:
    unload_two(it)
    return lambda t: it.to.members.lead(t, 1, b"booked", (False, False, True))


@case("""
    member 1: MEASURES=2
""")
def note_a_source(it: RowChanges) -> Operation:
    return lambda t: it.to.members.note_source(t, 1, 2)


@case("""
    header: POLLED=now
""")
def note_a_poll(it: RowChanges) -> Operation:
    return lambda t: it.to.members.note_poll(t)


@case("""
    header: POLLED=now
""")
def note_a_poll_that_shows_processes(it: RowChanges) -> Operation:
    return lambda t: it.to.members.note_poll(t, True)


@case("""
    header: POLLED=now SOURCE_MEASURES_PROCESSES=0
""")
def note_a_poll_that_shows_none(it: RowChanges) -> Operation:
    return lambda t: it.to.members.note_poll(t, False)


@case("""
    member 1: BELL=1
    wake member 1 BELL
""")
def ring(it: RowChanges) -> Operation:
    return lambda t: it.to.members.ring(t, 1)


@case("""
    header: SETTINGS[13]=21 SETTINGS_CHANGED=now
    member 0: BELL=1
    member 1: BELL=1
    member 2: BELL=1
    SETTINGS: value=0
    wake member 0 BELL
    wake member 1 BELL
    wake member 2 BELL
""")
def change_settings(it: RowChanges) -> Operation:
    return lambda t: it.to.members.set_settings(t, Settings(memory_return_seconds=21.0, peak_window_seconds=30.0))


# ---- reset -------------------------------------------------------------------------------------------------


@case("""
    header: WAITING=0 ACTIVE=0 RESETS=1
    member 0: BELL=3
    member 1: BELL=1
    model 0: LOADED=0 ACTIVE=0 UNLOADING=1 WAITING=0
    model 1: LOADED=0 ACTIVE=0 IDLE=0 UNLOADING=1 IDLE_HEAD=0 USED_AT=now SEATS=0
    model 2: LOADED=0 ACTIVE=0 IDLE=0 UNLOADING=2 IDLE_HEAD=0 FAILURES=0 FAILED_AT=0
    instance 0: STATE=UNLOADING HOLDER=1 SINCE=now
    instance 1: STATE=UNLOADING HOLDER=1 SEATS=0 SINCE=now
    instance 2: STATE=FREE SEAT_OF=0 SINCE=now
    instance 3: STATE=UNLOADING HOLDER=1 SINCE=now
    instance 4: STATE=UNLOADING SINCE=now
    ticket 0: STATE=RESET SIGNAL=1
    UNLOAD_BEGAN: model=0 row=0 value=50 RESET 0/0/0/0 0/0
    UNLOAD_BEGAN: model=1 row=1 value=500 RESET 0/0/0/0 0/0
    UNLOAD_BEGAN: model=2 row=3 value=500 RESET 0/0/0/0 0/0
    UNLOAD_BEGAN: model=2 row=4 value=500 RESET 0/0/0/0 0/0
    RESET: value=0
    wake ticket 0 SIGNAL
    wake member 0 BELL
    wake member 0 BELL
    wake member 0 BELL
    wake member 1 BELL
""")
def reset_what_is_in_use_and_idle(it: RowChanges) -> Operation:
    it.users(2)
    it.active()
    it.idle(model=2, handle=b"2")
    it.active(model=2, handle=b"")
    it.do(lambda t: it.to.models.note_failure(t, 2))
    return lambda t: it.to.reset(t)


@case("""
    header: WAITING=0 ACTIVE=0 LOADING=0 RESETS=1 FAILED_LOADS=41 SUSPEND_FAILURES=2
    member 0: BELL=4
    model 0: LOADED=0 ACTIVE=0 UNLOADING=1 WAITING=0
    model 1: LOADING=0 UNLOADING=4 USED_AT=now SUSPENDED=0
    instance 0: STATE=UNLOADING HOLDER=1 SINCE=now
    instance 1: STATE=UNLOADING HOLDER=1 SINCE=now DEVICE_MB=0
    instance 2: STATE=UNLOADING HOLDER=1 SINCE=now DEVICE_MB=0
    instance 3: STATE=UNLOADING HOLDER=1 RESERVED_MB=0 SINCE=now DEVICE_MB=0
    instance 5: STATE=FREE SINCE=now
    ticket 0: STATE=RESET SIGNAL=1
    device 1: RETURNING_MB=1600 RETURN_COUNT=3 CONFIGURED_AT=now RETURNS[6]=now RETURNS[7]=600 RETURNS[8]=nan
    UNLOAD_BEGAN: model=0 row=0 value=50 RESET 0/0/0/0 0/0
    SUSPEND_FAILED: model=1 row=1 value=74
    UNLOAD_BEGAN: model=1 row=2 value=0 RESET 0/0/0/0 0/0
    RESUME_FAILED: model=1 row=3 value=27
    LOAD_FAILED: model=1 row=5 value=6
    RESET: value=0
    wake ticket 0 SIGNAL
    wake member 0 BELL
    wake member 0 BELL
    wake member 0 BELL
    wake member 0 BELL
""")
def reset_what_loads_and_is_suspended(it: RowChanges) -> Operation:
    for number, make in enumerate((it.suspending, it.suspended, it.resuming, it.unloading)):
        make(handle=b"%d" % number)
    it.loading()
    it.leased()
    return lambda t: it.to.reset(t)


@case("""
    header: WAITING=0 ACTIVE=0 ISOLATED=0 RESETS=1
    member 0: BELL=2
    model 0: LOADED=0 ACTIVE=0 UNLOADING=1 WAITING=0
    model 1: LOADED=0 ACTIVE=0 UNLOADING=1
    instance 0: STATE=UNLOADING HOLDER=1 SINCE=now
    instance 1: STATE=UNLOADING HOLDER=1 SINCE=now
    ticket 0: STATE=RESET SIGNAL=1
    device 1: ISOLATED=0
    UNLOAD_BEGAN: model=0 row=0 value=50 RESET 0/0/0/0 0/0
    ISOLATION_ENDED: model=1 row=1 value=0
    UNLOAD_BEGAN: model=1 row=1 value=400 RESET 0/0/0/0 0/0
    RESET: value=0
    wake ticket 0 SIGNAL
    wake member 0 BELL
    wake member 0 BELL
""")
def reset_what_runs_alone(it: RowChanges) -> Operation:
    row = it.loading()
    it.do(lambda t: it.to.isolation.begin(t, row))
    it.do(lambda t: it.to.loads.end(t, row, b"handle", 400.0, 0, False))
    return lambda t: it.to.reset(t)


@case("""
    header: WAITING=0 ACTIVE=0 LOADING=0 RESETS=1 FAILED_LOADS=41
    member 0: BELL=2
    model 0: LOADED=0 ACTIVE=0 UNLOADING=1 WAITING=0
    model 1: LOADED=0 ACTIVE=0 LOADING=0 UNLOADING=1 WAITING=0 USED_AT=now HOLD_S=10.19
    instance 0: STATE=UNLOADING HOLDER=1 SINCE=now
    instance 1: STATE=UNLOADING HOLDER=1 SINCE=now
    instance 2: STATE=FREE SINCE=now
    ticket 0: STATE=RESET SIGNAL=1
    ticket 1: STATE=RESET INSTANCE=0 SIGNAL=2
    ticket 2: STATE=RESET INSTANCE=0 SIGNAL=2
    ticket 3: STATE=RESET SIGNAL=1
    device 1: CONFIGURED_AT=now
    RELEASED: model=1 row=1 value=2
    LOAD_FAILED: model=1 row=2 value=1
    UNLOAD_BEGAN: model=0 row=0 value=50 RESET 0/0/0/0 0/0
    UNLOAD_BEGAN: model=1 row=1 value=500 RESET 0/0/0/0 0/0
    RESET: value=0
    wake ticket 0 SIGNAL
    wake ticket 1 SIGNAL
    wake ticket 2 SIGNAL
    wake ticket 3 SIGNAL
    wake member 0 BELL
    wake member 0 BELL
""")
def reset_waiters(it: RowChanges) -> Operation:
    row = it.idle()
    granted, loads, _ = it.ticket(), it.ticket(), it.ticket()
    it.do(lambda t: it.to.hand_over.grant(t, granted, row))
    it.do(lambda t: it.to.hand_over.allow_load(t, loads, 0b10, 250.0, False))
    return lambda t: it.to.reset(t)


@case("""
    header: WAITING=1 ACTIVE=0 RESETS=1
    member 0: BELL=1
    model 0: LOADED=0 ACTIVE=0 UNLOADING=1 WAITING=0
    instance 0: STATE=UNLOADING HOLDER=1 SINCE=now
    ticket 0: STATE=RESET SIGNAL=1
    UNLOAD_BEGAN: model=0 row=0 value=50 RESET 0/0/0/0 0/0
    RESET: value=0
    wake ticket 0 SIGNAL
    wake member 0 BELL
""")
def reset_nothing_that_is_newer(it: RowChanges) -> Operation:
    number, generation = it.words[Header.NEXT_TICKET], it.words[Header.NEXT_GENERATION]
    it.ticket()
    it.idle()
    return lambda t: it.to.reset(t, (number, generation))


# ---- the test ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_a_transition_changes_just_what_it_is_to(it: RowChanges, name: str) -> None:
    make, expected = CASES[name]
    lines = it.changes(make(it)).splitlines()
    # Long lines go on in the next one, further in.
    told = textwrap.dedent(expected.strip("\n")).replace("\n  ", " ").splitlines()
    assert lines == told
