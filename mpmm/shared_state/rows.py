"""Typed reads of live rows: `tables.instances[row].mb` instead of a word by its number.

For code off the warm path, which uses `reads`: a read takes 0.7 us, or 0.2 if the row object is kept, where a word by
its number takes 0.15. A read returns what the segment holds at that moment, so values that belong together need the
lock. A field has the name that `layout` gives its word; `tests/test_snapshot.py` compares the two. Nothing here changes
a row: `transitions` does.
"""

from __future__ import annotations

from typing import Generic, TypeVar, overload

from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import (
    Device,
    Event,
    Header,
    Instance,
    Member,
    Model,
    Observation,
    Table,
    Ticket,
    device_rows,
)
from mpmm.shared_state.segment import Segment

__all__ = [
    "DeviceRow",
    "EventRow",
    "HeaderRow",
    "InstanceRow",
    "MemberRow",
    "ModelRow",
    "ObservationRow",
    "Row",
    "Rows",
    "TicketRow",
]

Value = TypeVar("Value")


class Row:
    """One row of a live segment; `at` is its first word."""

    __slots__ = ("at", "segment")

    def __init__(self, segment: Segment, at: int) -> None:
        self.segment = segment
        self.at = at


class _Field(Generic[Value]):
    """A field of a row: the word at `place`, converted to what it means."""

    def __init__(self, place: int) -> None:
        self.place = place

    @overload
    def __get__(self, row: None, owner: type[Row]) -> _Field[Value]: ...
    @overload
    def __get__(self, row: Row, owner: type[Row]) -> Value: ...
    def __get__(self, row: Row | None, owner: type[Row]) -> _Field[Value] | Value:
        return self if row is None else self._read(row.segment, row.at + self.place)

    def _read(self, segment: Segment, word: int) -> Value:
        raise NotImplementedError


class Word(_Field[int]):
    """A whole number."""

    def _read(self, segment: Segment, word: int) -> int:
        return segment.words[word]


class Flag(_Field[bool]):
    """A word that is 0 for False."""

    def _read(self, segment: Segment, word: int) -> bool:
        return segment.words[word] != 0


class Reference(_Field["int | None"]):
    """The row that a word refers to, None for none."""

    def _read(self, segment: Segment, word: int) -> int | None:
        # Read once, because without the lock it may change at any moment.
        found = segment.words[word]
        return found - 1 if found else None


class Number(_Field[float]):
    """A float."""

    def _read(self, segment: Segment, word: int) -> float:
        return segment.floats[word]


class Devices(_Field["list[int]"]):
    """The rows of the devices whose bits are set, lowest first."""

    def _read(self, segment: Segment, word: int) -> list[int]:
        return device_rows(segment.words[word])


class HeaderRow(Row):
    """What the header says about the whole namespace."""

    __slots__ = ()

    # Odd while a transaction is open, even one that a dead process has left.
    change = Word(Header.CHANGE)
    # Not in the undo log: a rollback must not bring back a number that was handed out.
    next_generation = Word(Header.NEXT_GENERATION)
    # A process that remembers this number sees whether queue and memory were emptied since.
    resets = Word(Header.RESETS)
    active = Word(Header.ACTIVE)
    loading = Word(Header.LOADING)
    waiting = Word(Header.WAITING)
    # Also in the device rows (H3); here one read covers all of them.
    isolated = Devices(Header.ISOLATED)
    leader = Reference(Header.LEADER)
    # Shows that the leader works, not that figures are fresh: a source that hangs does not stop the polls.
    polled = Word(Header.POLLED)
    events = Word(Header.EVENTS)
    observations_made = Word(Header.OBSERVATIONS_MADE)
    # Equal to `observations_made` if the solver has nothing new to learn.
    solved_at = Word(Header.SOLVED_AT)
    # 0 if pids cannot tell which process lives, so that none is looked up.
    pid_namespace = Word(Header.PID_NAMESPACE)
    host_share_mb = Number(Header.HOST_SHARE_MB)
    # Bits, unlike `isolated`, because it is only compared with the bits of a row.
    steady = Word(Header.STEADY)
    # What the leader's source has shown, not what this process's own source can do.
    source_measures_processes = Flag(Header.SOURCE_MEASURES_PROCESSES)
    source_accounting_only = Flag(Header.SOURCE_ACCOUNTING_ONLY)
    source_frees_late = Flag(Header.SOURCE_FREES_LATE)
    # 0 as long as the creator's choice holds.
    settings_changed = Word(Header.SETTINGS_CHANGED)


class MemberRow(Row):
    """One attached process."""

    __slots__ = ()

    state = Word(Member.STATE)
    pid = Word(Member.PID)
    lock = Word(Member.LOCK)
    generation = Word(Member.GENERATION)
    # Set only for servers: a worker may have any number of instances, which name it as their holder or owner.
    instance = Reference(Member.INSTANCE)
    measures = Word(Member.MEASURES)
    # nan, not 0 MB, if no sample has shown the process.
    measured_mb = Number(Member.MEASURED_MB)
    peak_mb = Number(Member.PEAK_MB)


class ModelRow(Row):
    """One tag, or one lease that is waited for or held."""

    __slots__ = ()

    state = Word(Model.STATE)
    generation = Word(Model.GENERATION)
    known = Flag(Model.KNOWN)
    measured = Flag(Model.MEASURED)
    # nan unless `known`, so that no comparison or sum takes it for a figure.
    estimate_mb = Number(Model.ESTIMATE_MB)
    sd_mb = Number(Model.SD_MB)
    at_least_mb = Number(Model.AT_LEAST_MB)
    # What users say, 0 for nothing; an estimate takes its place as soon as there is one.
    expect_mb = Number(Model.EXPECT_MB)
    # These are sums over rows, and agree with them only while the lock is held. (M1, M3)
    loaded = Word(Model.LOADED)
    active = Word(Model.ACTIVE)
    idle = Word(Model.IDLE)
    loading = Word(Model.LOADING)
    unloading = Word(Model.UNLOADING)
    waiting = Word(Model.WAITING)
    loads = Word(Model.LOADS)
    hits = Word(Model.HITS)
    pins = Word(Model.PINS)
    shares = Flag(Model.SHARES)
    # Mean durations are 0 until there was one.
    load_s = Number(Model.LOAD_S)
    hold_s = Number(Model.HOLD_S)
    mean_interarrival_s = Number(Model.MEAN_INTERARRIVAL_S)
    # As of the last count; `ModelReads.requests` says how many there are by now.
    requests = Word(Model.REQUESTS)
    requested_at = Word(Model.REQUESTED_AT)
    failures = Word(Model.FAILURES)
    failed_at = Word(Model.FAILED_AT)
    superseded = Flag(Model.SUPERSEDED)
    suspends = Word(Model.SUSPENDS)
    resumes = Word(Model.RESUMES)
    suspend_s = Number(Model.SUSPEND_S)
    resume_s = Number(Model.RESUME_S)
    unsuspendable = Word(Model.UNSUSPENDABLE)
    keep_alive = Word(Model.KEEP_ALIVE)
    users = Word(Model.USERS)
    seats = Word(Model.SEATS)

    @property
    def copies(self) -> int:
        """How many copies are loaded; seats do not count."""
        return self.loaded - self.seats


class InstanceRow(Row):
    """One copy of a model, or one lease that is held."""

    __slots__ = ()

    state = Word(Instance.STATE)
    model = Word(Instance.MODEL)
    # Rows are reused: code that keeps a row's index keeps this, too, and compares it.
    generation = Word(Instance.GENERATION)
    holder = Reference(Instance.HOLDER)
    owner = Reference(Instance.OWNER)
    server = Reference(Instance.SERVER)
    devices = Devices(Instance.DEVICES)
    # The same word for comparisons, which need no list.
    device_bits = Word(Instance.DEVICES)
    seat_of = Reference(Instance.SEAT_OF)
    seats = Word(Instance.SEATS)
    # What it takes; while it loads, admission counts `reserved_mb` instead. (I3)
    mb = Number(Instance.MB)
    reserved_mb = Number(Instance.RESERVED_MB)
    since = Word(Instance.SINCE)
    loaded_at = Word(Instance.LOADED_AT)
    unload_on_release = Word(Instance.UNLOAD_ON_RELEASE)
    has_server = Flag(Instance.HAS_SERVER)
    uses = Word(Instance.USES)
    # A pid of the holder's pid namespace, 0 for none.
    program = Word(Instance.PROGRAM)
    unload_late = Flag(Instance.UNLOAD_LATE)
    handed_at = Word(Instance.HANDED_AT)
    way = Word(Instance.WAY)
    device_mb = Number(Instance.DEVICE_MB)
    host_mb = Number(Instance.HOST_MB)
    steady = Flag(Instance.STEADY)


class TicketRow(Row):
    """One waiter."""

    __slots__ = ()

    state = Word(Ticket.STATE)
    # Tells a ticket from earlier ones in its row.
    number = Word(Ticket.NUMBER)
    priority = Word(Ticket.PRIORITY)
    model = Word(Ticket.MODEL)
    member = Reference(Ticket.MEMBER)
    instance = Reference(Ticket.INSTANCE)
    enqueued = Word(Ticket.ENQUEUED)
    # After it, other processes skip the ticket; its own process removes it.
    deadline = Word(Ticket.DEADLINE)
    # The figures below are from the moment when this became the reason, and do not follow later changes.
    reason = Word(Ticket.REASON)
    need_mb = Number(Ticket.NEED_MB)
    preload = Word(Ticket.PRELOAD)
    head_of_line_at = Word(Ticket.HEAD_OF_LINE_AT)
    free_mb = Number(Ticket.FREE_MB)
    coming_mb = Number(Ticket.COMING_MB)
    seconds = Number(Ticket.SECONDS)
    other = Reference(Ticket.OTHER)
    on = Devices(Ticket.ON)
    loadable_on = Word(Ticket.LOADABLE_ON)
    usable_on = Word(Ticket.USABLE_ON)
    span = Word(Ticket.SPAN)
    called_up = Word(Ticket.CALLED_UP)
    rank = Word(Ticket.RANK)
    steady = Flag(Ticket.STEADY)


class DeviceRow(Row):
    """One accelerator, or the host's memory."""

    __slots__ = ()

    state = Word(Device.STATE)
    total_mb = Number(Device.TOTAL_MB)
    # The last figure, however old; 0 before the first one, so check `sampled`.
    used_mb = Number(Device.USED_MB)
    sampled = Word(Device.SAMPLED)
    peak_mb = Number(Device.PEAK_MB)
    return_count = Word(Device.RETURN_COUNT)
    returning_mb = Number(Device.RETURNING_MB)
    # Both are nan until the device has been measured once.
    external_mb = Number(Device.EXTERNAL_MB)
    external_least_mb = Number(Device.EXTERNAL_LEAST_MB)
    isolated = Reference(Device.ISOLATED)
    # Counts only while `isolated`; nan until the load begins.
    baseline_mb = Number(Device.BASELINE_MB)
    configured_at = Word(Device.CONFIGURED_AT)
    unrelated_mb = Number(Device.UNRELATED_MB)
    tried = Word(Device.TRIED)
    measured = Flag(Device.MEASURED)


class ObservationRow(Row):
    """Readings of one configuration on one device."""

    __slots__ = ()

    #: Reference to the device, 0 for readings that a caller passed in.
    device = Word(Observation.DEVICE)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Which models (generations) were loaded, and how many copies of each."""
        first, words = self.at + Observation.PAIRS, self.segment.words
        # One slice: without the lock, it is less likely to mix two configurations of a row that is reused meanwhile.
        packed = words[first : first + words[self.at + Observation.PAIRS_USED]].tolist()
        return [(pair >> 16, pair & 0xFFFF) for pair in packed]

    @property
    def readings(self) -> list[float]:
        """The memory that they took together, in MB, each time; in no particular order."""
        first = self.at + Observation.READINGS
        return [
            float(mb) for mb in self.segment.floats[first : first + self.segment.words[self.at + Observation.COUNT]]
        ]


class EventRow(Row):
    """One entry of the event ring. Without the lock it may be overwritten at any moment."""

    __slots__ = ()

    sequence = Word(Event.SEQUENCE)
    instance = Reference(Event.INSTANCE)

    @property
    def kind(self) -> int:
        """A number of `EventKind`."""
        return self.segment.words[self.at + Event.KIND] & 0xFF

    @property
    def cause(self) -> Cause | None:
        """The reason and its figures, None if the policy has not decided it."""
        words, floats, at = self.segment.words, self.segment.floats, self.at
        reason = words[at + Event.KIND] >> 8 & 0xFF
        if not reason:
            return None
        return Cause(
            reason - 1,
            floats[at + Event.NEED_MB],
            floats[at + Event.FREE_MB],
            floats[at + Event.COMING_MB],
            floats[at + Event.SECONDS],
            words[at + Event.OTHER],
            words[at + Event.ON],
        )


AnyRow = TypeVar("AnyRow", bound=Row)


class Rows(Generic[AnyRow]):
    """The rows of one table, by index."""

    def __init__(self, segment: Segment, table: Table, kind: type[AnyRow]) -> None:
        self._segment = segment
        self._base = table.base
        self._words = table.words
        self._kind = kind

    def __getitem__(self, row: int) -> AnyRow:
        return self._kind(self._segment, self._base + row * self._words)
