"""Fairness: the order of the queue, and how long its head may be overtaken.

The queue is ordered by (class, rank). Requests rank in the order in which they come, but each step of a request's
`priority` counts for as much as `HEAD_START_S` of waiting. So a request that waits gains on all that come later, and no
stream of urgent ones starves it: a request of its class that comes later by more than that time, for each step between
the two, does not overtake it. That is 200 s at the very most, and 0 s if no request says how urgent it is.

The class is 0 for unknown models, 1 for known ones, and 2 for preloads. Unknown models come first, but not before a
known one that has waited for `UNKNOWN_FIRST` times `max_overtake_seconds`: a stream of unknown models starves no other.
It moves to the first class then, together with the known ones that rank before it, so that the order of known models
never depends on the wait for unknown ones.

The first waiter for which there is no room is the *head of the line*. For the next `max_overtake_seconds`, waiters
behind it may overtake it by reusing any idle instance, so that the waiters of one model are served together before its
instance is evicted. After that overtaking is limited: the instances that are to make room for the head are kept for it,
and drain; all others may still be reused, which does not delay it. After twice that time overtaking is over, whatever
was expected: no idle instance is handed out behind the head, and where the head may load nothing else is loaded or
resumed, however small. A model that has to run alone is never overtaken.

The time begins only when there is a waiter that can delay the head. As long as only the end of a load that has begun
can make room, the waiters that share that load later do not delay the head. Otherwise, with loads longer than the
bound, every instance would be evicted as soon as it is loaded, for the sake of the next waiter: four clients that
cycle through four models with room for one, each one model further, would need 112 loads of 10 s for 112 requests
instead of 31. A small load that begins later, beside the room for the head, neither starts the time nor delays its
start: it only matters whether the instances that are already loaded could make room.

The time does not begin when a waiter comes, because in a long queue all have waited for long, and then every instance
would be loaded for one waiter alone, which makes the queue even longer: in the simulator, with 64 clients and loads of
2 s, 576 loads for 1 000 requests and a longest wait of 28 s, instead of 71 loads and 8 s.

Leases may be held for ever, so a waiter for one to end is not the head of the line, and delays only later leases. These
may be granted before it for `max_overtake_seconds` after it came; after that only if they do not delay it, which is
certain if it has room at the end of the same leases with the later one as without. So it waits at most for the leases
that were held when it came, and for those that were granted within the bound.

Loads begin in the order of the queue, with one exception: when there is room for the first waiter, a model that more
requests wait for and that fits in the same room is loaded before it, once for each waiter, and not before one for which
overtaking is limited. The time of the waiter that was passed begins anew when that load has ended, so it waits for one
load, and the bound once more, at most. In the simulator, with 64 clients and loads of 0.3 s, this needs 1402 loads
instead of 1537 in 15 traces, with a shorter median wait, and up to 0.4 s more for the longest (1.9 s); four clients
that cycle through four models with room for one, each in an order of its own, need 1.22 times the loads of a planner
that knows all future requests (12 cases, 1.30 at the most) instead of 1.29 (1.49). Without a limit on how often a
waiter is passed it is 1.40, and the longest waits are longer by a half.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from mpmm.policy.admission import limit_mb
from mpmm.policy.view import DeviceView, TicketView, View

__all__ = [
    *("HEAD_START_S", "HIGHEST_URGENCY", "UNKNOWN_FIRST"),
    *("may_be_leased_before", "overtaking_limited", "overtaking_over", "queue_order", "rank_ns", "urgency_of"),
]


# For how many times the bound an unknown model comes before a known one. Every isolation flushes the device, so unknown
# models are better measured one after the other than in turns with known ones: if 64 clients begin with 12 unknown
# models, the 99th percentile of the waits is 6 s; with 1 instead of 4 it is 10 s, with half as many loads again.
UNKNOWN_FIRST = 4


# How urgent a request may be, from the negative of this to this; 0 is usual.
HIGHEST_URGENCY = 10
# How far each step puts a request ahead of those that came at the same time: longer than most loads, and for the
# highest number of steps less than the usual `wait_timeout_seconds` of the requests that are overtaken.
HEAD_START_S = 10.0


def rank_ns(enqueued_ns: int, urgency: int) -> int:
    """Return the number that orders the waiters of one class, lowest first: when they came, less a head start."""
    return enqueued_ns + (HIGHEST_URGENCY - urgency) * int(HEAD_START_S * 1e9)


def urgency_of(enqueued_ns: int, rank: int) -> int:
    """Return how urgent a request is, from its rank."""
    return HIGHEST_URGENCY - round((rank - enqueued_ns) / (HEAD_START_S * 1e9))


def queue_order(view: View) -> list[TicketView]:
    """Return the waiters in the order of the queue; equal ranks in the order of their numbers."""
    patient_s = UNKNOWN_FIRST * view.rules.max_overtake_seconds
    # A preload (class 2) stays where it is: no request waits for the copies that it loads.
    patient = (one.rank for one in view.tickets if one.priority == 1 and view.now_s - one.enqueued_s >= patient_s)
    first_class_up_to = max(patient, default=-1)

    def place(ticket: TicketView) -> tuple[int, int, int]:
        is_promoted = ticket.priority == 1 and ticket.rank <= first_class_up_to
        return 0 if is_promoted else ticket.priority, ticket.rank, ticket.number

    return sorted(view.tickets, key=place)


def overtaking_limited(view: View, ticket: TicketView) -> bool:
    """Tell whether the head of the line must no longer be delayed: others reuse only what it does not need."""
    since = ticket.head_since_s
    return since is not None and view.now_s - since >= view.rules.max_overtake_seconds


def overtaking_over(view: View, ticket: TicketView) -> bool:
    """Tell whether nothing at all may overtake the head of the line any longer."""
    since = ticket.head_since_s
    return since is not None and view.now_s - since >= 2 * view.rules.max_overtake_seconds


# With more leases than this on one device, not every sum is checked.
_MOST_SUMMED = 10


def may_be_leased_before(
    view: View, waiting: TicketView, share_mb: float, device: DeviceView, mb: float, held_mb: Sequence[float]
) -> bool:
    """Tell whether `mb` of a device may be leased before a waiter that needs `share_mb` there once leases have ended.

    held_mb: the leases that are held on the device.
    """
    if waiting.loadable_on and device.device not in waiting.loadable_on:
        return True
    if view.now_s - waiting.enqueued_s < view.rules.max_overtake_seconds:
        return True
    # What leases may take when the waiter's turn comes.
    most_mb = limit_mb(device, view.rules.slack_percentage) - share_mb
    if len(held_mb) > _MOST_SUMMED:
        return math.fsum(held_mb) + mb <= most_mb
    return not any(
        most_mb - mb < math.fsum(left_mb) <= most_mb
        for count in range(len(held_mb) + 1)
        for left_mb in itertools.combinations(held_mb, count)
    )
