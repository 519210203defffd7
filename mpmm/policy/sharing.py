"""Sharing: whether to wait for an instance that others use or load, rather than to load another one.

Times that have not been measured are inferred from those seen so far. A model that has never been loaded is expected to
load as the others do, and an instance whose holds are not known is expected to be held for as long again as it has been
held already (Gott's rule). The same rule applies to anything that is late: a load or a hold that is late by a second is
expected to be late by another one. So a waiter waits at first if nothing has been measured, and it waits for a hung
load or an endless hold only until that is expected to take longer than a load.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from mpmm.policy.view import ModelView, Reason, TicketView

__all__ = [
    "FIRST_LOAD_S",
    "Seen",
    "expected_wait_s",
    "presumed",
    "remaining_s",
    "room_in_s",
    "seen_so_far",
    "served_in_s",
    "waiting_is_sooner",
]

# How long a load is expected to take before one has ended in the namespace: twice what large models took on an H100
# through Beam, 4 to 12 s. It only decides when to stop waiting for the very first load of all.
FIRST_LOAD_S = 25.0
# Reasons whose time is the one until there may be room.
_UNTIL_RELEASED = frozenset({Reason.IN_USE, Reason.DRAINING})
_UNTIL_ROOM = _UNTIL_RELEASED | {Reason.BACKING_OFF}
# Waits of which mpmm cannot tell when they end.
_UNTIL_OTHERS_ACT = frozenset(
    {
        *(Reason.MEMORY, Reason.PINNED, Reason.LEASED, Reason.EXTERNAL, Reason.COPIES, Reason.TABLE_FULL),
        *(Reason.NO_DEVICE, Reason.OUTRANKED, Reason.QUIET, Reason.RESTLESS),
    }
)


@dataclass(frozen=True)
class Seen:
    """Expectations for a model that has not been loaded, from those that have.

    load_s, hold_s: the means over those models, 0 unknown. shares: a load is expected to make a handle, because most of
    those models did. It is also expected while nothing has been loaded, because Beam's RunInference makes handles.
    """

    load_s: float = 0.0
    hold_s: float = 0.0
    shares: bool = True


def seen_so_far(models: Iterable[ModelView]) -> Seen:
    """Return what the models in a view have shown."""
    loaded = [model for model in models if model.load_s]
    held = [model.hold_s for model in loaded if model.hold_s]
    if not loaded:
        return Seen()
    return Seen(
        math.fsum(model.load_s for model in loaded) / len(loaded),
        math.fsum(held) / len(held) if held else 0.0,
        2 * sum(model.shares for model in loaded) > len(loaded),
    )


def presumed(model: ModelView, seen: Seen) -> ModelView:
    """Return a model with assumptions about its first load; unchanged once a load has ended."""
    if model.load_s:
        return model
    return replace(model, load_s=seen.load_s or FIRST_LOAD_S, shares=model.shares or seen.shares)


def remaining_s(mean_s: float, elapsed_s: float) -> float:
    """Return how much longer something that takes `mean_s` (0 unknown) on average is expected to take.

    Once it is late, it is expected to be late by as much again; so without a known mean it lasts for as long again.
    """
    return abs(mean_s - elapsed_s)


def served_in_s(first_s: float, hold_s: float, ahead: int, places: float) -> float:
    """Return in how many seconds a waiter is served with `ahead` others before it.

    places: how many can use the copies at a time. first_s, hold_s: for how long each of these is still held, and then
    by each waiter.
    """
    return (first_s + hold_s * ahead) / places


def waiting_is_sooner(
    model: ModelView, ticket: TicketView, ahead: int, now_s: float, seen: Seen | None = None
) -> float | None:
    """Return in how many seconds existing instances serve a waiter, if that is sooner than its own load; else None.

    ahead: waiters of the same model before this one that wait for the same instances.

    With c usable instances, each held for h on average, the (n+1)-th waiter gets one after about (n+1) h / c, where an
    instance counts once for each of its users. That is compared with the time of a load. What is left of a load that
    has begun adds to the wait but not to the comparison: otherwise a waiter that comes just after it began would begin
    another one, only to have it a hold sooner. The time by which the load is late does count. If all instances are held
    for longer than a load takes, and the waiter has waited that long, the mean has promised too much, and another one
    is loaded.
    """
    seen = seen or Seen()
    model = presumed(model, seen)
    loaded, coming = model.usable_by(ticket.member), model.coming_for(ticket.member)
    if not loaded and not coming:
        return None
    if loaded and model.hold_s and min(model.held_for_s, now_s - ticket.enqueued_s) >= model.load_s:
        return None
    served_s = _served_s(model, loaded, coming, ahead, seen)
    coming_s = model.coming_s or model.load_s
    late_s = 0.0 if loaded else max(0.0, model.loading_for_s - coming_s)
    if served_s + late_s >= model.load_s:
        return None
    return served_s if loaded else served_s + remaining_s(coming_s, model.loading_for_s)


def _served_s(model: ModelView, loaded: int, coming: int, ahead: int, seen: Seen, least_first_s: float = 0.0) -> float:
    """Return in how many seconds a waiter has a usable copy, not counting what is left of the copies' load.

    least_first_s: for how long, at least, current holders are expected to still hold copies.
    """
    first_s = hold_s = model.hold_s
    if not hold_s:
        # No hold has ended yet. Of several copies the one that was handed out last tells nothing: a process that wants
        # a hundred for itself would wait a moment for each. So the total time of all holds counts: if none has ended in
        # that time, ends are expected to be as rare.
        held_s = max(model.held_for_s, model.held_in_all_s) if loaded else 0.0
        first_s = max(held_s, seen.hold_s - held_s)
        hold_s = held_s + first_s
    return served_in_s(max(first_s, least_first_s), hold_s, ahead, max(1, loaded + coming) * model.users)


def expected_wait_s(
    model: ModelView,
    member: int,
    ahead: int,
    reason: int,
    seconds: float,
    seen: Seen | None = None,
    waited_s: float = 0.0,
    room_ahead_s: float = 0.0,
) -> float:
    """Return in how many seconds a waiter is expected to have a copy to use, for people and for Retry-After.

    The estimate follows from how long loads and holds of the model have taken. It is unknown how much room the waiters
    before this one will take, but they get theirs first: room_ahead_s is the longest of their `room_in_s`, or how long
    this waiter has waited if there are none, because then an unknown model runs alone. ahead: waiters of the same model
    before this one. reason, seconds: why it waits, and the time in that reason when it was given; for a back-off, what
    is left of it. waited_s: how long it has waited.

    A hold that has lasted for less than the mean is expected to last for the mean from now, as if it had no memory. One
    that has lasted longer is expected to last for as long again as it has been held: the conditional expectation of a
    Pareto distribution with alpha = 2, which describes the tail of jobs' durations better than an exponential one does
    (Harchol-Balter and Downey, "Exploiting process lifetime distributions for dynamic load balancing", ACM TOCS 15(3),
    1997: half of the processes that have run for t run for another t). Otherwise, for a copy that has been held for a
    minute, of a model whose holds take a millisecond, a wait of a millisecond would be promised all the time.
    """
    seen = seen or Seen()
    model = presumed(model, seen)
    loaded, coming = model.usable_by(member), model.coming_for(member)
    served_s = _served_s(model, loaded, coming, ahead, seen, model.held_for_s if loaded else 0.0)
    if loaded:
        return served_s
    if coming:
        return served_s + remaining_s(model.coming_s or model.load_s, model.loading_for_s)
    room_s = room_ahead_s if reason == Reason.BEHIND else room_in_s(reason, seconds, waited_s)
    # The waiter that loads uses its copy at once.
    hold_s = model.hold_s or seen.hold_s
    return room_s + model.load_s + hold_s * ahead


def room_in_s(reason: int, seconds: float, waited_s: float) -> float:
    """Return in how many seconds a waiter is expected to have room to load; the parameters are as above.

    Room that should have come free while it waited is expected to take as long again, like a hold; so is room of which
    it is unknown when it comes free.
    """
    room_s = seconds if reason in _UNTIL_ROOM and math.isfinite(seconds) else 0.0
    return max(room_s, waited_s) if reason in _UNTIL_RELEASED | _UNTIL_OTHERS_ACT else room_s
