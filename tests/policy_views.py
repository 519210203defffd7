"""Models, waiters, copies and devices for the tests of the policy, and a view of them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

from mpmm.policy.view import (
    BusyInstance,
    DeviceView,
    IdleInstance,
    ModelView,
    PlacedInstance,
    Rules,
    TicketView,
    View,
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
    head_for: float | None = None,
) -> TicketView:
    since = None if head_for is None else NOW - head_for
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
    """Return the model with holds so much longer than its loads that no request waits for an instance in use."""
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
    """Return a view. in_use: number of copies on the first device of which only their use is known."""
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


# ---- the cost of being wrong -------------------------------------------------------------------------------


def wanted(row: int, need: float, rate: float, **more: Any) -> ModelView:
    """Return a model with one copy, whose loads take 2 s."""
    values = {"load_s": 2.0, "hold_s": 0.1, "rate": rate, **more}
    return replace(model(row, need, shared=1), **values)


def in_use(row: int, of: int, mb: float, free_in_s: float) -> BusyInstance:
    return BusyInstance(row, of, 0, mb, free_in_s)


# ---- sharing -----------------------------------------------------------------------------------------------


def busy(**values: Any) -> ModelView:
    """Return a known model with one copy, in use, that takes 2 s to load and is held for 0.1 s."""
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
    """Return the same model while another process loads its only copy."""
    more = {"shared": 0, "loading": {OTHER: 1}, "shares": values.get("load_s", 2.0) > 0, "loading_for_s": seconds}
    return busy(**more, **values)


# ---- what only several copies, waiters or devices show -------------------------------------------------------


def usable_on(one: TicketView, on: int) -> TicketView:
    """Return the waiter, now restricted to copies on one device."""
    return replace(one, loadable_on=(on,), usable_on=(on,))
