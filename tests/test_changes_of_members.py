"""What the transitions of members, and of resets change, word by word; see `row_changes`."""

from __future__ import annotations

import pytest
from row_changes import Cases, Operation, RowChanges, when_long
from row_changes import it as it  # the fixture

from mpmm.shared_state.layout import Header, Member
from mpmm.shared_state.settings import Settings

CASES = Cases()


# ---- members ---------------------------------------------------------------------------------------------------


@CASES.case("""
    header: ENDS=6
    member 5: STATE=GUEST PID=999 STARTED_WALL=now GENERATION=10 ATTACHED=now MEASURED_MB=nan NAME=9 NAME[1]='a
      progra' NAME[2]='m'
    JOINED: value=5
""")
def join(it: RowChanges) -> Operation:
    return lambda t: it.to.members.join(t, 5, Member.GUEST, 999, it.now, b"a program")


@CASES.case("""
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


@CASES.case("""
    member 1: STATE=FREE
    LEFT: value=4194305
    wake_all_with_news
    returns True
""")
def leave(it: RowChanges) -> Operation:
    return lambda t: it.to.members.leave(t, 1)


@CASES.case("""
    header: LEADER=0
    member 1: STATE=FREE
    LEFT: value=4194305
    wake_all_with_news
    returns True
""")
def the_leader_leaves(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.members.lead(t, 1, b"made up", (True, False, False)))
    return lambda t: it.to.members.leave(t, 1)


@CASES.case("""
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
    REAPED: value=4194305
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


@CASES.case("""
    header: REAPS=1
    member 1: STATE=FREE
    model 1: LOADED=1 IDLE=1 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    REAPED: value=4194305
    wake_all_with_news
    returns True
""")
def reap_a_worker_whose_idle_object_lies_beside_a_handle(it: RowChanges) -> Operation:
    it.idle(handle=b"", member=1)
    it.idle(member=2)
    return lambda t: it.to.members.reap(t, 1)


@CASES.case("""
    header: WAITING=0 REAPS=1
    member 0: STATE=FREE
    member 1: BELL=1
    model 0: WAITING=0
    instance 1: HOLDER=2 HANDED_AT=now
    ticket 0: STATE=FREE
    LEFT_QUEUE: model=0 ticket=0 value=18
    REAPED: value=4194304
    wake_all_with_news
    wake member 1 BELL
    returns True
""")
def a_newcomer_reaps_a_worker_that_unloads(it: RowChanges) -> Operation:
    row = it.unloading()
    it.do(lambda t: it.to.unloads.hand_over(t, row, 0))
    it.act_as(-1)
    return lambda t: it.to.members.reap(t, 0)


@CASES.case("""
    header: WAITING=0 REAPS=1
    member 0: STATE=FREE
    model 0: WAITING=0
    model 1: UNLOADING=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    ticket 0: STATE=FREE
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    LEFT_QUEUE: model=0 ticket=0 value=18
    REAPED: value=4194304
    wake_all_with_news
    returns True
""")
def reap_the_last_worker_that_unloads(it: RowChanges) -> Operation:
    row = it.unloading()
    it.do(lambda t: it.to.unloads.hand_over(t, row, 0))
    it.act_as(-1)
    for slot in (1, 2):
        it.poke(it.tables.member(slot) + Member.STATE, Member.GUEST)
    return lambda t: it.to.members.reap(t, 0)


@CASES.case("""
    header: WAITING=0
    member 0: STATE=FREE
    member 1: BELL=1
    model 0: WAITING=0
    instance 1: HOLDER=2 HANDED_AT=now
    ticket 0: STATE=FREE
    LEFT_QUEUE: model=0 ticket=0 value=18
    LEFT: value=4194304
    wake_all_with_news
    wake member 1 BELL
    returns True
""")
def a_worker_that_unloads_leaves(it: RowChanges) -> Operation:
    row = it.unloading()
    it.do(lambda t: it.to.unloads.hand_over(t, row, 0))
    return lambda t: it.to.members.leave(t, 0)


@CASES.case("""
    model 1: USED_AT=now PINS=0
    pin 1: STATE=0
    UNPINNED: model=1 value=1
    wake_all_with_news
    returns False
""")
def leave_in_a_transaction_that_is_long(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.pins.pin(t, 1, 1))
    it.do(lambda t: it.to.pins.pin(t, 2, 1))
    return lambda t: when_long(t, lambda: it.to.members.leave(t, 1), after=0)


@CASES.case("""
    model 1: USED_AT=now PINS=0
    pin 1: STATE=0
    UNPINNED: model=1 value=1
    wake_all_with_news
    returns False
""")
def reap_in_a_transaction_that_is_long(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.pins.pin(t, 1, 1))
    it.do(lambda t: it.to.pins.pin(t, 2, 1))
    return lambda t: when_long(t, lambda: it.to.members.reap(t, 1), after=0)


@CASES.case("""
    header: LOADING=0 REAPS=1
    member 0: BELL=1
    member 1: STATE=FREE BELL=1
    model 1: LOADING=0 SUSPENDED=1
    instance 1: STATE=SUSPENDING HOLDER=1 RESERVED_MB=0 SINCE=now
    RESUME_GIVEN_UP: model=1 row=1 value=7
    REAPED: value=4194305
    wake_all_with_news
    wake member 1 BELL
    wake member 0 BELL
    returns True
""")
def reap_a_worker_that_resumes(it: RowChanges) -> Operation:
    it.resuming()
    return lambda t: it.to.members.reap(t, 1)


@CASES.case("""
    header: REAPS=1
    member 3: STATE=FREE
    model 1: LOADED=2 IDLE=0 IDLE_HEAD=0 USED_AT=now SEATS=0
    instance 1: SERVER=0 SEATS=0 MB=0 UNLOAD_ON_RELEASE=1
    instance 2: STATE=FREE SEAT_OF=0 SINCE=now
    instance 3: SEAT_OF=0 UNLOAD_ON_RELEASE=1
    device 1: RETURNING_MB=500 RETURN_COUNT=1 RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    LOST: model=1 row=1 value=500
    REAPED: value=4194307
    wake_all_with_news
    returns True
""")
def reap_the_server_of_a_copy_in_use(it: RowChanges) -> Operation:
    it.users(3)
    row = it.active(server=3)
    it.do(lambda t: it.to.holds.take_idle(t, row + 2, 3))
    return lambda t: it.to.members.reap(t, 3)


@CASES.case("""
    header: REAPS=1
    member 3: STATE=FREE
    model 1: LOADED=0 IDLE=0 IDLE_HEAD=0 USED_AT=now
    instance 1: STATE=FREE SINCE=now
    device 1: RETURNING_MB=500 RETURN_COUNT=1 CONFIGURED_AT=now RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    LOST: model=1 row=1 value=500
    REAPED: value=4194307
    wake_all_with_news
    returns True
""")
def reap_the_server_of_an_idle_copy(it: RowChanges) -> Operation:
    it.idle(server=3)
    return lambda t: it.to.members.reap(t, 3)


@CASES.case("""
    header: REAPS=1
    member 3: STATE=FREE
    instance 1: SERVER=0 UNLOAD_ON_RELEASE=1
    LOST: model=1 row=1 value=600
    REAPED: value=4194307
    wake_all_with_news
    returns True
""")
def reap_the_server_of_a_load(it: RowChanges) -> Operation:
    row = it.loading()
    it.do(lambda t: it.to.loads.link_server(t, row, 3))
    return lambda t: it.to.members.reap(t, 3)


@CASES.case("""
    header: REAPS=1
    member 3: STATE=FREE
    model 1: USED_AT=now SUSPENDED=0
    instance 1: STATE=FREE SINCE=now
    device 1: CONFIGURED_AT=now
    LOST: model=1 row=1 value=0
    REAPED: value=4194307
    wake_all_with_news
    returns True
""")
def reap_the_server_of_a_suspended_copy(it: RowChanges) -> Operation:
    it.suspended(server=3)
    return lambda t: it.to.members.reap(t, 3)


@CASES.case("""
    member 3: STATE=FREE
    instance 1: SERVER=0 MB=0 UNLOAD_ON_RELEASE=1
    device 1: RETURNING_MB=500 RETURN_COUNT=1 RETURNS=now RETURNS[1]=500 RETURNS[2]=nan
    LOST: model=1 row=1 value=500
    LEFT: value=4194307
    wake_all_with_news
    returns True
""")
def reap_a_server_that_was_ended(it: RowChanges) -> Operation:
    it.unloading(server=3)
    return lambda t: it.to.members.reap(t, 3)


@CASES.case("""
    member 4: STATE=FREE
    LEFT: value=4194308
    wake_all_with_news
    returns True
""")
def reap_a_server_of_nothing(it: RowChanges) -> Operation:
    return lambda t: it.to.members.reap(t, 4)


@CASES.case("""
    header: LEADER=2 LEADER_SINCE=now POLLED=now LEADERS=2 SOURCE_COUNTS_NAMED=1 SOURCE_MEASURES_PROCESSES=0
      SOURCE_FREES_LATE=1 SOURCE_NAME[1]='another'
    LEADER: value=1
""")
def lead(it: RowChanges) -> Operation:
    return lambda t: it.to.members.lead(t, 1, b"another", (False, True, False), True)


@CASES.case("""
    header: LEADER=2 LEADER_SINCE=now POLLED=now LEADERS=2 SOURCE_MEASURES_PROCESSES=0 SOURCE_ACCOUNTING_ONLY=1
      SOURCE_NAME=6 SOURCE_NAME[1]='booked'
    device 1: RETURNING_MB=0 RETURN_COUNT=0
    LEADER: value=1
""")
def lead_without_a_source(it: RowChanges) -> Operation:
    it.unload_two()
    return lambda t: it.to.members.lead(t, 1, b"booked", (False, False, True))


@CASES.case("""
    member 1: MEASURES=2
""")
def note_a_source(it: RowChanges) -> Operation:
    return lambda t: it.to.members.note_source(t, 1, 2)


@CASES.case("""
    header: POLLED=now
""")
def note_a_poll(it: RowChanges) -> Operation:
    return lambda t: it.to.members.note_poll(t)


@CASES.case("""
    header: POLLED=now
""")
def note_a_poll_that_shows_processes(it: RowChanges) -> Operation:
    return lambda t: it.to.members.note_poll(t, True)


@CASES.case("""
    header: POLLED=now SOURCE_MEASURES_PROCESSES=0
""")
def note_a_poll_that_shows_none(it: RowChanges) -> Operation:
    return lambda t: it.to.members.note_poll(t, False)


@CASES.case("""
    member 1: BELL=1
    wake member 1 BELL
""")
def ring(it: RowChanges) -> Operation:
    return lambda t: it.to.members.ring(t, 1)


@CASES.case("""
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


# ---- reset -----------------------------------------------------------------------------------------------------


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
    header: WAITING=2 ACTIVE=0 RESETS=1
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
    for _ in range(2):
        it.ticket()
    it.idle()
    return lambda t: it.to.reset(t, (number, generation))


@CASES.case("""
    header: WAITING=0 ACTIVE=0 RESETS=1
    member 0: BELL=3
    model 0: LOADED=0 ACTIVE=0 UNLOADING=1 WAITING=0
    model 1: LOADED=0 ACTIVE=0 IDLE=0 UNLOADING=2 IDLE_HEAD=0
    instance 0: STATE=UNLOADING HOLDER=1 SINCE=now
    instance 1: STATE=UNLOADING HOLDER=1 SINCE=now NEXT=3 PREVIOUS=0
    instance 2: STATE=UNLOADING HOLDER=1 SINCE=now
    ticket 0: STATE=RESET SIGNAL=1
    UNLOAD_BEGAN: model=0 row=0 value=50 RESET 0/0/0/0 0/0
    UNLOAD_BEGAN: model=1 row=1 value=500 RESET 0/0/0/0 0/0
    UNLOAD_BEGAN: model=1 row=2 value=500 RESET 0/0/0/0 0/0
    RESET: value=0
    wake ticket 0 SIGNAL
    wake member 0 BELL
    wake member 0 BELL
    wake member 0 BELL
""")
def reset_one_in_use_before_an_idle_one(it: RowChanges) -> Operation:
    row, _ = it.idle(), it.idle(handle=b"2")
    it.do(lambda t: it.to.holds.take_idle(t, row, 2))
    return lambda t: it.to.reset(t)


@CASES.case("""
    header: WAITING=0 ACTIVE=0 RESETS=1
    member 0: BELL=2
    model 0: LOADED=0 ACTIVE=0 UNLOADING=1 WAITING=0
    model 1: LOADED=0 ACTIVE=0 UNLOADING=1 USED_AT=now SEATS=0
    instance 0: STATE=UNLOADING HOLDER=1 SINCE=now
    instance 1: STATE=FREE SEAT_OF=0 SINCE=now
    instance 2: STATE=UNLOADING HOLDER=1 SEATS=0 SINCE=now NEXT=0
    ticket 0: STATE=RESET SIGNAL=1
    UNLOAD_BEGAN: model=0 row=0 value=50 RESET 0/0/0/0 0/0
    UNLOAD_BEGAN: model=1 row=2 value=500 RESET 0/0/0/0 0/0
    RESET: value=0
    wake ticket 0 SIGNAL
    wake member 0 BELL
    wake member 0 BELL
""")
def reset_a_copy_behind_its_seat(it: RowChanges) -> Operation:
    first = it.idle(handle=b"2")
    it.users(2)
    row = it.resuming()
    it.unload(first)
    it.do(lambda t: it.to.suspensions.end_resume(t, row))
    it.take(1)
    return lambda t: it.to.reset(t)


@CASES.case("""
    header: WAITING=0 ACTIVE=0 RESETS=1
    member 0: BELL=2
    model 0: LOADED=0 ACTIVE=0 UNLOADING=1 WAITING=0
    model 1: LOADED=0 ACTIVE=0 UNLOADING=1 HOLD_S=10.09
    instance 0: STATE=UNLOADING HOLDER=1 SINCE=now
    instance 1: STATE=UNLOADING HOLDER=1 SINCE=now
    ticket 0: STATE=RESET SIGNAL=1
    ticket 1: STATE=RESET INSTANCE=0 SIGNAL=2
    UNLOAD_BEGAN: model=0 row=0 value=50 RESET 0/0/0/0 0/0
    RELEASED: model=1 row=1 value=1
    UNLOAD_BEGAN: model=1 row=1 value=500 RESET 0/0/0/0 0/0
    RESET: value=0
    wake ticket 0 SIGNAL
    wake member 0 BELL
    wake ticket 1 SIGNAL
    wake member 0 BELL
""")
def reset_what_was_granted_to_one_that_is_newer(it: RowChanges) -> Operation:
    row = it.idle()
    number, generation = it.words[Header.NEXT_TICKET], it.words[Header.NEXT_GENERATION]
    waiter = it.ticket()
    it.do(lambda t: it.to.hand_over.grant(t, waiter, row))
    return lambda t: it.to.reset(t, (number, generation))


@CASES.case("""
    header: WAITING=1
    model 0: WAITING=0
    ticket 0: STATE=RESET SIGNAL=1
    wake ticket 0 SIGNAL
    returns (2, 11)
""")
def reset_in_a_transaction_that_is_long_before_all_tickets(it: RowChanges) -> Operation:
    it.idle()
    it.ticket()
    return lambda t: when_long(t, lambda: it.to.reset(t), after=1)


@CASES.case("""
    header: WAITING=0 ACTIVE=0
    member 0: BELL=1
    model 0: LOADED=0 ACTIVE=0 UNLOADING=1 WAITING=0
    instance 0: STATE=UNLOADING HOLDER=1 SINCE=now
    ticket 0: STATE=RESET SIGNAL=1
    UNLOAD_BEGAN: model=0 row=0 value=50 RESET 0/0/0/0 0/0
    wake ticket 0 SIGNAL
    wake member 0 BELL
    returns (1, 11)
""")
def reset_in_a_transaction_that_is_long_before_all_copies(it: RowChanges) -> Operation:
    it.idle()
    return lambda t: when_long(t, lambda: it.to.reset(t), after=2)


@pytest.mark.parametrize("name", CASES.names)
def test_a_transition_of_members_changes_just_what_it_is_to(it: RowChanges, name: str) -> None:
    CASES.check(it, name)
