"""One screen of text about a namespace: problems, what is loaded where, which processes hold it or wait, and why."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mpmm.observability.colours import Paint, plain
from mpmm.observability.findings import findings, longest_wait_s
from mpmm.observability.formatting import (
    BAR_SIGNS,
    PLAIN_SIGNS,
    age,
    bar,
    copies_counter,
    expected_waits,
    for_people,
    mb,
    needs,
    pids,
    places,
    shared_by,
    waiters,
    why,
    whys,
)
from mpmm.observability.tables import table, wrapped
from mpmm.policy.demand import Demand
from mpmm.policy.view import Reason
from mpmm.shared_state.snapshot import (
    DeviceInfo,
    EventInfo,
    InstanceInfo,
    MemberInfo,
    ModelInfo,
    Snapshot,
    TicketInfo,
)

__all__ = [
    "EVENTS_OF_EACH",
    "Section",
    "copies",
    "devices",
    "evictions",
    "headline",
    "leases",
    "models",
    "overview",
    "render",
    "sections",
    "waiting",
]

#: How many of the newest events of each kind a screen needs.
EVENTS_OF_EACH = 16
BAR_WIDTH = 30
NARROWEST_BAR = 10
_DECISION_HEAD = ("ago", "event", "model", "ticket", "why")
_STATES = ("loading", "resuming", "unloading", "suspending", "active", "idle", "suspended")


Item = TypeVar("Item")
Row = tuple[str, ...]


@dataclass(frozen=True)
class Section(Generic[Item]):
    """A table with a title; only rows that are shown are formatted.

    items: all there are, the most important first. row: formats one. shown: how many are shown by default. least: the
    least important columns, which are left out first. prose: the last column is a sentence.
    """

    title: str
    head: Row
    items: Sequence[Item]
    row: Callable[[Item], Row]
    shown: int
    least: Row = ()
    prose: bool = False

    def rows(self, everything: bool = False) -> list[Row]:
        """Return the rows to show: all of them with `everything`, or if only one would be left out."""
        items = self.items if everything or len(self.items) <= self.shown + 1 else self.items[: self.shown]
        return [self.row(item) for item in items]

    def lines(self, everything: bool, width: int | None, paint: Paint = plain) -> list[str]:
        """Return the lines of the table, without `everything` only the most important rows."""
        if not self.items:
            return [f"{self.title}: none"]
        rows = self.rows(everything)
        rest = len(self.items) - len(rows)
        head, *lines = table(self.head, rows, width, least=self.least, prose=self.prose, below=True)
        more = [f"  … and {rest} more; --all shows them"] if rest else []
        return [paint("title", f"{self.title}:"), paint("head", head), *lines, *more]


def render(snapshot: Snapshot, *, everything: bool = False, width: int | None = None, paint: Paint = plain) -> str:
    """Return a snapshot as text for people.

    everything: all rows, not only the most important ones. width: in characters; columns that do not fit are left out,
    and sentences are wrapped, or placed below their rows. paint: gives parts of the text a style.
    """
    snapshot = for_people(snapshot)
    first, *others = (line for long in headline(snapshot) for line in wrapped(long, width))
    parts = [[paint("title", first), *others]]
    said = findings(snapshot)
    lines = [("urgent", f"ATTENTION: {finding.text}") for finding in said if finding.urgent] or [("well", "all well")]
    lines += [("note", f"note: {finding.text}") for finding in said if not finding.urgent]
    parts.append([paint(style, line) for style, long in lines for line in wrapped(long, width)])
    parts += [section.lines(everything, width, paint) for section in sections(snapshot, width)]
    return "\n\n".join("\n".join(part) for part in parts)


def headline(snapshot: Snapshot) -> list[str]:
    """Return the lines at the top of the screen."""
    leader = next((member for member in snapshot.members if member.slot == snapshot.leader), None)
    kinds = Counter(member.kind for member in snapshot.members)
    lines = [
        f"namespace {snapshot.namespace}, {_counted(kinds['worker'], 'worker')} and "
        f"{_counted(kinds['server'], 'model server')}, "
        f"up for {age(snapshot.taken_wall_s - snapshot.created_wall_s)}",
        f"leader: {f'pid {leader.pid} for {age(snapshot.leader_for_s)}' if leader else 'none'}, "
        f"polled {age(snapshot.polled_ago_s)} ago, source {_source(snapshot)}, "
        f"lock {_lock_state(snapshot)}",
        f"loads {snapshot.loads}, reuses {snapshot.hits}, evictions {snapshot.evictions}, "
        f"failed loads {snapshot.failed_loads}, out of memory {snapshot.out_of_memory}, "
        f"time-outs {snapshot.timeouts}, reaped {snapshot.reaps}, rolled back {snapshot.rollbacks}",
    ]
    if snapshot.suspends:
        taken = sum(copy.host_mb for copy in snapshot.copies)
        lines.append(
            f"suspended {snapshot.suspends}, resumed {snapshot.resumes}, failed {snapshot.suspend_failures}, "
            f"host memory {mb(taken)} of {mb(snapshot.suspend_budget_mb)} MB"
        )
    queue = waiters(snapshot)
    if queue:
        lines.append(f"waiting: {len(queue)}, the longest for {age(longest_wait_s(snapshot))}")
    tags = {copy.row: copy.tag for copy in snapshot.copies}
    for copy in snapshot.copies:
        if copy.steady:
            lines.append(f"quiet: {copy.tag} starts on {places(copy)}, nothing else is loaded or unloaded there")
    for device in snapshot.devices:
        if device.isolated is not None:
            lines.append(
                f"isolation: {tags.get(device.isolated, '?')} runs alone on device {device.row}, to be measured"
            )
    return lines


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _source(snapshot: Snapshot) -> str:
    return (snapshot.source or "(none yet)") + (" (measures processes)" if snapshot.measures_processes else "")


def _lock_state(snapshot: Snapshot) -> str:
    if snapshot.lock.held is None:
        return "not checked"
    return f"held by pid {snapshot.lock.last_holder_pid}" if snapshot.lock.held else "free"


def overview(snapshots: Sequence[Snapshot], width: int | None = None, paint: Paint = plain) -> str:
    """Return one line for each of several namespaces, in at most `width` characters."""
    rows = []
    for snapshot in map(for_people, snapshots):
        used = sum(device.used_mb or 0.0 for device in snapshot.devices)
        limit = sum(device.limit_mb for device in snapshot.devices)
        urgent = [finding.text for finding in findings(snapshot) if finding.urgent]
        rows.append(
            (
                snapshot.namespace,
                str(len(snapshot.members)),
                str(sum(model.copies for model in snapshot.models)),
                str(snapshot.active),
                str(snapshot.waiting),
                age(longest_wait_s(snapshot)),
                f"{used:.0f} of {limit:.0f}",
                urgent[0] if urgent else "all well",
            )
        )
    head = ("namespace", "members", "copies", "in use", "waiting", "longest", "MB used", "state")
    heading, *lines = table(head, rows, width, least=("longest", "members", "copies", "MB used"), prose=True)
    hint = "`mpmm inspect NAMESPACE` shows one of them"
    return "\n".join([paint("title", "namespaces:"), paint("head", heading), *lines, "", hint])


def sections(snapshot: Snapshot, width: int | None = None) -> list[Section[Any]]:
    """Return all tables, for lines of `width` characters, the most important first."""
    return [
        devices(snapshot, BAR_WIDTH if width is None else min(BAR_WIDTH, max(NARROWEST_BAR, width // 5))),
        waiting(snapshot),
        copies(snapshot),
        *leases(snapshot),
        models(snapshot),
        evictions(snapshot),
        _decisions(snapshot),
        _members(snapshot),
    ]


def devices(snapshot: Snapshot, bar_width: int) -> Section[DeviceInfo]:
    """Return the devices, with bars of `bar_width` characters."""
    signs = BAR_SIGNS if _can_show(BAR_SIGNS) else PLAIN_SIGNS

    def row(device: DeviceInfo) -> Row:
        return (
            str(device.row),
            bar(device, bar_width, signs),
            *(mb(value) for value in (device.used_mb, device.external_mb, device.reserved_mb, device.returning_mb)),
            *(mb(value) for value in (device.limit_mb, device.total_mb, device.peak_since_start_mb)),
            "accounting" if snapshot.accounting_only else _ago(device.sample_age_s),
            device.name,
        )

    head = (
        *("device", "", "used MB", "external", "reserved", "returning"),
        *("limit", "total", "highest", "sampled", "name"),
    )
    # The columns that explain the bar are left out last.
    least = ("highest", "total", "sampled", "name", "external", "returning", "reserved")
    return Section("devices", head, snapshot.devices, row, 16, least)


def _ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{age(seconds)} ago"


def _can_show(signs: str) -> bool:
    try:
        signs.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def waiting(snapshot: Snapshot) -> Section[TicketInfo]:
    """Return the waiting requests in the order of the queue; those with an answer are not among them."""

    need_of, expected_s_of, why_of = needs(snapshot), expected_waits(snapshot), whys(snapshot)

    def row(ticket: TicketInfo) -> Row:
        return (
            str(ticket.number),
            ticket.tag,
            str(ticket.pid),
            age(ticket.waited_s),
            age(expected_s_of(ticket)),
            age(ticket.time_left_s),
            f"{ticket.urgency:+d}" if ticket.urgency else "0",
            mb(need_of(ticket)),
            _reason(ticket.reason),
            why_of(ticket),
        )

    head = ("ticket", "for", "pid", "waited", "expected", "left", "priority", "needs MB", "reason", "why")
    least = ("left", "ticket", "priority", "needs MB", "expected")
    return Section("waiting", head, waiters(snapshot), row, 8, least, prose=True)


def _reason(reason: int) -> str:
    return Reason(reason).name.lower() if reason in Reason._value2member_map_ else str(reason)


def copies(snapshot: Snapshot) -> Section[InstanceInfo]:
    """Return the copies of models: those that change state, then those in use, then idle ones; the longest first."""
    pid_of = pids(snapshot)
    names = {member.slot: member.name for member in snapshot.members}
    order = {state: place for place, state in enumerate(_STATES)}

    def row(copy: InstanceInfo) -> Row:
        return (
            str(copy.row),
            copy.tag,
            ", ".join([copy.state, *shared_by(copy)])
            + (", steady" if copy.steady else "")
            + (", unloads on release" if copy.unload_on_release else ""),
            age(copy.for_s),
            mb(copy.mb),
            places(copy),
            pid_of(copy.holder),
            "-" if copy.holder is None else names.get(copy.holder, "?"),
            pid_of(copy.owner if copy.server is None else copy.server),
            str(copy.uses),
            "-" if copy.peak_mb is None else mb(copy.peak_mb),
            mb(copy.host_mb) if copy.host_mb else "-",
        )

    items = sorted(
        (copy for copy in snapshot.copies if copy.state != "leased"),
        key=lambda copy: (order.get(copy.state, 0), -copy.for_s),
    )
    head = (
        *("copy", "model", "state", "for", "MB", "on"),
        *("holder pid", "holder", "kept by pid", "uses", "peak MB", "host MB"),
    )
    least = ("host MB", "peak MB", "holder", "uses", "kept by pid", "copy", "on")
    return Section("copies", head, items, row, 10, least)


def leases(snapshot: Snapshot) -> list[Section[InstanceInfo]]:
    """Return the leases that are held, nothing if there are none."""
    pid_of = pids(snapshot)

    def row(lease: InstanceInfo) -> Row:
        return (
            str(lease.row),
            lease.tag,
            mb(lease.reserved_mb),
            mb(lease.mb) if lease.mb else "?",
            age(lease.for_s),
            places(lease),
            pid_of(lease.holder),
            "?" if lease.program is None else str(lease.program),
        )

    items = [lease for lease in snapshot.copies if lease.state == "leased"]
    head = ("lease", "name", "MB", "taken MB", "for", "on", "holder pid", "program pid")
    return [Section("leases", head, items, row, 6, ("lease", "taken MB", "on", "program pid"))] if items else []


def _size(model: ModelInfo) -> str:
    """Return what a model takes: the estimate, else a known lower bound (`>`), or what its users expect (`~`)."""
    if model.estimate_mb is None and model.at_least_mb >= (model.expect_mb or 1e-9):
        return f"> {mb(model.at_least_mb)}"
    if model.estimate_mb is None and model.expect_mb is not None:
        return f"~ {mb(model.expect_mb)}"
    return mb(model.estimate_mb)


def _kept(model: ModelInfo) -> str:
    """Return how long idle copies are kept, if the users of the model have said so."""
    if model.keep_alive_s is None:
        return "-"
    return "for ever" if math.isinf(model.keep_alive_s) else age(model.keep_alive_s)


def models(snapshot: Snapshot) -> Section[ModelInfo]:
    """Return the models, first those that requests wait for."""
    count = copies_counter(snapshot)

    def row(model: ModelInfo) -> Row:
        return (
            model.tag,
            _size(model),
            *(str(count(model, state)) for state in ("loaded", "active", "idle", "loading", "unloading")),
            str(model.suspended),
            *(str(count) for count in (model.waiting, model.loads, model.hits, model.evictions, model.pins)),
            *(f"{seconds:.3f}" if seconds else "-" for seconds in (model.load_s, model.hold_s)),
            f"{Demand(model.mean_interarrival_s, model.requests).per_second(model.requested_ago_s):.3g}",
            age(model.unused_for_s),
            _kept(model),
        )

    items = sorted(
        (model for model in snapshot.models if model.kind == "model"),
        key=lambda model: (-model.waiting, -model.active - model.loading, -model.copies, model.tag),
    )
    head = (
        *("model", "MB", "loaded", "active", "idle", "loading", "unloading", "suspended", "waiting", "loads"),
        *("reuses", "evicted"),
        *("pins", "load s", "hold s", "per s", "unused", "kept"),
    )
    least = (
        *("kept", "per s", "pins", "unused", "hold s", "unloading", "reuses", "loads", "evicted", "load s", "loaded"),
        "suspended",
    )
    return Section("models", head, items, row, 10, least)


def _decision(event: EventInfo) -> Row:
    ticket = "" if event.ticket is None else str(event.ticket)
    return age(event.age_s), event.kind, event.tag or "?", ticket, why(event)


def evictions(snapshot: Snapshot) -> Section[EventInfo]:
    """Return the last unloads and suspensions, the latest first."""
    gone = [event for event in snapshot.events if event.kind in ("unload_began", "suspend_began")]
    return Section(
        "last evictions", _DECISION_HEAD, gone[: -EVENTS_OF_EACH - 1 : -1], _decision, 5, ("ticket", "event"), True
    )


def _decisions(snapshot: Snapshot) -> Section[EventInfo]:
    decided = [event for event in snapshot.events if event.reason is not None]
    return Section(
        "last decisions", _DECISION_HEAD, decided[: -EVENTS_OF_EACH - 1 : -1], _decision, 8, ("ticket",), True
    )


def _members(snapshot: Snapshot) -> Section[MemberInfo]:
    held = Counter(copy.holder for copy in snapshot.instances if copy.state in ("active", "leased"))

    def row(member: MemberInfo) -> Row:
        return (
            str(member.slot),
            "leader" if member.slot == snapshot.leader else member.kind,
            str(member.pid),
            {True: "yes", False: "DEAD", None: "?"}[member.alive],
            age(member.attached_for_s),
            mb(member.measured_mb) if member.kind == "server" else "",
            str(held[member.slot]),
            member.name,
        )

    items = sorted(
        snapshot.members, key=lambda m: (m.alive is not False, m.slot != snapshot.leader, -held[m.slot], m.slot)
    )
    head = ("member", "kind", "pid", "alive", "attached", "MB", "holds", "name")
    return Section("members", head, items, row, 6, ("MB", "member", "attached", "holds"))
