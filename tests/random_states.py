"""Random states as input for plans, and the plans that are recorded for them in `recorded_plans.txt`.

A plan that differs from the recorded one shows an effect of a change of the policy, even an unexpected one. If it is
intended, run `python tests/random_states.py` to record the plans again, and read the differences.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpmm.policy.fairness import rank_ns
from mpmm.policy.plan import make_plan
from mpmm.policy.view import (
    BusyInstance,
    Decision,
    DeviceView,
    IdleInstance,
    ModelView,
    PlacedInstance,
    Rules,
    SuspendedInstance,
    TicketView,
    View,
    Why,
)

RECORDED = Path(__file__).parent / "recorded_plans.txt"
# The number of states, and of those at the end that are `RareState`s.
STATES, RARE = 1600, 600
NOW_S = 1000.0
# Few different sizes, so that some models fit exactly, and some alternatives are equally good.
SIZES_MB = (100.0, 200.0, 250.0, 300.0, 400.0, 500.0, 600.0)


class RandomState:
    """A state whose counts are consistent: copies, their uses, loads and suspensions, and their memory."""

    # There are fewer idle copies than this, not counting places in some.
    idle_below = 5

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.devices = self.pick(1, 1, 2, 3)
        self.models = 4
        self.rows = iter(range(1, 1000))
        self.shared: Counter[int] = Counter()
        self.owned: dict[int, Counter[int]] = defaultdict(Counter)
        self.loading: dict[int, Counter[int]] = defaultdict(Counter)
        self.used_mb: Counter[int] = Counter()
        self.sizes = {row: self.pick(*SIZES_MB) for row in range(self.models)}
        # Evictions are decided by costs if all costs are known.
        self.costs_are_known = self.now_and_then(2)
        self.leases = {row for row in range(self.models) if self.now_and_then(12)}

    def pick(self, *values: Any) -> Any:
        """Return one of the values."""
        return self.chance.choice(values)

    def now_and_then(self, one_in: int) -> bool:
        """Return True once in `one_in` times, on average."""
        return self.chance.randrange(one_in) == 0

    def view(self) -> View:
        """Return the state as a view."""
        idle = [one for _ in range(self.chance.randrange(self.idle_below)) for one in self._idle()]
        busy = [self._busy() for _ in range(self.pick(0, 0, 1, 2))]
        leases = [
            self._placed(PlacedInstance, self.chance.randrange(self.models)) for _ in range(self.pick(0, 0, 0, 1))
        ]
        suspended = [self._suspended() for _ in range(self.pick(0, 0, 0, 1, 2))]
        tickets = tuple(self._ticket(row) for row in range(1, self.pick(2, 3, 4, 6)))
        waiting = Counter(ticket.model for ticket in tickets)
        devices = tuple(self._device(row, leases) for row in range(self.devices))
        return View(
            now_s=NOW_S,
            rules=Rules(
                slack_percentage=self.pick(0.0, 0.1),
                eviction_cooldown_seconds=10.0,
                min_model_copies=self.pick(0, 1, 1, 2),
                max_overtake_seconds=self.pick(1.0, 2.0),
                isolate_unknown=self.pick(True, True, False),
                max_model_copies=self.pick(math.inf, math.inf, 1, 2),
            ),
            models={row: self._model(row, waiting[row]) for row in range(self.models)},
            idle=tuple(sorted(idle, key=lambda one: -one.idle_since_s)),
            tickets=tickets,
            devices=devices,
            busy=tuple(busy),
            leases=tuple(leases),
            suspended=tuple(sorted(suspended, key=lambda one: -one.since_s)),
            host_free_mb=self.pick(0.0, 300.0, 1e5),
        )

    def _placed(self, kind: Any, model: int, **more: Any) -> Any:
        spans = self.devices > 1 and self.now_and_then(8)
        first, *others = self.chance.sample(range(self.devices), 2 if spans else 1)
        mb = self.pick(self.sizes[model], self.sizes[model], *SIZES_MB) / (2 if spans else 1)
        if kind is not SuspendedInstance:
            for device in (first, *others):
                self.used_mb[device] += mb
        return kind(next(self.rows), model, first, mb, other_shares=tuple((one, mb) for one in others), **more)

    def _owner(self) -> int | None:
        return self.pick(None, None, None, 1, 2)  # type: ignore[no-any-return]  # `pick` returns one of any values.

    def _count(self, model: int, owner: int | None) -> None:
        if owner is None:
            self.shared[model] += 1
        else:
            self.owned[model][owner] += 1

    def _idle(self) -> list[IdleInstance]:
        model, owner = self.chance.randrange(self.models), self._owner()
        more = {"idle_since_s": NOW_S - self.pick(1.0, 5.0, 10.0, 30.0), "owner": owner, "pinned": self.now_and_then(6)}
        whole = self._placed(IdleInstance, model, **more, suspendable=self.now_and_then(3))
        self._count(model, owner)
        if not self.now_and_then(8):
            return [whole]
        self._count(model, owner)
        place = IdleInstance(next(self.rows), model, whole.device, 0.0, place_in=whole.row, **more)
        return [whole, place] if self.now_and_then(2) else [place]

    def _busy(self) -> BusyInstance:
        model, owner, loads = self.chance.randrange(self.models), self._owner(), self.now_and_then(3)
        if loads:
            self.loading[model][owner or 1] += 1
        else:
            self._count(model, owner)
        free_in_s = self.pick(0.0, 0.5, 2.0, 8.0, math.inf)
        more = {"free_in_s": free_in_s, "pinned": self.now_and_then(8), "owner": owner, "loading": loads}
        one: BusyInstance = self._placed(BusyInstance, model, **more)
        return one

    def _suspended(self) -> SuspendedInstance:
        model, since_s = self.chance.randrange(self.models), NOW_S - self.pick(1.0, 20.0)
        one: SuspendedInstance = self._placed(
            SuspendedInstance, model, since_s=since_s, owner=self._owner(), resume_s=self.pick(0.0, 0.5, 4.0)
        )
        return one

    def _device(self, row: int, leases: list[PlacedInstance]) -> DeviceView:
        leased_mb = math.fsum(one.mb_on(row) for one in leases if row in one.devices)
        external_mb = self.pick(0.0, 0.0, 50.0, 300.0)
        returning_mb = self.pick(0.0, 0.0, 0.0, 100.0)
        unloading_mb = self.pick(0.0, 0.0, 0.0, 200.0)
        unloading = int(unloading_mb > 0)
        return DeviceView(
            device=row,
            total_mb=self.pick(1000.0, 1000.0, 800.0),
            used_mb=self.used_mb[row] - leased_mb + external_mb + returning_mb + unloading_mb,
            reserved_mb=leased_mb,
            unloading_mb=unloading_mb,
            returning_mb=returning_mb,
            leased_mb=leased_mb,
            external_mb=external_mb,
            external_least_mb=self.pick(0.0, external_mb),
            isolated=self.now_and_then(25),
            unloading=unloading,
            suspending=unloading * self.pick(0, 1),
            steady=self.chance.randrange(self.models) if self.now_and_then(12) else None,
        )

    def _model(self, row: int, waiting: int) -> ModelView:
        failures = self.pick(0, 0, 0, 0, 0, 1, 3)
        return ModelView(
            model=row,
            known=row in self.leases or not self.now_and_then(4),
            need_mb=self.sizes[row],
            shared=self.shared[row],
            owned=dict(self.owned[row]),
            waiting=waiting,
            loading=dict(self.loading[row]),
            shares=self.pick(True, True, False),
            load_s=self.pick(1.0, 2.0, 8.0) if self.costs_are_known else self.pick(0.0, 1.0, 2.0, 8.0),
            hold_s=self.pick(0.0, 0.1, 1.0, 3.0),
            loading_for_s=self.pick(0.0, 0.5, 3.0),
            held_for_s=self.pick(0.0, 0.05, 2.0),
            held_in_all_s=self.pick(0.0, 0.2, 4.0),
            rate=self.pick(0.1, 0.5, 2.0) if self.costs_are_known else self.pick(0.0, 0.0, 0.5),
            lease=row in self.leases,
            failures=failures,
            failed_ago_s=self.pick(0.2, 1.5, 10.0) if failures else math.inf,
            leaving=int(self.now_and_then(20)),
            superseded=self.now_and_then(8),
            suspending=int(self.now_and_then(12)),
            resume_s=self.pick(0.0, 0.5),
            coming_s=self.pick(0.0, 0.0, 0.5),
            bound_mb=self.pick(0.0, 0.0, 0.0, self.sizes[row]),
            users=self.pick(1.0, 1.0, 1.0, 2.0),
        )

    def _ticket(self, row: int) -> TicketView:
        waited_s = self.pick(0.0, 0.5, 2.0, 5.0)
        preload = self.pick(0, 0, 0, 0, 0, 0, 0, 1, 2)
        some = tuple(sorted(self.chance.sample(range(self.devices), self.pick(1, self.devices))))
        there = self.now_and_then(6)
        return TicketView(
            row=row,
            number=self.chance.randrange(100) * 10 + row,
            priority=2 if preload else self.pick(0, 1, 1, 1),
            model=self.chance.randrange(self.models),
            member=self.pick(1, 1, 2),
            enqueued_s=NOW_S - waited_s,
            preload=preload,
            head_since_s=NOW_S - self.pick(0.5, 1.5, 4.0) if self.now_and_then(4) else None,
            loadable_on=some if there else (),
            usable_on=some if there and self.now_and_then(2) else (),
            span=2 if self.devices > 1 and self.now_and_then(10) else 1,
            nested=self.now_and_then(10),
            passed=self.now_and_then(8),
            rank=rank_ns(int((NOW_S - waited_s) * 1e9), self.pick(0, 0, 0, 1)),
            steady=self.now_and_then(10),
            resumes=bool(preload) and self.now_and_then(3),
        )


class RareState(RandomState):
    """A state in which much is common that is rare in others: long queues, wide copies, and limits that just do."""

    idle_below = 9

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.devices = self.pick(1, 2, 2, 3)
        self.sizes = {row: self.pick(0.0, 1.0, 200.0, 300.0, 720.0, 800.0, 900.0) for row in range(self.models)}
        self.leases = {row for row in range(self.models) if self.now_and_then(6)}
        self.costs_are_known = not self.now_and_then(4)

    def view(self) -> View:
        """Return the state as a view."""
        view = super().view()
        more = tuple(self._ticket(row) for row in range(len(view.tickets) + 1, 9))
        more_leases = tuple(
            PlacedInstance(next(self.rows), row, device.device, device.leased_mb / 2)
            for device in view.devices
            for row in self.leases
            if device.leased_mb
        )
        waiting = Counter(ticket.model for ticket in (*view.tickets, *more))
        models = {row: replace(one, waiting=waiting[row]) for row, one in view.models.items()}
        return replace(
            view,
            rules=replace(view.rules, max_model_copies=self.pick(math.inf, math.inf, math.inf, 3)),
            tickets=(*view.tickets, *more),
            models=models,
            leases=(*view.leases, *more_leases),
        )

    def _idle(self) -> list[IdleInstance]:
        return [replace(one, suspendable=not self.now_and_then(3)) for one in super()._idle()]

    def _device(self, row: int, leases: list[PlacedInstance]) -> DeviceView:
        device = super()._device(row, leases)
        grown_mb, leased_mb = self.pick(0.0, 0.0, 300.0), self.pick(0.0, 0.0, 0.0, 300.0)
        on_its_way = self.pick(0.0, 0.0, 0.5, 300.0)
        unloading = self.pick(0, 0, 0, 1, 2)
        return replace(
            device,
            used_mb=device.used_mb + grown_mb + on_its_way,
            reserved_mb=device.reserved_mb + leased_mb,
            unloading_mb=device.unloading_mb + (on_its_way if unloading else 0.0),
            returning_mb=device.returning_mb + (0.0 if unloading else on_its_way),
            leased_mb=device.leased_mb + leased_mb,
            external_mb=device.external_mb + grown_mb,
            unloading=device.unloading + unloading,
            suspending=device.suspending + min(unloading, self.pick(0, 1, 2)),
        )

    def _ticket(self, row: int) -> TicketView:
        ticket = super()._ticket(row)
        preload = self.pick(0, 0, 0, 0, 0, 0, 0, 2, 3)
        return replace(
            ticket,
            preload=preload,
            priority=2 if preload else ticket.priority,
            span=self.pick(1, 1, 1, 2) if self.devices > 1 else 1,
            usable_on=ticket.usable_on or self.pick((), (), (), (0,)),
            steady=self.now_and_then(20),
            resumes=bool(preload) and self.now_and_then(3),
            # The first of one rank are told apart by their numbers.
            rank=ticket.rank // 10**9 * 10**9 if self.now_and_then(2) else 0,
        )


def shown(value: object) -> str:
    """Return a value as a short text."""
    if isinstance(value, Why):
        figures = [value.need_mb, value.free_mb, value.coming_mb, value.seconds]
        about = [] if value.other is None else [f"of {value.other}"]
        on = [f"on {shown(value.devices)}"] if value.devices else []
        return " ".join([value.reason.name, "/".join(f"{one:.5g}" for one in figures), *about, *on])
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def decided(decision: Decision) -> str:
    """Return the decision for a waiter as text."""
    fields = {name: value for name, value in vars(decision).items() if name not in ("ticket", "why", "reason")}
    said = [f"{name}={shown(value)}" for name, value in fields.items() if value not in (False, None)]
    why = getattr(decision, "why", None)
    reason = getattr(decision, "reason", None)
    said += [] if reason is None or reason == getattr(why, "reason", None) else [reason.name]
    return " ".join([f"{decision.ticket}: {type(decision).__name__}", *said, *([shown(why)] if why else [])])


def plan_of(seed: int) -> str:
    """Return the plan of a random state: a line for each decision."""
    kind = RandomState if seed < STATES - RARE else RareState
    plan = make_plan(kind(seed).view())
    held_up = ["the queue is held up"] if plan.queue_held_up else []
    return "\n".join(f"  {line}" for line in [*map(decided, plan.decisions), *held_up])


def main() -> None:
    """Record the plans."""
    RECORDED.write_text("".join(f"{seed}\n{plan_of(seed)}\n".replace("\n\n", "\n") for seed in range(STATES)))


if __name__ == "__main__":
    main()
