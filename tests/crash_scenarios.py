"""An operation for each transition, on a state in which it does as much as possible: see `test_crash_points`."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from typing import Any

from crash_lab import Lab, Operation
from crash_lab import lab as lab  # the fixture
from harness import NOBODYS_PID

from mpmm.policy.suspension import Unsuspendable, Way
from mpmm.policy.view import Reason
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Device, Member
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions import Transitions
from mpmm.shared_state.transitions.part import Part


def scenarios() -> dict[str, Callable[[Lab], Operation]]:
    """Return how to prepare each transition, under its name; several for one transition as `name/variant`."""

    def claimed_when_full(lab: Lab) -> Operation:
        for tag in "abcd":
            lab.model(tag)
        return lambda t, tr: tr.models.claim(t, "new", b"new")

    def reaped(lab: Lab) -> Operation:
        lab.idle("a", b"", server=False)  # owned by the victim
        lab.active("a", b"h1", server=False)
        loading = lab.loading("b")
        lab.do(lambda t, tr: tr.loads.link_server(t, loading, lab.server))
        lab.unloading("c")
        lab.ticket("a")
        lab.do(lambda t, tr: tr.members.lead(t, lab.victim, b"test", (True, False, False)))
        return lambda t, tr: tr.members.reap(t, lab.victim)

    def reaped_isolated(lab: Lab) -> Operation:
        lab.loading("a", alone=True)
        return lambda t, tr: tr.members.reap(t, lab.victim)

    def reaped_with_answers(lab: Lab) -> Operation:
        lab.idle("a")
        waiting = lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.grant(t, waiting, 0))
        allowed = lab.ticket("b")
        lab.do(lambda t, tr: tr.hand_over.allow_load(t, allowed, 1, 50.0, alone=False))
        return lambda t, tr: tr.members.reap(t, lab.victim)

    def reaped_server(lab: Lab) -> Operation:
        lab.idle("a", server=True)
        return lambda t, tr: tr.members.reap(t, lab.server)

    def reset_all(lab: Lab) -> Operation:
        lab.idle("a")
        lab.active("a")
        lab.loading("b")
        lab.ticket("c")
        lab.do(lambda t, tr: tr.models.note_failure(t, 1))
        return lambda t, tr: tr.reset(t)

    def granted(lab: Lab) -> Operation:
        lab.idle("a", b"h1")
        copy = lab.idle("a", b"h2")
        ticket = lab.ticket("a")
        return lambda t, tr: tr.hand_over.grant(t, ticket, copy)

    def passed_on(lab: Lab) -> Operation:
        copy = lab.idle("a")
        lab.do(lambda t, tr: tr.holds.take_idle(t, copy, Lab.victim + 1))
        ticket = lab.ticket("a")
        return lambda t, tr: tr.hand_over.from_holder(t, ticket, copy, Cause(Reason.IDLE_COPY))

    def answered(lab: Lab) -> Operation:
        copy, ticket = lab.idle("a"), lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.grant(t, ticket, copy))
        return lambda t, tr: tr.hand_over.consume_answer(t, ticket)

    def left_with_load(lab: Lab) -> Operation:
        ticket = lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.allow_load(t, ticket, 1, 50.0, alone=True))
        return lambda t, tr: tr.hand_over.leave_queue(t, ticket)

    def left_with_grant(lab: Lab) -> Operation:
        copy, ticket = lab.idle("a"), lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.grant(t, ticket, copy))
        return lambda t, tr: tr.hand_over.leave_queue(t, ticket)

    def released_between_idle(lab: Lab) -> Operation:
        lab.idle("a", b"h1")
        copy = lab.active("a", b"h2")
        return lambda t, tr: tr.holds.release(t, copy)

    def released_alone(lab: Lab) -> Operation:
        copy = lab.active("a", alone=True)
        return lambda t, tr: tr.holds.release(t, copy)

    def released_and_unloaded(lab: Lab) -> Operation:
        copy = lab.active("a", server=True)
        lab.do(lambda t, tr: tr.members.reap(t, lab.server))
        return lambda t, tr: tr.holds.release(t, copy)

    def given_up_with_server(lab: Lab) -> Operation:
        copy = lab.loading("a", alone=True)
        lab.do(lambda t, tr: tr.loads.link_server(t, copy, lab.server))
        return lambda t, tr: tr.loads.give_up(t, copy)

    def discarded_promised(lab: Lab) -> Operation:
        copy, ticket = lab.idle("a"), lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.grant(t, ticket, copy))
        return lambda t, tr: tr.holds.discard(t, copy)

    def sampled_after_load(lab: Lab) -> Operation:
        lab.active("a")
        lab.do(lambda t, tr: tr.devices.sample(t, 0, 10.0, 5))
        now = time.monotonic_ns()
        return lambda t, tr: tr.devices.sample(t, 0, 200.0, now)

    def returning(lab: Lab) -> int:
        """Unload a copy after a sample of 500 MB, so that the return of its memory is awaited."""
        copy = lab.unloading("a")
        lab.do(lambda t, tr: tr.members.lead(t, 0, b"test", (False, True, False)))
        lab.do(lambda t, tr: tr.devices.sample(t, 0, 500.0, 5))
        lab.do(lambda t, tr: tr.unloads.end(t, copy))
        return time.monotonic_ns()

    def returned(lab: Lab) -> Operation:
        now = returning(lab)
        return lambda t, tr: tr.devices.sample(t, 0, 400.0, now)

    def returned_late(lab: Lab) -> Operation:
        now = returning(lab)
        lab.do(lambda t, tr: t.set(lab.tables.device(0) + Device.RETURNS, 1))
        return lambda t, tr: tr.devices.sample(t, 0, 501.0, now)

    def not_sampled_since(lab: Lab) -> Operation:
        returning(lab)
        lab.do(lambda t, tr: t.set(lab.tables.device(0) + Device.RETURNS, 6))
        return lambda t, tr: tr.ledgers.expire(t)

    def observed_again(lab: Lab) -> Operation:
        lab.do(lambda t, tr: tr.estimates.observe(t, [(7, 1), (9, 2)], 10.0))
        return lambda t, tr: tr.estimates.observe(t, [(9, 2), (7, 1)], 11.0)

    def observed_when_full(lab: Lab) -> Operation:
        for generation in (7, 8, 9):
            lab.do(lambda t, tr, g=generation: tr.estimates.observe(t, [(g, 1)], 10.0))  # type: ignore[misc]  # mypy has no type for a lambda's default
        return lambda t, tr: tr.estimates.observe(t, [(10, 1)], 11.0)

    def allowed_lease(lab: Lab) -> Operation:
        ticket = lab.lease_ticket()
        return lambda t, tr: tr.hand_over.allow_load(t, ticket, 1, 70.0, alone=False)

    def granted_lease(lab: Lab) -> int:
        ticket = lab.lease_ticket()
        lab.do(lambda t, tr: tr.hand_over.allow_load(t, ticket, 1, 70.0, alone=False))
        return ticket

    def refused_lease(lab: Lab) -> int:
        ticket = lab.lease_ticket()
        lab.do(lambda t, tr: tr.tickets.refuse(t, ticket))
        return ticket

    def pinned(lab: Lab) -> int:
        model = lab.model()
        return int(lab.do(lambda t, tr: tr.pins.pin(t, model, lab.victim)))

    def reaped_with_pins(lab: Lab) -> Operation:
        pinned(lab)
        other = lab.model("b")
        lab.do(lambda t, tr: tr.pins.pin(t, other, lab.victim))
        return lambda t, tr: tr.members.reap(t, lab.victim)

    def preloading(lab: Lab) -> int:
        model = lab.model(known=False)
        return int(lab.do(lambda t, tr: tr.tickets.enqueue(t, model, lab.victim, 2, 100.0, 2**62, 3)))

    def reaped_with_leases(lab: Lab) -> Operation:
        lab.leased()
        granted_lease(lab)
        lab.lease_ticket()
        return lambda t, tr: tr.members.reap(t, lab.victim)

    def measured(lab: Lab) -> Operation:
        lab.idle("a", server=True)
        return lambda t, tr: tr.measurements.measure(t, lab.server, {0: 77.0})

    def spanning(lab: Lab) -> int:
        model = lab.model()
        row: int = lab.do(lambda t, tr: tr.loads.begin(t, model, lab.victim, 3, 100.0, alone=True))
        lab.do(lambda t, tr: tr.loads.link_server(t, row, lab.server))
        lab.do(lambda t, tr: tr.loads.end(t, row, b"h", 90.0, lab.server + 1, True, shares_mb=(60.0, 30.0)))
        return row

    def measured_on_two(lab: Lab) -> Operation:
        spanning(lab)
        return lambda t, tr: tr.measurements.measure(t, lab.server, {0: 77.0, 1: 11.0})

    def reaped_spanning(lab: Lab) -> Operation:
        spanning(lab)
        return lambda t, tr: tr.members.reap(t, lab.victim)

    def twin_loaded(lab: Lab) -> Operation:
        lab.idle("a", b"h")
        copy = lab.loading("b")
        return lambda t, tr: tr.loads.end(t, copy, b"h", 80.0, 0, False)

    def twins_evicted(lab: Lab) -> Operation:
        copy = lab.active("a", b"h", server=True)
        lab.idle("b", b"h")
        lab.do(lambda t, tr: tr.holds.release(t, copy))
        return lambda t, tr: tr.unloads.begin(t, copy, Lab.victim, evicted=True)

    def twin_in_use(lab: Lab) -> int:
        copy = lab.idle("a", b"h", server=True)
        lab.active("b", b"h")
        return copy

    def told_to_go(lab: Lab) -> int:
        """Make a copy in use that was asked to unload, whose memory a twin takes over."""
        copy = lab.active("a", b"h", server=True)
        lab.idle("b", b"h")
        lab.do(lambda t, tr: tr.unloads.ask(t, copy, lab.victim))
        return copy

    def steady_ticket(lab: Lab) -> int:
        model = lab.model()
        return int(lab.do(lambda t, tr: tr.tickets.enqueue(t, model, lab.victim, 1, 50.0, 2**62, steady=True)))

    def program_leased(lab: Lab) -> int:
        """Make a lease whose program was measured, where memory may come back late."""
        row = lab.leased()
        lab.do(lambda t, tr: tr.members.lead(t, lab.victim, b"test", (True, True, False)))
        lab.do(lambda t, tr: tr.leases.link_program(t, row, 4711))
        lab.do(lambda t, tr: tr.leases.measure_program(t, row, [33.0]))
        return row

    def steady_load(lab: Lab) -> int:
        """Make a load during which a copy has to wait for its unload."""
        lab.unloading("b")
        ticket = steady_ticket(lab)
        row: int = lab.do(lambda t, tr: tr.hand_over.allow_load(t, ticket, 1, 50.0, alone=False))
        lab.do(lambda t, tr: tr.hand_over.consume_answer(t, ticket))
        return row

    def failed_before(lab: Lab) -> Operation:
        model = lab.model()
        lab.do(lambda t, tr: tr.models.note_failure(t, model))
        copy = lab.loading()
        return lambda t, tr: tr.loads.end(t, copy, b"handle", 80.0, 0, False)

    def led_by_accounting(lab: Lab) -> Operation:
        returning(lab)
        return lambda t, tr: tr.members.lead(t, Lab.victim, b"booked", (False, False, True))

    def described_instead_of_stated(lab: Lab) -> Operation:
        lab.do(lambda t, tr: tr.devices.describe(t, [(b"uuid-0", b"gpu 0", 1000.0)], measured=False))
        lab.idle("a")
        return lambda t, tr: tr.devices.describe(t, [(b"uuid-1", b"gpu 1", 2000.0)], replace=True)

    def stated_device_forgotten(lab: Lab) -> Operation:
        lab.do(lambda t, tr: tr.devices.describe(t, [(b"uuid-1", b"gpu 1", 1000.0)], measured=False))
        return lambda t, tr: tr.devices.forget_stated(t, 1)

    def reaped_while_it_moves(prepare: Callable[[Lab], int]) -> Callable[[Lab], Operation]:
        def scenario(lab: Lab) -> Operation:
            prepare(lab)
            return lambda t, tr: tr.members.reap(t, lab.victim)

        return scenario

    def server_reaped(prepare: Callable[..., int]) -> Callable[[Lab], Operation]:
        def scenario(lab: Lab) -> Operation:
            prepare(lab, server=True)
            return lambda t, tr: tr.members.reap(t, lab.server)

        return scenario

    def loading_for_three(lab: Lab) -> int:
        lab.for_three()
        return lab.loading()

    def resuming_for_three(lab: Lab) -> int:
        lab.for_three()
        return lab.resuming()

    def last_user(lab: Lab) -> int:
        """Make a copy that is unloaded once its last seat is released; return that seat."""
        copy = lab.shared()
        lab.do(lambda t, tr: tr.unloads.ask(t, copy, lab.victim))
        (seat,) = lab.tables.seats_of(copy)
        return seat

    def before_last_user(lab: Lab) -> int:
        """Make a twin in mid-unload that has the memory of a copy that is unloaded after it; return the twin."""
        copy, twin = lab.shared(server=True), lab.idle("b")
        lab.do(lambda t, tr: tr.unloads.ask(t, copy, lab.victim))
        lab.do(lambda t, tr: tr.unloads.ask(t, twin, lab.victim))
        return twin

    def used_in_all_rows(lab: Lab) -> int:
        copy = lab.shared(used=2, server=True)
        lab.do(lambda t, tr: tr.holds.take_idle(t, copy, lab.victim + 1))
        return copy

    def shared_sleeper(lab: Lab) -> int:
        copy = lab.shared(used=0)
        lab.do(lambda t, tr: tr.suspensions.note_way(t, copy, Way.COOPERATIVE))
        return copy

    def shared_twin(lab: Lab) -> int:
        """Make a copy whose memory passes to a twin with several users."""
        copy = lab.idle("b", server=True)
        lab.shared()
        return copy

    def told_to_resume(lab: Lab) -> int:
        copy, ticket = lab.suspended("a"), lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.allow_resume(t, ticket, copy))
        return ticket

    def failed_to_resume_promised(lab: Lab) -> Operation:
        copy, ticket = lab.suspended("a"), lab.ticket("a")
        lab.do(lambda t, tr: tr.hand_over.allow_resume(t, ticket, copy))
        return lambda t, tr: tr.suspensions.fail(t, copy, None, 1)

    def dropped(lab: Lab) -> int:
        copy = lab.suspended("a")
        lab.do(lambda t, tr: tr.suspensions.drop(t, copy, Lab.victim))
        return copy

    def unloads_on_release(lab: Lab) -> int:
        copy = lab.suspending("a")
        lab.do(lambda t, tr: tr.unloads.ask(t, copy, Lab.victim))
        return copy

    def checkpoints_ended(lab: Lab) -> Operation:
        row = lab.idle("a", server=True)
        lab.do(lambda t, tr: tr.suspensions.note_way(t, row, Way.CHECKPOINT))
        return lambda t, tr: tr.suspensions.end_checkpoints(t, lab.server)

    def allowed_to_resume(lab: Lab) -> Operation:
        copy, ticket = lab.suspended("a"), lab.ticket("a")
        return lambda t, tr: tr.hand_over.allow_resume(t, ticket, copy)

    def reset_suspended(lab: Lab) -> Operation:
        lab.suspended("a")
        lab.suspending("b")
        lab.resuming("c")
        return lambda t, tr: tr.reset(t)

    def measured_no_more(lab: Lab) -> Operation:
        lab.idle("a", server=True)
        lab.do(lambda t, tr: tr.measurements.measure(t, lab.server, {0: 77.0}))
        return lambda t, tr: tr.measurements.forget(t, lab.server)

    def measured_suspended(lab: Lab) -> Operation:
        lab.suspended("a", server=True)
        return lambda t, tr: tr.measurements.measure(t, lab.server, {0: 5.0})

    def on(prepare: Callable[[Lab], int], operate: Callable[[Transaction, Transitions, int], object]) -> Any:
        def scenario(lab: Lab) -> Operation:
            row = prepare(lab)
            return lambda t, tr: operate(t, tr, row)

        return scenario

    return {
        "members.join": lambda lab: lambda t, tr: tr.members.join(t, 4, Member.WORKER, NOBODYS_PID + 2, 3, b"newcomer"),
        "members.leave": on(
            lambda lab: lab.active() and lab.ticket(), lambda t, tr, _: tr.members.leave(t, Lab.victim)
        ),
        "members.reap": reaped,
        "members.reap/isolated": reaped_isolated,
        "members.reap/answered": reaped_with_answers,
        "members.reap/server": reaped_server,
        "members.reap/leases": reaped_with_leases,
        "members.reap/pins": reaped_with_pins,
        "members.lead": lambda lab: lambda t, tr: tr.members.lead(t, Lab.victim, b"nvml", (True, True, False)),
        "members.lead/accounting only": led_by_accounting,
        "members.note_source": lambda lab: lambda t, tr: tr.members.note_source(t, Lab.victim, 2),
        "members.note_poll": lambda lab: lambda t, tr: tr.members.note_poll(t, False),
        "members.note_processes": lambda lab: lambda t, tr: tr.members.note_processes(t, False),
        "members.ring": lambda lab: lambda t, tr: tr.members.ring(t, Lab.victim),
        "models.claim": lambda lab: lambda t, tr: tr.models.claim(t, "new", b"new"),
        "models.claim/recycling": claimed_when_full,
        "estimates.estimate": on(
            lambda lab: lab.ticket(known=False), lambda t, tr, _: tr.estimates.estimate(t, 0, 123.5, measured=True)
        ),
        "estimates.estimate/of a preload": on(
            preloading, lambda t, tr, _: tr.estimates.estimate(t, 0, 123.5, measured=True)
        ),
        "estimates.expect": on(lambda lab: lab.ticket(known=False), lambda t, tr, _: tr.estimates.expect(t, 0, 123.5)),
        "models.keep_alive": on(Lab.model, lambda t, tr, row: tr.models.keep_alive(t, row, 5)),
        "estimates.record_out_of_memory": on(Lab.model, lambda t, tr, row: tr.estimates.record_out_of_memory(t, row)),
        "models.note_failure": on(Lab.model, lambda t, tr, row: tr.models.note_failure(t, row)),
        "loads.end/after failures": failed_before,
        "estimates.record_out_of_memory/loading": on(
            Lab.model, lambda t, tr, row: tr.estimates.record_out_of_memory(t, row, 700.0, loading=True)
        ),
        "pins.pin": on(Lab.model, lambda t, tr, row: tr.pins.pin(t, row, Lab.victim)),
        "pins.pin/for all": on(Lab.model, lambda t, tr, row: tr.pins.pin(t, row, -1)),
        "models.supersede": on(Lab.model, lambda t, tr, row: tr.models.supersede(t, row, True)),
        "pins.unpin": on(pinned, lambda t, tr, row: tr.pins.unpin(t, row)),
        "tickets.answer_enough": on(preloading, lambda t, tr, row: tr.tickets.answer_enough(t, row)),
        "tickets.enqueue/preload": on(
            Lab.model, lambda t, tr, row: tr.tickets.enqueue(t, row, Lab.victim, 2, 9.0, 2**62, 3)
        ),
        "tickets.enqueue/nested": on(
            Lab.model, lambda t, tr, row: tr.tickets.enqueue(t, row, Lab.victim, 0, 9.0, 2**62, nested=True)
        ),
        "tickets.enqueue": on(Lab.model, lambda t, tr, row: tr.tickets.enqueue(t, row, Lab.victim, 0, math.nan, 2**62)),
        "tickets.enqueue/known to wait": on(
            Lab.model,
            lambda t, tr, row: tr.tickets.enqueue(t, row, Lab.victim, 1, 9.0, 2**62, cause=Cause(6, seconds=0.5)),
        ),
        "models.note_demand": on(Lab.model, lambda t, tr, row: tr.models.note_demand(t, row, 0.5, 7, 10**9)),
        "tickets.set_reason": on(
            Lab.ticket, lambda t, tr, row: tr.tickets.set_reason(t, row, Cause(3, 100.0, 50.0, 60.0, 0.5, 1, 1))
        ),
        "tickets.warn": on(Lab.ticket, lambda t, tr, row: tr.tickets.warn(t, row, "waits")),
        "tickets.block": on(Lab.ticket, lambda t, tr, row: tr.tickets.block(t, row)),
        "tickets.call_up": on(Lab.ticket, lambda t, tr, row: tr.tickets.call_up(t, row)),
        "tickets.let_pass": on(Lab.ticket, lambda t, tr, row: tr.tickets.let_pass(t, row)),
        "tickets.expire": on(Lab.ticket, lambda t, tr, row: tr.tickets.expire(t, row)),
        "hand_over.grant": granted,
        "hand_over.from_holder": passed_on,
        "hand_over.allow_load": on(
            Lab.ticket, lambda t, tr, row: tr.hand_over.allow_load(t, row, 1, 50.0, alone=False)
        ),
        "hand_over.allow_load/alone": on(
            Lab.ticket, lambda t, tr, row: tr.hand_over.allow_load(t, row, 1, 50.0, alone=True)
        ),
        "hand_over.allow_load/lease": allowed_lease,
        "hand_over.allow_load/steady": on(
            steady_ticket, lambda t, tr, row: tr.hand_over.allow_load(t, row, 1, 50.0, alone=False)
        ),
        "isolation.end_steady": on(steady_load, lambda t, tr, row: tr.isolation.end_steady(t, row)),
        "loads.end/steady": on(steady_load, lambda t, tr, row: tr.loads.end(t, row, b"h2", 50.0, 0, False)),
        "tickets.refuse": on(Lab.ticket, lambda t, tr, row: tr.tickets.refuse(t, row)),
        "hand_over.consume_answer": answered,
        "hand_over.consume_answer/refused lease": on(
            refused_lease, lambda t, tr, row: tr.hand_over.consume_answer(t, row)
        ),
        "hand_over.leave_queue/lease": on(Lab.lease_ticket, lambda t, tr, row: tr.hand_over.leave_queue(t, row)),
        "hand_over.leave_queue/lease granted": on(granted_lease, lambda t, tr, row: tr.hand_over.leave_queue(t, row)),
        "leases.claim": lambda lab: (
            lambda t, tr: tr.tickets.enqueue(t, tr.leases.claim(t, b"l", 70.0), Lab.victim, 1, 70.0, 9)
        ),
        "leases.begin": on(Lab.lease, lambda t, tr, row: tr.leases.begin(t, row, Lab.victim, 1, 70.0)),
        "leases.link_program": on(Lab.leased, lambda t, tr, row: tr.leases.link_program(t, row, 4711)),
        "leases.measure_program": on(Lab.leased, lambda t, tr, row: tr.leases.measure_program(t, row, [33.0])),
        "leases.end": on(Lab.leased, lambda t, tr, row: tr.leases.end(t, row)),
        "leases.end/with a program": on(program_leased, lambda t, tr, row: tr.leases.end(t, row)),
        "hand_over.leave_queue": on(Lab.ticket, lambda t, tr, row: tr.hand_over.leave_queue(t, row)),
        "hand_over.leave_queue/told to load": left_with_load,
        "hand_over.leave_queue/granted": left_with_grant,
        "loads.begin": on(Lab.model, lambda t, tr, row: tr.loads.begin(t, row, Lab.victim, 1, 100.0, alone=False)),
        "isolation.set_baseline": on(
            lambda lab: lab.loading(alone=True), lambda t, tr, row: tr.isolation.set_baseline(t, row)
        ),
        "loads.link_server": on(Lab.loading, lambda t, tr, row: tr.loads.link_server(t, row, Lab.server)),
        "loads.end": on(Lab.loading, lambda t, tr, row: tr.loads.end(t, row, b"handle", 80.0, 0, False)),
        "loads.end/object": on(Lab.loading, lambda t, tr, row: tr.loads.end(t, row, b"", 80.0, 0, False)),
        "loads.fail": on(Lab.loading, lambda t, tr, row: tr.loads.fail(t, row)),
        "loads.give_up": on(Lab.loading, lambda t, tr, row: tr.loads.give_up(t, row)),
        "loads.give_up/server": given_up_with_server,
        "holds.activate": on(Lab.idle, lambda t, tr, row: tr.holds.activate(t, row, Lab.victim + 1)),
        "holds.take_idle": on(Lab.idle, lambda t, tr, row: tr.holds.take_idle(t, row, Lab.victim + 1)),
        "holds.release": released_between_idle,
        "holds.release/not used": on(Lab.active, lambda t, tr, row: tr.holds.release(t, row, used=False)),
        "holds.release/alone": released_alone,
        "holds.release/unload on release": released_and_unloaded,
        "isolation.end": on(lambda lab: lab.active(alone=True), lambda t, tr, row: tr.isolation.end(t, row)),
        "unloads.begin": on(Lab.idle, lambda t, tr, row: tr.unloads.begin(t, row, Lab.victim, evicted=True)),
        "unloads.ask": on(Lab.idle, lambda t, tr, row: tr.unloads.ask(t, row, Lab.victim)),
        "unloads.ask/in use": on(Lab.active, lambda t, tr, row: tr.unloads.ask(t, row, Lab.victim)),
        "unloads.ask/loading": on(Lab.loading, lambda t, tr, row: tr.unloads.ask(t, row, Lab.victim)),
        "holds.release/asked to go": on(told_to_go, lambda t, tr, row: tr.holds.release(t, row)),
        "members.set_settings": lambda lab: lambda t, tr: tr.members.set_settings(t, Settings(slack_percentage=0.3)),
        "loads.end/twin": twin_loaded,
        "unloads.begin/twins idle": twins_evicted,
        "unloads.begin/twin in use": on(twin_in_use, lambda t, tr, row: tr.unloads.begin(t, row, Lab.victim, True)),
        "unloads.hand_over": on(Lab.unloading, lambda t, tr, row: tr.unloads.hand_over(t, row, 0)),
        "unloads.note_late": on(Lab.unloading, lambda t, tr, row: tr.unloads.note_late(t, row)),
        "unloads.end": on(Lab.unloading, lambda t, tr, row: tr.unloads.end(t, row)),
        "holds.discard": on(Lab.active, lambda t, tr, row: tr.holds.discard(t, row)),
        "holds.discard/promised": discarded_promised,
        "reset": reset_all,
        "reset/lease granted": on(granted_lease, lambda t, tr, _: tr.reset(t)),
        "devices.describe": lambda lab: (
            lambda t, tr: tr.devices.describe(t, [(b"uuid-0", b"gpu 0", 2000.0), (b"uuid-1", b"gpu 1", 2000.0)])
        ),
        "devices.describe/others": lambda lab: (
            lambda t, tr: tr.devices.describe(t, [(b"uuid-0", b"gpu 0", 2000.0), (b"mig", b"m", 9.0)], replace=True)
        ),
        "devices.describe/instead of stated ones": described_instead_of_stated,
        "devices.forget_stated": stated_device_forgotten,
        "devices.note_try": lambda lab: lambda t, tr: tr.devices.note_try(t, 0, 10**9),
        "devices.note_unrelated": lambda lab: lambda t, tr: tr.devices.note_unrelated(t, 0, 55.0),
        "measurements.set_measured_mb": on(
            Lab.active, lambda t, tr, row: tr.measurements.set_measured_mb(t, row, 66.0)
        ),
        "loads.begin/spanning": on(
            Lab.model, lambda t, tr, row: tr.loads.begin(t, row, Lab.victim, 3, 90.0, alone=True)
        ),
        "measurements.measure/spanning": measured_on_two,
        "members.reap/spanning": reaped_spanning,
        "devices.sample": sampled_after_load,
        "devices.sample/returned": returned,
        "devices.sample/written off": returned_late,
        "ledgers.expire": not_sampled_since,
        "measurements.measure": measured,
        "measurements.forget": measured_no_more,
        "devices.reset_peaks": lambda lab: lambda t, tr: tr.devices.reset_peaks(t),
        "estimates.observe": observed_again,
        "estimates.observe/recycling": observed_when_full,
        "estimates.note_solution": lambda lab: lambda t, tr: tr.estimates.note_solution(t, 5),
        "suspensions.note_way": on(Lab.idle, lambda t, tr, row: tr.suspensions.note_way(t, row, Way.COOPERATIVE)),
        "suspensions.end_checkpoints": checkpoints_ended,
        "suspensions.expect": on(Lab.model, lambda t, tr, row: tr.suspensions.expect(t, row, 1.5, 0.5)),
        "suspensions.begin": on(Lab.sleeper, lambda t, tr, row: tr.suspensions.begin(t, row, Lab.victim, True)),
        "suspensions.end": on(Lab.suspending, lambda t, tr, row: tr.suspensions.end(t, row)),
        "suspensions.fail": on(
            Lab.suspending, lambda t, tr, row: tr.suspensions.fail(t, row, Unsuspendable.SUSPEND_FAILED)
        ),
        "suspensions.fail/resuming": on(Lab.resuming, lambda t, tr, row: tr.suspensions.fail(t, row, None, 1)),
        "suspensions.fail/promised": failed_to_resume_promised,
        "hand_over.allow_resume": allowed_to_resume,
        "suspensions.begin_resume": on(Lab.suspended, lambda t, tr, row: tr.suspensions.begin_resume(t, row, 1)),
        "suspensions.end_resume": on(Lab.resuming, lambda t, tr, row: tr.suspensions.end_resume(t, row)),
        "suspensions.cancel": on(Lab.resuming, lambda t, tr, row: tr.suspensions.cancel(t, row)),
        "suspensions.turn_back": on(Lab.resuming, lambda t, tr, row: tr.suspensions.turn_back(t, row, 1)),
        "suspensions.hand_over": on(Lab.suspending, lambda t, tr, row: tr.suspensions.hand_over(t, row, 0)),
        "suspensions.drop": on(Lab.suspended, lambda t, tr, row: tr.suspensions.drop(t, row, Lab.victim)),
        "unloads.end/suspended before": on(dropped, lambda t, tr, row: tr.unloads.end(t, row)),
        "suspensions.end/unload on release": on(unloads_on_release, lambda t, tr, row: tr.suspensions.end(t, row)),
        "unloads.ask/suspended": on(Lab.suspended, lambda t, tr, row: tr.unloads.ask(t, row, Lab.victim)),
        "hand_over.leave_queue/told to resume": on(told_to_resume, lambda t, tr, row: tr.hand_over.leave_queue(t, row)),
        "reset/suspended": reset_suspended,
        "reset/told to resume": on(told_to_resume, lambda t, tr, _: tr.reset(t)),
        "members.reap/told to resume": reaped_while_it_moves(told_to_resume),
        "members.reap/suspending": reaped_while_it_moves(Lab.suspending),
        "members.reap/resuming": reaped_while_it_moves(Lab.resuming),
        "members.reap/server suspending": server_reaped(Lab.suspending),
        "members.reap/server suspended": server_reaped(Lab.suspended),
        "members.reap/server resuming": server_reaped(Lab.resuming),
        "measurements.measure/suspended": measured_suspended,
        "models.set_users": on(Lab.model, lambda t, tr, row: tr.models.set_users(t, row, 3)),
        "loads.end/for three": on(
            loading_for_three, lambda t, tr, row: tr.loads.end(t, row, b"handle", 80.0, 0, False)
        ),
        "suspensions.end_resume/for three": on(
            resuming_for_three, lambda t, tr, row: tr.suspensions.end_resume(t, row)
        ),
        "suspensions.begin/seats": on(shared_sleeper, lambda t, tr, row: tr.suspensions.begin(t, row, 1, True)),
        "seats.free": on(
            lambda lab: lab.tables.seats_of(lab.shared(used=0))[0], lambda t, tr, row: tr.seats.free(t, row)
        ),
        "holds.release/last user": on(last_user, lambda t, tr, seat: tr.holds.release(t, seat)),
        "unloads.begin/seats": on(
            lambda lab: lab.shared(used=0), lambda t, tr, row: tr.unloads.begin(t, row, Lab.victim, evicted=True)
        ),
        "unloads.ask/seat in use": on(Lab.shared, lambda t, tr, row: tr.unloads.ask(t, row, Lab.victim)),
        "unloads.begin/twin with seats": on(
            shared_twin, lambda t, tr, row: tr.unloads.begin(t, row, Lab.victim, evicted=True)
        ),
        "unloads.end/twin with a seat in use": on(before_last_user, lambda t, tr, row: tr.unloads.end(t, row)),
        "holds.discard/seats": on(used_in_all_rows, lambda t, tr, row: tr.holds.discard(t, row)),
        "members.reap/server of seats": on(
            lambda lab: lab.shared(server=True), lambda t, tr, _: tr.members.reap(t, Lab.server)
        ),
        "members.reap/owner of seats": on(
            lambda lab: lab.shared(handle=b""), lambda t, tr, _: tr.members.reap(t, Lab.victim)
        ),
        "members.reap/last user": on(last_user, lambda t, tr, _: tr.members.reap(t, Lab.victim)),
        "reset/seats": on(Lab.shared, lambda t, tr, _: tr.reset(t)),
    }


# What parts of `Transitions` do for one another: by itself, none of these keeps the invariants.
STEPS = {
    "tickets.answer",
    "tickets.stop_waiting",
    "tickets.wait_again",
    "models.take_row",
    "models.forget_failures",
    "estimates.raise_to",
    "ledgers.expect_back",
    "ledgers.count_after_lease",
    "ledgers.await_nothing",
    "ledgers.settle",
    "isolation.begin",
    "isolation.begin_steady",
    "isolation.note_change",
    "twins.part",
    "twins.leave_to_last",
    "seats.add",
    "seats.close",
    "seats.free_all",
    "seats.move",
    "loads.abandon",
    "leases.forget_spent",
    "hand_over.reset",
    "hand_over.take_back",
}


def transitions_of(transitions: Transitions) -> set[str]:
    """Return every public method of `Transitions` and of its parts that takes a transaction."""
    parts = {f"{name}.": part for name, part in vars(transitions).items() if isinstance(part, Part)}
    return {
        prefix + name
        for prefix, part in {"": transitions, **parts}.items()
        for name, method in inspect.getmembers(part, inspect.ismethod)
        if not prefix.startswith("_") and not name.startswith("_") and "t" in inspect.signature(method).parameters
    }
