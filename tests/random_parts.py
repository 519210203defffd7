"""Random arguments for functions of the policy, and the answers that are recorded for them in `recorded_parts.txt`.

There are few values to draw from, so that both sides of a comparison are often equal. After an intended change of an
answer, run `python tests/random_parts.py` to record the answers again, and read the differences.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, get_args

from policy_views import NOW, RULES, view
from random_states import RandomState

from mpmm.policy import (
    admission,
    backoff,
    behind,
    eviction,
    fairness,
    isolation,
    ledger,
    loading,
    making_room,
    out_of_memory,
    placement,
    reasons,
    sharing,
    suspension,
)
from mpmm.policy.admission import free_mb
from mpmm.policy.backfill import backfill
from mpmm.policy.demand import Demand
from mpmm.policy.plan_state import PlanState, most_free_mb
from mpmm.policy.room_ahead import make_room_ahead
from mpmm.policy.view import (
    BusyInstance,
    Decision,
    DeviceView,
    IdleInstance,
    ModelView,
    PlacedInstance,
    Reason,
    Rules,
    SuspendedInstance,
    TicketView,
    View,
)

RECORDED = Path(__file__).parent / "recorded_parts.txt"
CASES = 200
PLACED = (IdleInstance, BusyInstance, SuspendedInstance)
SLACKS = (0.0, 0.1)
SIZES_MB = (0.0, 100.0, 200.0, 300.0, 400.0)
TIMES_S = (0.0, 0.5, 1.0, 2.0, 4.0)
# When the samples of a device begin.
TAKEN_NS = 5 * 10**9
# A function, and its arguments.
Call = tuple[Callable[..., object], tuple[Any, ...]]


class Draw:
    """Draws arguments."""

    def __init__(self, seed: str) -> None:
        self.chance = random.Random(seed)

    def pick(self, *values: Any) -> Any:
        """Return one of the values."""
        return self.chance.choice(values)

    def some(self, *values: Any, most: int = 3) -> list[Any]:
        """Return up to `most` of the values; one may come several times."""
        return [self.pick(*values) for _ in range(self.chance.randrange(most + 1))]

    def mb(self) -> float:
        """Return a size."""
        return self.pick(*SIZES_MB)  # type: ignore[no-any-return]  # `pick` returns one of any values.

    def s(self) -> float:
        """Return a time."""
        return self.pick(*TIMES_S)  # type: ignore[no-any-return]  # as above

    def yes(self) -> bool:
        """Return True or False."""
        return self.chance.random() < 0.5

    def device(self, row: int = 0) -> DeviceView:
        """Return a device."""
        return DeviceView(
            row,
            self.pick(0.0, 800.0, 1000.0, 1000.0),
            used_mb=self.mb(),
            reserved_mb=self.mb(),
            unloading_mb=self.pick(0.0, 0.0, 100.0),
            returning_mb=self.pick(0.0, 0.0, 100.0),
            external_mb=self.pick(-50.0, 0.0, 100.0, 300.0),
            extra_mb=self.pick(0.0, 0.0, 50.0),
        )

    def devices(self, least: int = 0) -> list[DeviceView]:
        """Return several devices."""
        return [self.device(row) for row in range(self.chance.randrange(least, 4))]

    def model(self, row: int = 0) -> ModelView:
        """Return a model."""
        return ModelView(
            row,
            known=True,
            need_mb=self.mb(),
            shared=self.pick(0, 0, 1, 2),
            owned=self.pick({}, {}, {1: 1}, {2: 2}),
            waiting=self.pick(0, 1, 2),
            loading=self.pick({}, {}, {1: 1}, {2: 1}),
            shares=self.yes(),
            load_s=self.pick(0.0, 0.04, 0.05, 1.0, 2.0, 2.0),
            hold_s=self.s(),
            loading_for_s=self.s(),
            held_for_s=self.s(),
            held_in_all_s=self.s(),
            rate=self.pick(0.0, 0.5, 1.0, 2.0),
            failures=self.pick(0, 1, 2, 3, 6, 7),
            failed_ago_s=self.pick(0.0, 1.0, 2.0, 5.0, 70.0, math.inf),
            leaving=self.pick(0, 0, 1),
            superseded=self.chance.random() < 0.1,
            coming_s=self.pick(0.0, 0.0, 0.5),
            users=self.pick(1.0, 1.0, 2.0),
        )

    def ticket(self, row: int = 1, model: int = 0) -> TicketView:
        """Return a waiter."""
        return TicketView(
            row,
            self.chance.randrange(10) * 10 + row,
            priority=self.pick(0, 1, 1, 2),
            model=model,
            member=self.pick(1, 2),
            enqueued_s=NOW - self.pick(0.0, 1.0, 2.0, 4.0, 7.9, 8.0, 16.0),
            head_since_s=self.pick(None, NOW, NOW - 1.9, NOW - 2.0, NOW - 3.9, NOW - 4.0),
            loadable_on=self.pick((), (0,), (1,)),
            rank=self.pick(5, 6, 7),
        )

    def idle(self, row: int, model: int = 0) -> IdleInstance:
        """Return an idle copy, which may lie on a second device."""
        return IdleInstance(
            *(row, model, 0, self.pick(50.0, 100.0, 200.0), NOW - self.pick(1.0, 9.0, 10.0, 20.0)),
            pinned=self.chance.random() < 0.1,
            suspendable=self.chance.random() < 0.2,
            other_shares=self.pick((), (), ((1, 100.0),)),
        )

    def busy(self, row: int, model: int) -> BusyInstance:
        """Return a copy in use."""
        place = self.pick(0, 0, 1), self.pick(100.0, 300.0)
        return BusyInstance(row, model, *place, self.pick(0.0, 0.5, 2.0, 8.0), pinned=self.yes() and self.yes())

    def view(self, tickets: int = 1) -> View:
        """Return a view of three models, with some copies of them."""
        models = [self.model(row) for row in range(3)]
        waiters = [self.ticket(row, self.pick(0, 1, 2)) for row in range(1, tickets + 1)]
        copies = [self.idle(row, self.pick(0, 1, 1, 2)) for row in range(10, 10 + self.chance.randrange(6))]
        used = tuple(self.busy(row, self.pick(0, 1, 2)) for row in range(20, 20 + self.chance.randrange(3)))
        rules = replace(RULES, min_model_copies=self.pick(0, 1, 2), slack_percentage=self.pick(*SLACKS))
        found = view(models, waiters, copies=copies, devices=[self.device(0), self.device(1)], rules=rules, busy=used)
        # Idle copies come in the order of their ages there, and any order here.
        return replace(found, idle=tuple(copies), models=dict(enumerate(models)))

    def candidates(self) -> list[eviction.Candidate]:
        """Return copies with random costs and sizes."""
        return [
            eviction.Candidate(self.pick(0.0, 0.5, 1.0, 1.0, 2.0, 3.0), mb, self.idle(row))
            for row, mb in enumerate(self.some(0.5, 50.0, 100.0, 200.0, 300.0, most=6))
        ]

    def eviction_plan(self, row: int = 0) -> eviction.EvictionPlan:
        """Return a plan for one device."""
        victims, awaited = (self.idle(10), self.idle(11 + row)), (self.busy(20, 1), self.busy(21 + row, 1))
        return eviction.EvictionPlan(
            *((self.device(row),), victims[: self.pick(0, 1, 2)], awaited[: self.pick(0, 1, 2)]),
            self.pick(None, 0.0, 1.0, 1.5),
            *(self.s(), self.mb()),
            (self.mb(),),
        )

    def movable(self) -> suspension.Movable:
        """Return a copy that could be suspended."""
        way = self.pick(suspension.Way.NONE, *[suspension.Way.COOPERATIVE, suspension.Way.CHECKPOINT] * 3)
        if way is suspension.Way.NONE:
            # There are no rates for it, so its times have to be known.
            return suspension.Movable(self.mb(), way, self.s(), 0.5, 1.0, self.pick(0.0, 1.0))
        times = self.pick(0.0, 0.75, 1.0, 1.5, 2.0, 8.0), self.pick(0.0, 0.25, 0.5), self.pick(0.0, 0.25, 0.5)
        return suspension.Movable(self.pick(0.0, 500.0, 8000.0), way, *times, self.pick(0.0, 0.5, 2.0))

    def host_room(self) -> suspension.HostRoom:
        """Return the host, with copies that may be dropped."""
        kept = [
            suspension.Kept(
                row, self.pick(0.0, 1.5, 100.0, 200.0), self.s(), self.pick(None, 0.0, 1.0, 2.0), self.yes()
            )
            if self.yes()
            else suspension.Kept(row, 100.0, self.s(), self.pick(0.5, 1.0, 2.0))
            for row in range(self.chance.randrange(5))
        ]
        return suspension.HostRoom(kept, self.pick(-100.0, 0.0, 100.0), self.pick(0.0, 300.0, 500.0))

    def returns(self, taken_ns: int = TAKEN_NS) -> tuple[ledger.Return, ...]:
        """Return unloads whose memory has not come back, most of them from shortly before a sample."""
        return tuple(
            ledger.Return(
                taken_ns - self.pick(0, 1, ledger.HIDDEN_NS, ledger.TRUST_ACCOUNTS_NS, -1),
                self.pick(100.0, 200.0, 300.0),
                self.pick(math.nan, 100.0, 300.0, 370.0, 400.0, 500.0, 600.0),
            )
            for _ in range(self.chance.randrange(4))
        )

    def accounts(self) -> ledger.Ledger:
        """Return a device's ledger."""
        external_mb = self.pick(math.nan, -100.0, 0.0, 0.0, 0.5, 100.0, 200.0)
        least_mb = self.pick(math.nan, 0.0, 50.0, 200.0)
        return ledger.Ledger(external_mb, least_mb, self.returns(), self.pick(0.0, 10.0))

    def entries(self) -> list[ledger.Entry]:
        """Return what instances took during a sample."""
        drawn = ((self.pick(0.0, 100.0), self.pick(100.0, 300.0)) for _ in range(self.chance.randrange(4)))
        return [ledger.Entry(*one, *cut(self, [self.yes()])) for one in drawn]

    def obstacles(self) -> list[behind.Before]:
        """Return waiters of a queue."""
        reason = (Reason.IN_USE, Reason.DRAINING, Reason.DRAINING, Reason.LEASED, Reason.BEHIND, Reason.SHARING)
        found = [behind.Before(tag, self.pick(*reason), self.pick((), (0,), (1,), (0, 1))) for tag in "abc"]
        return found[self.pick(0, 1, 3) :]


def cut(draw: Draw, arguments: Sequence[Any]) -> list[Any]:
    """Leave out some of the last arguments, which have defaults."""
    return list(arguments)[: draw.chance.randrange(len(arguments) + 1)]


# Draws arguments for each function of a group.
Group = Callable[[Draw], Iterator[Call]]


def _of_memory(draw: Draw) -> Iterator[Call]:
    slack = draw.pick(*SLACKS)
    yield admission.limit_mb, (draw.device(), slack)
    yield admission.free_mb, (draw.device(), slack)
    yield admission.widened, (draw.device(), draw.pick(600.0, 700.0, 800.0, 850.0, 900.0, 1000.0), slack)
    yield admission.largest_limit_mb, (draw.devices(), slack, *cut(draw, [draw.pick(1, 2)]))
    yield placement.best_place, (draw.devices(), draw.pick(*SIZES_MB), slack, *cut(draw, [draw.pick(1, 1, 2)]))
    fuller = [replace(one, used_mb=draw.chance.uniform(0.0, 500.0), reserved_mb=0.0) for one in draw.devices()]
    yield placement.best_place, (fuller, draw.pick(0.0, 100.0), slack)
    costs = [(one, draw.s(), draw.pick(0, 1), draw.mb()) for one in draw.devices()]
    yield placement.soonest_alone, (costs, draw.pick(1, 2))
    yield out_of_memory.raised_estimate_mb, (draw.mb(), draw.pick(0.0, 200.0, 250.0, 300.0, math.inf))
    limit_mb = draw.pick(0.0, 1.5, 2.5, 50.0, 101.0, math.inf)
    yield out_of_memory.bound_mb, (draw.pick(-10.0, 0.0, 0.5, 1.5, 100.0, math.inf), limit_mb)


def _of_the_ledger(draw: Draw) -> Iterator[Call]:
    give_up_ns = draw.pick(0, 1, 2) * ledger.TRUST_ACCOUNTS_NS
    for _ in range(3):
        used_mb = draw.pick(0.0, 100.0, 110.0, 200.0, 300.0, 330.0, 700.0)
        figure = ledger.Figure(used_mb, TAKEN_NS, TAKEN_NS + 1, *cut(draw, [draw.pick(0.0, 0.0, 150.0)]))
        entries = draw.entries() if draw.yes() else []
        now_ns = TAKEN_NS + draw.pick(0, 0, ledger.HIDDEN_NS, ledger.TRUST_ACCOUNTS_NS)
        late = cut(draw, [draw.chance.random() < 0.8])
        yield ledger.settle, (draw.accounts(), figure, entries, now_ns, give_up_ns, *late)
    now_ns = TAKEN_NS + draw.pick(0, 1, ledger.HIDDEN_NS, ledger.TRUST_ACCOUNTS_NS)
    yield ledger.expire, (draw.accounts(), TAKEN_NS, now_ns, give_up_ns)
    yield returning, (draw.accounts(),)
    one = ledger.Return(2 * TAKEN_NS, draw.pick(50.0, 100.0, 300.0), draw.pick(math.nan, 700.0))
    yield ledger.Ledger.awaiting, (draw.accounts(), one, draw.pick(1, 2, 3, 4))


def returning(found: ledger.Ledger) -> object:
    """Return what a ledger still awaits."""
    return found.returning_mb


def _of_times(draw: Draw) -> Iterator[Call]:
    yield backoff.back_off_s, (draw.pick(-1, 0, 1, 2, 6, 7, 8, 17, 5000),)
    yield backoff.left_s, (draw.model(),)
    demand = Demand(draw.pick(0.0, 1.0, 3.0), draw.pick(0, 1, 2, 3), draw.pick(90.0, 99.0, 100.0))
    yield Demand.counted, (demand, draw.pick(0, 1, 2, 3, 4, 6), 100.0)
    yield Demand.per_second, (demand, 100.0)
    seen = draw.pick(None, sharing.Seen(draw.s(), draw.s(), draw.yes()))
    models = [draw.model(row) for row in range(draw.chance.randrange(4))]
    yield sharing.seen_so_far, (models,)
    yield sharing.presumed, (draw.model(), seen or sharing.Seen())
    yield sharing.remaining_s, (draw.s(), draw.s())
    yield sharing.served_in_s, (draw.s(), draw.s(), draw.pick(0, 1, 3), draw.pick(1.0, 2.0))
    yield sharing.waiting_is_sooner, (draw.model(), draw.ticket(), draw.pick(0, 1, 2), NOW, *cut(draw, [seen]))
    reason = draw.pick(*Reason, *[Reason.IN_USE, Reason.DRAINING, Reason.BACKING_OFF, Reason.BEHIND] * 10)
    seconds = draw.pick(0.0, 1.0, 3.0, math.inf)
    waits = draw.pick(0, 1, 2), reason, seconds, seen, draw.s(), draw.s()
    yield sharing.expected_wait_s, (draw.model(), draw.pick(1, 2), *waits[:3], *cut(draw, waits[3:]))
    yield sharing.room_in_s, (reason, seconds, draw.s())


def _of_suspensions(draw: Draw) -> Iterator[Call]:
    yield suspension.why_unsuspendable, (draw.pick(0, 1, 2, 3, 4),)
    yield suspension.limit_s, (draw.pick(0.0, 2000.0, 2100.0, 2200.0, 9000.0),)
    copy = draw.movable()
    if copy.way:
        yield suspension.suspend_s, (copy,)
        yield suspension.resume_s, (copy,)
        yield worth, (copy,)
    yield suspension.pays, (copy, draw.pick(0.0, 0.1, 0.15, 0.2))
    copies = [one for one in (draw.movable() for _ in range(4)) if one.way]
    yield suspension.saved_share, (copies[: draw.pick(0, 1, 2, 4)],)
    for _ in range(3):
        needs = draw.pick(100.0, 200.0, 300.0), draw.pick(None, 0.0, 1.0, 1.5, 3.0, math.inf)
        yield suspension.HostRoom.dropped_for, (draw.host_room(), *needs)


def worth(copy: suspension.Movable) -> tuple[object, ...]:
    """Return what a copy that could be suspended says of itself."""
    return copy.is_measured, copy.worth, copy.worth_suspending


def _of_the_queue(draw: Draw) -> Iterator[Call]:
    enqueued_ns, urgency = draw.pick(10**15, 10**15 + 7), draw.pick(-10, -1, 0, 1, 10)
    yield fairness.rank_ns, (enqueued_ns, urgency)
    yield fairness.urgency_of, (enqueued_ns, fairness.rank_ns(enqueued_ns, urgency))
    seen = draw.view(tickets=4)
    yield fairness.queue_order, (seen,)
    yield fairness.overtaking_limited, (seen, draw.ticket())
    yield fairness.overtaking_over, (seen, draw.ticket())
    held_mb = draw.some(100.0, 200.0, 300.0, 400.0, most=4) if draw.yes() else [50.0] * draw.pick(9, 10, 11)
    waits = draw.ticket(), draw.pick(100.0, 300.0), draw.device(draw.pick(0, 1)), draw.pick(100.0, 200.0, 400.0)
    yield fairness.may_be_leased_before, (seen, *waits, held_mb)


def _of_evictions(draw: Draw) -> Iterator[Call]:
    seen = draw.view()
    [ticket] = seen.tickets
    yield eviction.score, (seen, draw.idle(1), draw.pick(0, 1, 2))
    yield eviction.eviction_order, (seen, seen.idle, ticket)
    need_mb = draw.pick(100.0, 300.0, 600.0, 800.0, 1000.0)
    yield eviction.plan_eviction, (seen, draw.pick(*seen.devices), seen.idle, seen.busy, need_mb, ticket)
    yield eviction.cheapest_set, (draw.candidates(), draw.pick(1.0, 50.0, 100.0, 150.0, 300.0))
    dearer = replace(draw.eviction_plan(), reload_cost=draw.pick(None, 2.0, 2.5, 4.0))
    yield eviction.waiting_pays, (draw.eviction_plan(), dearer, draw.model())
    plans = [draw.eviction_plan(row) for row in range(draw.pick(1, 2, 3))]
    yield eviction.combine, (plans,)
    yield cost, (plans[0],)


def cost(plan: eviction.EvictionPlan) -> object:
    """Return by what a plan is compared with others."""
    return plan.cost


def _of_instances(draw: Draw) -> Iterator[Call]:
    yield counts, (draw.model(), draw.pick(1, 2, 3))
    yield defaults, (draw.pick(ModelView, TicketView, DeviceView, View, Rules, *PLACED, *get_args(Decision)),)
    one = draw.idle(1)
    yield PlacedInstance.mb_on, (one, draw.pick(*one.devices))
    yield PlacedInstance.is_within, (one, draw.pick((), (0,), (1,), (0, 1)))


def counts(model: ModelView, member: int) -> tuple[int, ...]:
    """Return how many copies a model has, in different ways."""
    return model.copies, model.loaded, model.usable_by(member), model.coming_for(member)


def defaults(kind: Any) -> list[tuple[object, ...]]:
    """Return what the fields of a class are if they are left out, and which of them do not count in comparisons."""
    return [
        (one.name, one.default, *["not compared"] * (not one.compare))
        for one in fields(kind)
        if one.default is not MISSING
    ]


def _of_people(draw: Draw) -> Iterator[Call]:
    timed = Reason.DRAINING, Reason.IN_USE, Reason.SHARING, Reason.SUSPENDING
    yield reasons.time_left_s, (draw.pick(*Reason, *timed * 10), draw.s(), draw.s())
    reason, seconds = draw.pick(*Reason, len(Reason) + 50), draw.pick(0.0, 0.004, 0.005, 1.0, math.inf)
    on, other = draw.pick((), (0,), (0, 1)), draw.pick(None, "b")
    more = draw.mb(), draw.pick(-5.0, 100.0), draw.mb(), seconds, other, on
    yield reasons.explain, (reason, *cut(draw, more))
    obstacle = behind.Obstacle(draw.pick(*behind.Behind), "a", on)
    yield reasons.explain_behind, (draw.pick(None, obstacle, obstacle),)
    queue = [draw.pick(*Reason) for _ in range(draw.chance.randrange(4))]
    yield behind.in_the_way, (queue, int)
    devices, alone = draw.pick((0,), (0, 1), (0, 1, 2)), draw.pick({}, {0: "x"}, {1: "y"}, {1: "y", 2: "z"})
    waits = draw.pick((), (0,), (0, 1)), draw.pick(1, 1, 2), draw.yes()
    yield behind.obstacle, (devices, *waits, alone, draw.obstacles())


def _of_states(draw: Draw) -> Iterator[Call]:
    seen = RandomState(draw.chance.randrange(10**6)).view()
    ticket = replace(draw.pick(*seen.tickets), span=draw.pick(1, 1, 2), usable_on=draw.pick((), (0,), (1,)))
    model, share_mb = seen.models[ticket.model], draw.pick(100.0, 400.0, 700.0, 800.0, 900.0)
    asked: list[tuple[Callable[..., object], tuple[object, ...]]] = [
        (making_room.choose_room, (ticket, share_mb, draw.yes())),
        (making_room.cheapest_room, (ticket, share_mb, draw.pick((), seen.busy))),
        (making_room.room_by_unloading_all, (ticket, [*seen.devices], share_mb)),
        (making_room.holds_up_others, (ticket, model)),
        (making_room.is_delayed_by_loads, (ticket, share_mb)),
        (making_room.wait_for_others, (ticket, [*seen.devices], share_mb)),
        (making_room.wait_without_room, (ticket, [*seen.devices], share_mb)),
        (loading.needs_only_free_memory, (ticket, model)),
        (isolation.devices_to_drain, (ticket,)),
        (isolation.is_kept_out_by_leases, (seen.devices, share_mb)),
        (isolation.isolate, (ticket, share_mb)),
        (PlanState.open_to, (ticket,)),
        (PlanState.allowed_for, (ticket,)),
        (PlanState.idle_on, (set(draw.pick((0,), (1,), (0, 1))),)),
        (PlanState.pinned_mb_on, (draw.pick(*seen.devices).device,)),
        (PlanState.count_fitting, (seen.devices, share_mb, *cut(draw, [draw.yes(), draw.yes()]))),
        (PlanState.must_run_alone, (ticket, model)),
        (PlanState.has_most_copies, (model,)),
        (PlanState.usable_part, (ticket, model)),
        (PlanState.need_mb, (ticket, model)),
        (PlanState.suspended_for, (ticket,)),
        (PlanState.all_suspended_for, (ticket,)),
        (PlanState.has_suspended_for, (ticket,)),
        (most_room, (share_mb,)),
    ]
    for function, arguments in asked:
        # Each on a state of its own, because some take what they find.
        yield function, (PlanState(seen), *arguments)
    yield beside_the_head, (seen, ticket, draw.pick(*seen.tickets), draw.yes())
    yield before_leases, (seen, draw.pick(*seen.tickets), ticket, share_mb, draw.yes())


def most_room(state: PlanState, slack: float) -> float:
    """Return how much is free where most is."""
    return most_free_mb(state.devices.values(), slack / 1000.0)


def beside_the_head(seen: View, head: TicketView, ticket: TicketView, room_is_coming: bool) -> tuple[object, ...]:
    """Return what a waiter gets behind a head of the line, and what is left to others after that."""
    state, model = PlanState(seen), seen.models[ticket.model]
    state.head, state.room_is_coming = head, room_is_coming
    state.eviction_plan = making_room.choose_room(state, head, seen.models[head.model].need_mb / head.span, due=False)
    found = backfill(state, ticket, model) or make_room_ahead(state, ticket, model)
    plan, free = state.eviction_plan, [free_mb(device, 0.0) for device in state.devices.values()]
    hopeless = sorted({model for model, *_ in state.no_backfill})
    return found, plan.left_mb if plan else (), state.room_is_coming, hopeless, free


def before_leases(seen: View, waiting: TicketView, ticket: TicketView, mb: float, awaited: bool) -> object:
    """Return where something may be leased while another waiter waits for leases to end."""
    state = PlanState(seen)
    state.lease_is_awaited = awaited
    state.awaiting_leases.append((waiting, 300.0))
    return state.leasable([*seen.devices], seen.models[ticket.model], mb)


GROUPS: tuple[Group, ...] = (
    *(_of_memory, _of_the_ledger, _of_times, _of_suspensions, _of_the_queue, _of_evictions, _of_instances),
    *(_of_people, _of_states),
)


def shown(value: object) -> str:
    """Return a value as a short text; of copies, waiters and devices little more than rows."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, PlacedInstance | TicketView):
        return f"#{value.row}"
    if isinstance(value, DeviceView):
        return f"#{value.device}+{value.extra_mb:.9g}"
    if isinstance(value, ModelView):
        members = (f"{slot}:{count}" for part in (value.owned, value.loading) for slot, count in part.items())
        return " ".join([f"{value.load_s:.9g} {value.shares} {value.shared}", *members])
    if is_dataclass(value):
        return shown(tuple(getattr(value, one.name) for one in fields(value)))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{' '.join(map(shown, value))}]"
    return f"{value:.9g}" if isinstance(value, float) else str(value)


def calls(group: Group) -> dict[str, list[Call]]:
    """Return the calls of each function of a group, by its name."""
    found: dict[str, list[Call]] = {}
    for case in range(CASES):
        for function, arguments in group(Draw(f"{group.__name__} {case}")):
            found.setdefault(function.__qualname__, []).append((function, arguments))
    return found


def answers(group: Group) -> dict[str, list[str]]:
    """Return the answers of each function of a group."""
    return {
        name: [shown(function(*arguments)) for function, arguments in of_name] for name, of_name in calls(group).items()
    }


def recorded() -> dict[str, list[str]]:
    """Return the answers that were recorded."""
    parts = re.findall(r"^(\S+)\n((?:  .*\n)*)", RECORDED.read_text(), re.MULTILINE)
    return {name: [line[2:] for line in lines.splitlines()] for name, lines in parts}


def main() -> None:
    """Record the answers."""
    found = (part for group in GROUPS for part in answers(group).items())
    RECORDED.write_text("".join(f"{name}\n" + "".join(f"  {one}\n" for one in of_name) for name, of_name in found))


if __name__ == "__main__":
    main()
