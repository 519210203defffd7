"""The whole state of a namespace as plain values, read from outside: no membership, no change, hardly ever a lock.

It does without NumPy and psutil, because to import those takes longer than all that is done here.

`read_snapshot` copies the segment and decodes the copy. It answers whatever happens to the lock's holder: a copy
that falls into a transaction is completed by the undo log in the copy (see `transaction.py`). Only when writers leave
no gap for a copy is the lock taken, for the length of one.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from mpmm.errors import LayoutMismatchError, LockTimeoutError, SegmentCorruptError
from mpmm.policy.fairness import HEAD_START_S, urgency_of
from mpmm.shared_state.durations import LONGEST_NS
from mpmm.shared_state.events import EventKind
from mpmm.shared_state.layout import (
    LAYOUT_VERSION,
    MOST_SPANNED,
    Device,
    Event,
    Header,
    Instance,
    Layout,
    Member,
    Model,
    Observation,
    Pin,
    Table,
    Ticket,
    device_rows,
)
from mpmm.shared_state.liveness import member_lives
from mpmm.shared_state.lock_file import identity_of, is_locked
from mpmm.shared_state.runtime_dir import RuntimeDirectory
from mpmm.shared_state.segment import (
    SHARED_MEMORY,
    Segment,
    SegmentProblem,
    UnfinishedSegment,
    segment_lost,
    segment_name,
)
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.transaction import roll_back

__all__ = [
    "ALL_EVENTS",
    "DeviceInfo",
    "EventChoice",
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
    "decode",
    "find_lost_namespaces",
    "find_namespaces",
    "read_snapshot",
]

_COPIES_TRIED = 12
_LOCK_PATIENCE_S = 0.5
# So long a look waits for a process that joins or leaves, which takes milliseconds, before it says that a segment is
# lost; and so long it sleeps meanwhile.
LIFECYCLE_PATIENCE_S = 0.5
LIFECYCLE_LOOK_S = 0.005


class Kind(str, Enum):
    """What a member is."""

    WORKER = "worker"
    SERVER = "server"
    GUEST = "guest"


_MEMBER_KINDS = {Member.WORKER: Kind.WORKER, Member.SERVER: Kind.SERVER, Member.GUEST: Kind.GUEST}
_MODEL_KINDS = {1: "model", 2: "lease"}
_INSTANCE_STATES = {
    1: "loading",
    2: "active",
    3: "idle",
    4: "unloading",
    5: "leased",
    6: "suspending",
    7: "suspended",
    8: "resuming",
}
_BOOKED_BY_RESERVATION = ("loading", "resuming", "leased")
_EVENT_KINDS = {kind.value: kind.name.lower() for kind in EventKind}
_TICKET_STATES = {1: "waiting", 2: "granted", 3: "load", 4: "refused", 5: "reset", 6: "enough"}


@dataclass(frozen=True, eq=False)
class MemberInfo:
    """One attached process. `alive` is None when it was not looked up. Servers: `measured_mb`, `peak_mb`."""

    slot: int
    kind: str
    pid: int
    name: str
    alive: bool | None
    started_wall_s: float
    attached_for_s: float
    instance: int | None
    measured_mb: float | None
    peak_mb: float | None
    generation: int


@dataclass(frozen=True, eq=False)
class ModelInfo:
    """One tag: how many copies in which state, its estimate in MB (None: unknown), its counters and its times.

    name: what people call it, empty for nothing but the tag.
    kind: `model`, or `lease` for what stands for one lease, held or waited for; its estimate is what it is for.
    shares: its loader has made a handle.
    measured: the estimate was read from processes; sd_mb: its standard deviation. at_least_mb: the model ran out of
    memory with that much free, so it needs more, 0 if it never has. expect_mb: what its users say, which counts as long
    as there is no estimate (None: nothing). keep_alive_s: how long its users want idle copies kept (None: as the
    settings say). failures: loads in a row that failed, the last
    one failed_ago_s ago (None: none).
    unused_for_s: since its last use, 0 while it is in use. load_s, hold_s, gap_s: decayed means of the time of a load,
    of a hold and between two requests, 0 unknown. requests: how many the last of these has seen, and requested_ago_s:
    when.
    suspended: copies that are suspended, or being so; suspends, resumes: how many have ended; suspend_s, resume_s:
    decayed means of how long they take, 0 unknown. unsuspendable: why it is not suspended any more, a number of
    `policy.suspension.Unsuspendable`, or 0.
    """

    row: int
    kind: str
    tag: str
    name: str
    shares: bool
    estimate_mb: float | None
    measured: bool
    sd_mb: float
    at_least_mb: float
    expect_mb: float | None
    keep_alive_s: float | None
    failures: int
    failed_ago_s: float | None
    loaded: int
    active: int
    idle: int
    loading: int
    unloading: int
    waiting: int
    loads: int
    hits: int
    evictions: int
    pins: int
    unused_for_s: float
    load_s: float
    hold_s: float
    gap_s: float
    requests: int
    requested_ago_s: float
    idle_head: int | None
    suspended: int
    suspends: int
    resumes: int
    suspend_s: float
    resume_s: float
    unsuspendable: int
    generation: int


@dataclass(frozen=True, eq=False)
class InstanceInfo:
    """One copy. `holder`, `owner` and `server` are slots of members; `handle` is None for an object.

    device: row of the (first) device it lies on; shares_mb: what MB is on each of its devices, by row. peak_mb: the
    most that the process of its server was measured to take.

    A lease that is held is one in state `leased`: `reserved_mb` is what it is for, `mb` what its program, of pid
    `program` if that is known, was measured to take.

    steady: nothing else is loaded or unloaded where it lies.
    unload_late: its unload takes too long, so nobody waits for its memory any more. handed_over_s: how long ago another
    process was told to do it last, None if none was.

    way: how it can be suspended, a number of `policy.suspension.Way`, or 0. device_mb: what a suspended one had of its
    device, and reserves to come back; host_mb: what it takes of the host.
    """

    row: int
    tag: str
    model: int
    state: str
    holder: int | None
    owner: int | None
    server: int | None
    device: int
    shares_mb: dict[int, float]
    mb: float
    peak_mb: float | None
    reserved_mb: float
    for_s: float
    uses: int
    handle: str | None
    program: int | None
    steady: bool
    doomed: bool
    unload_late: bool
    handed_over_s: float | None
    way: int
    device_mb: float
    host_mb: float
    next: int | None
    previous: int | None
    generation: int


@dataclass(frozen=True, eq=False)
class TicketInfo:
    """One waiter, for a model or a lease. `need_mb` is the estimate or default when it queued; `member` is a slot.

    priority: its class, see `policy.fairness`; urgency: the `priority` of the request.
    preload: how many copies a preload wants, 0 for other waiters.
    reason: a number of `policy.view.Reason`; free_mb, coming_mb, seconds, other (a tag) and on (rows of devices) are
    its figures. devices, tied: rows of the devices where it may load, and on which a copy is of use; empty for all.
    span: how many devices what it loads lies on.
    blocked_for_s: since when it is the first one for whom there is no room, None if it has never been.
    called_up_ago_s: when it was told to look for itself, see `mpmm.model_manager.tenure`; None if it was not.
    """

    row: int
    number: int
    priority: int
    urgency: int
    tag: str
    model: int
    member: int
    pid: int
    state: str
    reason: int
    need_mb: float
    free_mb: float
    coming_mb: float
    seconds: float
    other: str | None
    on: tuple[int, ...]
    devices: tuple[int, ...]
    tied: tuple[int, ...]
    span: int
    waited_s: float
    blocked_for_s: float | None
    called_up_ago_s: float | None
    time_left_s: float
    preload: int
    instance: int | None


@dataclass(frozen=True, eq=False)
class PinInfo:
    """A member (slot), or if that is None the namespace, wants the idle copies of a model (row) kept."""

    row: int
    tag: str
    model: int
    member: int | None
    for_s: float


@dataclass(frozen=True, eq=False)
class DeviceInfo:
    """One device. `used_mb` is None before the first figure; `sample_age_s` likewise.

    committed_mb: what admission counts as taken, see `policy.ledger`. reserved_mb: what of that the figure does not
    show yet. returning_mb, returns_mb: what is awaited from unloads, and from each of them. external_mb: what is in use
    and not the namespace's, None before the first figure; below 0 where instances take less than they are taken for.
    foreign_mb: what processes take that are not the namespace's, as far as the source lists them. measured: a source
    that can measure it has described it. isolated: the copy that runs alone on it. samples: the last figures, oldest
    first, each as (seconds ago, MB).
    """

    row: int
    uuid: str
    name: str
    total_mb: float
    limit_mb: float
    used_mb: float | None
    peak_mb: float | None
    peak_since_start_mb: float
    committed_mb: float
    reserved_mb: float
    returning_mb: float
    returns_mb: tuple[float, ...]
    external_mb: float | None
    foreign_mb: float
    measured: bool
    isolated: int | None
    sample_age_s: float | None
    samples: tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False)
class ObservationInfo:
    """Readings in MB of one configuration (tag -> copies) on a device; None for readings that a caller has made."""

    copies: dict[str, int]
    readings_mb: tuple[float, ...]
    device: int | None = None


@dataclass(frozen=True, eq=False)
class EventInfo:
    """One entry of the event ring, oldest first; `value` as `EventKind` says.

    reason: a number of `policy.view.Reason` where the policy has decided it, and then its figures; else None.
    on: rows of the devices that the reason is about. devices: rows of those on which a load or lease that begins is
    placed, as far as they are among the first 32.
    """

    sequence: int
    kind: str
    age_s: float
    pid: int
    tag: str | None
    instance: int | None
    ticket: int | None
    value: float | None
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
    """Who took the lock last. `held` is None when it was not looked up."""

    held: bool | None
    last_holder_pid: int
    taken_ago_s: float
    holder_stopped: bool


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Everything. Times are relative to the moment of the copy; `torn_words` were undone in the copy.

    taken_s: that moment, as `time.monotonic()`; taken_wall_s: as Unix time.
    polled_ago_s: since the leader, or somebody in its place, last did its duty.
    isolated: the copy that runs alone; of several, on devices of their own, the first.
    suspend_budget_mb: host memory that suspended copies may take together; suspend_failures: suspensions and resumes
    that cost the copy.
    table_ends: rows that were ever in use, for the tables that keep count of it.
    missing_files: names of files of living members that are not where they were made. files_put_back: how many of those
    members have made again.
    """

    namespace: str
    segment: str
    layout_version: int
    taken_s: float
    taken_wall_s: float
    created_wall_s: float
    change: int
    torn_words: int
    lock: LockInfo
    source: str
    source_asked: str
    books_only: bool
    measures_processes: bool
    leader: int | None
    leader_for_s: float | None
    polled_ago_s: float
    next_ticket: int
    waiting: int
    active: int
    loading: int
    isolated: int | None
    isolated_devices: tuple[int, ...]
    steady_devices: tuple[int, ...]
    events_written: int
    loads: int
    hits: int
    evictions: int
    failed_loads: int
    timeouts: int
    reaps: int
    rollbacks: int
    leaders: int
    resets: int
    out_of_memory: int
    suspends: int
    resumes: int
    suspend_failures: int
    suspend_budget_mb: float
    written_off_mb: float
    files_put_back: int
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
    missing_files: tuple[str, ...] = ()


def find_namespaces(root: Path | None = None) -> list[str]:
    """Return the namespaces of this user that have a segment, by name."""
    return sorted(name for name, segment in _folders_below(root) if os.path.exists(f"{SHARED_MEMORY}/{segment}"))


def find_lost_namespaces(root: Path | None = None) -> list[str]:
    """Return the namespaces of this user whose members live, and whose segment somebody has removed, by name."""
    return sorted(
        name
        for name, segment in _folders_below(root)
        if not os.path.exists(f"{SHARED_MEMORY}/{segment}") and _is_lost(RuntimeDirectory(name, root), segment)
    )


def _folders_below(root: Path | None) -> list[tuple[str, str]]:
    """Return the names of folders that may be those of namespaces, and those of their segments."""
    folder = RuntimeDirectory("any", root).root
    try:
        prefix = segment_name(folder, "")
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [(name, f"{prefix}{name}") for name in names]


def _is_lost(runtime: RuntimeDirectory, name: str) -> bool:
    """Tell whether the segment `name` is gone though members live.

    The last process to leave is a member still while it removes first the segment and then the folder. So where
    somebody holds the lifecycle lock, the look counts only once that has ended, or takes too long.
    """
    deadline = time.monotonic() + LIFECYCLE_PATIENCE_S
    while _has_members(runtime.path):
        if not is_locked(runtime.file("lifecycle.lock")) or time.monotonic() >= deadline:
            # Looked at again, because it may have ended between the two looks.
            return not os.path.exists(f"{SHARED_MEMORY}/{name}") and _has_members(runtime.path)
        time.sleep(LIFECYCLE_LOOK_S)
    return False


def _has_members(folder: Path) -> bool:
    """Tell whether a member of a namespace lives, in whatever segment."""
    with contextlib.suppress(FileNotFoundError):
        return any(is_locked(lock) for lock in folder.glob("m*.lock"))
    return False


@dataclass(frozen=True, eq=False)
class EventChoice:
    """Which events of the ring a snapshot is to have.

    after: those with a higher sequence number only. newest_of_each: at most so many of each kind and reason.
    """

    after: int = 0
    newest_of_each: int | None = None


ALL_EVENTS = EventChoice()


def read_snapshot(
    namespace: str, root: Path | None = None, *, events: bool = True, choice: EventChoice = ALL_EVENTS
) -> Snapshot:
    """Read the state of a namespace.

    events: False leaves the event ring out; choice: what is wanted of it else.
    Raises FileNotFoundError when there is no such namespace, LayoutMismatchError when it is another version's,
    SegmentCorruptError when it holds junk, SegmentLostError when it is gone though members live, InvalidArgumentError
    for an impossible name.
    """
    runtime = RuntimeDirectory(namespace, root)
    if not runtime.path.is_dir():
        raise FileNotFoundError(f"there is no namespace {namespace!r} in {runtime.root}")
    name = segment_name(runtime.root, namespace)
    try:
        segment = Segment.open(name)
    except UnfinishedSegment:
        raise FileNotFoundError(f"namespace {namespace!r} is being made, or its maker was killed") from None
    except SegmentProblem as problem:
        raise LayoutMismatchError(
            f"cannot read namespace {namespace!r}: found {problem.found}, expected {problem.expected}",
            name=name,
            found=problem.found,
            expected=problem.expected,
        ) from None
    if segment is None:
        if _is_lost(runtime, name):
            raise segment_lost(namespace, name)
        raise FileNotFoundError(f"namespace {namespace!r} has no segment {name}")
    try:
        copied = _consistent_copy(segment, events)
        layout = segment.layout
    finally:
        segment.close()
    held = is_locked(segment.path)
    folder, missing = str(runtime.path), []
    alive = {}
    for slot, pid, attached, inode, pids_of in _used_members(copied, layout):
        path = f"{folder}/m{slot}.lock"
        alive[slot] = member_lives(path, inode, pid, attached, pids_of)
        if alive[slot] and (identity_of(path) or (0, 0))[1] != inode:
            missing.append(f"m{slot}.lock")
    if alive:
        missing += [name for name in ("alive.lock", "token") if not os.path.lexists(f"{folder}/{name}")]
    decoded = decode(copied, layout, namespace, name, held=held, alive=alive, with_events=events, choice=choice)
    return replace(decoded, missing_files=tuple(missing)) if missing else decoded


def _consistent_copy(segment: Segment, events: bool) -> bytearray:
    """Return a copy that is one state of the segment once its undo log is rolled back; see `transaction.py`."""
    words = segment.words
    last = bytearray()
    for attempt in range(_COPIES_TRIED):
        before = words[Header.CHANGE]
        copied = segment.copy_in_use(events=events)
        if words[Header.CHANGE] == before and (before % 2 == 0 or copied == last):
            return copied
        last = copied
        # Between two transactions of busy writers there are pauses; ours differ, so that one is hit.
        time.sleep(0.0001 * (attempt % 7))
    # Writers are too busy for that. The lock is free every few microseconds then; if it is not, because its holder
    # has been stopped just now, nothing changes any more and the next copy is as good.
    try:
        lock = segment.lock_file()
    except FileNotFoundError:
        return last
    try:
        with contextlib.suppress(LockTimeoutError):
            lock.exclusive(_LOCK_PATIENCE_S)
        return segment.copy_in_use(events=events, into=last)
    finally:
        lock.close()


def _used_members(copied: bytearray, layout: Layout) -> list[tuple[int, int, int, int, int]]:
    """Return slot, pid, time of attaching (monotonic, ns), inode of the lock file and pid namespace of the members."""
    words, table = memoryview(copied).cast("Q"), layout.members
    starts = ((slot, table.base + slot * table.words) for slot in _used(words, table))
    asked = (Member.PID, Member.ATTACHED, Member.LOCK)
    return [(slot, *(words[at + word] for word in asked), words[Header.PID_NAMESPACE]) for slot, at in starts]  # type: ignore[misc]  # mypy does not count a generator's words


def _used(words: memoryview, table: Table) -> list[int]:
    states = words[table.base : table.end : table.words].tolist()
    return [row for row, state in enumerate(states) if state]


def decode(
    copied: bytearray,
    layout: Layout,
    namespace: str,
    segment: str,
    *,
    held: bool | None = None,
    alive: dict[int, bool] | None = None,
    with_events: bool = True,
    choice: EventChoice = ALL_EVENTS,
) -> Snapshot:
    """Turn a copy of a segment into a snapshot; rolls an open transaction back in the copy.

    Raises SegmentCorruptError when rows hold what mpmm never writes.
    """
    words = memoryview(copied).cast("Q")
    torn = roll_back(words, layout.undo)
    # Thousands of new objects, none of them garbage, would have the collector come by several times.
    collects = gc.isenabled()
    gc.disable()
    try:
        wanted = choice if with_events else None
        return _Decoder(copied, layout).snapshot(namespace, segment, torn, held, alive or {}, wanted)
    except (IndexError, ValueError, OverflowError) as error:
        raise SegmentCorruptError(
            f"segment {segment} of namespace {namespace!r} holds what mpmm never writes ({error}); "
            "end its processes, the next one makes a new segment",
            name=segment,
        ) from error
    finally:
        if collects:
            gc.enable()


class _Decoder:
    def __init__(self, copied: bytearray, layout: Layout) -> None:
        self._bytes = copied
        self._layout = layout
        self._words = memoryview(copied).cast("Q")
        self._floats = memoryview(copied).cast("B").cast("d")
        self._now = time.monotonic_ns()

    def snapshot(
        self,
        namespace: str,
        segment: str,
        torn: int,
        held: bool | None,
        alive: dict[int, bool],
        choice: EventChoice | None,
    ) -> Snapshot:
        words, floats = self._words, self._floats
        settings = Settings(*(floats[Header.SETTINGS + offset] for offset in range(len(fields(Settings)))))
        books_only = bool(words[Header.SOURCE_BOOKS_ONLY])
        models = dict(self._rows("models"))
        tags = {row: self._text(at + Model.TAG) for row, at in models.items()}
        instances = tuple(self._instance(row, at, tags) for row, at in self._rows("instances"))
        used = self._last_used(instances)
        leader = self._reference(words[Header.LEADER])
        devices = tuple(self._device(row, at, settings, instances, books_only) for row, at in self._rows("devices"))
        return Snapshot(
            namespace=namespace,
            segment=segment,
            layout_version=LAYOUT_VERSION,
            taken_s=self._now / 1e9,
            taken_wall_s=time.time(),
            created_wall_s=words[Header.CREATED_WALL] / 1e9,
            change=words[Header.CHANGE],
            torn_words=torn,
            lock=self._lock(held),
            source=self._text(Header.SOURCE_NAME),
            source_asked=self._text(Header.SOURCE_ASKED),
            books_only=books_only,
            measures_processes=bool(words[Header.SOURCE_MEASURES_PROCESSES]),
            leader=leader,
            leader_for_s=None if leader is None else self._age(words[Header.LEADER_SINCE]),
            polled_ago_s=self._age(words[Header.POLLED]),
            next_ticket=words[Header.NEXT_TICKET],
            waiting=words[Header.WAITING],
            active=words[Header.ACTIVE],
            loading=words[Header.LOADING],
            isolated=min((device.isolated for device in devices if device.isolated is not None), default=None),
            isolated_devices=tuple(device_rows(words[Header.ISOLATED])),
            steady_devices=tuple(device_rows(words[Header.STEADY])),
            events_written=words[Header.EVENTS],
            loads=words[Header.LOADS],
            hits=words[Header.HITS],
            evictions=words[Header.EVICTIONS],
            failed_loads=words[Header.FAILED_LOADS],
            timeouts=words[Header.TIMEOUTS],
            reaps=words[Header.REAPS],
            rollbacks=words[Header.ROLLBACKS],
            leaders=words[Header.LEADERS],
            resets=words[Header.RESETS],
            out_of_memory=words[Header.OUT_OF_MEMORY],
            suspends=words[Header.SUSPENDS],
            resumes=words[Header.RESUMES],
            suspend_failures=words[Header.SUSPEND_FAILURES],
            suspend_budget_mb=self._suspend_budget_mb(settings),
            written_off_mb=floats[Header.WRITTEN_OFF],
            files_put_back=words[Header.PUT_BACK],
            settings=settings,
            table_ends={table.name: words[table.end_word] for table in self._layout.growing},
            members=tuple(self._member(row, at, alive.get(row)) for row, at in self._rows("members")),
            models=tuple(self._model(row, at, used.get(row)) for row, at in models.items()),
            instances=instances,
            tickets=tuple(
                sorted(
                    (self._ticket(row, at, tags) for row, at in self._rows("tickets")),
                    key=lambda ticket: (
                        ticket.priority,
                        -ticket.waited_s - HEAD_START_S * ticket.urgency,
                        ticket.number,
                    ),
                )
            ),
            pins=tuple(self._pin(row, at, tags) for row, at in self._rows("pins")),
            devices=devices,
            observations=tuple(self._observations(models, tags)),
            events=() if choice is None else tuple(self._events(tags, choice)),
        )

    def _suspend_budget_mb(self, settings: Settings) -> float:
        chosen = settings.suspend_budget_mb
        return chosen if math.isfinite(chosen) else self._floats[Header.HOST_SHARE_MB]

    def _rows(self, name: str) -> Iterable[tuple[int, int]]:
        table: Table = getattr(self._layout, name)
        return [(row, table.base + row * table.words) for row in _used(self._words, table)]

    def _text(self, word: int) -> str:
        length = min(self._words[word], 8 * 128)
        return bytes(self._bytes[8 * (word + 1) : 8 * (word + 1) + length]).decode("utf-8", "surrogateescape")

    def _age(self, then_ns: int) -> float:
        return (self._now - then_ns) / 1e9

    @staticmethod
    def _reference(word: int) -> int | None:
        return word - 1 if word else None

    @staticmethod
    def _number(value: float) -> float | None:
        return None if math.isnan(value) else value

    def _lock(self, held: bool | None) -> LockInfo:
        pid = self._words[Header.LOCK_HOLDER]
        stopped = False
        if held:
            import psutil

            try:
                stopped = psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            except (psutil.Error, ValueError, OverflowError):
                stopped = False
        return LockInfo(held, pid, self._age(self._words[Header.LOCK_TAKEN]), stopped)

    def _member(self, row: int, at: int, alive: bool | None) -> MemberInfo:
        words, floats = self._words, self._floats
        kind = _MEMBER_KINDS.get(words[at + Member.STATE], Kind.WORKER)
        return MemberInfo(
            slot=row,
            kind=kind.value,
            pid=words[at + Member.PID],
            name=self._text(at + Member.NAME),
            alive=alive,
            started_wall_s=words[at + Member.STARTED_WALL] / 1e9,
            attached_for_s=self._age(words[at + Member.ATTACHED]),
            instance=self._reference(words[at + Member.INSTANCE]),
            measured_mb=self._number(floats[at + Member.MEASURED_MB]),
            peak_mb=floats[at + Member.PEAK_MB] if kind is Kind.SERVER else None,
            generation=words[at + Member.GENERATION],
        )

    @staticmethod
    def _last_used(instances: tuple[InstanceInfo, ...]) -> dict[int, float]:
        """Return how long ago a copy of each model that has any was used last, by the model's row."""
        used: dict[int, float] = {}
        for copy in instances:
            for_s = 0.0 if copy.state == "active" else copy.for_s
            used[copy.model] = min(for_s, used.get(copy.model, for_s))
        return used

    def _model(self, row: int, at: int, used_ago_s: float | None) -> ModelInfo:
        words, floats = self._words, self._floats
        return ModelInfo(
            row=row,
            kind=_MODEL_KINDS.get(words[at + Model.STATE], f"state {words[at + Model.STATE]}"),
            tag=self._text(at + Model.TAG),
            name=self._text(at + Model.NAME),
            shares=bool(words[at + Model.SHARES]),
            estimate_mb=self._floats[at + Model.ESTIMATE_MB] if words[at + Model.KNOWN] else None,
            measured=bool(words[at + Model.MEASURED]),
            sd_mb=floats[at + Model.SD_MB],
            at_least_mb=floats[at + Model.AT_LEAST_MB],
            expect_mb=floats[at + Model.EXPECT_MB] or None,
            keep_alive_s=self._kept_s(words[at + Model.KEEP_ALIVE]),
            failures=words[at + Model.FAILURES],
            failed_ago_s=self._age(words[at + Model.FAILED_AT]) if words[at + Model.FAILED_AT] else None,
            loaded=words[at + Model.LOADED],
            active=words[at + Model.ACTIVE],
            idle=words[at + Model.IDLE],
            loading=words[at + Model.LOADING],
            unloading=words[at + Model.UNLOADING],
            waiting=words[at + Model.WAITING],
            loads=words[at + Model.LOADS],
            hits=words[at + Model.HITS],
            evictions=words[at + Model.EVICTIONS],
            pins=words[at + Model.PINS],
            unused_for_s=self._age(words[at + Model.USED_AT]) if used_ago_s is None else used_ago_s,
            load_s=floats[at + Model.LOAD_S],
            hold_s=floats[at + Model.HOLD_S],
            gap_s=floats[at + Model.GAP_S],
            requests=words[at + Model.REQUESTS],
            requested_ago_s=self._age(words[at + Model.REQUESTED_AT]),
            idle_head=self._reference(words[at + Model.IDLE_HEAD]),
            suspended=words[at + Model.SUSPENDED],
            suspends=words[at + Model.SUSPENDS],
            resumes=words[at + Model.RESUMES],
            suspend_s=floats[at + Model.SUSPEND_S],
            resume_s=floats[at + Model.RESUME_S],
            unsuspendable=words[at + Model.UNSUSPENDABLE],
            generation=words[at + Model.GENERATION],
        )

    @staticmethod
    def _kept_s(word: int) -> float | None:
        return None if not word else math.inf if word > LONGEST_NS else (word - 1) / 1e9

    def _instance(self, row: int, at: int, tags: dict[int, str]) -> InstanceInfo:
        words, floats = self._words, self._floats
        mb, server = floats[at + Instance.MB], self._reference(words[at + Instance.SERVER])
        devices = device_rows(words[at + Instance.DEVICES])[:MOST_SPANNED]
        first = at + Instance.SHARES
        shares = [mb] if len(devices) == 1 else floats[first : first + len(devices)].tolist()
        member = self._layout.members.base + (server or 0) * Member.WORDS
        return InstanceInfo(
            row=row,
            tag=tags.get(words[at + Instance.MODEL], ""),
            model=words[at + Instance.MODEL],
            state=_INSTANCE_STATES.get(words[at + Instance.STATE], f"state {words[at + Instance.STATE]}"),
            holder=self._reference(words[at + Instance.HOLDER]),
            owner=self._reference(words[at + Instance.OWNER]),
            server=server,
            device=devices[0] if devices else 0,
            shares_mb=dict(zip(devices, shares, strict=True)),
            mb=mb,
            peak_mb=None if server is None else floats[member + Member.PEAK_MB] or None,
            reserved_mb=floats[at + Instance.RESERVED_MB],
            for_s=self._age(words[at + Instance.SINCE]),
            uses=words[at + Instance.USES],
            handle=self._text(at + Instance.HANDLE) or None,
            program=words[at + Instance.PROGRAM] or None,
            steady=bool(words[at + Instance.STEADY]),
            doomed=bool(words[at + Instance.DOOMED]),
            unload_late=bool(words[at + Instance.UNLOAD_LATE]),
            handed_over_s=self._age(words[at + Instance.HANDED_AT]) if words[at + Instance.HANDED_AT] else None,
            way=words[at + Instance.WAY],
            device_mb=floats[at + Instance.DEVICE_MB],
            host_mb=floats[at + Instance.HOST_MB],
            next=self._reference(words[at + Instance.NEXT]),
            previous=self._reference(words[at + Instance.PREVIOUS]),
            generation=words[at + Instance.GENERATION],
        )

    def _ticket(self, row: int, at: int, tags: dict[int, str]) -> TicketInfo:
        words, floats = self._words, self._floats
        member = words[at + Ticket.MEMBER] - 1
        known = 0 <= member < self._layout.members.capacity
        return TicketInfo(
            row=row,
            number=words[at + Ticket.NUMBER],
            priority=words[at + Ticket.PRIORITY],
            urgency=urgency_of(words[at + Ticket.ENQUEUED], words[at + Ticket.RANK]),
            tag=tags.get(words[at + Ticket.MODEL], ""),
            model=words[at + Ticket.MODEL],
            member=member,
            pid=words[self._layout.members.base + member * Member.WORDS + Member.PID] if known else 0,
            state=_TICKET_STATES.get(words[at + Ticket.STATE], f"state {words[at + Ticket.STATE]}"),
            reason=words[at + Ticket.REASON],
            need_mb=floats[at + Ticket.NEED_MB],
            free_mb=floats[at + Ticket.FREE_MB],
            coming_mb=floats[at + Ticket.COMING_MB],
            seconds=floats[at + Ticket.SECONDS],
            other=tags.get(words[at + Ticket.OTHER] - 1),
            on=tuple(device_rows(words[at + Ticket.ON])),
            devices=tuple(device_rows(words[at + Ticket.DEVICES])),
            tied=tuple(device_rows(words[at + Ticket.TIED])),
            span=words[at + Ticket.SPAN],
            waited_s=self._age(words[at + Ticket.ENQUEUED]),
            blocked_for_s=self._age(words[at + Ticket.BLOCKED_AT]) if words[at + Ticket.BLOCKED_AT] else None,
            called_up_ago_s=self._age(words[at + Ticket.CALLED_UP]) if words[at + Ticket.CALLED_UP] else None,
            time_left_s=-self._age(words[at + Ticket.DEADLINE])
            if words[at + Ticket.DEADLINE] < LONGEST_NS
            else math.inf,
            preload=words[at + Ticket.PRELOAD],
            instance=self._reference(words[at + Ticket.INSTANCE]),
        )

    def _pin(self, row: int, at: int, tags: dict[int, str]) -> PinInfo:
        words = self._words
        model = words[at + Pin.MODEL]
        member = self._reference(words[at + Pin.MEMBER])
        return PinInfo(row, tags.get(model, ""), model, member, self._age(words[at + Pin.SINCE]))

    def _device(
        self, row: int, at: int, settings: Settings, instances: tuple[InstanceInfo, ...], books_only: bool
    ) -> DeviceInfo:
        words, floats = self._words, self._floats
        here = [instance for instance in instances if row in instance.shares_mb]
        sampled = words[at + Device.SAMPLED]
        booked = math.fsum(instance.shares_mb[row] for instance in here if instance.state not in _BOOKED_BY_RESERVATION)
        external = floats[at + Device.EXTERNAL_MB]
        used = booked if books_only else (floats[at + Device.USED_MB] if sampled else None)
        returning = floats[at + Device.RETURNING_MB] if self._words[Header.SOURCE_SETTLES_LATE] else 0.0
        committed = math.fsum(self._committed(instance, row) for instance in here) + returning
        committed += 0.0 if math.isnan(external) else external
        awaited = min(self._words[at + Device.RETURN_COUNT], Device.RETURNS_LENGTH)
        return DeviceInfo(
            row=row,
            uuid=self._text(at + Device.UUID),
            name=self._text(at + Device.NAME),
            total_mb=floats[at + Device.TOTAL_MB],
            limit_mb=floats[at + Device.TOTAL_MB] * (1 - settings.slack_percentage),
            used_mb=used,
            peak_mb=floats[at + Device.PEAK_MB] if sampled else None,
            peak_since_start_mb=floats[at + Device.HIGHEST_MB],
            committed_mb=committed,
            reserved_mb=max(0.0, committed - (used or 0.0)),
            returning_mb=floats[at + Device.RETURNING_MB],
            returns_mb=tuple(floats[at + Device.RETURNS + Device.RETURN_WORDS * n + 1] for n in range(awaited)),
            external_mb=None if math.isnan(external) else external,
            foreign_mb=floats[at + Device.FOREIGN_MB],
            measured=bool(words[at + Device.MEASURED]),
            isolated=self._reference(words[at + Device.ISOLATED]),
            sample_age_s=self._age(sampled) if sampled else None,
            samples=self._samples(at + Device.RING),
        )

    def _samples(self, ring: int) -> tuple[tuple[float, float], ...]:
        end = ring + 2 * Device.RING_LENGTH
        times = self._words[ring:end:2].tolist()
        figures = self._floats[ring + 1 : end : 2].tolist()
        taken = sorted((then, mb) for then, mb in zip(times, figures, strict=True) if then and math.isfinite(mb))
        return tuple((self._age(then), mb) for then, mb in taken)

    def _committed(self, instance: InstanceInfo, device: int) -> float:
        """What a copy or a lease counts for on a device, see `policy.ledger` and `Scheduler.read_copies`."""
        span = len(instance.shares_mb)
        if instance.state == "leased":
            return max(instance.reserved_mb, instance.mb) / span
        if instance.state not in ("loading", "resuming"):
            return instance.shares_mb[device]
        share_mb = instance.reserved_mb / span
        if instance.server is None or not self._words[Header.SOURCE_MEASURES_PROCESSES]:
            return share_mb
        at = self._layout.members.base + instance.server * Member.WORDS
        word = Member.MEASURED_MB if span == 1 else Member.SHARES + list(instance.shares_mb).index(device)
        measured = self._floats[at + word]
        return share_mb if math.isnan(measured) else max(share_mb, measured)

    def _observations(self, models: dict[int, int], tags: dict[int, str]) -> Iterable[ObservationInfo]:
        words, floats = self._words, self._floats
        by_generation = {words[at + Model.GENERATION]: tags[row] for row, at in models.items()}
        for _, at in self._rows("observations"):
            first = at + Observation.PAIRS
            pairs = words[first : first + min(words[at + Observation.PAIRS_USED], Observation.PAIRS_LENGTH)].tolist()
            count = min(words[at + Observation.COUNT], Observation.READINGS_KEPT)
            start = at + Observation.READINGS
            yield ObservationInfo(
                {by_generation.get(pair >> 16, "(recycled)"): pair & 0xFFFF for pair in pairs},
                tuple(floats[start : start + count].tolist()),
                self._reference(words[at + Observation.DEVICE]),
            )

    def _events(self, tags: dict[int, str], choice: EventChoice) -> Iterable[EventInfo]:
        table, written = self._layout.events, self._words[Header.EVENTS]
        first = max(1, written - table.capacity + 2, choice.after + 1)
        sequences: Iterable[int] = range(first, written + 1)
        if choice.newest_of_each is not None:
            sequences = self._newest(first, written, choice.newest_of_each)
        for sequence in sequences:
            at = table.base + (sequence - 1) % table.capacity * table.words
            if self._words[at + Event.SEQUENCE] == sequence:
                yield self._event(at, tags)

    def _newest(self, first: int, last: int, count: int) -> list[int]:
        """Return the sequence numbers of so many newest events of each kind and reason, in order."""
        table = self._layout.events
        kinds = self._words[table.base + Event.KIND : table.end : table.words].tolist()
        seen: Counter[int] = Counter()
        found = []
        for sequence in range(last, first - 1, -1):
            kind = kinds[(sequence - 1) % table.capacity]
            if seen[kind] < count:
                seen[kind] += 1
                found.append(sequence)
        return found[::-1]

    def _event(self, at: int, tags: dict[int, str]) -> EventInfo:
        words, floats = self._words, self._floats
        placed, decided = divmod(words[at + Event.KIND], 2**32)
        reason, kind = divmod(decided, 256)
        model = words[at + Event.MODEL]
        return EventInfo(
            sequence=words[at + Event.SEQUENCE],
            kind=_EVENT_KINDS.get(kind, f"kind {kind}"),
            age_s=self._age(words[at + Event.TIME]),
            pid=words[at + Event.PID],
            tag=tags.get(model - 1) if model else None,
            instance=self._reference(words[at + Event.INSTANCE]),
            ticket=self._reference(words[at + Event.TICKET]),
            value=self._number(floats[at + Event.VALUE]),
            reason=reason - 1 if reason else None,
            need_mb=self._number(floats[at + Event.NEED_MB]) if reason else None,
            free_mb=self._number(floats[at + Event.FREE_MB]) if reason else None,
            coming_mb=self._number(floats[at + Event.COMING_MB]) if reason else None,
            seconds=self._number(floats[at + Event.SECONDS]) if reason else None,
            other=tags.get(words[at + Event.OTHER] - 1) if reason else None,
            on=tuple(device_rows(words[at + Event.ON])) if reason else (),
            devices=tuple(device_rows(placed)),
        )


def as_json(row: Snapshot | EventInfo) -> dict[str, Any]:
    """Return a snapshot, or a row of one, as JSON values: figures that are not finite become None.

    `mpmm.cli` documents the schema.
    """
    return {field.name: _jsonable(getattr(row, field.name)) for field in fields(row)}


def _jsonable(value: Any) -> Any:
    kind = value.__class__
    if kind in _PLAIN:
        return value
    if kind is float:
        return value if math.isfinite(value) else None
    if kind is tuple:
        return [_jsonable(entry) for entry in value]
    # A mapping, or a dataclass, which keeps its fields in their order.
    entries = value if kind is dict else value.__dict__
    return {name: entry if entry.__class__ in _PLAIN else _jsonable(entry) for name, entry in entries.items()}


_PLAIN = frozenset({int, str, bool, type(None)})
