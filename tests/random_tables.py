"""Random operations on the rows of a namespace, each of which its owner may make: see `test_views`.

They go through `transitions` as managers, leaders and servers do, without a process for each. What a policy would
forbid for want of memory is allowed: nothing here decides.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial

from mpmm.errors import TableFullError
from mpmm.policy.suspension import Unsuspendable, Way
from mpmm.policy.view import Reason
from mpmm.shared_state.durations import LONGEST_NS
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Capacities, Header, Instance, Member, Ticket, device_rows
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.transaction import Transaction

ROOMY = Capacities(
    members=8, models=10, instances=16, tickets=80, pins=8, devices=3, observations=3, events=64, undo=16384
)
DEVICES = [(b"uuid-0", b"gpu 0", 8000.0), (b"uuid-1", b"gpu 1", 8000.0), (b"uuid-2", b"gpu 2", 4000.0)]
# Whether the source measures processes, frees late, and only accounts for what is loaded.
FLAGS = [(True, False, False), (True, True, False), (False, True, False), (False, False, True)]
# What waiters may be told in one namespace.
REASONS = [
    (Reason.SHARING, Reason.COPIES),
    (Reason.LEASED, Reason.EXTERNAL, Reason.SHARING, Reason.BEHIND),
    (Reason.IN_USE, Reason.UNLOADING, Reason.MEMORY, Reason.DRAINING),
]
OF_LEASES = (Reason.LEASED, Reason.BEHIND)
WORKERS = (0, 1, 2)
SERVERS = (3, 4, 5)
SECOND_NS = 10**9
_names = itertools.count()


class _Undo(Exception):
    """Ends a transaction that was only an attempt."""


class RandomTables:
    """A namespace with up to three devices, three workers and three model servers, and a clock that `step` moves.

    plain: all models are known, all copies are handles, of which none is suspended, no load fails, and most who wait
    want one model, and no more than a copy of it. Of every other seed: there the scheduler's shortcuts often know what
    to do.
    """

    def __init__(self, seed: int, devices: int | None = None) -> None:
        """devices: how many, else as the seed says."""
        self.chance = random.Random(seed)
        self.now = 10**15
        self.most_copies = self.chance.choice([2, 100])
        chosen = Settings(
            suspend_budget_mb=self.chance.choice([0.0, 500.0, 1e5]),
            max_overtake_seconds=self.chance.choice([0.5, 60.0]),
            max_model_copies=self.most_copies,
        )
        self.namespace = Namespace.join(f"random{next(_names)}", capacities=ROOMY, settings=chosen)
        self.tables, self.layout = self.namespace.tables, self.namespace.segment.layout
        self.transitions = self.namespace.transitions
        self.handles = itertools.count()
        flags = self.chance.choice(FLAGS)
        self.models = self.chance.choice([1, 2, 6])
        self.plain = seed % 2 == 0
        self.reasons = self.chance.choice([*REASONS, tuple(Reason)])
        used = DEVICES[: devices or self.chance.choice([1, 3])]
        self.places = [1, 2, 4, 1, 2, 4, 3, 6, 7] if len(used) == 3 else [1]
        with self.namespace.transaction() as t:
            self.transitions.devices.describe(t, used)
            self.transitions.members.lead(t, 0, b"made up", flags)
            for number in range(self.models):
                tag = f"m{number}"
                row = self.transitions.models.claim(t, tag, tag.encode())
                self.transitions.models.set_users(t, row, self.chance.choice([1, 1, 2, 3]))
                if self.plain:
                    self.transitions.estimates.estimate(t, row, 100.0, measured=True)
        for slot in (*WORKERS[1:], *SERVERS):
            kind = Member.WORKER if slot in WORKERS else Member.SERVER
            self.do(partial(self._join, slot, kind))
        self.operations: list[tuple[int, Callable[[Transaction], object]]] = [
            (3, self._name_model),
            (10, self._begin_load),
            (12, self._end_load),
            (2, self._fail_load),
            (8, self._take),
            (12, self._release),
            (1, self._ask_unload),
            (2, self._begin_unload),
            (1, self._note_late),
            (2, self._end_unload),
            (6, self._suspend),
            (4, self._end_suspension),
            (3, self._fail_suspension),
            (3, self._resume),
            (2, self._end_resume),
            (2, self._lease),
            (2, self._measure_lease),
            (1, self._end_lease),
            (3, self._measure),
            (3, self._sample),
            (9, self._ask),
            (6, self._tell),
            (4, self._leave),
            (1, self._begin_steady),
            (1, self._end_steady),
            (2, self._run_alone),
        ]

    def _join(self, slot: int, kind: int, t: Transaction) -> None:
        self.transitions.members.join(t, slot, kind, 4242 + slot, slot, b"made up")

    def do(self, operation: Callable[[Transaction], object]) -> None:
        """Make an operation; nothing if a table is full."""
        try:
            with self.namespace.transaction() as t:
                operation(t)
        except TableFullError:
            pass

    @contextlib.contextmanager
    def attempt(self) -> Iterator[Transaction]:
        """A transaction that is rolled back."""
        with contextlib.suppress(_Undo), self.namespace.transaction() as t:
            yield t
            raise _Undo

    def step(self) -> None:
        """Let some time pass, and make one operation, if it is possible."""
        self.now += self.chance.choice([10**6, 10**8, SECOND_NS, 3 * SECOND_NS])
        weights = [weight for weight, _ in self.operations]
        self.do(self.chance.choices(self.operations, weights)[0][1])

    def come_to_rest(self) -> None:
        """Let nobody wait for, load or hold a copy any more, nor want one kept; what unloads or suspends goes on."""
        transitions, instances = self.transitions, self.layout.instances
        with self.namespace.transaction() as t:
            for ticket in self.tables.used_rows(self.layout.tickets):
                transitions.hand_over.leave_queue(t, ticket)
            for pin in self.tables.used_rows(self.layout.pins):
                transitions.pins.unpin(t, pin)
            for row in self.tables.rows_where(instances, Instance.STATE, Instance.LOADING):
                transitions.loads.fail(t, row)
            for row in self.tables.rows_where(instances, Instance.STATE, Instance.RESUMING):
                transitions.suspensions.end_resume(t, row)
            for row in self.tables.rows_where(instances, Instance.STATE, Instance.ACTIVE):
                transitions.holds.release(t, row)

    def close(self) -> None:
        """Leave the namespace."""
        self.namespace.leave()

    # ---- what there is ---------------------------------------------------------------------------------------

    def _some(self, *states: int) -> int | None:
        """Return a row of a copy or lease in one of these states; no seat."""
        found = [row for row in self.tables.used_rows(self.layout.instances) if self._is_in(row, states)]
        return self.chance.choice(found) if found else None

    def _is_in(self, row: int, states: tuple[int, ...]) -> bool:
        one = self.tables.instances[row]
        return one.state in states and one.seat_of is None

    def _some_unused(self) -> int | None:
        """Return an idle copy that nobody uses."""
        row = self._some(Instance.IDLE)
        return None if row is None or self.tables.is_in_use(row) else row

    def _some_place(self, state: int) -> int | None:
        """Return a row in a state, a copy's or a seat's."""
        found = self.tables.rows_where(self.layout.instances, Instance.STATE, state)
        return self.chance.choice(found) if found else None

    def _model(self, t: Transaction) -> int:
        tag = f"m{self.chance.randrange(self.models)}"
        return self.transitions.models.claim(t, tag, tag.encode())

    def _some_devices(self) -> int:
        """Return the bits of devices on which something may be placed, 0 if the choice falls on one that is taken."""
        bits = self.chance.choice(self.places)
        return 0 if any(self.tables.devices[device].isolated is not None for device in device_rows(bits)) else bits

    def _of_ours(self, tickets: tuple[int, ...]) -> int | None:
        found = [row for row in self.tables.used_rows(self.layout.tickets) if self.tables.tickets[row].state in tickets]
        return self.chance.choice(found) if found else None

    # ---- models ----------------------------------------------------------------------------------------------

    def _name_model(self, t: Transaction) -> None:
        model, transitions = self._model(t), self.transitions
        mb = self.chance.choice([50.0, 300.0, 700.0])
        what = self.chance.randrange(8)
        if what < 2:
            transitions.estimates.estimate(t, model, mb, measured=bool(what))
        elif what == 2:
            transitions.estimates.expect(t, model, mb)
        elif what == 3:
            transitions.estimates.record_out_of_memory(t, model, mb)
        elif what == 4:
            transitions.models.set_users(t, model, self.chance.randrange(1, 4))
        elif what == 5:
            transitions.models.supersede(t, model, self.chance.random() < 0.5)
        elif what == 6:
            pin = self.tables.pin_row(model, self.namespace.reference)
            if pin is None:
                transitions.pins.pin(t, model, self.namespace.slot)
            else:
                transitions.pins.unpin(t, pin)
        else:
            transitions.suspensions.expect(t, model, self.chance.choice([0.0, 0.2]), self.chance.choice([0.0, 0.1]))

    # ---- copies ----------------------------------------------------------------------------------------------

    def _begin_load(self, t: Transaction) -> None:
        mb = self.chance.choice([100.0, 300.0])
        # Of some models there is no copy for longer where everything is plain.
        model = self.transitions.models.claim(t, "m0", b"m0") if self.plain else self._model(t)
        member, devices = self.chance.choice(WORKERS), self._some_devices()
        if not devices or self._has_enough(model):
            return
        row = self.transitions.loads.begin(t, model, member, devices, mb, alone=False)
        free = [slot for slot in SERVERS if self.tables.members[slot].instance is None]
        if free and self.chance.random() < 0.5:
            self.transitions.loads.link_server(t, row, self.chance.choice(free))

    def _has_enough(self, model: int) -> bool:
        figures = self.tables.models[model]
        return figures.copies + figures.loading >= self.most_copies

    def _end_load(self, t: Transaction) -> None:
        row = self._some(Instance.LOADING)
        if row is None:
            return
        one, transitions = self.tables.instances[row], self.transitions
        mb = self.chance.choice([80.0, 250.0])
        server = 0 if one.server is None else one.server + 1
        handle = b"h%d" % next(self.handles) if server or self.plain or self.chance.random() < 0.6 else b""
        shares = (
            tuple(mb * share for share in (0.5, 0.3, 0.2)[: len(one.devices)]) if self.chance.random() < 0.5 else ()
        )
        transitions.loads.end(t, row, handle, sum(shares) or mb, server, bool(server), shares)
        if self.chance.random() < 0.7:
            transitions.suspensions.note_way(t, row, self.chance.choice([Way.COOPERATIVE, Way.CHECKPOINT]))

    def _fail_load(self, t: Transaction) -> None:
        row = self._some(Instance.LOADING)
        if row is None:
            return
        model = self.tables.instances[row].model
        self.transitions.loads.fail(t, row)
        if not self.plain and self.chance.random() < 0.5:
            self.transitions.models.note_failure(t, model)

    def _take(self, t: Transaction) -> None:
        row = self._some_place(Instance.IDLE)
        if row is not None:
            owner = self.tables.instances[row].owner
            self.transitions.holds.take_idle(t, row, (self.chance.choice(WORKERS) if owner is None else owner) + 1)

    def _release(self, t: Transaction) -> None:
        row = self._some_place(Instance.ACTIVE)
        if row is not None:
            self.transitions.holds.release(t, row, used=self.chance.random() < 0.8)

    def _ask_unload(self, t: Transaction) -> None:
        row = self._some(Instance.ACTIVE, Instance.IDLE)
        if row is not None:
            self.transitions.unloads.ask(t, row, self.chance.choice(WORKERS))

    def _begin_unload(self, t: Transaction) -> None:
        row = self._some_unused()
        if row is not None:
            self.transitions.unloads.begin(t, row, self.chance.choice(WORKERS), evicted=self.chance.random() < 0.5)

    def _some_unloading(self) -> int | None:
        row = self._some(Instance.UNLOADING)
        # Nobody begins before the last seat is given back.
        return None if row is None or self.tables.instances[row].seats else row

    def _note_late(self, t: Transaction) -> None:
        row = self._some_unloading()
        if row is not None:
            self.transitions.unloads.note_late(t, row)

    def _end_unload(self, t: Transaction) -> None:
        row = self._some_unloading()
        if row is not None:
            self.transitions.unloads.end(t, row)

    # ---- suspension ------------------------------------------------------------------------------------------

    def _suspend(self, t: Transaction) -> None:
        row = self._some_unused()
        if row is None:
            return
        one = self.tables.instances[row]
        if not self.plain and one.way and len(one.devices) == 1 and not self.transitions.twins.any_of(row):
            self.transitions.suspensions.begin(t, row, self.chance.choice(WORKERS), evicted=True)

    def _end_suspension(self, t: Transaction) -> None:
        row = self._some(Instance.SUSPENDING)
        if row is not None:
            self.transitions.suspensions.end(t, row)

    def _fail_suspension(self, t: Transaction) -> None:
        row = self._some(Instance.SUSPENDING, Instance.RESUMING)
        if row is not None:
            why = self.chance.choice([None, *Unsuspendable])
            self.transitions.suspensions.fail(t, row, why, self.chance.choice(WORKERS))

    def _resume(self, t: Transaction) -> None:
        row = self._some(Instance.SUSPENDED)
        if row is not None and not self._has_enough(self.tables.instances[row].model):
            owner = self.tables.instances[row].owner
            self.transitions.suspensions.begin_resume(t, row, self.chance.choice(WORKERS) if owner is None else owner)

    def _end_resume(self, t: Transaction) -> None:
        row = self._some(Instance.RESUMING)
        if row is not None:
            self.transitions.suspensions.end_resume(t, row)

    # ---- leases ----------------------------------------------------------------------------------------------

    def _lease(self, t: Transaction) -> None:
        mb, devices = self.chance.choice([70.0, 600.0]), self._some_devices()
        if not devices:
            return
        model = self.transitions.leases.claim(t, b"lease", mb)
        self.transitions.leases.begin(t, model, self.chance.choice(WORKERS), devices, mb)

    def _measure_lease(self, t: Transaction) -> None:
        row = self._some(Instance.LEASED)
        if row is not None:
            self.transitions.leases.measure_program(t, row, self.chance.choice([0.0, 50.0, 900.0]))

    def _end_lease(self, t: Transaction) -> None:
        row = self._some(Instance.LEASED)
        if row is not None:
            self.transitions.leases.end(t, row)

    # ---- figures ---------------------------------------------------------------------------------------------

    def _measure(self, t: Transaction) -> None:
        slot = self.chance.choice(SERVERS)
        instance = self.tables.members[slot].instance
        if instance is not None:
            devices = self.tables.instances[instance].devices
            figures = {device: self.chance.choice([90.0, 280.0, 410.0]) for device in devices}
            self.transitions.measurements.measure(t, slot, figures, self.now)

    def _sample(self, t: Transaction) -> None:
        device = self.chance.choice(self.tables.used_rows(self.layout.devices))
        self.transitions.devices.note_unrelated(t, device, self.chance.choice([0.0, 0.0, 200.0]))
        self.transitions.devices.sample(t, device, self.chance.choice([0.0, 500.0, 2500.0]), self.now, self.now)

    # ---- the queue -------------------------------------------------------------------------------------------

    def _ask(self, t: Transaction) -> None:
        chance, enqueue = self.chance, self.transitions.tickets.enqueue
        if chance.random() < (0.5 if Reason.LEASED in self.reasons else 0.1):
            lease = self.transitions.leases.claim(t, b"lease", 90.0)
            cause, urgency = Cause(chance.choice(OF_LEASES)), chance.choice([0, 1])
            enqueue(t, lease, chance.choice(WORKERS), 1, 90.0, LONGEST_NS, cause=cause, urgency=urgency)
            return
        for _ in range(chance.choice([1, 1, 1, 12])):
            deadline_ns = chance.choice([LONGEST_NS, LONGEST_NS, self.now + 2 * SECOND_NS])
            urgency = chance.choice([0, 0, 1, -1])
            if self.plain:
                model = self._model(t) if chance.random() < 0.1 else self.transitions.models.claim(t, "m0", b"m0")
                cause = Cause(chance.choice(self.reasons), 1.0, 2.0, 3.0, 4.0)
                enqueue(t, model, chance.choice(WORKERS), 1, 100.0, deadline_ns, cause=cause, urgency=urgency)
                continue
            model = self._model(t)
            sized = self.tables.models[model].known
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

    def _tell(self, t: Transaction) -> None:
        row = self._of_ours((Ticket.WAITING,))
        if row is None:
            return
        newest = self.namespace.segment.words[Header.NEWEST_TICKET]
        if self.plain and self.tables.tickets[newest].state == Ticket.WAITING:
            row = newest
        tickets = self.transitions.tickets
        what = self.chance.choice([0, 0, 1, 2, 3, 3])
        if what == 0:
            tickets.block(t, row)
        elif what == 1:
            tickets.let_pass(t, row)
        elif what == 2:
            tickets.call_up(t, row)
        else:
            tickets.set_reason(t, row, Cause(self.chance.choice(self.reasons), 1.0, 2.0, 3.0, 4.0))

    def _leave(self, t: Transaction) -> None:
        for _ in range(self.chance.choice([1, 1, 8, 8])):
            row = self._of_ours((Ticket.WAITING,))
            if row is not None:
                self.transitions.hand_over.leave_queue(t, row)

    # ---- whole devices ---------------------------------------------------------------------------------------

    def _begin_steady(self, t: Transaction) -> None:
        row = self._some(Instance.LOADING, Instance.LEASED)
        taken = {device for one in self._steady() for device in self.tables.instances[one].devices}
        if row is not None and not taken & set(self.tables.instances[row].devices):
            self.transitions.isolation.begin_steady(t, row)

    def _steady(self) -> list[int]:
        used = self.tables.used_rows(self.layout.instances)
        return [row for row in used if self.tables.instances[row].steady]

    def _end_steady(self, t: Transaction) -> None:
        for row in self._steady()[:1]:
            self.transitions.isolation.end_steady(t, row)

    def _run_alone(self, t: Transaction) -> None:
        row = self._some(Instance.LOADING)
        if row is None or any(
            self.tables.devices[device].isolated is not None for device in self.tables.used_rows(self.layout.devices)
        ):
            return
        one = self.tables.instances[row]
        if len(one.devices) == 1 and self.tables.on_device(one.devices[0]) == [row]:
            self.transitions.isolation.begin(t, row)
