"""Texts and figures that several views share."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar, cast

from mpmm.policy.backoff import back_off_s
from mpmm.policy.behind import Before, in_the_way, obstacle
from mpmm.policy.reasons import explain, explain_behind, time_left_s
from mpmm.policy.sharing import expected_wait_s, room_in_s, seen_so_far
from mpmm.policy.view import ModelView, Reason
from mpmm.shared_state.snapshot import DeviceInfo, EventInfo, InstanceInfo, ModelInfo, Snapshot, TicketInfo
from mpmm.text.display_names import shown_tags
from mpmm.text.printable import printable

__all__ = [
    "age",
    "bar",
    "copies_counter",
    "decided_at",
    "devices_of",
    "expected_waits",
    "for_people",
    "mb",
    "named",
    "names_of",
    "needs",
    "pids",
    "places",
    "shared_by",
    "times_left",
    "waiters",
    "why",
    "whys",
    "with_names",
]

#: Signs of a bar: used, reserved, returning and free memory, and the limit.
BAR_SIGNS = "█▓░·│"
PLAIN_SIGNS = "#+-.|"
Row = TypeVar("Row", bound=Any)


def names_of(snapshot: Snapshot) -> dict[str, str]:
    """Return what people see instead of tags, for models with names."""
    return shown_tags({model.tag: model.name for model in snapshot.models})


def named(row: Row, names: Mapping[str, str]) -> Row:
    """Return a row of a snapshot with names instead of tags; the same object if it has none."""
    found = {field: names.get(getattr(row, field, None) or "") for field in ("tag", "other")}
    changed: dict[str, Any] = {field: name for field, name in found.items() if name is not None}
    return replace(row, **changed) if changed else row


def with_names(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot whose rows have names instead of tags; the same object if no model has a name."""
    names = names_of(snapshot)
    if not names:
        return snapshot
    tables = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
    rows = {name: rows for name, rows in tables.items() if isinstance(rows, tuple) and rows and is_dataclass(rows[0])}
    changed: dict[str, Any] = {name: tuple(named(row, names) for row in table) for name, table in rows.items()}
    return replace(snapshot, **changed)


def for_people(row: Row) -> Row:
    """Return a snapshot, or a row of one, fit for a terminal: printable, a snapshot with names instead of tags.

    The same object if nothing changes.
    """
    if isinstance(row, Snapshot):
        row = cast(Row, with_names(row))
    changed: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        new = value
        if isinstance(value, str):
            new = printable(value)
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            rows = tuple(map(for_people, value))
            new = rows if any(one is not other for one, other in zip(rows, value, strict=True)) else value
        if new is not value:
            changed[field.name] = new
    return replace(row, **changed) if changed else row


def mb(value: float | None) -> str:
    """Return a number of MB as text."""
    return "?" if value is None or math.isnan(value) else f"{value:.0f}"


def age(seconds: float | None) -> str:
    """Return a duration as text of at most six characters: `0.3 s`, `42 s`, `12 min`, `5.2 h`, `3 d`."""
    if seconds is None or math.isnan(seconds):
        return "?"
    if math.isinf(seconds):
        return "-"
    for limit, unit, divisor in ((10, "s", 1.0), (100, "s", 1.0), (5400, "min", 60.0), (172800, "h", 3600.0)):
        if seconds < limit:
            short = divisor == 3600.0 or limit == 10
            return f"{max(0.0, seconds) / divisor:.{1 if short else 0}f} {unit}"
    return f"{seconds / 86400:.0f} d"


def decided_at(events: Iterable[EventInfo], taken_s: float) -> dict[int, float]:
    """Return by ticket when waiters were told why they wait, as far as events say; taken_s: when these were read."""
    waits = (event for event in events if event.kind == "waits" and event.ticket is not None)
    return {cast(int, event.ticket): taken_s - event.age_s for event in waits}


def times_left(snapshot: Snapshot, decided: Mapping[int, float] | None = None) -> Callable[[TicketInfo], float]:
    """Return a function that says how much of the time in a waiter's reason is left; `inf`, unknown, once it is over.

    decided: see `decided_at`; None takes the times from the snapshot's events. A waiter without one counts as told when
    it began to wait.
    """
    models = {model.row: model for model in snapshot.models}
    told = decided_at(snapshot.events, snapshot.taken_s) if decided is None else decided

    def left_s(ticket: TicketInfo) -> float:
        back_off_left_s = _back_off_left_s(ticket, models.get(ticket.model))
        if back_off_left_s is not None:
            return back_off_left_s
        at = told.get(ticket.number)
        return time_left_s(ticket.reason, ticket.seconds, ticket.waited_s if at is None else snapshot.taken_s - at)

    return left_s


def whys(snapshot: Snapshot, decided: Mapping[int, float] | None = None) -> Callable[[TicketInfo], str]:
    """Return a function that says in a sentence why a waiter waits now; `decided` as for `times_left`."""
    need_of, left_s_of = needs(snapshot), times_left(snapshot, decided)
    leases = {model.row for model in snapshot.models if model.kind == "lease"}
    devices = [device.row for device in snapshot.devices]
    tags = {copy.row: copy.tag for copy in snapshot.instances}
    isolated = {device.row: tags.get(device.isolated) for device in snapshot.devices if device.isolated is not None}
    alone = {row: tag for row, tag in isolated.items() if tag is not None}
    queue = waiters(snapshot)
    places = {ticket.number: place for place, ticket in enumerate(queue)}
    obstacles = in_the_way(queue, lambda one: one.reason)

    def said(ticket: TicketInfo) -> str:
        if ticket.reason != Reason.BEHIND:
            return why(ticket, need_of(ticket), left_s_of(ticket))
        place = places.get(ticket.number, 0)
        before = (Before(one.tag, one.reason, one.on) for at, one in obstacles if at < place)
        return explain_behind(obstacle(devices, ticket.loadable_on, ticket.span, ticket.model in leases, alone, before))

    return said


def _back_off_left_s(ticket: TicketInfo, model: ModelInfo | None) -> float | None:
    """Return how much is left of the back-off that a ticket waits for, None if it waits for something else."""
    if ticket.reason != Reason.BACKING_OFF or model is None or model.failed_ago_s is None:
        return None
    return max(0.0, back_off_s(model.failures) - model.failed_ago_s)


def why(row: TicketInfo | EventInfo, need_mb: float | None = None, seconds: float | None = None) -> str:
    """Return the sentence for a decision, empty if the policy has decided nothing.

    need_mb: what to show instead of the row's, see `needs`. seconds: the time that is left now, see `times_left`.
    """
    if row.reason is None:
        return ""
    need = row.need_mb if need_mb is None else need_mb
    time_s = row.seconds if seconds is None else seconds
    need, free, coming, time_s = (figure or 0.0 for figure in (need, row.free_mb, row.coming_mb, time_s))
    return explain(row.reason, need, free, coming, time_s, row.other, row.on)


def needs(snapshot: Snapshot) -> Callable[[TicketInfo], float]:
    """Return a function that says how many MB a ticket needs.

    An unknown model is tried on a whole device at most, and so is one whose copies were seen to take more.
    """
    unknown = {model.row for model in snapshot.models if model.estimate_mb is None and model.expect_mb is None}
    infers = not snapshot.accounting_only
    tried = unknown | {
        model.row for model in snapshot.models if model.measured or (infers and model.sd_mb and model.loads)
    }
    largest = max((device.limit_mb for device in snapshot.devices), default=math.inf)
    return lambda ticket: min(ticket.need_mb, largest) if ticket.model in tried else ticket.need_mb


def expected_waits(snapshot: Snapshot) -> Callable[[TicketInfo], float]:
    """Return a function that says in how many seconds a waiter is expected to get its copy, `nan` for a lease."""
    copies: dict[int, list[InstanceInfo]] = {}
    for copy in snapshot.instances:
        copies.setdefault(copy.model, []).append(copy)
    views = {model.row: _view(model, copies.get(model.row, [])) for model in snapshot.models if model.kind == "model"}
    models = {model.row: model for model in snapshot.models}
    seen = seen_so_far(views.values())
    queue = waiters(snapshot)

    def seconds_of(ticket: TicketInfo) -> float:
        back_off_left_s = _back_off_left_s(ticket, models.get(ticket.model))
        return ticket.seconds if back_off_left_s is None else back_off_left_s

    # By ticket: how many requests ahead of it wait for its model, and in how many seconds all ahead of it have room.
    before: dict[int, tuple[int, float]] = {}
    ahead, room_ahead_s = Counter[int](), -math.inf
    for one in queue:
        before[one.number] = (ahead[one.model], room_ahead_s)
        ahead[one.model] += not one.preload
        room_ahead_s = max(room_ahead_s, room_in_s(one.reason, seconds_of(one), one.waited_s))

    def expected_s(ticket: TicketInfo) -> float:
        if ticket.model not in views:
            return math.nan
        # A ticket that no longer waits counts as behind all others.
        in_front, room_s = before.get(ticket.number, (ahead[ticket.model], room_ahead_s))
        waited_s = ticket.waited_s
        others = (seconds_of(ticket), seen, waited_s, waited_s if room_s == -math.inf else room_s)
        return expected_wait_s(views[ticket.model], ticket.member + 1, in_front, ticket.reason, *others)

    return expected_s


def _view(model: ModelInfo, copies: list[InstanceInfo]) -> ModelView:
    """Return a model as the policy sees it, with what is needed to compute times."""
    staying = [copy for copy in copies if not copy.unload_on_release]
    held = [copy for copy in staying if copy.state in ("active", "idle")]
    whole = [copy for copy in held if copy.seat_of is None]
    loading = [copy for copy in staying if copy.state == "loading"]
    return ModelView(
        model=model.row,
        known=model.estimate_mb is not None,
        need_mb=model.estimate_mb or 0.0,
        shared=sum(copy.owner is None for copy in whole),
        owned=Counter(copy.owner + 1 for copy in whole if copy.owner is not None),
        users=len(held) / len(whole) if whole else model.users or 1,
        waiting=model.waiting,
        loading=Counter(copy.holder + 1 for copy in loading if copy.holder is not None),
        shares=model.shares,
        load_s=model.load_s,
        hold_s=model.hold_s,
        loading_for_s=min((copy.for_s for copy in loading), default=0.0),
        held_for_s=min((copy.for_s for copy in held if copy.state == "active"), default=0.0),
        held_in_all_s=sum(copy.for_s for copy in held if copy.state == "active"),
    )


def copies_counter(snapshot: Snapshot) -> Callable[[ModelInfo, str], int]:
    """Return a function that says how many copies of a model are in a state; one with several users counts once."""
    found = Counter((copy.model, copy.state) for copy in snapshot.copies)

    def count(model: ModelInfo, state: str) -> int:
        # Only these two have seats; for the others the model's own counters, which may combine states, are right.
        if state == "loaded":
            return model.copies
        return found[model.row, state] if state in ("active", "idle") else int(getattr(model, state))

    return count


def shared_by(copy: InstanceInfo) -> list[str]:
    """Return how many of its possible users a copy has, as text; nothing if it may have only one."""
    return [f"{copy.held} of {copy.seats + 1} users"] if copy.seats else []


def pids(snapshot: Snapshot) -> Callable[[int | None], str]:
    """Return a function that returns the pid of the member in a slot, as text."""
    known = {member.slot: str(member.pid) for member in snapshot.members}
    return lambda slot: "-" if slot is None else known.get(slot, "?")


def waiters(snapshot: Snapshot) -> list[TicketInfo]:
    """Return the waiting tickets, the head of the queue first."""
    return [ticket for ticket in snapshot.tickets if ticket.state == "waiting"]


def devices_of(copy: InstanceInfo) -> tuple[int, ...]:
    """Return the rows of the devices that a copy or a lease is on."""
    return tuple(copy.shares_mb)


def places(copy: InstanceInfo) -> str:
    """Return the devices of a copy, as text."""
    return ", ".join(map(str, devices_of(copy)))


def bar(device: DeviceInfo, width: int, signs: str = BAR_SIGNS) -> str:
    """Return how full a device is, in `width` characters: used, reserved and returning memory, and the limit."""
    full, reserved, returning, free, limit = tuple(signs)
    cells = [free] * width
    if device.total_mb > 0:
        begin = 0.0
        for sign, amount in ((full, device.used_mb or 0.0), (reserved, device.reserved_mb)):
            end = begin + max(0.0, amount)
            for cell in range(round(begin / device.total_mb * width), round(end / device.total_mb * width)):
                if cell < width:
                    cells[cell] = sign
            begin = end
        # Returning memory is still part of what is used.
        back = round(max(0.0, device.returning_mb) / device.total_mb * width)
        last = min(width, round((device.used_mb or 0.0) / device.total_mb * width))
        for cell in range(max(0, last - back), last):
            cells[cell] = returning
        at = min(width - 1, round(device.limit_mb / device.total_mb * width))
        if device.limit_mb < device.total_mb and cells[at] == free:
            cells[at] = limit
    return "".join(cells)
