"""Records of a snapshot: each row, and the header, as plain values.

Each field is declared here once, with its kind and its word (`kinds`). `decode` fills it, and `--json` shows it under
the same name: `mpmm.cli` documents the schema. `decode` computes fields without a kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

from mpmm.policy.suspension import why_unsuspendable
from mpmm.shared_state.layout import Device, Event, Header, Instance, Member, Model, Pin, Ticket
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import kinds
from mpmm.shared_state.states import InstanceState, ModelState, TicketState

__all__ = [
    "FORGOTTEN",
    "DeviceInfo",
    "EventInfo",
    "InstanceInfo",
    "LockInfo",
    "MemberInfo",
    "ModelInfo",
    "ObservationInfo",
    "PinInfo",
    "Snapshot",
    "TicketInfo",
    "as_json",
]

# Stands for the tag of a model or lease whose row another one has taken since. Ended leases often shared one row.
FORGOTTEN = "(forgotten)"


@dataclass(frozen=True, eq=False)
class MemberInfo:
    """One attached process. `alive` is None if it was not checked. Only servers have `measured_mb` and `peak_mb`."""

    slot: int
    kind: str
    pid: int = field(metadata=kinds.word(Member.PID))
    name: str = field(metadata=kinds.text(Member.NAME))
    # Only the kernel knows it, see `liveness`.
    alive: bool | None
    started_wall_s: float = field(metadata=kinds.wall(Member.STARTED_WALL))
    attached_for_s: float = field(metadata=kinds.age(Member.ATTACHED))
    instance: int | None = field(metadata=kinds.reference(Member.INSTANCE))
    measured_mb: float | None = field(metadata=kinds.number_or_none(Member.MEASURED_MB))
    peak_mb: float | None
    generation: int = field(metadata=kinds.word(Member.GENERATION))


@dataclass(frozen=True, eq=False)
class ModelInfo:
    """One tag: its copies by state, its estimate in MB (None: unknown), its counters and its times.

    name: what people call it, empty if just by its tag.
    kind: `model`, or `lease` for a row that stands for one lease, held or waited for; its estimate is the lease's size.
    shares: its loader has returned a handle.
    measured: the estimate was read from processes; sd_mb: its standard deviation. at_least_mb: the model ran out of
    memory with that much free, so it needs more, 0 if it never has. expect_mb: what its users say, used as long as
    there is no estimate (None: nothing). keep_alive_s: how long its users want idle copies kept (None: as the settings
    say). failures: loads in a row that failed, the last one failed_ago_s ago (None: none).
    unused_for_s: since its last use, 0 while it is in use. load_s, hold_s, mean_interarrival_s: decayed means of the
    time of a load, of a hold and between two requests, 0 unknown. requests: how many requests the last of these has
    counted, the newest requested_ago_s ago.
    suspended: copies that are suspended, or are being suspended; suspends, resumes: how many have ended; suspend_s,
    resume_s: decayed means of how long they take, 0 unknown. unsuspendable: why its copies are no longer suspended, a
    number of `policy.suspension.Unsuspendable`, or 0.
    users: how many users at a time a copy that is loaded from now on may have, 0 for one. seats: how many of the
    `loaded` rows are seats, not copies.
    """

    row: int
    kind: str = field(metadata=kinds.state(Model.STATE, ModelState))
    tag: str = field(metadata=kinds.text(Model.TAG))
    name: str = field(metadata=kinds.text(Model.NAME))
    shares: bool = field(metadata=kinds.flag(Model.SHARES))
    # The word means nothing while KNOWN is 0.
    estimate_mb: float | None
    measured: bool = field(metadata=kinds.flag(Model.MEASURED))
    sd_mb: float = field(metadata=kinds.number(Model.SD_MB))
    at_least_mb: float = field(metadata=kinds.number(Model.AT_LEAST_MB))
    expect_mb: float | None = field(metadata=kinds.amount_or_none(Model.EXPECT_MB))
    keep_alive_s: float | None
    failures: int = field(metadata=kinds.word(Model.FAILURES))
    failed_ago_s: float | None = field(metadata=kinds.age_or_none(Model.FAILED_AT))
    loaded: int = field(metadata=kinds.word(Model.LOADED))
    active: int = field(metadata=kinds.word(Model.ACTIVE))
    idle: int = field(metadata=kinds.word(Model.IDLE))
    loading: int = field(metadata=kinds.word(Model.LOADING))
    unloading: int = field(metadata=kinds.word(Model.UNLOADING))
    waiting: int = field(metadata=kinds.word(Model.WAITING))
    loads: int = field(metadata=kinds.word(Model.LOADS))
    hits: int = field(metadata=kinds.word(Model.HITS))
    evictions: int = field(metadata=kinds.word(Model.EVICTIONS))
    pins: int = field(metadata=kinds.word(Model.PINS))
    # From its copies if it has any, because a use writes nothing into the model's row.
    unused_for_s: float
    load_s: float = field(metadata=kinds.number(Model.LOAD_S))
    hold_s: float = field(metadata=kinds.number(Model.HOLD_S))
    mean_interarrival_s: float = field(metadata=kinds.number(Model.MEAN_INTERARRIVAL_S))
    requests: int = field(metadata=kinds.word(Model.REQUESTS))
    requested_ago_s: float = field(metadata=kinds.age(Model.REQUESTED_AT))
    idle_head: int | None = field(metadata=kinds.reference(Model.IDLE_HEAD))
    suspended: int = field(metadata=kinds.word(Model.SUSPENDED))
    suspends: int = field(metadata=kinds.word(Model.SUSPENDS))
    resumes: int = field(metadata=kinds.word(Model.RESUMES))
    suspend_s: float = field(metadata=kinds.number(Model.SUSPEND_S))
    resume_s: float = field(metadata=kinds.number(Model.RESUME_S))
    unsuspendable: int = field(metadata=kinds.word(Model.UNSUSPENDABLE))
    users: int = field(metadata=kinds.word(Model.USERS))
    seats: int = field(metadata=kinds.word(Model.SEATS))
    generation: int = field(metadata=kinds.word(Model.GENERATION))

    @property
    def copies(self) -> int:
        """How many copies are loaded."""
        return self.loaded - self.seats

    @property
    def why_unsuspendable(self) -> str:
        """Why its copies are no longer suspended, as a clause; empty if they may be."""
        return why_unsuspendable(self.unsuspendable)


@dataclass(frozen=True, eq=False)
class InstanceInfo:
    """One copy. `holder`, `owner` and `server` are slots of members; `handle` is None for an object.

    device: row of the (first) device it lies on; shares_mb: its MB on each of its devices, by row. peak_mb: the most
    that its server's process was measured to take.

    If several may use a copy at a time, each user but the first has a row, too: seat_of is the row of the copy whose
    seat this is, seats how many this copy has, held how many use it (a seat: 0 or 1). `Snapshot.copies` joins them.

    A lease that is held is in state `leased`: `reserved_mb` is its size, `mb` what its program, of pid `program` if
    that is known, was measured to take.

    steady: nothing else is loaded or unloaded on its devices.
    unload_late: its unload takes too long, so no plan waits for its memory any more. handed_over_s: how long ago
    another process was last told to unload it, None if none was.

    way: how it can be suspended, a number of `policy.suspension.Way`, or 0. device_mb: what a suspended copy took of
    its device, and reserves to come back; host_mb: what it takes of the host.
    """

    row: int
    tag: str = field(metadata=kinds.tag(Instance.MODEL))
    model: int = field(metadata=kinds.word(Instance.MODEL))
    state: str = field(metadata=kinds.state(Instance.STATE, InstanceState))
    holder: int | None = field(metadata=kinds.reference(Instance.HOLDER))
    owner: int | None = field(metadata=kinds.reference(Instance.OWNER))
    server: int | None = field(metadata=kinds.reference(Instance.SERVER))
    seat_of: int | None = field(metadata=kinds.reference(Instance.SEAT_OF))
    seats: int = field(metadata=kinds.word(Instance.SEATS))
    # Counted, because a copy's row does not say whether its seats are in use.
    held: int
    device: int
    # By device, because a position in a list would mean nothing if other devices are listed.
    shares_mb: dict[int, float]
    mb: float = field(metadata=kinds.number(Instance.MB))
    peak_mb: float | None
    reserved_mb: float = field(metadata=kinds.number(Instance.RESERVED_MB))
    for_s: float = field(metadata=kinds.age(Instance.SINCE))
    uses: int = field(metadata=kinds.word(Instance.USES))
    handle: str | None = field(metadata=kinds.text_or_none(Instance.HANDLE))
    program: int | None = field(metadata=kinds.word_or_none(Instance.PROGRAM))
    steady: bool = field(metadata=kinds.flag(Instance.STEADY))
    unload_on_release: bool = field(metadata=kinds.flag(Instance.UNLOAD_ON_RELEASE))
    unload_late: bool = field(metadata=kinds.flag(Instance.UNLOAD_LATE))
    handed_over_s: float | None = field(metadata=kinds.age_or_none(Instance.HANDED_AT))
    way: int = field(metadata=kinds.word(Instance.WAY))
    device_mb: float = field(metadata=kinds.number(Instance.DEVICE_MB))
    host_mb: float = field(metadata=kinds.number(Instance.HOST_MB))
    next: int | None = field(metadata=kinds.reference(Instance.NEXT))
    previous: int | None = field(metadata=kinds.reference(Instance.PREVIOUS))
    generation: int = field(metadata=kinds.word(Instance.GENERATION))


@dataclass(frozen=True, eq=False)
class TicketInfo:
    """One waiter, for a model or a lease. `need_mb` is the estimate or default when it was queued; `member` is a slot.

    priority: its class, see `policy.fairness`; urgency: the `priority` of the request.
    preload: how many copies a preload wants, one for a resume, 0 for other waiters.
    reason: a number of `policy.view.Reason`; free_mb, coming_mb, seconds, other (a tag) and on (rows of devices) are
    its figures. loadable_on, usable_on: rows of the devices where it may load, and where it can use a copy; empty for
    all.
    span: over how many devices its load spreads.
    head_of_line_for_s: how long it has been the first waiter without memory, None if it has never been.
    called_up_ago_s: how long ago it was told to look for itself, see `mpmm.model_manager.tenure`; None if it was not.
    """

    row: int
    number: int = field(metadata=kinds.word(Ticket.NUMBER))
    priority: int = field(metadata=kinds.word(Ticket.PRIORITY))
    urgency: int
    tag: str = field(metadata=kinds.tag(Ticket.MODEL))
    model: int = field(metadata=kinds.word(Ticket.MODEL))
    # Looked up, because a ticket's row only has its member's slot.
    member: int
    pid: int
    state: str = field(metadata=kinds.state(Ticket.STATE, TicketState))
    reason: int = field(metadata=kinds.word(Ticket.REASON))
    need_mb: float = field(metadata=kinds.number(Ticket.NEED_MB))
    free_mb: float = field(metadata=kinds.number(Ticket.FREE_MB))
    coming_mb: float = field(metadata=kinds.number(Ticket.COMING_MB))
    seconds: float = field(metadata=kinds.number(Ticket.SECONDS))
    other: str | None = field(metadata=kinds.tag_of_reference(Ticket.OTHER))
    on: tuple[int, ...] = field(metadata=kinds.devices(Ticket.ON))
    loadable_on: tuple[int, ...] = field(metadata=kinds.devices(Ticket.LOADABLE_ON))
    usable_on: tuple[int, ...] = field(metadata=kinds.devices(Ticket.USABLE_ON))
    span: int = field(metadata=kinds.word(Ticket.SPAN))
    waited_s: float = field(metadata=kinds.age(Ticket.ENQUEUED))
    head_of_line_for_s: float | None = field(metadata=kinds.age_or_none(Ticket.HEAD_OF_LINE_AT))
    called_up_ago_s: float | None = field(metadata=kinds.age_or_none(Ticket.CALLED_UP))
    # Below 0 if its deadline has passed and it has not left yet.
    time_left_s: float
    preload: int = field(metadata=kinds.preload(Ticket.PRELOAD))
    instance: int | None = field(metadata=kinds.reference(Ticket.INSTANCE))


@dataclass(frozen=True, eq=False)
class PinInfo:
    """A pin: a member (slot), or the namespace (None), wants the idle copies of a model (row) kept."""

    row: int
    tag: str = field(metadata=kinds.tag(Pin.MODEL))
    model: int = field(metadata=kinds.word(Pin.MODEL))
    member: int | None = field(metadata=kinds.reference(Pin.MEMBER))
    for_s: float = field(metadata=kinds.age(Pin.SINCE))


@dataclass(frozen=True, eq=False)
class DeviceInfo:
    """One device. `used_mb` is None before the first figure; `sample_age_s` likewise.

    committed_mb: what admission counts as taken, see `policy.ledger`. reserved_mb: the part of that which the figure
    does not show yet. returning_mb, returns_mb: what is awaited from unloads, and from each of them. external_mb: in
    use but not the namespace's, None before the first figure; below 0 if instances take less than is accounted for.
    unrelated_mb: what processes that are not the namespace's take, as far as the source lists them. measured: a source
    that can measure it has described it. isolated: the copy that runs alone on it. samples: the last figures, oldest
    first, each as (seconds ago, MB).
    """

    row: int
    uuid: str = field(metadata=kinds.text(Device.UUID))
    name: str = field(metadata=kinds.text(Device.NAME))
    total_mb: float = field(metadata=kinds.number(Device.TOTAL_MB))
    limit_mb: float
    used_mb: float | None
    peak_mb: float | None
    peak_since_start_mb: float = field(metadata=kinds.number(Device.HIGHEST_MB))
    committed_mb: float
    reserved_mb: float
    returning_mb: float = field(metadata=kinds.number(Device.RETURNING_MB))
    returns_mb: tuple[float, ...]
    external_mb: float | None = field(metadata=kinds.number_or_none(Device.EXTERNAL_MB))
    unrelated_mb: float = field(metadata=kinds.number(Device.UNRELATED_MB))
    measured: bool = field(metadata=kinds.flag(Device.MEASURED))
    isolated: int | None = field(metadata=kinds.reference(Device.ISOLATED))
    sample_age_s: float | None = field(metadata=kinds.age_or_none(Device.SAMPLED))
    # As ages, like most times here, because a monotonic clock means nothing to a reader elsewhere.
    samples: tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False)
class ObservationInfo:
    """Readings in MB of one configuration (tag -> copies) on a device; None for readings that a caller passed in."""

    instances: dict[str, int]
    readings_mb: tuple[float, ...]
    device: int | None = None


@dataclass(frozen=True, eq=False)
class EventInfo:
    """One entry of the event ring, oldest first; `EventKind` says what `value` is.

    reason: a number of `policy.view.Reason`, followed by its figures, if the policy has decided it; else None.
    tag, other: FORGOTTEN if another model or lease has taken the row since. on: rows of the devices that the reason is
    about. devices: rows of those, of the first 32, on which a load or lease that begins is placed.
    """

    sequence: int = field(metadata=kinds.word(Event.SEQUENCE))
    kind: str
    age_s: float = field(metadata=kinds.age(Event.TIME))
    pid: int = field(metadata=kinds.word(Event.PID))
    tag: str | None
    instance: int | None = field(metadata=kinds.reference(Event.INSTANCE))
    ticket: int | None = field(metadata=kinds.reference(Event.TICKET))
    value: float | None = field(metadata=kinds.number_or_none(Event.VALUE))
    # Without a reason the ring has figures of older events, which `decode` leaves out.
    reason: int | None = None
    need_mb: float | None = None
    free_mb: float | None = None
    coming_mb: float | None = None
    seconds: float | None = None
    other: str | None = None
    on: tuple[int, ...] = ()
    devices: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class LockInfo:
    """Which process took the lock last. `held` is None if it was not checked."""

    held: bool | None
    last_holder_pid: int = field(metadata=kinds.word(Header.LOCK_HOLDER))
    taken_ago_s: float = field(metadata=kinds.age(Header.LOCK_TAKEN))
    # Checked only if the lock is held. A stopped holder blocks all transactions.
    holder_stopped: bool


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything. Times are relative to the moment of the copy; `torn_words` were undone in the copy.

    taken_s: that moment, as `time.monotonic()`; taken_wall_s: as Unix time.
    polled_ago_s: since the leader, or another process in its place, last did the periodic work.
    isolated: the copy that runs alone; if there are several, on different devices, the first.
    suspend_budget_mb: host memory that suspended copies may take together; suspend_failures: suspensions and resumes
    that failed and cost the copy.
    table_ends: how many rows were ever in use, for tables that record it.
    missing_files: names of living members' files that are missing. files_put_back: how many of them members have put
    back.
    """

    namespace: str
    segment: str
    layout_version: int
    taken_s: float
    taken_wall_s: float
    created_wall_s: float = field(metadata=kinds.wall(Header.CREATED_WALL))
    change: int = field(metadata=kinds.word(Header.CHANGE))
    # Above 0 if the copy caught a transaction, which then was undone in it.
    torn_words: int
    lock: LockInfo
    source: str = field(metadata=kinds.text(Header.SOURCE_NAME))
    source_asked: str = field(metadata=kinds.text(Header.SOURCE_ASKED))
    accounting_only: bool = field(metadata=kinds.flag(Header.SOURCE_ACCOUNTING_ONLY))
    measures_processes: bool = field(metadata=kinds.flag(Header.SOURCE_MEASURES_PROCESSES))
    leader: int | None = field(metadata=kinds.reference(Header.LEADER))
    leader_for_s: float | None
    polled_ago_s: float = field(metadata=kinds.age(Header.POLLED))
    next_ticket: int = field(metadata=kinds.word(Header.NEXT_TICKET))
    waiting: int = field(metadata=kinds.word(Header.WAITING))
    active: int = field(metadata=kinds.word(Header.ACTIVE))
    loading: int = field(metadata=kinds.word(Header.LOADING))
    isolated: int | None
    # The transitions keep these bits beside the rows, so both are here for `check` to compare. (H3)
    isolated_devices: tuple[int, ...] = field(metadata=kinds.devices(Header.ISOLATED))
    steady_devices: tuple[int, ...] = field(metadata=kinds.devices(Header.STEADY))
    events_written: int = field(metadata=kinds.word(Header.EVENTS))
    loads: int = field(metadata=kinds.word(Header.LOADS))
    hits: int = field(metadata=kinds.word(Header.HITS))
    evictions: int = field(metadata=kinds.word(Header.EVICTIONS))
    failed_loads: int = field(metadata=kinds.word(Header.FAILED_LOADS))
    timeouts: int = field(metadata=kinds.word(Header.TIMEOUTS))
    reaps: int = field(metadata=kinds.word(Header.REAPS))
    rollbacks: int = field(metadata=kinds.word(Header.ROLLBACKS))
    leaders: int = field(metadata=kinds.word(Header.LEADERS))
    resets: int = field(metadata=kinds.word(Header.RESETS))
    out_of_memory: int = field(metadata=kinds.word(Header.OUT_OF_MEMORY))
    suspends: int = field(metadata=kinds.word(Header.SUSPENDS))
    resumes: int = field(metadata=kinds.word(Header.RESUMES))
    suspend_failures: int = field(metadata=kinds.word(Header.SUSPEND_FAILURES))
    # None as long as the creator's choice holds.
    settings_changed_ago_s: float | None = field(metadata=kinds.age_or_none(Header.SETTINGS_CHANGED))
    suspend_budget_mb: float
    written_off_mb: float = field(metadata=kinds.number(Header.WRITTEN_OFF))
    files_put_back: int = field(metadata=kinds.word(Header.PUT_BACK))
    settings: Settings
    table_ends: dict[str, int]
    members: tuple[MemberInfo, ...]
    models: tuple[ModelInfo, ...]
    instances: tuple[InstanceInfo, ...]
    tickets: tuple[TicketInfo, ...]
    pins: tuple[PinInfo, ...]
    devices: tuple[DeviceInfo, ...]
    observations: tuple[ObservationInfo, ...]
    events: tuple[EventInfo, ...]
    # `read` fills it in, from the folder.
    missing_files: tuple[str, ...] = ()

    @property
    def copies(self) -> tuple[InstanceInfo, ...]:
        """The copies and leases, each joined with its seats: in use if any of them is, by the first user."""
        # Seats are rare, and each screen calls this several times.
        if not any(copy.seats for copy in self.instances):
            return self.instances
        seats: dict[int | None, list[InstanceInfo]] = {}
        for one in self.instances:
            seats.setdefault(one.seat_of, []).append(one)
        return tuple(_with_seats(copy, seats[copy.row]) if copy.seats else copy for copy in seats.get(None, ()))


def _with_seats(copy: InstanceInfo, seats: list[InstanceInfo]) -> InstanceInfo:
    places = [copy, *seats]
    used = [one for one in places if one.state == "active"]
    uses = sum(one.uses for one in places)
    # Idle only since its last user gave it back.
    if copy.state == "idle" and not used:
        return replace(copy, uses=uses, for_s=min(one.for_s for one in places))
    if copy.state not in ("idle", "active"):
        return replace(copy, uses=uses)
    # Of its users, show the one that has held it longest: it is the most interesting to waiters.
    first = max(used, key=lambda one: one.for_s, default=copy)
    return replace(copy, state="active", uses=uses, for_s=first.for_s, holder=first.holder)


def as_json(row: Snapshot | EventInfo) -> dict[str, Any]:
    """Return a snapshot, or an event of one, as JSON values: figures that are not finite become None.

    `mpmm.cli` documents the schema.
    """
    return {field.name: _jsonable(getattr(row, field.name)) for field in fields(row)}


def _jsonable(value: Any) -> Any:
    # Not isinstance, because this is called for each value of thousands of rows.
    kind = value.__class__
    if kind in _PLAIN:
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if kind is tuple:
        return [_jsonable(entry) for entry in value]
    # A mapping, or a dataclass, whose `__dict__` has its fields in order.
    entries = value if kind is dict else value.__dict__
    return {name: entry if entry.__class__ in _PLAIN else _jsonable(entry) for name, entry in entries.items()}


_PLAIN = frozenset({int, str, bool, type(None)})
