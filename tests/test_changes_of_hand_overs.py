"""What the transitions of hand-overs change, word by word; see `row_changes`."""

from __future__ import annotations

import pytest
from row_changes import CAUSE, Cases, Operation, RowChanges
from row_changes import it as it  # the fixture

from mpmm.shared_state.layout import Ticket

CASES = Cases()


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
    header: WAITING=4 ACTIVE=2 HITS=11
    model 1: ACTIVE=1 IDLE=1 WAITING=3 HITS=102
    instance 1: STATE=ACTIVE HOLDER=3 SINCE=now USES=2
    instance 2: NEXT=0
    ticket 1: STATE=GRANTED INSTANCE=2 SIGNAL=2
    ticket 3: SIGNAL=1 CALLED_UP=now
    GRANTED: model=1 row=1 ticket=1 value=9
    wake ticket 1 SIGNAL
    wake ticket 3 SIGNAL
""")
def grant_and_call_up_the_most_urgent(it: RowChanges) -> Operation:
    row, _ = it.idle(), it.idle(handle=b"2")
    waiter, *_ = it.ticket(), it.ticket(member=1), it.ticket(member=1, urgency=2), it.ticket(urgency=1)
    it.do(lambda t: it.to.tickets.call_up(t, waiter))
    return lambda t: it.to.hand_over.grant(t, waiter, row)


@CASES.case("""
    header: WAITING=2 ACTIVE=2 HITS=11
    model 1: ACTIVE=1 IDLE=1 WAITING=1 HITS=102
    instance 1: STATE=ACTIVE HOLDER=3 SINCE=now USES=2
    instance 2: NEXT=0
    ticket 1: STATE=GRANTED INSTANCE=2 SIGNAL=1
    GRANTED: model=1 row=1 ticket=1 value=4
    wake ticket 1 SIGNAL
""")
def grant_to_one_that_was_not_called_up(it: RowChanges) -> Operation:
    row, _, waiter = it.idle(), it.idle(handle=b"2"), it.ticket()
    it.ticket(member=1)
    return lambda t: it.to.hand_over.grant(t, waiter, row)


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
    ticket 1: STATE=FREE
""")
def consume_an_answer(it: RowChanges) -> Operation:
    row, waiter = it.idle(), it.ticket()
    it.do(lambda t: it.to.hand_over.grant(t, waiter, row))
    return lambda t: it.to.hand_over.consume_answer(t, waiter)


@CASES.case("""
    ticket 1: STATE=FREE
""")
def consume_the_answer_of_a_lease(it: RowChanges) -> Operation:
    model = it.do(lambda t: it.to.leases.claim(t, b"lease", 250.0))
    waiter = it.ticket(model=model)
    it.do(lambda t: it.to.hand_over.allow_load(t, waiter, 0b10, 250.0, False))
    return lambda t: it.to.hand_over.consume_answer(t, waiter)


@CASES.case("""
    model 3: STATE=FREE USED_AT=now
    ticket 1: STATE=FREE
""")
def consume_the_refusal_of_a_lease(it: RowChanges) -> Operation:
    model = it.do(lambda t: it.to.leases.claim(t, b"lease", 250.0))
    waiter = it.ticket(model=model)
    it.do(lambda t: it.to.tickets.refuse(t, waiter))
    return lambda t: it.to.hand_over.consume_answer(t, waiter)


@CASES.case("""
    header: WAITING=1
    model 1: WAITING=0
    ticket 1: STATE=FREE
    LEFT_QUEUE: model=1 ticket=1 value=2
""")
def leave_the_queue(it: RowChanges) -> Operation:
    waiter = it.ticket()
    return lambda t: it.to.hand_over.leave_queue(t, waiter)


@CASES.case("""
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


@CASES.case("""
    header: WAITING=2
    model 1: WAITING=1
    ticket 1: STATE=FREE
    LEFT_QUEUE: model=1 ticket=1 value=4
""")
def leave_the_queue_beside_another_one(it: RowChanges) -> Operation:
    waiter, _ = it.ticket(), it.ticket(member=1)
    return lambda t: it.to.hand_over.leave_queue(t, waiter)


@CASES.case("""
    header: ACTIVE=1
    model 1: ACTIVE=0 IDLE=1 IDLE_HEAD=2 HOLD_S=10.09
    instance 1: STATE=IDLE HOLDER=0 SINCE=now
    ticket 1: STATE=FREE
    LEFT_QUEUE: model=1 ticket=1 value=6
    RELEASED: model=1 row=1 value=1
""")
def leave_what_was_granted_to_one_that_was_called_up(it: RowChanges) -> Operation:
    row, waiter, _ = it.idle(), it.ticket(), it.ticket(member=1)
    it.do(lambda t: it.to.tickets.call_up(t, waiter))
    it.do(lambda t: it.to.hand_over.grant(t, waiter, row))
    return lambda t: it.to.hand_over.leave_queue(t, waiter)


@CASES.case("""
    header: WAITING=1
    model 3: STATE=FREE WAITING=0 USED_AT=now
    ticket 1: STATE=FREE
    LEFT_QUEUE: model=3 ticket=1 value=2
""")
def leave_the_queue_for_a_lease(it: RowChanges) -> Operation:
    model = it.do(lambda t: it.to.leases.claim(t, b"lease", 250.0))
    waiter = it.ticket(model=model)
    return lambda t: it.to.hand_over.leave_queue(t, waiter)


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
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


@pytest.mark.parametrize("name", CASES.names)
def test_a_transition_of_hand_overs_changes_just_what_it_is_to(it: RowChanges, name: str) -> None:
    CASES.check(it, name)


# ---- what is read of the queue, and of copies for it -----------------------------------------------------------


@pytest.mark.parametrize(
    ("preload", "usable_on", "model", "devices", "can"),
    [
        *((0, 0, 1, 0b1, True), (0, 0, 2, 0b1, False), (2, 0, 1, 0b1, False), (Ticket.ONLY_RESUMES, 0, 1, 0b1, False)),
        *((0, 0b11, 1, 0b10, True), (0, 0b11, 1, 0b11, True), (0, 0b11, 1, 0b110, False), (0, 0b1, 1, 0b10, False)),
        (0, 0b11, 2, 0b10, False),
    ],
)
def test_a_waiter_can_use_copies_of_its_model_that_lie_on_its_devices_alone(
    it: RowChanges, preload: int, usable_on: int, model: int, devices: int, can: bool
) -> None:
    row = it.ticket(preload=preload, usable_on=usable_on)
    queue = it.namespace.reads.queue
    (waiter,) = [one for one in queue.waiting() if one.row == row]
    assert (waiter.can_use(model, devices), queue.can_use(row, model, devices)) == (can, can)


def test_a_waiter_can_use_nothing_once_its_deadline_has_passed(it: RowChanges) -> None:
    row, queue = it.ticket(), it.namespace.reads.queue
    found = []
    for left_ns in (1, 0, -1):
        it.poke(it.tables.ticket(row) + Ticket.DEADLINE, it.now + left_ns)
        found.append(queue.can_use(row, 1, 0b1))
    assert found == [True, False, False]


def test_the_newest_and_the_only_waiter_are_known_without_a_search(it: RowChanges) -> None:
    """The first ticket waits from the beginning."""
    queue = it.namespace.reads.queue

    def known() -> tuple[int | None, int | None]:
        newest = queue.newest()
        return None if newest is None else newest.row, queue.only_one()

    assert known() == (0, 0)
    waiter = it.ticket()
    assert known() == (waiter, None)
    it.do(lambda t: it.to.tickets.refuse(t, waiter))
    assert known() == (None, None), "an older one is the only one, which takes a search to find"
    it.do(lambda t: it.to.hand_over.consume_answer(t, waiter))
    assert known() == (None, None)
    waiter = it.ticket()
    it.do(lambda t: it.to.hand_over.leave_queue(t, 0))
    assert known() == (waiter, waiter)
    it.do(lambda t: it.to.hand_over.leave_queue(t, waiter))
    assert known() == (None, None)


@pytest.mark.parametrize(
    ("usable_on", "place"), [(0, 2), (0b100, 2), (0b1, 1), (0b10, 0), (0b11, 1), (0b111, 2), (0b1000, None)]
)
def test_the_first_idle_copy_is_the_one_that_was_given_back_last_of_those_on_the_devices(
    it: RowChanges, usable_on: int, place: int | None
) -> None:
    rows = [it.idle(handle=b"%d" % device, devices=(device,)) for device in (1, 0, 2)]
    reads = it.namespace.reads.instances
    assert reads.first_idle(1, usable_on) == (None if place is None else rows[place])
    assert reads.first_idle(2) is None
    every = range(3)
    assert [reads.is_idle(rows[one], 0, usable_on) for one in every] == [
        not usable_on or bool(usable_on >> device & 1) for device in (1, 0, 2)
    ]
