"""What the transitions of loads and isolation change, word by word; see `row_changes`."""

from __future__ import annotations

import pytest
from row_changes import CAUSE, Cases, Operation, RowChanges
from row_changes import it as it  # the fixture

from mpmm.shared_state.layout import Instance, Model

CASES = Cases()


@CASES.case("""
    header: LOADING=1 ENDS[2]=2
    model 1: LOADING=1 USED_AT=now
    instance 1: STATE=LOADING MODEL=1 GENERATION=10 HOLDER=3 DEVICES=2 MB=600 RESERVED_MB=600 SINCE=now
    LOAD_BEGAN: on=10 model=1 row=1 value=600
    returns 1
""")
def begin_to_load(it: RowChanges) -> Operation:
    return lambda t: it.to.loads.begin(t, 1, 2, 0b10, 600.0, False)


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
    member 4: INSTANCE=2
    instance 1: SERVER=5
""")
def link_a_server(it: RowChanges) -> Operation:
    row = it.loading()
    return lambda t: it.to.loads.link_server(t, row, 4)


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
    header: STEADY=3
    instance 1: STEADY=1
""")
def begin_a_steady_load(it: RowChanges) -> Operation:
    row = it.loading(devices=(0, 1))
    return lambda t: it.to.isolation.begin_steady(t, row)


@CASES.case("""
    header: LOADING=0 FAILED_LOADS=41
    model 1: LOADING=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: CONFIGURED_AT=now
    LOAD_FAILED: model=1 row=1 value=2
""")
def fail_to_load(it: RowChanges) -> Operation:
    row = it.loading()
    return lambda t: it.to.loads.fail(t, row)


@CASES.case("""
    header: LOADING=0 FAILED_LOADS=41
    model 1: LOADING=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: RETURNING_MB=600 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=600 RETURNS[2]=nan
    LOAD_FAILED: model=1 row=1 value=2
""")
def give_up_a_load(it: RowChanges) -> Operation:
    row = it.loading()
    return lambda t: it.to.loads.give_up(t, row)


@CASES.case("""
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


@CASES.case("""
    header: LOADING=0 FAILED_LOADS=41
    model 1: LOADING=0 UNLOADING=1
    instance 1: STATE=UNLOADING RESERVED_MB=0 SINCE=now HANDLE=15 HANDLE[1]='tag of a' HANDLE[2]=' server'
    LOAD_FAILED: model=1 row=1 value=3
""")
def abandon_a_load_with_a_server(it: RowChanges) -> Operation:
    row = it.loading()
    it.do(lambda t: it.to.loads.link_server(t, row, 3))
    return lambda t: it.to.loads.abandon(t, row)


@CASES.case("""
    header: ACTIVE=3 LOADING=0 LOADS=23
    model 1: LOADED=2 ACTIVE=2 LOADING=0 LOADS=104 LOAD_S=9.29
    instance 2: STATE=ACTIVE OWNER=2 MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=2 value=2
    returns False
""")
def end_a_load_of_an_object_beside_another_one(it: RowChanges) -> Operation:
    it.active(handle=b"")
    row = it.loading()
    return lambda t: it.to.loads.end(t, row, b"", 500.0, 0, False)


@CASES.case("""
    header: ACTIVE=4 LOADING=0 LOADS=24
    model 1: LOADED=3 ACTIVE=3 LOADING=0 LOADS=105 LOAD_S=8.561
    instance 3: STATE=ACTIVE MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1 HANDLE=21 HANDLE[1]='somethin'
      HANDLE[2]='g and th' HANDLE[3]='e end'
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=3 value=2
    returns False
""")
def end_a_load_of_a_handle_with_the_same_end_as_another(it: RowChanges) -> Operation:
    it.active(handle=b"beginning and the end")
    it.active(handle=b"an end")
    row = it.loading()
    return lambda t: it.to.loads.end(t, row, b"something and the end", 500.0, 0, False)


@CASES.case("""
    header: ACTIVE=3 LOADING=0 LOADS=23
    model 1: LOADED=2 ACTIVE=2 LOADING=0 LOADS=104 LOAD_S=9.38
    instance 2: STATE=ACTIVE MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1 HANDLE=6 HANDLE[1]='handle'
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=2 value=2
    returns False
""")
def end_a_load_of_a_handle_whose_last_copy_is_lost(it: RowChanges) -> Operation:
    it.active(server=3)
    it.do(lambda t: it.to.members.reap(t, 3))
    row = it.loading()
    return lambda t: it.to.loads.end(t, row, b"handle", 500.0, 0, False)


@CASES.case("""
    header: ACTIVE=2 LOADING=0 LOADS=23
    model 1: LOADED=1 ACTIVE=1 LOADING=0 LOADS=104 LOAD_S=9.29
    instance 2: STATE=ACTIVE MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1 HANDLE=6 HANDLE[1]='handle'
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=2 value=2
    returns False
""")
def end_a_load_of_the_handle_of_what_is_unloaded(it: RowChanges) -> Operation:
    it.unloading()
    row = it.loading()
    return lambda t: it.to.loads.end(t, row, b"handle", 500.0, 0, False)


@CASES.case("""
    header: ACTIVE=2 LOADING=0 LOADS=22
    model 1: LOADED=1 ACTIVE=1 LOADING=0 LOADS=103 SHARES=1 LOAD_S=1e-09
    instance 1: STATE=ACTIVE MB=500 RESERVED_MB=0 LOADED_AT=now USES=1 HANDLE=6 HANDLE[1]='handle'
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=1 value=0
    returns False
""")
def end_a_load_at_once(it: RowChanges) -> Operation:
    it.poke(it.tables.model(1) + Model.LOAD_S, 0.0)
    row = it.loading()
    it.poke(it.tables.instance(row) + Instance.SINCE, it.now)
    return lambda t: it.to.loads.end(t, row, b"handle", 500.0, 0, False)


@CASES.case("""
    header: LOADING=0 ISOLATED=0 FAILED_LOADS=41
    model 1: LOADING=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 0: ISOLATED=0 CONFIGURED_AT=now
    device 1: ISOLATED=0 CONFIGURED_AT=now
    LOAD_FAILED: model=1 row=1 value=3
    ISOLATION_ENDED: model=1 row=1 value=0
""")
def fail_to_load_alone(it: RowChanges) -> Operation:
    row = it.loading(devices=(0, 1))
    it.do(lambda t: it.to.isolation.begin(t, row))
    return lambda t: it.to.loads.fail(t, row)


@CASES.case("""
    header: LOADING=0 FAILED_LOADS=41 STEADY=0
    member 0: BELL=1
    member 1: BELL=1
    member 2: BELL=2
    model 1: LOADING=0 USED_AT=now
    instance 2: SINCE=now
    instance 4: STATE=FREE SINCE=now STEADY=0
    device 1: CONFIGURED_AT=now
    LOAD_FAILED: model=1 row=4 value=3
    wake member 0 BELL
    wake member 1 BELL
    wake member 2 BELL
""")
def fail_a_steady_load_beside_others(it: RowChanges) -> Operation:
    """The unloads and suspensions on its device that had to wait for it begin now, and no others."""
    it.idle(handle=b"1")
    it.suspending(handle=b"2")
    it.active(handle=b"3")
    row = it.loading()
    it.do(lambda t: it.to.isolation.begin_steady(t, row))
    return lambda t: it.to.loads.fail(t, row)


@CASES.case("""
    header: ACTIVE=2 LOADING=1 LOADS=22
    model 1: LOADED=1 ACTIVE=1 LOADING=1 LOADS=103 SHARES=1 LOAD_S=10.2
    instance 2: STATE=ACTIVE MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1 HANDLE=6 HANDLE[1]='handle'
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=2 value=3
    returns False
""")
def end_a_load_beside_a_steady_one(it: RowChanges) -> Operation:
    steady, row = it.loading(devices=(0,)), it.loading()
    it.do(lambda t: it.to.isolation.begin_steady(t, steady))
    return lambda t: it.to.loads.end(t, row, b"handle", 500.0, 0, False)


@CASES.case("""
    header: ACTIVE=3 LOADING=0 LOADS=23
    model 1: LOADED=2 ACTIVE=2 LOADING=0 LOADS=104 LOAD_S=9.29
    instance 2: STATE=ACTIVE OWNER=2 MB=500 RESERVED_MB=0 SINCE=now LOADED_AT=now USES=1
    device 1: CONFIGURED_AT=now
    LOAD_ENDED: model=1 row=2 value=2
    returns False
""")
def end_the_load_of_an_object_beside_another_one(it: RowChanges) -> Operation:
    it.active(handle=b"", devices=(0,))
    row = it.loading()
    return lambda t: it.to.loads.end(t, row, b"", 500.0, 0, False)


@pytest.mark.parametrize("name", CASES.names)
def test_a_transition_of_loads_changes_just_what_it_is_to(it: RowChanges, name: str) -> None:
    CASES.check(it, name)
