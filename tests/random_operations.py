"""Random operations on the rows of a namespace, each allowed to its member: see `test_views`.

They use `transitions` as managers, leaders and servers do, without a process for each. They do not follow the policy,
and load even without enough memory. An operation for which there is no row does nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from random_tables import SECOND_NS, SERVERS, WORKERS, RandomTables

from mpmm.policy.suspension import Unsuspendable, Way
from mpmm.policy.view import Reason
from mpmm.shared_state.durations import LONGEST_NS
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Header, Instance, Ticket
from mpmm.shared_state.transaction import Transaction

__all__ = ["step"]

OF_LEASES = (Reason.LEASED, Reason.BEHIND)


def step(made: RandomTables) -> None:
    """Let some time pass, and make one random operation, if it is possible."""
    made.now += made.chance.choice([10**6, 10**8, SECOND_NS, 3 * SECOND_NS])
    weights = [weight for weight, _ in OPERATIONS]
    _, operation = made.chance.choices(OPERATIONS, weights)[0]
    made.do(partial(operation, made))


# ---- models ----------------------------------------------------------------------------------------------


def change_model(made: RandomTables, t: Transaction) -> None:
    model, transitions = made.claim_model(t), made.transitions
    mb = made.chance.choice([50.0, 300.0, 700.0])
    what = made.chance.randrange(8)
    if what < 2:
        transitions.estimates.estimate(t, model, mb, measured=bool(what))
    elif what == 2:
        transitions.estimates.expect(t, model, mb)
    elif what == 3:
        transitions.estimates.record_out_of_memory(t, model, mb)
    elif what == 4:
        transitions.models.set_users(t, model, made.chance.randrange(1, 4))
    elif what == 5:
        transitions.models.supersede(t, model, made.chance.random() < 0.5)
    elif what == 6:
        pin = made.tables.pin_row(model, made.namespace.reference)
        if pin is None:
            transitions.pins.pin(t, model, made.namespace.slot)
        else:
            transitions.pins.unpin(t, pin)
    else:
        transitions.suspensions.expect(t, model, made.chance.choice([0.0, 0.2]), made.chance.choice([0.0, 0.1]))


# ---- copies ----------------------------------------------------------------------------------------------


def begin_load(made: RandomTables, t: Transaction) -> None:
    mb = made.chance.choice([100.0, 300.0])
    # If everything is plain, only one model has copies.
    model = made.transitions.models.claim(t, "m0", b"m0") if made.plain else made.claim_model(t)
    member, devices = made.chance.choice(WORKERS), made.some_devices()
    if not devices or made.has_enough(model):
        return
    row = made.transitions.loads.begin(t, model, member, devices, mb, alone=False)
    free = [slot for slot in SERVERS if made.tables.members[slot].instance is None]
    if free and made.chance.random() < 0.5:
        made.transitions.loads.link_server(t, row, made.chance.choice(free))


def end_load(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.LOADING)
    if row is None:
        return
    one, transitions = made.tables.instances[row], made.transitions
    mb = made.chance.choice([80.0, 250.0])
    server = 0 if one.server is None else one.server + 1
    handle = b"h%d" % next(made.handles) if server or made.plain or made.chance.random() < 0.6 else b""
    shares = tuple(mb * share for share in (0.5, 0.3, 0.2)[: len(one.devices)]) if made.chance.random() < 0.5 else ()
    transitions.loads.end(t, row, handle, sum(shares) or mb, server, bool(server), shares)
    if made.chance.random() < 0.7:
        transitions.suspensions.note_way(t, row, made.chance.choice([Way.COOPERATIVE, Way.CHECKPOINT]))


def fail_load(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.LOADING)
    if row is None:
        return
    model = made.tables.instances[row].model
    made.transitions.loads.fail(t, row)
    if not made.plain and made.chance.random() < 0.5:
        made.transitions.models.note_failure(t, model)


def take(made: RandomTables, t: Transaction) -> None:
    row = made.some_place(Instance.IDLE)
    if row is not None:
        owner = made.tables.instances[row].owner
        made.transitions.holds.take_idle(t, row, (made.chance.choice(WORKERS) if owner is None else owner) + 1)


def release(made: RandomTables, t: Transaction) -> None:
    row = made.some_place(Instance.ACTIVE)
    if row is not None:
        made.transitions.holds.release(t, row, used=made.chance.random() < 0.8)


def ask_unload(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.ACTIVE, Instance.IDLE)
    if row is not None:
        made.transitions.unloads.ask(t, row, made.chance.choice(WORKERS))


def begin_unload(made: RandomTables, t: Transaction) -> None:
    row = made.some_unused()
    if row is not None:
        made.transitions.unloads.begin(t, row, made.chance.choice(WORKERS), evicted=made.chance.random() < 0.5)


def note_late(made: RandomTables, t: Transaction) -> None:
    row = made.some_unloading()
    if row is not None:
        made.transitions.unloads.note_late(t, row)


def end_unload(made: RandomTables, t: Transaction) -> None:
    row = made.some_unloading()
    if row is not None:
        made.transitions.unloads.end(t, row)


# ---- suspension ------------------------------------------------------------------------------------------


def suspend(made: RandomTables, t: Transaction) -> None:
    row = made.some_unused()
    if row is None:
        return
    one = made.tables.instances[row]
    if not made.plain and one.way and len(one.devices) == 1 and not made.transitions.twins.any_of(row):
        made.transitions.suspensions.begin(t, row, made.chance.choice(WORKERS), evicted=True)


def end_suspension(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.SUSPENDING)
    if row is not None:
        made.transitions.suspensions.end(t, row)


def fail_suspension(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.SUSPENDING, Instance.RESUMING)
    if row is not None:
        why = made.chance.choice([None, *Unsuspendable])
        made.transitions.suspensions.fail(t, row, why, made.chance.choice(WORKERS))


def resume(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.SUSPENDED)
    if row is not None and not made.has_enough(made.tables.instances[row].model):
        owner = made.tables.instances[row].owner
        made.transitions.suspensions.begin_resume(t, row, made.chance.choice(WORKERS) if owner is None else owner)


def end_resume(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.RESUMING)
    if row is not None:
        made.transitions.suspensions.end_resume(t, row)


# ---- leases ----------------------------------------------------------------------------------------------


def lease(made: RandomTables, t: Transaction) -> None:
    mb, devices = made.chance.choice([70.0, 600.0]), made.some_devices()
    if not devices:
        return
    model = made.transitions.leases.claim(t, b"lease", mb)
    made.transitions.leases.begin(t, model, made.chance.choice(WORKERS), devices, mb)


def measure_lease(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.LEASED)
    if row is not None:
        mb, shares = made.chance.choice([0.0, 50.0, 900.0]), made.tables.shares_of(row)
        made.transitions.leases.measure_program(t, row, [mb / len(shares)] * len(shares))


def end_lease(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.LEASED)
    if row is not None:
        made.transitions.leases.end(t, row)


# ---- figures ---------------------------------------------------------------------------------------------


def measure(made: RandomTables, t: Transaction) -> None:
    slot = made.chance.choice(SERVERS)
    instance = made.tables.members[slot].instance
    if instance is not None:
        devices = made.tables.instances[instance].devices
        figures = {device: made.chance.choice([90.0, 280.0, 410.0]) for device in devices}
        made.transitions.measurements.measure(t, slot, figures, made.now)


def sample(made: RandomTables, t: Transaction) -> None:
    device = made.chance.choice(made.tables.used_rows(made.layout.devices))
    made.transitions.devices.note_unrelated(t, device, made.chance.choice([0.0, 0.0, 200.0]))
    made.transitions.devices.sample(t, device, made.chance.choice([0.0, 500.0, 2500.0]), made.now, made.now)


# ---- the queue -------------------------------------------------------------------------------------------


def ask(made: RandomTables, t: Transaction) -> None:
    chance, enqueue = made.chance, made.transitions.tickets.enqueue
    if chance.random() < (0.5 if Reason.LEASED in made.reasons else 0.1):
        model = made.transitions.leases.claim(t, b"lease", 90.0)
        cause, urgency = Cause(chance.choice(OF_LEASES)), chance.choice([0, 1])
        enqueue(t, model, chance.choice(WORKERS), 1, 90.0, LONGEST_NS, cause=cause, urgency=urgency)
        return
    for _ in range(chance.choice([1, 1, 1, 12])):
        deadline_ns = chance.choice([LONGEST_NS, LONGEST_NS, made.now + 2 * SECOND_NS])
        urgency = chance.choice([0, 0, 1, -1])
        if made.plain:
            model = made.claim_model(t) if chance.random() < 0.1 else made.transitions.models.claim(t, "m0", b"m0")
            cause = Cause(chance.choice(made.reasons), 1.0, 2.0, 3.0, 4.0)
            enqueue(t, model, chance.choice(WORKERS), 1, 100.0, deadline_ns, cause=cause, urgency=urgency)
            continue
        model = made.claim_model(t)
        sized = made.tables.models[model].known
        preload = chance.choice([0, 0, 0, 2])
        span = chance.choice([1, 1, 2])
        enqueue(
            *(t, model, chance.choice(WORKERS), 2 if preload else int(sized), 100.0, deadline_ns, preload),
            loadable_on=chance.choice([0, 0, 1, 6]),
            usable_on=chance.choice([0, 0, 3]),
            span=span,
            nested=chance.random() < 0.2,
            urgency=urgency,
            steady=chance.random() < 0.1,
        )


def tell(made: RandomTables, t: Transaction) -> None:
    row = made.some_waiter()
    if row is None:
        return
    newest = made.namespace.segment.words[Header.NEWEST_TICKET]
    if made.plain and made.tables.tickets[newest].state == Ticket.WAITING:
        row = newest
    tickets = made.transitions.tickets
    what = made.chance.choice([0, 0, 1, 2, 3, 3, 4])
    if what == 0:
        tickets.block(t, row)
    elif what == 1:
        tickets.let_pass(t, row)
    elif what == 2:
        tickets.call_up(t, row)
    elif what == 4:
        tickets.expire(t, row)
    else:
        tickets.set_reason(t, row, Cause(made.chance.choice(made.reasons), 1.0, 2.0, 3.0, 4.0))


def leave(made: RandomTables, t: Transaction) -> None:
    for _ in range(made.chance.choice([1, 1, 8, 8])):
        row = made.some_waiter()
        if row is not None:
            made.transitions.hand_over.leave_queue(t, row)


# ---- whole devices ---------------------------------------------------------------------------------------


def begin_steady(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.LOADING, Instance.LEASED)
    taken = {device for one in made.steady() for device in made.tables.instances[one].devices}
    if row is not None and not taken & set(made.tables.instances[row].devices):
        made.transitions.isolation.begin_steady(t, row)


def end_steady(made: RandomTables, t: Transaction) -> None:
    for row in made.steady()[:1]:
        made.transitions.isolation.end_steady(t, row)


def run_alone(made: RandomTables, t: Transaction) -> None:
    row = made.some(Instance.LOADING)
    if row is None or any(
        made.tables.devices[device].isolated is not None for device in made.tables.used_rows(made.layout.devices)
    ):
        return
    one = made.tables.instances[row]
    if len(one.devices) == 1 and made.tables.on_device(one.devices[0]) == [row]:
        made.transitions.isolation.begin(t, row)


# How often each operation is made, in relation to the others.
OPERATIONS: list[tuple[int, Callable[[RandomTables, Transaction], None]]] = [
    (3, change_model),
    (10, begin_load),
    (12, end_load),
    (2, fail_load),
    (8, take),
    (12, release),
    (1, ask_unload),
    (2, begin_unload),
    (1, note_late),
    (2, end_unload),
    (6, suspend),
    (4, end_suspension),
    (3, fail_suspension),
    (3, resume),
    (2, end_resume),
    (2, lease),
    (2, measure_lease),
    (1, end_lease),
    (3, measure),
    (3, sample),
    (9, ask),
    (6, tell),
    (4, leave),
    (1, begin_steady),
    (1, end_steady),
    (2, run_alone),
]
