"""The policy: what happens to whoever waits, as a table of cases and as properties of random states."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from harness import scaled
from hypothesis import given, settings
from hypothesis import strategies as st

from mpmm.policy.admission import free_mb, limit_mb
from mpmm.policy.demand import Demand
from mpmm.policy.eviction import Candidate, cheapest_set, eviction_order, score
from mpmm.policy.fairness import may_be_leased_before, overtaking_limited, overtaking_over, queue_order
from mpmm.policy.placement import best_place
from mpmm.policy.plan import make_plan
from mpmm.policy.sharing import FIRST_LOAD_S, Seen, seen_so_far, waiting_is_sooner
from mpmm.policy.view import (
    BusyInstance,
    DeviceView,
    Evict,
    Grant,
    IdleInstance,
    Load,
    ModelView,
    PlacedInstance,
    Reason,
    Refuse,
    Rules,
    Satisfied,
    TicketView,
    View,
    Wait,
)

NOW = 1000.0
RULES = Rules(
    slack_percentage=0.1,
    eviction_cooldown_seconds=10.0,
    min_model_copies=1,
    max_overtake_seconds=2.0,
    isolate_unknown=True,
)
A, B, C, D = range(4)
ME, OTHER = 1, 2


def model(row: int, need: float = 100.0, *, known: bool = True, **counts: Any) -> ModelView:
    loading = counts.get("loading", {})
    held, owned, waiting = counts.get("shared", 0), counts.get("owned", {}), counts.get("waiting", 0)
    old = counts.get("superseded", False)
    return ModelView(row, known, need, held, owned, waiting, loading, shares=bool(loading), superseded=old)


def ticket(
    row: int,
    wants: int,
    *,
    priority: int = 1,
    member: int = ME,
    waited: float = 0.0,
    preload: int = 0,
    blocked: float | None = None,
) -> TicketView:
    since = None if blocked is None else NOW - blocked
    return TicketView(row, row, priority, wants, member, NOW - waited, preload, since)


def idle(
    row: int,
    of: int,
    *,
    mb: float = 100.0,
    age: float = 100.0,
    owner: int | None = None,
    on: int = 0,
    pinned: bool = False,
) -> IdleInstance:
    return IdleInstance(row, of, on, mb, NOW - age, owner, pinned)


def held_for_long(one: ModelView) -> ModelView:
    """The model, whose holds take so much longer than its loads that nobody waits for an instance in use."""
    return replace(one, load_s=1.0, hold_s=9.0)


def at_most(copies: int) -> Rules:
    return replace(RULES, max_model_copies=copies)


def device(row: int = 0, total: float = 1000.0, used: float = 0.0, **more: Any) -> DeviceView:
    numbers: dict[str, Any] = {"reserved_mb": 0.0, "unloading_mb": 0.0, "returning_mb": 0.0, **more}
    return DeviceView(row, total, used, **numbers)


def view(
    models: list[ModelView],
    tickets: list[TicketView],
    *,
    copies: list[IdleInstance] | None = None,
    devices: list[DeviceView] | None = None,
    rules: Rules = RULES,
    busy: tuple[BusyInstance, ...] = (),
    in_use: int = 0,
    unloading: int = 0,
    isolated: bool = False,
    leases: tuple[PlacedInstance, ...] = (),
) -> View:
    """A state. in_use: copies on the first device that nothing is known of but that they are in use."""
    waiting = Counter(t.model for t in tickets)
    there = [device()] if devices is None else devices
    nameless = tuple(BusyInstance(1000 + row, models[0].model, 0, 0.0, math.inf, pinned=True) for row in range(in_use))
    return View(
        now_s=NOW,
        rules=rules,
        models={m.model: replace(m, waiting=m.waiting or waiting[m.model]) for m in models},
        idle=tuple(sorted(copies or [], key=lambda copy: -copy.idle_since_s)),
        tickets=tuple(tickets),
        devices=tuple(replace(one, unloading=unloading, isolated=isolated or one.isolated) for one in there),
        busy=(*busy, *nameless),
        leases=leases,
    )


CASES: Mapping[str, tuple[View, list[object]]] = {
    "nobody waits": (view([], []), []),
    "an idle copy is granted": (view([model(A, shared=1)], [ticket(1, A)], copies=[idle(7, A)]), [Grant(1, 7)]),
    "the newest idle copy is granted": (
        view([model(A, shared=2)], [ticket(1, A)], copies=[idle(7, A, age=9), idle(8, A, age=3)]),
        [Grant(1, 8)],
    ),
    "one's own object is granted": (
        view([model(A, owned={ME: 1})], [ticket(1, A)], copies=[idle(7, A, owner=ME)]),
        [Grant(1, 7)],
    ),
    "another's object is of no use": (
        view([model(A, owned={OTHER: 1})], [ticket(1, A)], copies=[idle(7, A, owner=OTHER)]),
        [Load(1, (0,), 100, False)],
    ),
    "one copy is granted once": (
        view([held_for_long(model(A, shared=1))], [ticket(1, A), ticket(2, A)], copies=[idle(7, A)]),
        [Grant(1, 7), Load(2, (0,), 100, False)],
    ),
    "pinned copies are not evicted": (
        view(
            [model(A, 900), model(B, shared=1), model(C, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B, mb=500, pinned=True), idle(8, C, mb=300)],
            devices=[device(used=800)],
        ),
        [Wait(1, Reason.PINNED)],
    ),
    "others are evicted in place of pinned copies": (
        view(
            [model(A, 400), model(B, shared=1), model(C, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B, mb=500, pinned=True, age=200), idle(8, C, mb=300)],
            devices=[device(used=800)],
        ),
        [Evict(1, (8,))],
    ),
    "a pinned copy is granted like any other": (
        view([model(A, shared=1)], [ticket(1, A)], copies=[idle(7, A, pinned=True)]),
        [Grant(1, 7)],
    ),
    "an unknown model runs alone beside what is idle and pinned": (
        view([model(A, known=False), model(B, shared=1)], [ticket(1, A)], copies=[idle(7, B, pinned=True)]),
        [Load(1, (0,), 100, True)],
    ),
    "no more copies than there may be": (
        view([model(A, shared=1), model(B)], [ticket(1, A), ticket(2, B)], rules=at_most(1), in_use=1),
        [Wait(1, Reason.COPIES), Load(2, (0,), 100, False)],
    ),
    "a copy that is being loaded counts": (
        view([model(A, loading={OTHER: 1})], [ticket(1, A)], rules=at_most(1), in_use=1),
        [Wait(1, Reason.COPIES)],
    ),
    "loads of one plan count": (
        view([model(A)], [ticket(1, A), ticket(2, A, member=OTHER)], rules=at_most(1)),
        [Load(1, (0,), 100, False), Wait(2, Reason.COPIES)],
    ),
    "another's idle object makes way where there may be no more": (
        view(
            [model(A, owned={OTHER: 2})],
            [ticket(1, A)],
            copies=[idle(7, A, owner=OTHER, age=9), idle(8, A, owner=OTHER, age=3)],
            rules=at_most(2),
        ),
        [Evict(1, (7,))],
    ),
    "another's pinned object does not": (
        view(
            [model(A, owned={OTHER: 1})],
            [ticket(1, A)],
            copies=[idle(7, A, owner=OTHER, pinned=True)],
            rules=at_most(1),
        ),
        [Wait(1, Reason.COPIES)],
    ),
    "another's object does not make way for who has one": (
        view(
            [model(A, owned={ME: 1, OTHER: 1})],
            [ticket(1, A)],
            copies=[idle(7, A, owner=OTHER)],
            rules=at_most(2),
            in_use=1,
        ),
        [Wait(1, Reason.COPIES)],
    ),
    "a preload loads although a copy is idle": (
        view([model(A, shared=1)], [ticket(1, A, priority=2, preload=2)], copies=[idle(7, A)]),
        [Load(1, (0,), 100, False)],
    ),
    "a preload has enough when others load": (
        view(
            [model(A, shared=1, loading={OTHER: 1})],
            [ticket(1, A, priority=2, preload=2)],
            copies=[idle(7, A)],
            in_use=1,
        ),
        [Satisfied(1)],
    ),
    "a preload has enough when there may be no more": (
        view([model(A, shared=1)], [ticket(1, A, priority=2, preload=2)], rules=at_most(1)),
        [Satisfied(1)],
    ),
    "others' objects are not enough for a preload": (
        view([model(A, owned={OTHER: 2})], [ticket(1, A, priority=2, preload=1)]),
        [Load(1, (0,), 100, False)],
    ),
    "a preload comes after everybody else": (
        view([model(A, 600), model(B, 600)], [ticket(1, A, priority=2, preload=1), ticket(2, B)]),
        [Load(2, (0,), 600, False), Wait(1, Reason.MEMORY)],
    ),
    "a preload of more copies than fit at once is refused": (
        view([model(A, 300, shared=3)], [ticket(1, A, priority=2, preload=4)], devices=[device(used=900)]),
        [Refuse(1)],
    ),
    "a preload of as many copies as fit at once has others evicted": (
        view(
            [model(A, 300, shared=2), model(B, shared=1)],
            [ticket(1, A, priority=2, preload=3)],
            copies=[idle(7, A, mb=300), idle(8, A, mb=300), idle(9, B, mb=200)],
            devices=[device(used=800)],
        ),
        [Evict(1, (9,))],
    ),
    "a preload of what can be loaded no second time is refused": (
        view([model(A, 950, shared=1)], [ticket(1, A, priority=2, preload=2)], devices=[device(used=950)]),
        [Refuse(1)],
    ),
    "who waits for a lease to end holds up no model": (
        view(
            [model(A, 500), model(B, shared=1), model(C, 100)],
            [ticket(1, A, waited=60), ticket(2, B), ticket(3, C)],
            copies=[idle(7, B, mb=100)],
            devices=[device(used=100, reserved_mb=600, leased_mb=600)],
        ),
        [Wait(1, Reason.LEASED), Grant(2, 7), Load(3, (0,), 100, False)],
    ),
    "a lease goes before who has just begun to wait for one to end": (
        view(
            [model(A, 850), replace(model(B, 100), lease=True)],
            [ticket(1, A, waited=1.9), ticket(2, B)],
            devices=[device(reserved_mb=600, leased_mb=600)],
            leases=(PlacedInstance(7, D, 0, 600),),
        ),
        [Wait(1, Reason.LEASED), Load(2, (0,), 100, False)],
    ),
    "no lease that delays who has waited for long": (
        view(
            [model(A, 850), replace(model(B, 100), lease=True)],
            [ticket(1, A, waited=2.0), ticket(2, B)],
            devices=[device(reserved_mb=600, leased_mb=600)],
            leases=(PlacedInstance(7, D, 0, 600),),
        ),
        [Wait(1, Reason.LEASED), Wait(2, Reason.BEHIND)],
    ),
    "but one that leaves it room when the others have ended, and not two if they do not": (
        view(
            [model(A, 750), replace(model(B, 100), lease=True), replace(model(C, 100), lease=True)],
            [ticket(1, A, waited=9.0), ticket(2, B), ticket(3, C)],
            devices=[device(reserved_mb=600, leased_mb=600)],
            leases=(PlacedInstance(7, D, 0, 600),),
        ),
        [Wait(1, Reason.LEASED), Load(2, (0,), 100, False), Wait(3, Reason.BEHIND)],
    ),
    "nor one that would have it wait for two leases in place of one": (
        view(
            [model(A, 600), replace(model(B, 100), lease=True)],
            [ticket(1, A, waited=9.0), ticket(2, B)],
            devices=[device(reserved_mb=550, leased_mb=550)],
            leases=(PlacedInstance(7, D, 0, 300), PlacedInstance(8, D, 0, 250)),
        ),
        [Wait(1, Reason.LEASED), Wait(2, Reason.BEHIND)],
    ),
    "a lease may go where who waits for one to end may not": (
        view(
            [model(A, 850), replace(model(B, 100), lease=True)],
            [replace(ticket(1, A, waited=9.0), loadable_on=(0,)), ticket(2, B)],
            devices=[device(reserved_mb=600, leased_mb=600), device(1, used=700)],
            leases=(PlacedInstance(7, D, 0, 600),),
        ),
        [Wait(1, Reason.LEASED), Load(2, (1,), 100, False)],
    ),
    "no room is made for a lease behind who waits for one to end": (
        view(
            [model(A, 850), replace(model(B, 200), lease=True), model(C, shared=1)],
            [ticket(1, A, waited=1.0), ticket(2, B)],
            copies=[idle(6, C, mb=200)],
            devices=[device(used=200, reserved_mb=600, leased_mb=600)],
            leases=(PlacedInstance(7, D, 0, 600),),
        ),
        [Wait(1, Reason.LEASED), Wait(2, Reason.BEHIND)],
    ),
    "beside a lease what fits if others let go is waited for in turn": (
        view(
            [model(A, 500), model(B, 100)],
            [ticket(1, A), ticket(2, B)],
            devices=[device(used=300, reserved_mb=400, leased_mb=400)],
            in_use=1,
        ),
        [Wait(1, Reason.MEMORY)],
    ),
    "what fits is loaded": (view([model(A)], [ticket(1, A)]), [Load(1, (0,), 100, False)]),
    "what fits exactly is loaded": (view([model(A, 900)], [ticket(1, A)]), [Load(1, (0,), 900, False)]),
    "what an earlier load takes is gone for a later one": (
        view([model(A, 500), model(B, 500)], [ticket(1, A), ticket(2, B)]),
        [Load(1, (0,), 500, False), Wait(2, Reason.MEMORY)],
    ),
    "reservations count": (
        view([model(A, 500)], [ticket(1, A)], devices=[device(reserved_mb=401)], in_use=1),
        [Wait(1, Reason.MEMORY)],
    ),
    "too large for ever": (view([model(A, 901)], [ticket(1, A)]), [Refuse(1)]),
    "too large for another copy, but there is one": (
        view([held_for_long(model(A, 901, shared=1))], [ticket(1, A)], in_use=1),
        [Wait(1, Reason.MEMORY)],
    ),
    "too large, and another's object does not help": (
        view([model(A, 901, owned={OTHER: 1})], [ticket(1, A)], in_use=1),
        [Refuse(1)],
    ),
    "a refusal blocks nobody": (
        view([model(A, 901), model(B)], [ticket(1, A), ticket(2, B)]),
        [Refuse(1), Load(2, (0,), 100, False)],
    ),
    "the device that is least full takes it": (
        view([model(A, 300)], [ticket(1, A)], devices=[device(0, used=500), device(1), device(2, used=300)]),
        [Load(1, (1,), 300, False)],
    ),
    "full means the share that is in use": (
        view([model(A, 100)], [ticket(1, A)], devices=[device(0, 4000, used=1000), device(1, used=300)]),
        [Load(1, (0,), 100, False)],
    ),
    "of devices that are as full the tightest fit takes it": (
        view([model(A, 10)], [ticket(1, A)], devices=[device(0, 4000, used=1620), device(1, used=405)]),
        [Load(1, (1,), 10, False)],
    ),
    "a device without room does not, however full the others are": (
        view([model(A, 900)], [ticket(1, A)], devices=[device(0, used=100), device(1, 4000, used=2600)]),
        [Load(1, (1,), 900, False)],
    ),
    "loads of one plan go to different devices": (
        view([model(A, 300), model(B, 300)], [ticket(1, A), ticket(2, B)], devices=[device(0), device(1)]),
        [Load(1, (0,), 300, False), Load(2, (1,), 300, False)],
    ),
    "who is tied to a device loads there": (
        view(
            [model(A, 300)],
            [replace(ticket(1, A), loadable_on=(1,), usable_on=(1,))],
            devices=[device(0), device(1, used=500)],
        ),
        [Load(1, (1,), 300, False)],
    ),
    "who is tied to a device has no use for a copy elsewhere": (
        view(
            [replace(model(A, 300, shared=1), load_s=9.0, hold_s=0.1)],
            [replace(ticket(1, A), loadable_on=(1,), usable_on=(1,))],
            copies=[idle(7, A, mb=300)],
            devices=[device(0, used=300), device(1)],
        ),
        [Load(1, (1,), 300, False)],
    ),
    "another model that is in use where a waiter is tied to is of no use for it": (
        view(
            [replace(model(A, 300), load_s=9.0, hold_s=0.1), model(B, shared=1)],
            [replace(ticket(1, A), loadable_on=(1,), usable_on=(1,))],
            busy=(BusyInstance(5, B, 1, 100, 1.0),),
            devices=[device(0), device(1, used=100)],
        ),
        [Load(1, (1,), 300, False)],
    ),
    "nor is it enough for a preload there": (
        view(
            [model(A, 300), model(B, shared=1)],
            [replace(ticket(1, A, priority=2, preload=1), loadable_on=(1,), usable_on=(1,))],
            busy=(BusyInstance(5, B, 1, 100, 1.0),),
            devices=[device(0), device(1, used=100)],
        ),
        [Load(1, (1,), 300, False)],
    ),
    "one's own object that is in use there counts once": (
        view(
            [model(A, 300, owned={ME: 1})],
            [replace(ticket(1, A, priority=2, preload=2), loadable_on=(1,), usable_on=(1,))],
            busy=(BusyInstance(5, A, 1, 300, 1.0, owner=ME),),
            devices=[device(0), device(1, used=300)],
        ),
        [Load(1, (1,), 300, False)],
    ),
    "one that is being loaded there counts, too": (
        view(
            [model(A, 300, owned={ME: 1}, loading={ME: 1})],
            [replace(ticket(1, A, priority=2, preload=2), loadable_on=(1,), usable_on=(1,))],
            busy=(BusyInstance(5, A, 1, 300, 1.0, owner=ME), BusyInstance(6, A, 1, 0, 1.0, owner=ME, loading=True)),
            devices=[device(0), device(1, used=300)],
        ),
        [Satisfied(1)],
    ),
    "as many share an instance as it serves sooner than a load": (
        view(
            [replace(model(A, shared=1), load_s=2.0, hold_s=0.9)],
            [ticket(row, A) for row in (1, 2, 3)],
            busy=(BusyInstance(5, A, 0, 100, 0.5),),
        ),
        [Wait(1, Reason.SHARING), Wait(2, Reason.SHARING), Load(3, (0,), 100, False)],
    ),
    "who merely cannot load elsewhere has": (
        view(
            [model(A, 300, shared=1)],
            [replace(ticket(1, A), loadable_on=(1,))],
            copies=[idle(7, A, mb=300)],
            devices=[device(0, used=300), device(1)],
        ),
        [Grant(1, 7)],
    ),
    "a model that spans two devices takes half of each": (
        view(
            [model(A, 1600)],
            [replace(ticket(1, A), span=2)],
            devices=[device(0, used=200), device(1, used=50), device(2, used=30)],
        ),
        [Load(1, (2, 1), 1600, False)],
    ),
    "room for it is made on each": (
        view(
            [model(A, 1600), model(B, shared=1), model(C, shared=1)],
            [replace(ticket(1, A), span=2)],
            copies=[idle(7, B, mb=500), idle(8, C, mb=500, on=1)],
            devices=[device(0, used=500), device(1, used=500)],
        ),
        [Evict(1, (7, 8))],
    ),
    "a copy that spans devices makes room on each of them": (
        view(
            [model(A, 800), model(B, shared=1)],
            [replace(ticket(1, A), loadable_on=(1,))],
            copies=[replace(idle(7, B, mb=600), other_shares=((1, 500.0),))],
            devices=[device(0, used=600), device(1, used=500)],
        ),
        [Evict(1, (7,))],
    ),
    "what is too large for the devices it may go to is refused": (
        view([model(A, 2000)], [replace(ticket(1, A), loadable_on=(1,))], devices=[device(0, 4000), device(1)]),
        [Refuse(1)],
    ),
    "what is too large for two of them as well": (
        view([model(A, 2000)], [replace(ticket(1, A), span=2)], devices=[device(0, 4000), device(1)]),
        [Refuse(1)],
    ),
    "an unknown model isolates one device, and copies on others are handed out": (
        view(
            [model(A, known=False), held_for_long(model(B, shared=1)), model(C, shared=1)],
            [ticket(1, A, priority=0), ticket(2, B), ticket(3, C)],
            copies=[idle(7, B), idle(8, C, on=1)],
            devices=[device(0, used=100), device(1, used=200)],
        ),
        [Evict(1, (7,)), Load(2, (1,), 100, False), Grant(3, 8)],
    ),
    "it takes the device that is free soonest": (
        view(
            [model(A, known=False), model(B, shared=1), model(C, shared=1)],
            [ticket(1, A, priority=0)],
            busy=(BusyInstance(5, B, 0, 100, 3.0), BusyInstance(6, C, 1, 100, 0.5)),
            devices=[device(0, used=100), device(1, used=100)],
        ),
        [Wait(1, Reason.DRAINING)],
    ),
    "while a device drains, loads go on elsewhere, room is made for them as well": (
        view(
            [model(A, known=False), model(B, shared=2), model(C, shared=1), model(D, 500)],
            [ticket(1, A, priority=0), ticket(2, D)],
            copies=[idle(8, C, mb=400, on=1)],
            busy=(BusyInstance(5, B, 0, 100, 0.5), BusyInstance(6, B, 1, 400, 9.0)),
            devices=[device(0, used=100), device(1, used=800)],
        ),
        [Wait(1, Reason.DRAINING), Evict(2, (8,))],
    ),
    "two unknown models are measured on two devices at the same time": (
        view(
            [model(A, known=False), model(B, known=False)],
            [ticket(1, A, priority=0), ticket(2, B, priority=0)],
            devices=[device(0), device(1)],
        ),
        [Load(1, (0,), 100, True), Load(2, (1,), 100, True)],
    ),
    "beside a copy that runs alone nothing happens, elsewhere everything": (
        view(
            [model(A, shared=1), model(B, shared=1), model(C)],
            [ticket(1, A), ticket(2, B), ticket(3, C)],
            copies=[idle(7, A, pinned=True), idle(8, B, on=1)],
            rules=at_most(1),
            devices=[device(0, used=100, isolated=True), device(1, used=100)],
        ),
        [Wait(1, Reason.COPIES), Grant(2, 8), Load(3, (1,), 100, False)],
    ),
    "who waits for room on a device it is tied to keeps nobody from others": (
        view(
            [model(A, 800), model(B, 100)],
            [replace(ticket(1, A), loadable_on=(0,)), ticket(2, B)],
            devices=[device(0, used=800), device(1)],
            in_use=1,
        ),
        [Wait(1, Reason.MEMORY), Load(2, (1,), 100, False)],
    ),
    "nobody stands back for one whom other programs leave no room": (
        view(
            [model(A, 800), model(B, 100)],
            [ticket(1, A), ticket(2, B)],
            devices=[device(used=300, external_mb=300, external_least_mb=300)],
        ),
        [Wait(1, Reason.FOREIGN), Load(2, (0,), 100, False)],
    ),
    "no device is known yet": (view([model(A)], [ticket(1, A)], devices=[]), [Wait(1, Reason.NO_DEVICE)]),
    "room is made": (
        view([model(A, 800), model(B, shared=1)], [ticket(1, A)], copies=[idle(7, B)], devices=[device(used=150)]),
        [Evict(1, (7,))],
    ),
    "no more is evicted than needed": (
        view(
            [model(A, 800), model(B, shared=1), model(C, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B, age=50), idle(8, C, age=60)],
            devices=[device(used=200)],
        ),
        [Evict(1, (8,))],
    ),
    "room that could not be enough is not made": (
        view(
            [model(A, 800), model(B, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B)],
            devices=[device(used=400)],
            in_use=1,
        ),
        [Wait(1, Reason.MEMORY)],
    ),
    "where it is cheapest": (
        view(
            [model(A, 800), model(B, shared=2)],
            [ticket(1, A)],
            copies=[idle(7, B, mb=300, on=0), idle(8, B, mb=200, on=1)],
            devices=[device(0, used=300), device(1, used=200)],
        ),
        [Evict(1, (8,))],
    ),
    "memory that is being unloaded is waited for": (
        view(
            [model(A, 800), model(B, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B)],
            devices=[device(used=250, unloading_mb=150)],
            unloading=1,
        ),
        [Wait(1, Reason.UNLOADING)],
    ),
    "memory that is returning is waited for": (
        view(
            [model(A, 800), model(B, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B)],
            devices=[device(used=250, returning_mb=150)],
        ),
        [Wait(1, Reason.RETURNING)],
    ),
    "only what is missing beyond that is evicted": (
        view(
            [model(A, 800), model(B, shared=1), model(C, shared=1)],
            [ticket(1, A)],
            copies=[idle(7, B, age=60), idle(8, C, age=50)],
            devices=[device(used=350, returning_mb=150)],
        ),
        [Evict(1, (7,))],
    ),
    "a starving model displaces one with more waiters": (
        view(
            [model(A, 900), model(B, shared=1, waiting=5)],
            [ticket(1, A)],
            copies=[idle(7, B)],
            devices=[device(used=100)],
        ),
        [Evict(1, (7,))],
    ),
    "a model that has a copy does not": (
        view(
            [held_for_long(model(A, 800, shared=1)), model(B, shared=1, waiting=5)],
            [ticket(1, A)],
            copies=[idle(7, B)],
            devices=[device(used=200)],
            in_use=1,
        ),
        [Wait(1, Reason.MEMORY)],
    ),
    "a model whose only copies are other processes' objects is starving": (
        view(
            [model(A, 800, owned={OTHER: 1}), model(B, shared=1, waiting=5)],
            [ticket(1, A)],
            copies=[idle(7, B)],
            devices=[device(used=200)],
            in_use=1,
        ),
        [Evict(1, (7,))],
    ),
    "others' idle objects of the same model make room": (
        view(
            [model(A, 800, owned={OTHER: 1})],
            [ticket(1, A)],
            copies=[idle(7, A, owner=OTHER)],
            devices=[device(used=200)],
        ),
        [Evict(1, (7,))],
    ),
    "a blocked head stops later loads": (
        view([model(A, 800), model(B)], [ticket(1, A), ticket(2, B)], devices=[device(used=200)], in_use=1),
        [Wait(1, Reason.MEMORY)],
    ),
    "but not at once those who reuse": (
        view(
            [model(A, 800), model(B, shared=1)],
            [ticket(1, A, waited=9.0, blocked=1.9), ticket(2, B)],
            copies=[idle(7, B, mb=10)],
            devices=[device(used=200)],
            in_use=1,
        ),
        [Wait(1, Reason.MEMORY), Grant(2, 7)],
    ),
    "later those, too": (
        view(
            [model(A, 800), model(B, shared=1)],
            [ticket(1, A, waited=9.0, blocked=2.0), ticket(2, B)],
            copies=[idle(7, B, mb=10)],
            devices=[device(used=200)],
            in_use=1,
        ),
        [Wait(1, Reason.MEMORY)],
    ),
    "during isolation everybody waits": (
        view([model(A, shared=1)], [ticket(1, A)], copies=[idle(7, A)], isolated=True),
        [],
    ),
    "an unknown model goes first": (
        view([model(A, 500), model(B, known=False)], [ticket(1, A), ticket(2, B, priority=0)]),
        [Load(2, (0,), 100, True)],
    ),
    "it waits for the others to finish": (
        view([model(A, known=False)], [ticket(1, A, priority=0)], in_use=1),
        [Wait(1, Reason.DRAINING)],
    ),
    "it waits for loads to finish": (
        view([model(A, known=False)], [ticket(1, A, priority=0)], in_use=1),
        [Wait(1, Reason.DRAINING)],
    ),
    "everything idle goes": (
        view([model(A, known=False), model(B, shared=2)], [ticket(1, A, priority=0)], copies=[idle(7, B), idle(8, B)]),
        [Evict(1, (7, 8))],
    ),
    "it waits for unloads to end": (
        view([model(A, known=False)], [ticket(1, A, priority=0)], unloading=1),
        [Wait(1, Reason.UNLOADING)],
    ),
    "it waits for memory to return": (
        view([model(A, known=False)], [ticket(1, A, priority=0)], devices=[device(used=100, returning_mb=100)]),
        [Wait(1, Reason.RETURNING)],
    ),
    "it gets the roomiest device": (
        view([model(A, known=False)], [ticket(1, A, priority=0)], devices=[device(0, used=100), device(1)]),
        [Load(1, (1,), 100, True)],
    ),
    "two unknown ones run one after the other": (
        view([model(A, known=False), model(B, known=False)], [ticket(1, A, priority=0), ticket(2, B, priority=0)]),
        [Load(1, (0,), 100, True)],
    ),
    "with nothing to measure by nobody runs alone": (
        view(
            [model(A, known=False), model(B, known=False)],
            [ticket(1, A, priority=0), ticket(2, B, priority=0)],
            rules=replace(RULES, isolate_unknown=False),
        ),
        [Load(1, (0,), 100, False), Load(2, (0,), 100, False)],
    ),
}


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
def test_what_is_decided_when(case: str) -> None:
    state, expected = CASES[case]
    decisions = list(make_plan(state).decisions)
    if case == "everything idle goes":
        assert [(type(d), set(d.instances)) for d in decisions if isinstance(d, Evict)] == [(Evict, {7, 8})]
    else:
        assert decisions == expected


def test_the_plan_says_whether_the_rest_of_the_queue_can_still_get_something() -> None:
    assert make_plan(CASES["a blocked head stops later loads"][0]).blocked
    assert make_plan(CASES["during isolation everybody waits"][0]).blocked
    assert not make_plan(CASES["what fits is loaded"][0]).blocked


def test_tiers_are_beams_surplus_before_needed_and_cold_before_warm() -> None:
    state = view([model(A, shared=1), model(B, shared=2)], [])
    cold, warm = idle(1, A, age=10), idle(2, A, age=9.9)
    assert [score(state, cold, 2), score(state, warm, 2), score(state, cold, 1), score(state, warm, 1)] == [0, 1, 2, 3]


def test_waiters_weigh_more_than_any_tier() -> None:
    state = view([model(A, shared=2), model(B, shared=1), model(C)], [ticket(1, A), ticket(2, C)])
    wanted_surplus, unwanted_needed = idle(1, A, age=100), idle(2, B, age=0)
    assert score(state, wanted_surplus, 2) == 10
    assert eviction_order(state, [wanted_surplus, unwanted_needed], ticket(2, C)) == [unwanted_needed, wanted_surplus]


def test_of_equals_the_one_that_is_idle_longest_goes_first_and_the_last_copy_is_not_surplus() -> None:
    state = view([model(A, shared=3), model(B, shared=1), model(C)], [ticket(1, C)])
    copies = [idle(1, A, age=20), idle(2, A, age=40), idle(3, A, age=30), idle(4, B, age=90)]
    assert [copy.row for copy in eviction_order(state, copies, ticket(1, C))] == [2, 3, 4, 1]


def test_a_waiter_with_a_copy_only_displaces_models_with_fewer_waiters() -> None:
    state = view(
        [model(A, shared=1, waiting=2), model(B, shared=1, waiting=1), model(C, shared=1, waiting=2)], [ticket(1, A)]
    )
    assert [copy.row for copy in eviction_order(state, [idle(1, B), idle(2, C)], ticket(1, A))] == [1]


def test_waiters_stand_in_order_of_priority_then_number() -> None:
    tickets = [ticket(3, A), ticket(1, A), ticket(9, B, priority=0), ticket(2, C)]
    assert [t.row for t in queue_order(view([], tickets))] == [9, 1, 2, 3]


def test_overtaking_ends_exactly_at_the_bound() -> None:
    state = view([], [])
    assert not overtaking_limited(state, ticket(1, A, waited=9.0))
    assert not overtaking_limited(state, ticket(1, A, waited=9.0, blocked=1.999))
    assert overtaking_limited(state, ticket(1, A, waited=9.0, blocked=2.0))
    assert not overtaking_over(state, ticket(1, A, waited=9.0, blocked=3.999))
    assert overtaking_over(state, ticket(1, A, waited=9.0, blocked=4.0))


def test_a_known_model_that_has_waited_long_enough_stands_among_the_unknown() -> None:
    tickets = [ticket(1, A, waited=7.9), ticket(2, B, waited=8.0), ticket(3, C, priority=0)]
    assert [t.row for t in queue_order(view([], tickets))] == [2, 3, 1]


def test_free_memory_is_the_limit_less_what_is_used_and_reserved() -> None:
    one = device(used=200, reserved_mb=300)
    assert (limit_mb(one, 0.1), free_mb(one, 0.1)) == (900, 400)


def test_a_model_that_takes_nothing_goes_to_a_device_whose_total_is_known() -> None:
    state = view([model(A, 0.0)], [ticket(1, A)], devices=[device(0, 0.0), device(1, 1000.0, 900.0)])
    (decision,) = make_plan(state).decisions
    assert isinstance(decision, Load)
    assert decision.devices == (1,)


# ---- properties ----------------------------------------------------------------------------------------------

mb = st.integers(0, 1200).map(float)


@st.composite
def views(draw: st.DrawFn) -> View:
    """Any state, also ones that should not come about, such as a device over its limit."""
    devices = [
        device(row, draw(st.sampled_from([0.0, 500.0, 1000.0])), draw(mb), reserved_mb=draw(mb))
        for row in range(draw(st.integers(0, 3)))
    ]
    devices = [replace(d, returning_mb=draw(st.sampled_from([0.0, 0.0, 50.0]))) for d in devices]
    members = st.integers(1, 3)
    copies = [
        idle(
            row,
            draw(st.integers(0, 3)),
            mb=draw(mb),
            age=draw(st.floats(0, 30)),
            owner=draw(st.one_of(st.none(), members)),
            on=draw(st.integers(0, len(devices) - 1)) if devices else 0,
        )
        for row in range(draw(st.integers(0, 6)))
    ]
    shared: Counter[int] = Counter()
    owned: dict[int, Counter[int]] = defaultdict(Counter)
    for copy in copies:
        if copy.owner is None:
            shared[copy.model] += 1
        else:
            owned[copy.model][copy.owner] += 1
    models = [
        model(row, draw(mb), known=draw(st.booleans()), shared=shared[row] + draw(st.integers(0, 1)), owned=owned[row])
        for row in range(4)
    ]
    tickets = [
        ticket(
            row,
            wants := draw(st.integers(0, 3)),
            priority=int(models[wants].known),
            member=draw(members),
            waited=draw(st.floats(0, 4)),
        )
        for row in range(draw(st.integers(0, 8)))
    ]
    return view(
        models,
        tickets,
        copies=copies,
        devices=devices,
        rules=replace(RULES, isolate_unknown=draw(st.booleans())),
        in_use=draw(st.integers(0, 1)) if devices else 0,
        isolated=draw(st.integers(0, 9)) == 0,
    )


def runs_alone(state: View, waiter: TicketView) -> bool:
    """Tell whether a waiter's model has to run alone first."""
    return state.rules.isolate_unknown and not state.models[waiter.model].known


@settings(max_examples=300, deadline=None)
@given(views())
def test_no_plan_breaks_the_rules(state: View) -> None:
    plan = make_plan(state)
    tickets = {t.row: t for t in state.tickets}
    copies = {copy.row: copy for copy in state.idle}
    answered = [decision.ticket for decision in plan.decisions]
    granted = [decision.instance for decision in plan.decisions if isinstance(decision, Grant)]
    evicted = [row for decision in plan.decisions if isinstance(decision, Evict) for row in decision.instances]
    loads = [decision for decision in plan.decisions if isinstance(decision, Load)]

    assert len(answered) == len(set(answered)), "every waiter gets one answer"
    assert not any(one.isolated for one in state.devices) or not plan.decisions, (
        "nothing happens beside a model that runs alone"
    )
    taken = granted + evicted
    assert len(taken) == len(set(taken)), "a copy goes one way"
    for decision in plan.decisions:
        if isinstance(decision, Grant):
            copy, waiter = copies[decision.instance], tickets[decision.ticket]
            assert copy.model == waiter.model
            assert copy.owner in (None, waiter.member)
    for one in state.devices:
        planned = [load.need_mb for load in loads if load.devices == (one.device,) and not load.alone]
        room = free_mb(one, state.rules.slack_percentage)
        assert not planned or math.fsum(planned) <= room + 1e-6, "no device goes over its limit"
    for decision in plan.decisions:
        waiter = tickets[decision.ticket]
        wanted = state.models[waiter.model]
        if isinstance(decision, Load):
            largest = max(limit_mb(one, state.rules.slack_percentage) for one in state.devices)
            # What is only assumed does not make a model impossible.
            assert decision.need_mb in (wanted.need_mb, largest)
            assert decision.need_mb == wanted.need_mb or (not wanted.known and wanted.need_mb > largest)
            assert decision.alone == (not wanted.known and state.rules.isolate_unknown)
        if isinstance(decision, Refuse):
            limits = [limit_mb(one, state.rules.slack_percentage) for one in state.devices]
            assert wanted.need_mb > max(limits), "only what can never fit is refused"
        if isinstance(decision, Evict) and (wanted.known or not state.rules.isolate_unknown):
            assert decision.instances
            planned_mb = {
                one.device: math.fsum(load.need_mb for load in loads if load.devices == (one.device,))
                for one in state.devices
            }
            left = [replace(one, reserved_mb=one.reserved_mb + planned_mb[one.device]) for one in state.devices]
            # Where one runs alone, or everything drains for one, nobody else goes.
            alone = [other for other in plan.decisions if runs_alone(state, tickets[other.ticket])]
            closed = {row for other in alone if not isinstance(other, Satisfied) for row in other.why.devices}
            left = [one for one in left if one.device not in closed]
            assert best_place(left, wanted.need_mb, state.rules.slack_percentage) is None, "it would have fitted"
    for load in loads:
        if load.alone:
            (alone_on,) = load.devices
            assert not any(alone_on in copy.devices for copy in state.idle if not copy.pinned)
            assert not any(alone_on in copy.devices for copy in state.busy)
            assert [other for other in loads if alone_on in other.devices] == [load]


@st.composite
def states_at_rest(draw: st.DrawFn) -> View:
    """A state in which nothing is in use, loads or unloads, and no memory is expected. The books are right."""
    count = draw(st.integers(1, 2))
    totals = [draw(st.sampled_from([600.0, 1000.0])) for _ in range(count)]
    copies = []
    left = [total * (1 - RULES.slack_percentage) for total in totals]
    for row in range(draw(st.integers(0, 6))):
        on, mb = draw(st.integers(0, count - 1)), draw(st.sampled_from([50.0, 100.0, 250.0, 400.0]))
        if mb <= left[on]:
            left[on] -= mb
            owner = draw(st.one_of(st.none(), st.integers(1, 3)))
            copies.append(idle(row, draw(st.integers(0, 3)), mb=mb, owner=owner, on=on, pinned=draw(st.booleans())))
    devices = []
    for row, total in enumerate(totals):
        leased = draw(st.sampled_from([0.0, 0.0, 200.0]))
        external = draw(st.sampled_from([0.0, 48.0, 100.0, 300.0, 700.0]))
        ours = sum(copy.mb for copy in copies if copy.device == row)
        # What instances have grown by may count as external; on a device that has none, all of it is certain.
        least = draw(st.floats(0, external)) if ours else external
        figures = {"reserved_mb": leased, "leased_mb": leased, "external_mb": external, "external_least_mb": least}
        devices.append(device(row, total, ours + external, **figures))
    shared = Counter(copy.model for copy in copies if copy.owner is None)
    models = []
    for row in range(4):
        owned = Counter(copy.owner for copy in copies if copy.model == row and copy.owner is not None)
        need = draw(st.sampled_from([50.0, 300.0, 520.0, 880.0, 950.0]))
        one = model(row, need, known=draw(st.booleans()), shared=shared[row], owned=owned)
        load_s, hold_s = draw(st.sampled_from([(0.0, 0.0), (1.0, 0.0), (1.0, 0.1)]))
        models.append(replace(one, rate=draw(st.sampled_from([0.0, 1.0])), load_s=load_s, hold_s=hold_s))
    tickets = [
        ticket(
            row,
            draw(st.integers(0, 3)),
            member=draw(st.integers(1, 3)),
            preload=draw(st.sampled_from([0, 0, 0, 1, 2])),
            blocked=draw(st.sampled_from([None, 1.0, 3.0, 5.0])),
            waited=6.0,
        )
        for row in range(draw(st.integers(1, 5)))
    ]
    most = draw(st.sampled_from([1, 2, math.inf]))
    rules = replace(RULES, isolate_unknown=draw(st.booleans()), max_model_copies=most)
    return view(models, tickets, copies=copies, devices=devices, rules=rules)


@pytest.mark.parametrize(
    ("first", "where", "others"),
    [
        (model(A, 520, known=False), device(used=50, total=600, reserved_mb=200, leased_mb=200), False),
        (model(A, 300), device(used=350, total=600, external_mb=300.0, external_least_mb=0.0), True),
    ],
    ids=["unknown beside a lease", "beside what copies may have grown by"],
)
def test_an_idle_copy_is_handed_out_past_one_whose_room_nothing_here_can_make(
    first: ModelView, where: DeviceView, others: bool
) -> None:
    rules = Rules(0.1, 10.0, 1, 2.0, isolate_unknown=True, max_model_copies=1)
    waits = ticket(0, A, waited=6.0, blocked=3.0 if others else None)
    state = view(
        [first, model(B, 50, shared=1)],
        [waits, ticket(1, B, waited=6.0)],
        copies=[idle(7, B, mb=50, pinned=others)],
        devices=[where],
        rules=rules,
    )
    granted = [one for one in make_plan(state).decisions if isinstance(one, Grant)]
    assert [(one.ticket, one.instance) for one in granted] == [(1, 7)]


@settings(max_examples=scaled(300), deadline=None)
@given(states_at_rest())
def test_nobody_waits_without_end_while_nothing_is_in_use_and_no_memory_is_expected(state: View) -> None:
    """Somebody gets something, or all wait for what only others can end: external memory, leases, pins."""
    decisions = make_plan(state).decisions
    if any(isinstance(decision, Grant | Load | Evict | Refuse | Satisfied) for decision in decisions):
        return
    decided = {decision.ticket: decision for decision in decisions}
    for waiter in state.tickets:
        decision = decided.get(waiter.row)
        assert isinstance(decision, Wait), f"ticket {waiter.row} waits behind others"
        assert decision.reason in (Reason.FOREIGN, Reason.LEASED, Reason.PINNED, Reason.COPIES)
        assert not decision.first, "it holds up others"
        if decision.reason == Reason.COPIES:
            assert all(copy.pinned for copy in state.idle if copy.model == waiter.model)


@settings(max_examples=200, deadline=None)
@given(views())
def test_a_plan_is_the_same_whatever_the_order_of_the_view(state: View) -> None:
    shuffled = replace(state, tickets=state.tickets[::-1], devices=state.devices[::-1])
    assert make_plan(shuffled).decisions == make_plan(state).decisions


# ---- the cost of being wrong -------------------------------------------------------------------------------


def wanted(row: int, need: float, rate: float, **more: Any) -> ModelView:
    """A model with one copy, whose loads take 2 s."""
    values = {"load_s": 2.0, "hold_s": 0.1, "rate": rate, **more}
    return replace(model(row, need, shared=1), **values)


def test_of_known_costs_the_least_wanted_copy_goes_however_lately_it_was_used() -> None:
    state = view(
        [model(A, 100), wanted(B, 100, rate=5.0), wanted(C, 100, rate=0.1)],
        [ticket(1, A)],
        copies=[idle(7, B, age=60), idle(8, C, age=1)],
        devices=[device(used=900)],
    )
    assert make_plan(state).decisions == (Evict(1, (8,)),)


def test_what_another_model_has_taken_the_place_of_goes_first_however_much_it_was_wanted() -> None:
    for old, other in (
        # Known costs; costs that are not known of one, and of both: then the order would be Beam's.
        (wanted(B, 100, rate=9.0, superseded=True), wanted(C, 100, rate=0.1)),
        (model(B, shared=1, superseded=True), wanted(C, 100, rate=0.1)),
        (model(B, shared=1, superseded=True), model(C, shared=2)),
    ):
        state = view(
            [model(A, 100), old, other],
            [ticket(1, A)],
            copies=[idle(7, B, age=1), idle(8, C, age=60)],
            devices=[device(used=900)],
        )
        assert make_plan(state).decisions == (Evict(1, (7,)),)


def test_a_slow_load_outweighs_a_higher_rate() -> None:
    state = view(
        [model(A, 100), wanted(B, 100, rate=1.0, load_s=60.0), wanted(C, 100, rate=5.0)],
        [ticket(1, A)],
        copies=[idle(7, B), idle(8, C)],
        devices=[device(used=900)],
    )
    assert make_plan(state).decisions == (Evict(1, (8,)),)


def test_a_whole_set_is_chosen_and_not_more_than_that() -> None:
    # Two small ones harm less than one large, or than a small and a large.
    state = view(
        [model(A, 400), wanted(B, 200, rate=0.2), wanted(C, 200, rate=0.3), wanted(D, 500, rate=0.9)],
        [ticket(1, A)],
        copies=[idle(7, B, mb=200), idle(8, C, mb=200), idle(9, D, mb=500)],
        devices=[device(used=900)],
    )
    assert make_plan(state).decisions == (Evict(1, (7, 8)),)


def test_a_surplus_copy_goes_before_the_last_one_of_a_model_that_is_wanted_less() -> None:
    state = view(
        [model(A, 100), replace(wanted(B, 100, rate=1.0), shared=2), wanted(C, 100, rate=0.5)],
        [ticket(1, A)],
        copies=[idle(7, B, age=30), idle(8, B, age=20), idle(9, C, age=60)],
        devices=[device(used=900)],
    )
    assert make_plan(state).decisions == (Evict(1, (7,)),)


def test_where_all_loads_are_quick_the_order_is_beams() -> None:
    state = view(
        [model(A, 100), wanted(B, 100, rate=0.1, load_s=0.01), wanted(C, 100, rate=9.0, load_s=0.01)],
        [ticket(1, A)],
        copies=[idle(7, B, age=1), idle(8, C, age=60)],
        devices=[device(used=900)],
    )
    assert make_plan(state).decisions == (Evict(1, (8,)),)


def in_use(row: int, of: int, mb: float, free_in_s: float) -> BusyInstance:
    return BusyInstance(row, of, 0, mb, free_in_s)


@pytest.mark.parametrize(("free_in_s", "decision"), [(0.1, Wait(1, Reason.IN_USE)), (60.0, Evict(1, (7,)))])
def test_a_rarely_wanted_copy_in_use_is_waited_for_rather_than_a_hot_one_unloaded_if_that_is_soon(
    free_in_s: float, decision: object
) -> None:
    state = view(
        [replace(model(A, 100), load_s=2.0), wanted(B, 100, rate=5.0), wanted(C, 100, rate=0.1)],
        [ticket(1, A)],
        copies=[idle(7, B)],
        devices=[device(used=900)],
        busy=(in_use(8, C, 100, free_in_s),),
    )
    assert make_plan(state).decisions == (decision,)


def test_the_more_wait_the_less_a_drain_pays() -> None:
    def decided(waiters: int) -> object:
        state = view(
            [replace(model(A, 100), load_s=2.0), wanted(B, 100, rate=5.0), wanted(C, 100, rate=0.1)],
            [ticket(row, A) for row in range(waiters)],
            copies=[idle(7, B)],
            devices=[device(used=900)],
            busy=(in_use(8, C, 100, 20.0),),
        )
        return make_plan(state).decisions[0]

    assert decided(1) == Wait(0, Reason.IN_USE)
    assert decided(3) == Evict(0, (7,))


def test_each_surplus_copy_that_goes_leaves_one_less() -> None:
    state = view(
        [model(A, 200), replace(wanted(B, 100, rate=1.0), shared=3), wanted(C, 100, rate=0.5)],
        [ticket(1, A)],
        copies=[idle(7, B, age=30), idle(8, B, age=20), idle(9, B, age=10), idle(6, C, age=60)],
        devices=[device(used=900)],
    )
    assert make_plan(state).decisions == (Evict(1, (7, 8)),)


def test_what_comes_free_by_itself_is_waited_for_rather_than_something_unloaded_elsewhere() -> None:
    state = view(
        [model(A, 500), wanted(B, 100, rate=0.1)],
        [ticket(1, A)],
        copies=[idle(7, B, on=1)],
        devices=[device(0, used=500, unloading_mb=100), device(1, used=500)],
    )
    assert make_plan(state).decisions == (Wait(1, Reason.UNLOADING),)


def test_a_device_is_drained_for_one_that_runs_alone_where_the_last_copy_is_free_soonest() -> None:
    state = view(
        [model(A, known=False), model(B, shared=3)],
        [ticket(1, A, priority=0)],
        busy=(BusyInstance(5, B, 0, 100, 0.1), BusyInstance(6, B, 0, 100, 9.0), BusyInstance(7, B, 1, 100, 3.0)),
        devices=[device(0, used=200), device(1, used=100)],
    )
    (decision,) = make_plan(state).decisions
    assert decision == Wait(1, Reason.DRAINING)
    assert isinstance(decision, Wait)
    assert decision.why.devices == (1,)


# ---- passing one that waits for room -----------------------------------------------------------------------


def blocked_by_c(blocked_s: float, *behind: TicketView) -> View:
    """A needs 800 MB: one copy of C is idle, the other in use, with 400 MB each; an idle copy of B is small."""
    return view(
        [model(A, 800), model(B, shared=1), model(C, shared=2)],
        [ticket(1, A, blocked=blocked_s), *behind],
        copies=[idle(7, B, mb=10, age=1), idle(9, C, mb=400)],
        devices=[device(used=900)],
        busy=(in_use(8, C, 400, 0.5),),
    )


def test_within_the_bound_every_idle_copy_may_be_reused() -> None:
    decisions = make_plan(blocked_by_c(1.9, ticket(2, C), ticket(3, B))).decisions
    assert decisions[1:] == (Grant(2, 9), Grant(3, 7))


@pytest.mark.parametrize(
    ("load", "begins"),
    [
        pytest.param(
            BusyInstance(5, B, 0, 900, 9.0, loading=True), False, id="not while only the end of a load makes room"
        ),
        pytest.param(BusyInstance(5, B, 0, 900, 9.0), True, id="once that is in use"),
    ],
)
def test_the_time_of_a_blocked_one_begins_when_somebody_can_delay_it(load: BusyInstance, begins: bool) -> None:
    state = view([model(A, 800), model(B, 900)], [ticket(1, A)], devices=[device(used=900)], busy=(load,))
    (decision,) = make_plan(state).decisions
    assert (decision, isinstance(decision, Wait) and decision.first) == (Wait(1, Reason.IN_USE), begins)


def test_it_does_not_while_a_load_of_the_same_plan_takes_the_room() -> None:
    decisions = make_plan(view([model(A, 800), model(B, 800)], [ticket(1, A), ticket(2, B)])).decisions
    assert [isinstance(decision, Wait) and decision.first for decision in decisions] == [False, False]


def test_it_begins_during_a_load_if_others_are_idle_that_could_make_room() -> None:
    state = view(
        [model(A, 400), model(B, 100), wanted(C, 400, rate=50.0)],
        [replace(ticket(1, A))],
        copies=[idle(7, C, mb=400)],
        devices=[device(used=800)],
        busy=(BusyInstance(5, B, 0, 400, 0.1, loading=True),),
    )
    costs = {B: wanted(B, 100, rate=0.1, loading={OTHER: 1}), A: replace(model(A, 400, waiting=1), load_s=2.0)}
    (decision,) = make_plan(replace(state, models={**state.models, **costs})).decisions
    assert (decision, isinstance(decision, Wait) and decision.first) == (Wait(1, Reason.IN_USE), True)


def test_it_begins_when_a_small_load_goes_on_beside_it() -> None:
    state = view(
        [model(A, 800), model(B, shared=1), model(C, 50)],
        [ticket(1, A), ticket(2, C)],
        devices=[device(used=300)],
        busy=(BusyInstance(5, B, 0, 300, 1.0, loading=True),),
    )
    wait, load = make_plan(state).decisions
    assert isinstance(load, Load)
    assert isinstance(wait, Wait)
    assert wait.first


def test_after_it_only_what_is_not_to_make_room() -> None:
    # Wanted costs make the choice plain: C goes, and B, which is small and wanted, is none of it.
    state = blocked_by_c(2.0, ticket(2, C), ticket(3, B))
    costs = {B: wanted(B, 10, rate=50.0), C: replace(wanted(C, 400, rate=0.1), shared=2, waiting=1)}
    decisions = make_plan(replace(state, models={**state.models, **costs})).decisions
    assert decisions == (Evict(1, (9,)), Grant(3, 7))


def test_after_twice_the_bound_nothing_at_all() -> None:
    decisions = make_plan(blocked_by_c(4.0, ticket(2, C), ticket(3, B))).decisions
    assert not any(isinstance(decision, Grant) for decision in decisions)


def test_nothing_passes_a_model_that_has_to_run_alone() -> None:
    state = view(
        [model(A, known=False), held_for_long(model(B, shared=1))],
        [ticket(1, A, priority=0), ticket(2, B)],
        copies=[idle(7, B)],
        in_use=1,
    )
    assert make_plan(state).decisions == (Wait(1, Reason.DRAINING),)


@pytest.mark.parametrize(("need_mb", "loads"), [(50.0, True), (150.0, False)])
def test_a_small_load_goes_on_if_it_leaves_the_room_of_the_blocked_one(need_mb: float, loads: bool) -> None:
    # Of 900 MB 600 are free and 300 will be: A takes 800 of them.
    state = view(
        [model(A, 800), model(B, shared=1), model(C, need_mb)],
        [ticket(1, A), ticket(2, C)],
        devices=[device(used=300)],
        busy=(in_use(5, B, 300, 1.0),),
    )
    expected = (Load(2, (0,), need_mb, alone=False),) if loads else ()
    assert make_plan(state).decisions == (Wait(1, Reason.IN_USE), *expected)


def test_of_two_who_wait_for_one_model_one_loads_and_the_other_shares() -> None:
    handle = replace(model(A, 100), shares=True, load_s=2.0, hold_s=0.1)
    state = view([handle], [ticket(1, A), ticket(2, A, member=OTHER)])
    assert make_plan(state).decisions == (Load(1, (0,), 100.0, alone=False), Wait(2, Reason.SHARING))


# ---- which load is first -----------------------------------------------------------------------------------


def two_for_b(head: TicketView, b_mb: float = 800.0, waiting: int = 2, **more: Any) -> tuple[object, ...]:
    """One waits for A, which needs 800 of 900 MB, and behind it some wait for B."""
    behind = [ticket(row, B) for row in range(2, 2 + waiting)]
    return make_plan(view([model(A, 800), model(B, b_mb)], [head, *behind], **more)).decisions


def test_a_model_that_more_wait_for_is_loaded_before_that_of_the_first_waiter() -> None:
    wait, load = two_for_b(ticket(1, A))
    assert (wait, load) == (Wait(1, Reason.MEMORY), Load(2, (0,), 800, False))
    assert isinstance(wait, Wait)
    assert wait.passed
    assert not wait.first, "its time begins when that load has ended"


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(two_for_b(replace(ticket(1, A), passed=True)), id="only once"),
        pytest.param(two_for_b(ticket(1, A, blocked=2.0)), id="not when its time is up"),
        pytest.param(two_for_b(ticket(1, A), waiting=1), id="not for as many"),
        pytest.param(two_for_b(ticket(1, A), b_mb=900.5), id="not where it does not fit"),
        pytest.param(two_for_b(replace(ticket(1, A), loadable_on=(0,))), id="not past one that may not go anywhere"),
        pytest.param(two_for_b(ticket(1, A, priority=0)), id="not past one of the highest priority"),
    ],
)
def test_but_that_has_limits(found: tuple[object, ...]) -> None:
    assert found[0] == Load(1, (0,), 800, False)


def test_where_both_fit_neither_is_passed() -> None:
    decisions = two_for_b(ticket(1, A), devices=[device(total=4000)])
    assert decisions == (Load(1, (0,), 800, False), Load(2, (0,), 800, False), Wait(3, Reason.SHARING))


def test_a_waiter_that_was_passed_and_has_others_evicted_is_passed_no_more() -> None:
    models = [model(A, 800), model(B, 100), model(C, shared=1)]
    waiters = [ticket(1, A), ticket(2, B), ticket(3, B)]
    state = view(models, waiters, copies=[idle(7, C, mb=50)], devices=[device(used=50)])
    evict, load = make_plan(state).decisions
    assert (evict, load) == (Evict(1, (7,)), Load(2, (0,), 100, False))
    assert isinstance(evict, Evict)
    assert evict.passed


# ---- leases ------------------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 600).map(float), max_size=12),
    st.integers(1, 900).map(float),
    st.integers(1, 600).map(float),
)
def test_a_lease_that_goes_before_who_has_waited_for_long_does_not_delay_it(
    held_mb: list[float], need_mb: float, later_mb: float
) -> None:
    waiting = ticket(1, A, waited=2.0)
    if not may_be_leased_before(view([], []), waiting, need_mb, device(), later_mb, held_mb):
        return
    for ended in itertools.product((False, True), repeat=len(held_mb)):
        left_mb = math.fsum(mb for mb, gone in zip(held_mb, ended, strict=True) if not gone)
        assert (left_mb + need_mb <= 900) == (left_mb + later_mb + need_mb <= 900)


# ---- demand ------------------------------------------------------------------------------------------------


def test_demand_is_the_rate_of_regular_requests_and_silence_lowers_it() -> None:
    demand = Demand()
    for number in range(1, 21):
        demand = demand.counted(number, 2.0 * number)
    assert demand.per_second(40.0) == pytest.approx(0.5)
    assert demand.per_second(42.0) == pytest.approx(1 / 3)
    assert demand.per_second(1040.0) == pytest.approx(0.002, rel=0.01)


def test_requests_that_are_counted_together_weigh_as_much_as_one_by_one() -> None:
    one_by_one = together = Demand().counted(1, 0.0)
    for number in range(2, 12):
        one_by_one = one_by_one.counted(number, number - 1.0)
    together = together.counted(11, 10.0)
    assert one_by_one.mean_interarrival_s == pytest.approx(together.mean_interarrival_s)


def test_without_requests_there_is_no_demand_and_failed_loads_are_no_requests() -> None:
    assert Demand().per_second(5.0) == 0.0
    demand = Demand().counted(2, 1.0).counted(3, 2.0)
    assert demand.counted(3, 9.0) is demand
    assert demand.counted(2, 9.0) == replace(demand, requests=2)


# ---- sharing -----------------------------------------------------------------------------------------------


def busy(**values: Any) -> ModelView:
    """A known model with one copy, in use, that takes 2 s to load and is held for 0.1 s."""
    return ModelView(
        **{
            "model": A,
            "known": True,
            "need_mb": 100.0,
            "shared": 1,
            "owned": {},
            "waiting": 1,
            "load_s": 2.0,
            "hold_s": 0.1,
            **values,
        }
    )


def loading_for(seconds: float, **values: Any) -> ModelView:
    """The same model while another process loads its only copy."""
    more = {"shared": 0, "loading": {OTHER: 1}, "shares": values.get("load_s", 2.0) > 0, "loading_for_s": seconds}
    return busy(**more, **values)


@pytest.mark.parametrize(
    ("model_view", "ahead", "expected_s"),
    [
        pytest.param(busy(), 0, 0.1, id="a copy that is soon free is waited for"),
        pytest.param(busy(), 18, 1.9, id="also by the nineteenth"),
        pytest.param(busy(), 19, None, id="but not when so many wait that a load is as quick"),
        pytest.param(busy(shared=2), 19, 1.0, id="two copies serve twice as many"),
        pytest.param(busy(hold_s=3.0), 0, None, id="long holds are not waited for"),
        pytest.param(busy(held_for_s=2.0), 0, None, id="nor one that goes on for as long as a load takes"),
        pytest.param(busy(held_for_s=1.9), 0, 0.1, id="but one that goes on for less is"),
        pytest.param(busy(hold_s=0.0), 9, 0.0, id="a first hold that has just begun is waited for"),
        pytest.param(busy(hold_s=0.0, held_for_s=0.3), 0, 0.3, id="it is expected to last for as long again"),
        pytest.param(busy(hold_s=0.0, held_for_s=0.3), 2, 1.5, id="and so is each hold before one's own"),
        pytest.param(busy(hold_s=0.0, held_for_s=0.3), 3, None, id="until a load is sooner"),
        pytest.param(busy(hold_s=0.0, held_for_s=2.0), 0, None, id="which it is when a first hold outlasts a load"),
        pytest.param(busy(shared=0), 0, None, id="without a copy there is nothing to share"),
        pytest.param(busy(shared=0, owned={OTHER: 1}), 0, None, id="another process's object is no use"),
        pytest.param(busy(shared=0, owned={ME: 1}), 0, 0.1, id="an object of one's own is"),
        pytest.param(busy(shared=0, loading={OTHER: 1}, shares=True, loading_for_s=0.5), 0, 1.6, id="a load is shared"),
        pytest.param(busy(shared=0, loading={OTHER: 1}, shares=False), 0, None, id="but not of another's object"),
        pytest.param(loading_for(0.5, load_s=0.0, hold_s=0.0), 0, FIRST_LOAD_S - 0.5, id="so is a first load"),
        pytest.param(
            loading_for(0.5, load_s=0.0, hold_s=0.0, known=False), 0, FIRST_LOAD_S - 0.5, id="of an unknown model, too"
        ),
        pytest.param(loading_for(3.8), 0, 1.9, id="a load that is late is expected to be late by as much again"),
        pytest.param(loading_for(4.0), 0, None, id="and is not shared once another one is sooner"),
        pytest.param(
            loading_for(2 * FIRST_LOAD_S, load_s=0.0, hold_s=0.0), 0, None, id="nor is a first load that never ends"
        ),
    ],
)
def test_another_copy_is_loaded_only_where_that_is_sooner(
    model_view: ModelView, ahead: int, expected_s: float | None
) -> None:
    found = waiting_is_sooner(model_view, ticket(1, A, waited=2.0), ahead, NOW)
    assert found == (None if expected_s is None else pytest.approx(expected_s))


def test_who_has_just_come_waits_for_a_copy_that_is_held_for_long() -> None:
    assert waiting_is_sooner(busy(held_for_s=9.0), ticket(1, A, waited=1.9), 0, NOW) == pytest.approx(0.1)


def test_the_first_load_of_a_model_is_expected_to_be_as_those_of_others() -> None:
    objects = [busy(shared=0, owned={OTHER: 1}, load_s=4.0, hold_s=0.3)] * 2
    handle = busy(shares=True, load_s=1.0, hold_s=0.0)
    first = loading_for(0.5, load_s=0.0, hold_s=0.0)
    assert seen_so_far([first]) == Seen(0.0, 0.0, shares=True)
    seen = seen_so_far([*objects, handle])
    assert (seen.load_s, seen.hold_s) == pytest.approx((3.0, 0.3))
    assert not seen.shares
    waits_s = [
        waiting_is_sooner(first, ticket(1, A), 0, NOW, others)
        for others in (Seen(3.0, 0.3, shares=True), Seen(3.0, 0.3, shares=False), Seen(0.2, 0.1, shares=True))
    ]
    assert waits_s == [pytest.approx(2.8), None, None]


def test_while_nothing_is_known_one_loads_and_the_others_wait_for_that() -> None:
    tickets = [ticket(row, A, member=row) for row in range(1, 5)]
    decisions = make_plan(view([model(A)], tickets)).decisions
    assert decisions == (Load(1, (0,), 100, False), *(Wait(row, Reason.SHARING) for row in (2, 3, 4)))


@pytest.mark.parametrize("known", [True, False])
def test_unknown_models_are_loaded_in_parallel_where_processes_are_measured(known: bool) -> None:
    models = [model(row, known=known) for row in (A, B, C)]
    tickets = [ticket(row, wants) for row, wants in enumerate((A, B, C, A, B, C))]
    decisions = make_plan(view(models, tickets, rules=replace(RULES, isolate_unknown=False))).decisions
    loads = [Load(row, (0,), 100, False) for row in (0, 1, 2)]
    assert decisions == (*loads, *(Wait(row, Reason.SHARING) for row in (3, 4, 5)))


def test_a_hung_load_is_shared_until_another_one_is_sooner() -> None:
    def decided(loading_for_s: float) -> tuple[object, ...]:
        hung = loading_for(loading_for_s)
        return make_plan(view([hung], [ticket(1, A), ticket(2, A)], busy=(in_use(5, A, 100, 9.0),))).decisions

    assert decided(3.8) == (Wait(1, Reason.SHARING), Wait(2, Reason.SHARING))
    assert decided(4.0) == (Load(1, (0,), 100, False), Wait(2, Reason.SHARING))


def test_who_shares_a_copy_does_not_block_those_behind() -> None:
    view = View(
        now_s=NOW,
        rules=RULES,
        models={A: busy(), B: model(B, 100.0, waiting=1)},
        idle=(),
        tickets=(ticket(1, A), ticket(2, B)),
        devices=(device(),),
    )
    assert make_plan(view).decisions == (Wait(1, Reason.SHARING), Load(2, (0,), 100.0, alone=False))


# ---- what only several copies, waiters or devices show -------------------------------------------------------


def usable_on(one: TicketView, on: int) -> TicketView:
    """The waiter, to whom only what lies on one device is of use."""
    return replace(one, loadable_on=(on,), usable_on=(on,))


def test_a_preload_for_a_device_is_not_enough_because_another_model_is_in_use_there() -> None:
    state = view(
        [model(A), model(B, shared=1)],
        [usable_on(ticket(1, A, preload=1), 1)],
        busy=(BusyInstance(8, B, 1, 100, 5.0),),
        devices=[device(0), device(1, used=100)],
    )
    (decision,) = make_plan(state).decisions
    assert isinstance(decision, Load)
    assert decision.devices == (1,)


def test_a_load_for_a_device_counts_once_for_a_preload_of_two() -> None:
    state = view(
        [model(A, loading={ME: 1})],
        [usable_on(ticket(1, A, preload=2), 1)],
        busy=(BusyInstance(8, A, 1, 100, 5.0, owner=ME, loading=True),),
        devices=[device(0), device(1, used=100)],
    )
    (decision,) = make_plan(state).decisions
    assert isinstance(decision, Load)


def test_a_third_waiter_shares_as_long_as_that_is_sooner_than_a_load() -> None:
    one = replace(model(A, shared=1), load_s=1.0, hold_s=0.3)
    state = view([one], [ticket(row, A) for row in range(3)], busy=(in_use(8, A, 100, 0.3),))
    assert make_plan(state).decisions == tuple(Wait(row, Reason.SHARING) for row in range(3))


def test_a_device_is_not_emptied_in_vain_where_pinned_copies_leave_no_room() -> None:
    # Part of what counts as external may be what copies have grown by, so emptying a device may help: the second one.
    external = {"external_mb": 500, "external_least_mb": 0}
    state = view(
        [model(A, 700), model(B, shared=1), model(C, shared=2)],
        [ticket(1, A)],
        copies=[idle(7, B, mb=300, pinned=True), idle(8, C, mb=100)],
        busy=(BusyInstance(9, C, 1, 400, 60.0),),
        devices=[device(0, used=900, **external), device(1, used=900, **external)],
    )
    (decision,) = make_plan(state).decisions
    assert decision == Wait(1, Reason.IN_USE)


@settings(max_examples=scaled(100))
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 400)), max_size=6), st.integers(1, 900))
def test_victims_free_enough_and_none_of_them_goes_for_nothing(sizes: list[tuple[int, int]], missing_mb: int) -> None:
    candidates = [Candidate(harm, mb, idle(row, A, mb=mb)) for row, (harm, mb) in enumerate(sizes)]
    chosen = cheapest_set(candidates, missing_mb)
    freed_mb = sum(one.mb for one in chosen)
    if sum(one.mb for one in candidates) < missing_mb:
        assert chosen == []
    else:
        assert freed_mb >= missing_mb
        assert all(freed_mb - one.mb < missing_mb for one in chosen)
