"""What the transitions of tickets, models, pins and estimates change, word by word; see `row_changes`."""

from __future__ import annotations

from dataclasses import replace

import pytest
from row_changes import CAUSE, SECOND_NS, SMALL, Cases, Operation, RowChanges, raised
from row_changes import it as it  # the fixture

from mpmm.errors import TableFullError
from mpmm.shared_state.layout import Model, Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.text.display_names import set_display_name

CASES = Cases()


# ---- tickets ---------------------------------------------------------------------------------------------------


@CASES.case("""
    header: NEXT_TICKET=2 WAITING=2 NEWEST_TICKET=1 ENDS[3]=2
    model 1: WAITING=1
    ticket 1: STATE=WAITING NUMBER=1 PRIORITY=1 MODEL=1 MEMBER=3 ENQUEUED=now DEADLINE=now+5 NEED_MB=700 SPAN=1
      RANK=now+100
    QUEUED: model=1 ticket=1 value=700
    returns 1
""")
def wait_for_a_model(it: RowChanges) -> Operation:
    return lambda t: it.to.tickets.enqueue(t, 1, 2, 1, 700.0, it.now + 5 * SECOND_NS)


@CASES.case("""
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


@CASES.case("""
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


@CASES.case("""
    header: NEXT_TICKET=4 WAITING=3 NEWEST_TICKET=1
    model 1: WAITING=2
    ticket 1: STATE=WAITING NUMBER=3 PRIORITY=0 MEMBER=2 INSTANCE=0 ENQUEUED=now DEADLINE=now+9 NEED_MB=100
      RANK=now+100
    QUEUED: model=1 ticket=3 value=100
    returns 1
""")
def wait_in_the_row_of_one_that_was_granted_a_copy_beside_another_waiter(it: RowChanges) -> Operation:
    copy, row, _ = it.idle(), it.ticket(), it.ticket(member=1)
    it.do(lambda t: it.to.hand_over.grant(t, row, copy))
    it.do(lambda t: it.to.hand_over.consume_answer(t, row))
    return lambda t: it.to.tickets.enqueue(t, 1, 1, 0, 100.0, it.now + 9 * SECOND_NS)


@CASES.case("""
    ticket 1: SIGNAL=1 CALLED_UP=now
    wake ticket 1 SIGNAL
""")
def call_up_a_waiter(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.call_up(t, row)


@CASES.case("""
    ticket 1: REASON=33 FREE_MB=2 COMING_MB=3 SECONDS=4 OTHER=2 ON=6
    WAITS: model=1 ticket=1 value=2 CHEAPEST_RELOAD 1/2/3/4 2/6
""")
def say_why_one_waits(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.set_reason(t, row, CAUSE)


@CASES.case("""
    ticket 1: WARNED=1
    log mpmm NAMESPACE: a of pid 4194306 waits for ever
""")
def warn_of_a_wait(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.warn(t, row, "waits for ever")


@CASES.case("")
def warn_of_a_wait_once(it: RowChanges) -> Operation:
    row = it.ticket()
    it.do(lambda t: it.to.tickets.warn(t, row, "waits for ever"))
    return lambda t: it.to.tickets.warn(t, row, "waits for ever")


@CASES.case("""
    ticket 1: HEAD_OF_LINE_AT=now
""")
def become_head_of_the_line(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.block(t, row)


@CASES.case("""
    ticket 1: HEAD_OF_LINE_AT=0 OVERTAKEN=1
""")
def let_a_load_pass(it: RowChanges) -> Operation:
    row = it.ticket()
    it.do(lambda t: it.to.tickets.block(t, row))
    return lambda t: it.to.tickets.let_pass(t, row)


@CASES.case("""
    header: WAITING=1
    model 1: WAITING=0
    ticket 1: STATE=REFUSED SIGNAL=1
    REFUSED: model=1 ticket=1 value=700 CHEAPEST_RELOAD 1/2/3/4 2/6
    wake ticket 1 SIGNAL
""")
def refuse(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.refuse(t, row, CAUSE)


@CASES.case("""
    header: WAITING=1
    model 1: WAITING=0
    ticket 1: STATE=ENOUGH SIGNAL=1
    wake ticket 1 SIGNAL
""")
def answer_that_there_are_enough(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.answer_enough(t, row)


@CASES.case("""
    ticket 1: DEADLINE=now
""")
def expire_a_ticket(it: RowChanges) -> Operation:
    row = it.ticket()
    return lambda t: it.to.tickets.expire(t, row)


# ---- pins and models -------------------------------------------------------------------------------------------


@CASES.case("""
    header: ENDS[4]=2
    model 1: PINS=1
    pin 1: STATE=1 MODEL=1 MEMBER=3 SINCE=now
    PINNED: model=1 value=2
    returns 1
""")
def pin(it: RowChanges) -> Operation:
    return lambda t: it.to.pins.pin(t, 1, 2)


@CASES.case("""
    header: ENDS[4]=2
    model 1: PINS=1
    pin 1: STATE=1 MODEL=1 SINCE=now
    PINNED: model=1 value=-1
    returns 1
""")
def pin_for_the_namespace(it: RowChanges) -> Operation:
    return lambda t: it.to.pins.pin(t, 1, -1)


@CASES.case("""
    model 1: USED_AT=now PINS=0
    pin 1: STATE=0
    UNPINNED: model=1 value=2
""")
def unpin(it: RowChanges) -> Operation:
    row = it.do(lambda t: it.to.pins.pin(t, 1, 2))
    return lambda t: it.to.pins.unpin(t, row)


@CASES.case("""
    header: ENDS[1]=4
    model 3: STATE=MODEL GENERATION=10 ESTIMATE_MB=nan USED_AT=now EVENTS_BEFORE=11 TAG=11 TAG[1]='a new mo'
      TAG[2]='del'
    returns 3
""")
def claim_a_model(it: RowChanges) -> Operation:
    return lambda t: it.to.models.claim(t, "a new model", b"a new model")


@CASES.case("""
    returns 1
""")
def claim_a_model_again(it: RowChanges) -> Operation:
    return lambda t: it.to.models.claim(t, "a", b"a")


@CASES.case("""
    model 6: GENERATION=17 USED_AT=now FAILURES=0 FAILED_AT=0 EVENTS_BEFORE=19 TAG=3 TAG[1]='new'
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


@CASES.case("""
    model 6: GENERATION=22 USED_AT=now EVENTS_BEFORE=31 TAG=3 TAG[1]='new'
    returns 6
""")
def claim_no_row_of_a_model_that_has_as_much_of_one_thing_as_of_another(it: RowChanges) -> Operation:
    for number in range(3, 8):
        it.claim(f"m{number}")
    it.active(model=1)
    it.ticket(model=1)
    it.active(model=2, handle=b"2")
    it.loading(model=2)
    it.unloading(model=3, handle=b"3")
    it.loading(model=3)
    it.suspended(model=4, handle=b"4")
    it.active(model=4, handle=b"5")
    it.ticket(model=5)
    it.do(lambda t: it.to.pins.pin(t, 5, 2))
    it.poke(it.tables.model(7) + Model.USED_AT, it.now)
    for model in range(1, 6):
        it.poke(it.tables.model(model) + Model.USED_AT, 1)
    return lambda t: it.to.models.claim(t, "new", b"new")


@CASES.case("""
    returns TableFullError
""")
def claim_a_model_where_every_row_is_in_use(it: RowChanges) -> Operation:
    for number in range(3, 8):
        it.claim(f"m{number}")
    for model in range(1, 8):
        it.ticket(model=model) if model < 6 else it.pin(model)
    return lambda t: raised(lambda: it.to.models.claim(t, "new", b"new"))


@CASES.case("""
    returns 1
""")
def claim_a_model_that_has_a_name_which_this_process_does_not_know(it: RowChanges) -> Operation:
    with it.namespace.transaction() as t:
        t.set_text(it.tables.model(1) + Model.NAME, b"what others call it")
    return lambda t: it.to.models.claim(t, "a", b"a")


@CASES.case("""
    returns TableFullError
""")
def claim_no_row_of_a_model_whose_waiters_have_yet_to_read_their_answers(it: RowChanges) -> Operation:
    for number in range(3, 8):
        it.claim(f"m{number}")
    for model in range(3, 8):
        it.active(model=model, handle=b"%d" % model)
    for model, answer in ((1, it.to.tickets.refuse), (2, it.to.tickets.answer_enough)):
        row = it.ticket(model=model)
        it.do(lambda t, row=row, answer=answer: answer(t, row))  # type: ignore[misc]  # defaults of its own
    return lambda t: raised(lambda: it.to.models.claim(t, "new", b"new"))


@CASES.case("""
    model 4: GENERATION=15 USED_AT=now TAG=3 TAG[1]='new' NAME=0
    returns 4
""")
def claim_the_row_of_a_model_that_had_a_name(it: RowChanges) -> Operation:
    for number in range(3, 8):
        it.claim(f"m{number}")
    it.poke(it.tables.model(4) + Model.USED_AT, 1)
    it.poke(it.tables.model(4) + Model.NAME, 8)
    return lambda t: it.to.models.claim(t, "new", b"new")


@CASES.case("""
    header: ENDS[1]=5
    model 4: STATE=MODEL GENERATION=12 ESTIMATE_MB=nan USED_AT=now EVENTS_BEFORE=13 TAG=3 TAG[1]='new'
    returns 4
""")
def claim_a_row_beside_that_of_an_ended_lease(it: RowChanges) -> Operation:
    row = it.leased()
    it.end_lease(row)
    return lambda t: it.to.models.claim(t, "new", b"new")


@CASES.case("""
    model 4: STATE=MODEL GENERATION=17 ESTIMATE_MB=nan KNOWN=0 USED_AT=now EVENTS_BEFORE=15 TAG=3 TAG[1]='new'
    returns 4
""")
def claim_the_row_of_the_lease_that_ended_first(it: RowChanges) -> Operation:
    first, second = it.leased(), it.leased(mb=200.0)
    for row in (second, first):
        it.end_lease(row)
    for number in range(3):
        it.claim(f"m{number}")
    return lambda t: it.to.models.claim(t, "new", b"new")


@CASES.case("""
    model 3: STATE=MODEL GENERATION=16 ESTIMATE_MB=nan KNOWN=0 USED_AT=now EVENTS_BEFORE=13 TAG=3 TAG[1]='new'
    returns 3
""")
def claim_the_row_of_an_ended_lease(it: RowChanges) -> Operation:
    row = it.leased()
    it.end_lease(row)
    for number in range(4):
        it.claim(f"m{number}")
    return lambda t: it.to.models.claim(t, "new", b"new")


@CASES.case("""
    model 3: STATE=MODEL GENERATION=12 ESTIMATE_MB=nan KNOWN=0 USED_AT=now
    returns 3
""")
def claim_the_row_of_an_ended_lease_of_the_same_name(it: RowChanges) -> Operation:
    row = it.leased()
    it.end_lease(row)
    return lambda t: it.to.models.claim(t, "lease", b"lease")


@CASES.case("""
    model 3: NAME=17 NAME[1]='the mode' NAME[2]='l of our' NAME[3]='s'
    returns 3
""")
def claim_a_model_that_has_a_name(it: RowChanges) -> Operation:
    tag = "a tag that nobody reads"
    it.claim(tag)
    set_display_name(tag, "the model of ours")
    return lambda t: it.to.models.claim(t, tag, tag.encode())


@CASES.case("""
    model 1: KEEP_ALIVE=77
""")
def keep_idle_copies(it: RowChanges) -> Operation:
    return lambda t: it.to.models.keep_alive(t, 1, 77)


@CASES.case("""
    model 1: USERS=4
""")
def set_users(it: RowChanges) -> Operation:
    return lambda t: it.to.models.set_users(t, 1, 4)


@CASES.case("""
    model 1: FAILURES=2 FAILED_AT=now
""")
def note_a_failure(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.models.note_failure(t, 1))
    return lambda t: it.to.models.note_failure(t, 1)


@CASES.case("""
    model 1: FAILURES=0 FAILED_AT=0
""")
def forget_failures(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.models.note_failure(t, 1))
    return lambda t: it.to.models.forget_failures(t, 1)


@CASES.case("""
    model 1: SUPERSEDED=1
""")
def supersede(it: RowChanges) -> Operation:
    return lambda t: it.to.models.supersede(t, 1, True)


@CASES.case("""
    model 1: SUPERSEDED=0
""")
def supersede_no_more(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.models.supersede(t, 1, True))
    return lambda t: it.to.models.supersede(t, 1, False)


@CASES.case("""
    model 1: MEAN_INTERARRIVAL_S=2.5 REQUESTS=44 REQUESTED_AT=now-1
""")
def note_demand(it: RowChanges) -> Operation:
    return lambda t: it.to.models.note_demand(t, 1, 2.5, 44, it.now - SECOND_NS)


# ---- estimates -------------------------------------------------------------------------------------------------


@CASES.case("""
    model 1: ESTIMATE_MB=450 KNOWN=1 MEASURED=1 SD_MB=2.5
    ticket 1: PRIORITY=1 NEED_MB=450
    ticket 2: NEED_MB=450
    ESTIMATED: model=1 value=450
""")
def estimate(it: RowChanges) -> Operation:
    for model, priority in ((1, 0), (1, 2), (2, 0)):
        it.ticket(model=model, priority=priority)
    return lambda t: it.to.estimates.estimate(t, 1, 450.0, True, 2.5)


@CASES.case("""
    model 1: ESTIMATE_MB=440 MEASURED=0 SD_MB=0
    ESTIMATED: model=1 value=440
""")
def estimate_what_is_known(it: RowChanges) -> Operation:
    it.ticket(priority=0)
    it.do(lambda t: it.to.estimates.estimate(t, 1, 450.0, True, 2.5))
    it.do(lambda t: it.to.estimates.record_out_of_memory(t, 1, 500.0))
    return lambda t: it.to.estimates.estimate(t, 1, 440.0, False)


@CASES.case("""
    model 1: ESTIMATE_MB=440 KNOWN=1 AT_LEAST_MB=0
    ESTIMATED: model=1 value=440
""")
def estimate_and_forget_what_ran_out(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.record_out_of_memory(t, 1, 500.0))
    return lambda t: it.to.estimates.estimate(t, 1, 440.0, False, forget_bound=True)


@CASES.case("""
    model 1: ESTIMATE_MB=404.5 MEASURED=1 SD_MB=0
    ESTIMATED: model=1 value=404.5
""")
def raise_an_estimate(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False, 2.5))
    return lambda t: it.to.estimates.raise_to(t, 1, 404.5)


@CASES.case("")
def raise_no_estimate_for_so_little(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False))
    return lambda t: it.to.estimates.raise_to(t, 1, 404.0)


@CASES.case("""
    model 1: ESTIMATE_MB=5 KNOWN=1 MEASURED=1
    ESTIMATED: model=1 value=5
""")
def raise_an_estimate_that_is_none(it: RowChanges) -> Operation:
    return lambda t: it.to.estimates.raise_to(t, 1, 5.0)


@CASES.case("""
    model 1: ESTIMATE_MB=0.5 KNOWN=1 MEASURED=1
    ESTIMATED: model=1 value=0.5
""")
def raise_an_estimate_that_is_none_by_little(it: RowChanges) -> Operation:
    return lambda t: it.to.estimates.raise_to(t, 1, 0.5)


@CASES.case("""
    model 1: EXPECT_MB=300
    ticket 1: PRIORITY=1 NEED_MB=300
""")
def expect_what_a_user_says(it: RowChanges) -> Operation:
    it.ticket(priority=0)
    return lambda t: it.to.estimates.expect(t, 1, 300.0)


@CASES.case("""
    model 1: EXPECT_MB=300
""")
def expect_what_a_user_says_of_a_known_model(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False))
    it.ticket(priority=0)
    return lambda t: it.to.estimates.expect(t, 1, 300.0)


@CASES.case("""
    model 1: ESTIMATE_MB=300 EXPECT_MB=300
    ESTIMATED: model=1 value=300
""")
def expect_what_a_user_says_while_nobody_measures(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False))
    it.do(lambda t: it.to.members.lead(t, 1, b"booked", (False, False, True)))
    return lambda t: it.to.estimates.expect(t, 1, 300.0)


@CASES.case("""
    model 1: EXPECT_MB=300
""")
def expect_no_more_than_was_measured(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, True))
    it.do(lambda t: it.to.members.lead(t, 1, b"booked", (False, False, True)))
    return lambda t: it.to.estimates.expect(t, 1, 300.0)


@CASES.case("")
def expect_what_was_expected(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.expect(t, 1, 300.0))
    it.ticket(priority=0)
    return lambda t: it.to.estimates.expect(t, 1, 300.0)


@CASES.case("""
    header: OUT_OF_MEMORY=1
    model 1: AT_LEAST_MB=500
    OUT_OF_MEMORY: model=1 value=400
""")
def run_out_of_memory_in_use(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False))
    return lambda t: it.to.estimates.record_out_of_memory(t, 1, 500.0)


@CASES.case("""
    header: OUT_OF_MEMORY=1
    model 1: ESTIMATE_MB=nan KNOWN=0 SD_MB=0 AT_LEAST_MB=400
    OUT_OF_MEMORY: model=1 value=400
""")
def run_out_of_memory_in_a_load(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False, 2.5))
    return lambda t: it.to.estimates.record_out_of_memory(t, 1, 400.0, True)


@CASES.case("""
    header: OUT_OF_MEMORY=2
    OUT_OF_MEMORY: model=1 value=400
""")
def run_out_of_less_memory_than_is_expected(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, False))
    it.do(lambda t: it.to.estimates.record_out_of_memory(t, 1, 399.0))
    return lambda t: it.to.estimates.record_out_of_memory(t, 1, 398.0, True)


@CASES.case("""
    header: OUT_OF_MEMORY=1
    model 1: AT_LEAST_MB=500
    OUT_OF_MEMORY: model=1 value=400
""")
def run_out_of_memory_in_a_load_that_was_measured(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.estimate(t, 1, 400.0, True))
    return lambda t: it.to.estimates.record_out_of_memory(t, 1, 500.0, True)


@CASES.case("""
    header: OBSERVATIONS_MADE=1
    observation 0: STATE=1 COUNT=1 NEXT=1 UPDATED=now PAIRS_USED=2 DEVICE=2 READINGS=900 PAIRS=327681
      PAIRS[1]=458754
""")
def observe_a_configuration(it: RowChanges) -> Operation:
    return lambda t: it.to.estimates.observe(t, [(7, 2), (5, 1)], 900.0, 1)


@CASES.case("""
    header: OBSERVATIONS_MADE=3
    observation 1: COUNT=2 NEXT=2 UPDATED=now READINGS[1]=901
""")
def observe_a_configuration_again(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.observe(t, [(7, 2)], 800.0))
    it.do(lambda t: it.to.estimates.observe(t, [(7, 2), (5, 1)], 900.0, 1))
    return lambda t: it.to.estimates.observe(t, [(5, 1), (7, 2)], 901.0, 1)


@CASES.case("""
    header: OBSERVATIONS_MADE=2
    observation 1: STATE=1 COUNT=1 NEXT=1 UPDATED=now PAIRS_USED=1 DEVICE=3 READINGS=901 PAIRS=458754
""")
def observe_a_configuration_on_another_device(it: RowChanges) -> Operation:
    it.do(lambda t: it.to.estimates.observe(t, [(7, 2)], 900.0, 1))
    return lambda t: it.to.estimates.observe(t, [(7, 2)], 901.0, 2)


@CASES.case("""
    header: OBSERVATIONS_MADE=5
    observation 1: UPDATED=now PAIRS_USED=1 DEVICE=0 READINGS=901 PAIRS=589825
""")
def observe_more_than_there_are_rows(it: RowChanges) -> Operation:
    for number in (1, 0, 2, 1):
        it.observe([(7, 2), (8, number)], 900.0, number)
    return lambda t: it.to.estimates.observe(t, [(9, 1)], 901.0)


@CASES.case("""
    header: OBSERVATIONS_MADE=21
    observation 0: NEXT=1 UPDATED=now READINGS=950
""")
def observe_more_than_is_kept(it: RowChanges) -> Operation:
    for number in range(20):
        it.observe([(7, 2)], 900.0 + number, 1)
    return lambda t: it.to.estimates.observe(t, [(7, 2)], 950.0, 1)


@CASES.case("")
def observe_nothing(it: RowChanges) -> Operation:
    return lambda t: it.to.estimates.observe(t, [], 901.0)


@CASES.case("")
def observe_more_models_than_fit(it: RowChanges) -> Operation:
    return lambda t: it.to.estimates.observe(t, [(number, 1) for number in range(65)], 901.0)


@CASES.case("""
    header: SOLVED_AT=17
""")
def note_a_solution(it: RowChanges) -> Operation:
    return lambda t: it.to.estimates.note_solution(t, 17)


@pytest.mark.parametrize("name", CASES.names)
def test_a_transition_of_models_changes_just_what_it_is_to(it: RowChanges, name: str) -> None:
    CASES.check(it, name)


def leases_in_turn(namespace: Namespace, count: int) -> list[int]:
    """Claim leases one after another, each after the end of the one before; return their rows."""
    rows, leases = [], namespace.transitions.leases
    for number in range(count):
        with namespace.transaction() as t:
            rows.append(leases.claim(t, b"lease %d" % number, 1.0))
            leases.forget_spent(t, rows[-1])
    return rows


@pytest.mark.parametrize(("capacity", "rows"), [(20, [*range(16), 0, 1]), (5, [0, 1, 2, 3, 4, 0, 1])])
def test_sixteen_ended_leases_keep_their_names_if_the_table_has_room_for_them(capacity: int, rows: list[int]) -> None:
    namespace = Namespace.join("leases", capacities=replace(SMALL, models=capacity))
    try:
        assert leases_in_turn(namespace, len(rows)) == rows
        with namespace.transaction() as t:
            assert namespace.transitions.leases.claim(t, b"lease 3", 1.0) == 3, "of the same name"
    finally:
        namespace.leave()


def test_even_the_first_row_is_taken_from_a_model_that_is_not_used() -> None:
    namespace = Namespace.join("single", capacities=replace(SMALL, models=1))
    try:
        for tag in ("a", "b"):
            with namespace.transaction() as t:
                assert namespace.transitions.models.claim(t, tag, tag.encode()) == 0
        with namespace.transaction() as t:
            namespace.transitions.pins.pin(t, 0, -1)
            with pytest.raises(TableFullError):
                namespace.transitions.models.claim(t, "c", b"c")
    finally:
        namespace.leave()
