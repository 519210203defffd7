"""What the transitions of suspensions and leases change, word by word; see `row_changes`."""

from __future__ import annotations

import pytest
from row_changes import CAUSE, Cases, Operation, RowChanges
from row_changes import it as it  # the fixture

from mpmm.policy.suspension import Unsuspendable
from mpmm.shared_state.layout import Header, Instance, Member

CASES = Cases()


# ---- suspensions -----------------------------------------------------------------------------------------------


@CASES.case("""
    instance 1: WAY=2
""")
def note_how_it_is_suspended(it: RowChanges) -> Operation:
    row = it.active()
    return lambda t: it.to.suspensions.note_way(t, row, 2)


@CASES.case("""
    model 1: SUSPEND_S=3 RESUME_S=1.5
""")
def expect_a_suspension_to_take(it: RowChanges) -> Operation:
    return lambda t: it.to.suspensions.expect(t, 1, 3.0, 1.5)


@CASES.case("")
def expect_nothing_of_a_suspension(it: RowChanges) -> Operation:
    return lambda t: it.to.suspensions.expect(t, 1, 0.0, 0.0)


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
    header: SUSPENDS=51
    model 1: SUSPENDS=105 SUSPEND_S=12.2
    instance 1: STATE=SUSPENDED HOLDER=0 MB=0 SINCE=now
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    SUSPEND_ENDED: model=1 row=1 value=5
""")
def end_a_suspension(it: RowChanges) -> Operation:
    row = it.suspending()
    return lambda t: it.to.suspensions.end(t, row)


@CASES.case("""
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


@CASES.case("""
    header: LOADING=1
    model 1: LOADING=1 USED_AT=now SUSPENDED=0
    instance 1: STATE=RESUMING HOLDER=2 MB=500 RESERVED_MB=500 SINCE=now SHARES=250 SHARES[1]=250
    RESUME_BEGAN: on=11 model=1 row=1 ticket=8 value=500 CHEAPEST_RELOAD 1/2/3/4 2/6
""")
def begin_to_resume(it: RowChanges) -> Operation:
    row = it.suspended(devices=(0, 1))
    return lambda t: it.to.suspensions.begin_resume(t, row, 1, CAUSE, 9)


@CASES.case("""
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


@CASES.case("""
    header: LOADING=0
    model 1: LOADING=0 SUSPENDED=1
    instance 1: STATE=SUSPENDED HOLDER=0 MB=0 RESERVED_MB=0 SINCE=now
    RESUME_GIVEN_UP: model=1 row=1 value=7
""")
def cancel_a_resume(it: RowChanges) -> Operation:
    row = it.resuming()
    return lambda t: it.to.suspensions.cancel(t, row)


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
    member 1: BELL=1
    instance 1: HOLDER=2 SINCE=now
    wake member 1 BELL
""")
def hand_over_a_suspension(it: RowChanges) -> Operation:
    row = it.suspending()
    return lambda t: it.to.suspensions.hand_over(t, row, 1)


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
    header: WAITING=2 LOADING=0 SUSPEND_FAILURES=1
    member 2: BELL=2
    model 1: LOADING=0 UNLOADING=1 WAITING=1
    instance 1: STATE=UNLOADING RESERVED_MB=0 SINCE=now DEVICE_MB=0
    ticket 1: STATE=WAITING INSTANCE=0
    RESUME_FAILED: model=1 row=1 value=1
    wake member 2 BELL
""")
def fail_to_resume_for_who_has_not_heard_of_it(it: RowChanges) -> Operation:
    row, waiter = it.suspended(), it.ticket()
    it.do(lambda t: it.to.hand_over.allow_resume(t, waiter, row))
    return lambda t: it.to.suspensions.fail(t, row, None, 3)


@CASES.case("""
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


@CASES.case("""
    member 1: BELL=2
    model 1: UNLOADING=1 SUSPENDED=0
    instance 1: STATE=UNLOADING HOLDER=2 SINCE=now DEVICE_MB=0
    UNLOAD_BEGAN: model=1 row=1 value=0
    wake member 1 BELL
""")
def drop_an_object_that_is_suspended(it: RowChanges) -> Operation:
    row = it.suspended(handle=b"")
    return lambda t: it.to.suspensions.drop(t, row, 2)


@CASES.case("""
    header: SUSPENDS=51
    member 0: BELL=1
    model 1: UNLOADING=1 SUSPENDED=0 SUSPENDS=105 SUSPEND_S=12.3
    instance 1: STATE=UNLOADING HOLDER=1 MB=0 SINCE=now DEVICE_MB=0
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    SUSPEND_ENDED: model=1 row=1 value=6
    UNLOAD_BEGAN: model=1 row=1 value=0 ASKED 0/0/0/0 0/0
    wake member 0 BELL
""")
def a_newcomer_ends_a_suspension_of_what_is_to_be_unloaded(it: RowChanges) -> Operation:
    """It has no row yet, so a worker unloads it: the first one."""
    row = it.suspending()
    it.do(lambda t: it.to.unloads.ask(t, row, 2))
    it.act_as(-1)
    return lambda t: it.to.suspensions.end(t, row)


@CASES.case("""
    header: SUSPENDS=51
    model 1: USED_AT=now SUSPENDED=0 SUSPENDS=105 SUSPEND_S=12.3
    instance 1: STATE=FREE HOLDER=0 MB=0 SINCE=now
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    SUSPEND_ENDED: model=1 row=1 value=6
""")
def a_newcomer_ends_a_suspension_where_nobody_is_left(it: RowChanges) -> Operation:
    row = it.suspending()
    it.do(lambda t: it.to.unloads.ask(t, row, 2))
    it.act_as(-1)
    for slot in (0, 1, 2):
        it.poke(it.tables.member(slot) + Member.STATE, Member.GUEST)
    return lambda t: it.to.suspensions.end(t, row)


@CASES.case("""
    header: SUSPENDS=51
    member 1: BELL=1
    model 1: UNLOADING=1 SUSPENDED=0 SUSPENDS=105 SUSPEND_S=12.3
    instance 1: STATE=UNLOADING HOLDER=2 MB=0 SINCE=now DEVICE_MB=0
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    SUSPEND_ENDED: model=1 row=1 value=6
    UNLOAD_BEGAN: model=1 row=1 value=0 ASKED 0/0/0/0 0/0
    wake member 1 BELL
""")
def the_second_member_ends_a_suspension_of_what_is_to_be_unloaded(it: RowChanges) -> Operation:
    row = it.suspending()
    it.do(lambda t: it.to.unloads.ask(t, row, 2))
    it.act_as(1)
    return lambda t: it.to.suspensions.end(t, row)


# ---- leases ----------------------------------------------------------------------------------------------------


@CASES.case("""
    header: NEXT_TICKET=2 WAITING=2 NEWEST_TICKET=1 ENDS[1]=4 ENDS[3]=2
    model 3: STATE=LEASE GENERATION=10 ESTIMATE_MB=250 KNOWN=1 WAITING=1 USED_AT=now EVENTS_BEFORE=11 TAG=1
      TAG[1]='a'
    ticket 1: STATE=WAITING NUMBER=1 PRIORITY=1 MODEL=3 MEMBER=3 ENQUEUED=now DEADLINE=now NEED_MB=250 SPAN=1
      RANK=now+100
    QUEUED: model=3 ticket=1 value=250
    returns 1
""")
def claim_a_lease(it: RowChanges) -> Operation:
    return lambda t: it.to.tickets.enqueue(t, it.to.leases.claim(t, b"a", 250.0), 2, 1, 250.0, it.now)


@CASES.case("""
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


@CASES.case("""
    instance 1: PROGRAM=4711
""")
def link_a_program(it: RowChanges) -> Operation:
    row = it.leased()
    return lambda t: it.to.leases.link_program(t, row, 4711)


@CASES.case("""
    instance 1: MB=80 SHARES=30 SHARES[1]=50
""")
def measure_a_program(it: RowChanges) -> Operation:
    row = it.leased(devices=(0, 1))
    return lambda t: it.to.leases.measure_program(t, row, [30.0, 50.0])


@CASES.case("""
    model 3: STATE=FREE USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 0: CONFIGURED_AT=now
    device 1: CONFIGURED_AT=now
    LEASE_ENDED: model=3 row=1 value=3
""")
def end_a_lease(it: RowChanges) -> Operation:
    row = it.leased(devices=(0, 1))
    return lambda t: it.to.leases.end(t, row)


def used_by_a_program(it: RowChanges) -> int:
    """Return a lease on two devices with 800 MB each in use, of which its program takes some of one."""
    row = it.leased(devices=(0, 1))
    it.do(lambda t: it.to.leases.link_program(t, row, 4711))
    it.do(lambda t: it.to.leases.measure_program(t, row, [0.0, 80.0]))
    for device in (0, 1):
        it.sample(device, 800.0)
    return row


@CASES.case("""
    model 3: STATE=FREE USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 0: CONFIGURED_AT=now
    device 1: EXTERNAL_MB=800 EXTERNAL_LEAST_MB=800 CONFIGURED_AT=now
    LEASE_ENDED: model=3 row=1 value=7
""")
def end_a_lease_whose_program_has_memory(it: RowChanges) -> Operation:
    row = used_by_a_program(it)
    return lambda t: it.to.leases.end(t, row)


@CASES.case("""
    model 3: STATE=FREE USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 0: CONFIGURED_AT=now
    device 1: RETURNING_MB=80 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=80 RETURNS[2]=800
    LEASE_ENDED: model=3 row=1 value=7
""")
def end_a_lease_whose_program_may_give_memory_back_late(it: RowChanges) -> Operation:
    row = used_by_a_program(it)
    it.poke(Header.SOURCE_FREES_LATE, 1)
    return lambda t: it.to.leases.end(t, row)


@CASES.case("""
    model 3: STATE=FREE USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 0: CONFIGURED_AT=now
    device 1: CONFIGURED_AT=now
    LEASE_ENDED: model=3 row=1 value=7
""")
def end_a_lease_where_only_the_accounts_count(it: RowChanges) -> Operation:
    row = used_by_a_program(it)
    it.poke(Header.SOURCE_ACCOUNTING_ONLY, 1)
    return lambda t: it.to.leases.end(t, row)


@CASES.case("""
    instance 1: STATE=FREE SINCE=now
    device 1: CONFIGURED_AT=now
    LEASE_ENDED: model=3 row=1 value=5
""")
def end_a_lease_that_another_waits_for(it: RowChanges) -> Operation:
    row = it.leased()
    it.ticket(model=3)
    return lambda t: it.to.leases.end(t, row)


@CASES.case("""
    header: LOADING=0
    member 0: BELL=1
    model 1: LOADING=0 UNLOADING=1
    instance 1: STATE=UNLOADING HOLDER=1 MB=0 RESERVED_MB=0 SINCE=now DEVICE_MB=0
    RESUME_GIVEN_UP: model=1 row=1 value=7
    UNLOAD_BEGAN: model=1 row=1 value=0 ASKED 0/0/0/0 0/0
    wake member 0 BELL
""")
def a_guest_in_the_first_row_cancels_a_resume_of_what_is_to_be_unloaded(it: RowChanges) -> Operation:
    row = it.resuming()
    it.act_as(0)
    it.poke(it.tables.member(0), Member.GUEST)
    it.poke(it.tables.instance(row) + Instance.UNLOAD_ON_RELEASE, Instance.ASKED)
    return lambda t: it.to.suspensions.cancel(t, row)


@pytest.mark.parametrize("name", CASES.names)
def test_a_transition_of_suspensions_changes_just_what_it_is_to(it: RowChanges, name: str) -> None:
    CASES.check(it, name)
