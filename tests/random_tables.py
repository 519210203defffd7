"""A namespace with invented members and devices, whose rows `random_operations` fills at random: see `test_views`."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial

from harness import NOBODYS_PID

from mpmm.errors import TableFullError
from mpmm.policy.view import Reason
from mpmm.shared_state.layout import Capacities, Instance, Member, Ticket, device_rows
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.transaction import Transaction

ROOMY = Capacities(
    members=8, models=10, instances=16, tickets=80, pins=8, devices=3, observations=3, events=64, undo=16384
)
DEVICES = [(b"uuid-0", b"gpu 0", 8000.0), (b"uuid-1", b"gpu 1", 8000.0), (b"uuid-2", b"gpu 2", 4000.0)]
# Whether the source measures processes, frees late, and only accounts for what is loaded.
FLAGS = [(True, False, False), (True, True, False), (False, True, False), (False, False, True)]
# The reasons that waiters may have in one namespace.
REASONS = [
    (Reason.SHARING, Reason.COPIES),
    (Reason.LEASED, Reason.EXTERNAL, Reason.SHARING, Reason.BEHIND),
    (Reason.IN_USE, Reason.UNLOADING, Reason.MEMORY, Reason.DRAINING),
]
WORKERS = (0, 1, 2)
SERVERS = (3, 4, 5)
SECOND_NS = 10**9
_names = itertools.count()


class _Undo(Exception):
    """Ends a transaction that was only an attempt."""


class RandomTables:
    """A namespace with up to three devices, three workers and three model servers, and a clock that stands still.

    `random_operations.step` moves the clock and makes an operation; the methods here choose rows for it.

    plain: all models are known, all copies are handles and never suspended, no load fails, and most waiters want one
    model, and only a copy of it. Every other seed is plain, because the scheduler's shortcuts often apply there.
    """

    def __init__(self, seed: int, devices: int | None = None) -> None:
        """devices: their number, by default drawn by the seed."""
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

    def _join(self, slot: int, kind: int, t: Transaction) -> None:
        self.transitions.members.join(t, slot, kind, NOBODYS_PID + slot, slot, b"made up")

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

    def come_to_rest(self) -> None:
        """End all waits, pins, loads, resumes and holds; unloads and suspensions continue."""
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

    def some(self, *states: int) -> int | None:
        """Return a row of a copy or lease in one of these states, but not of a seat."""
        found = [row for row in self.tables.used_rows(self.layout.instances) if self._is_in(row, states)]
        return self.chance.choice(found) if found else None

    def _is_in(self, row: int, states: tuple[int, ...]) -> bool:
        one = self.tables.instances[row]
        return one.state in states and one.seat_of is None

    def some_unused(self) -> int | None:
        """Return an idle copy without a seat in use."""
        row = self.some(Instance.IDLE)
        return None if row is None or self.tables.is_in_use(row) else row

    def some_place(self, state: int) -> int | None:
        """Return a row of a copy or a seat in a state."""
        found = self.tables.rows_where(self.layout.instances, Instance.STATE, state)
        return self.chance.choice(found) if found else None

    def claim_model(self, t: Transaction) -> int:
        """Return the row of a random model, which gets one if it has none."""
        tag = f"m{self.chance.randrange(self.models)}"
        return self.transitions.models.claim(t, tag, tag.encode())

    def some_devices(self) -> int:
        """Return the bits of random devices for a placement, 0 if one of them is isolated."""
        bits = self.chance.choice(self.places)
        return 0 if any(self.tables.devices[device].isolated is not None for device in device_rows(bits)) else bits

    def some_waiter(self) -> int | None:
        """Return a ticket that waits."""
        found = self.tables.rows_where(self.layout.tickets, Ticket.STATE, Ticket.WAITING)
        return self.chance.choice(found) if found else None

    def has_enough(self, model: int) -> bool:
        """Tell whether a model has as many copies as it may have."""
        figures = self.tables.models[model]
        return figures.copies + figures.loading >= self.most_copies

    def some_unloading(self) -> int | None:
        """Return a copy whose unload can end."""
        row = self.some(Instance.UNLOADING)
        # An unload does not begin before the last seat is released.
        return None if row is None or self.tables.instances[row].seats else row

    def steady(self) -> list[int]:
        """Return the rows that hold back loads and unloads on their devices until they have started."""
        used = self.tables.used_rows(self.layout.instances)
        return [row for row in used if self.tables.instances[row].steady]
