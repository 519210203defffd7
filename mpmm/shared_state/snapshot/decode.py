"""Turns a copy of a segment into a `Snapshot`: reads fields by their kind in `records`, and computes the others."""

from __future__ import annotations

import gc
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import compress
from typing import TypeVar

from mpmm.errors import SegmentCorruptError
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
    Table,
    Ticket,
    device_rows,
)
from mpmm.shared_state.liveness import pid_namespace
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot.kinds import READ, Rows
from mpmm.shared_state.snapshot.records import (
    FORGOTTEN,
    DeviceInfo,
    EventInfo,
    InstanceInfo,
    LockInfo,
    MemberInfo,
    ModelInfo,
    ObservationInfo,
    PinInfo,
    Snapshot,
    TicketInfo,
)
from mpmm.shared_state.states import MemberState
from mpmm.shared_state.transaction import roll_back

__all__ = ["ALL_EVENTS", "EventChoice", "decode", "used_members"]

Record = TypeVar(
    "Record", MemberInfo, ModelInfo, InstanceInfo, TicketInfo, PinInfo, DeviceInfo, EventInfo, LockInfo, Snapshot
)

_EVENT_KINDS = {kind.value: kind.name.lower() for kind in EventKind}
_MEMBER_KINDS = {kind.value: kind.name.lower() for kind in MemberState if kind}
# In these states the reservation counts: the figure does not show the memory yet, or another program uses it.
_BOOKED_BY_RESERVATION = ("loading", "resuming", "leased")


@dataclass(frozen=True, eq=False)
class EventChoice:
    """Which events of the ring a snapshot returns.

    after: only those with a higher sequence number. newest_of_each: at most this many of each kind and reason, plus for
    each present waiter the last one that says why it waits, by which `observability.formatting` tells since when.
    """

    after: int = 0
    newest_of_each: int | None = None


ALL_EVENTS = EventChoice()


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

    Raises SegmentCorruptError if rows hold what mpmm never writes.
    """
    words = memoryview(copied).cast("Q")
    # The copy may be from the middle of a transaction whose writer was killed or stopped. The undo log in the copy
    # restores the state before it.
    torn = roll_back(words, layout.undo)
    # Thousands of new objects, none of them garbage, would make the collector run several times.
    collects = gc.isenabled()
    try:
        gc.disable()
        wanted = choice if with_events else None
        return _Decoder(copied, layout).snapshot(namespace, segment, torn, held, alive or {}, wanted)
    # Junk in the segment is refused here, once, so that code that reads a field need not expect it.
    except (IndexError, ValueError, OverflowError) as error:
        raise SegmentCorruptError(
            f"segment {segment} of namespace {namespace!r} holds what mpmm never writes ({error}); "
            "end its processes, the next one makes a new segment",
            name=segment,
        ) from error
    finally:
        if collects:
            gc.enable()


def used_members(copied: bytearray, layout: Layout) -> list[tuple[int, int, int, int, int]]:
    """Return slot, pid, time of attaching (monotonic, ns), inode of the lock file and pid namespace of the members."""
    words, table = memoryview(copied).cast("Q"), layout.members
    starts = ((slot, table.base + slot * table.words) for slot in _used(words, table))
    asked = (Member.PID, Member.ATTACHED, Member.LOCK)
    return [(slot, *(words[at + word] for word in asked), words[Header.PID_NAMESPACE]) for slot, at in starts]  # type: ignore[misc]  # mypy does not count a generator's words


def _used(words: memoryview, table: Table) -> list[int]:
    # The whole table, not just the rows below its end word: a used row above that breaks H5, and a check must see it.
    return list(compress(range(table.capacity), words[table.base : table.end : table.words].tolist()))


def _records(record: type[Record], rows: Rows, **computed: Iterable[object]) -> list[Record]:
    """Return a record for each row. computed: the columns of the fields without a kind."""
    columns = [computed[one.name] if one.name in computed else one.metadata[READ](rows) for one in fields(record)]
    return [record(*values) for values in zip(*columns, strict=True)]


class _Decoder:
    def __init__(self, copied: bytearray, layout: Layout) -> None:
        self._bytes = copied
        self._layout = layout
        self._words = memoryview(copied).cast("Q")
        self._floats = memoryview(copied).cast("B").cast("d")
        # Read together, because their difference converts the times of events.
        self._now, self._wall_s = time.monotonic_ns(), time.time()
        self._tags: dict[int, str] = {}
        # Before any other row is read, because other rows take their models' tags from here.
        self._models = _used(self._words, layout.models)
        models = self._rows(layout.models)
        self._tags.update(zip(self._models, [models.text_at(at + Model.TAG) for at in models.starts], strict=True))

    def snapshot(
        self,
        namespace: str,
        segment: str,
        torn: int,
        held: bool | None,
        alive: dict[int, bool],
        choice: EventChoice | None,
    ) -> Snapshot:
        words, header = self._words, self._rows_at([0])
        # The segment's settings, not this process's: the members follow these.
        settings = Settings(*self._floats[Header.SETTINGS : Header.SETTINGS + len(fields(Settings))].tolist())
        instances = self._instances()
        devices = self._devices(settings, instances)
        columns = {
            "namespace": namespace,
            "segment": segment,
            "layout_version": LAYOUT_VERSION,
            "taken_s": self._now / 1e9,
            "taken_wall_s": self._wall_s,
            "torn_words": torn,
            "lock": self._lock(header, held),
            # Without a leader, LEADER_SINCE keeps the last one's time.
            "leader_for_s": header.age(words[Header.LEADER_SINCE]) if words[Header.LEADER] else None,
            # Not from the header's bits, because `check` compares those with this. (H3)
            "isolated": min((device.isolated for device in devices if device.isolated is not None), default=None),
            "suspend_budget_mb": self._suspend_budget_mb(settings),
            "settings": settings,
            "table_ends": {table.name: words[table.end_word] for table in self._layout.growing},
            "members": tuple(self._members(alive)),
            "models": tuple(self._model_infos(instances)),
            "instances": tuple(instances),
            # Not by row, but in the order in which they are served, as far as that is known without a plan.
            "tickets": tuple(sorted(self._tickets(), key=_place_in_queue)),
            "pins": tuple(self._pins()),
            "devices": tuple(devices),
            "observations": tuple(self._observations()),
            "events": () if choice is None else tuple(self._events(choice)),
            # `read` fills it in, from the folder.
            "missing_files": (),
        }
        return _records(Snapshot, header, **{name: (value,) for name, value in columns.items()})[0]

    def _suspend_budget_mb(self, settings: Settings) -> float:
        chosen = settings.suspend_budget_mb
        # Infinite unless it was chosen: then the creator's share of the host's memory counts.
        return chosen if math.isfinite(chosen) else self._floats[Header.HOST_SHARE_MB]

    def _rows(self, table: Table) -> Rows:
        return self._rows_at([table.base + row * table.words for row in _used(self._words, table)])

    def _rows_at(self, starts: list[int]) -> Rows:
        return Rows(starts, self._words, self._floats, self._bytes, self._now, self._tags)

    def _lock(self, header: Rows, held: bool | None) -> LockInfo:
        stopped = False
        # In another pid namespace, the holder's pid may be that of another process.
        if held and self._words[Header.PID_NAMESPACE] == pid_namespace():
            # Imported only if the lock is held: the import takes longer than the rest of a snapshot.
            import psutil

            try:
                status = psutil.Process(self._words[Header.LOCK_HOLDER]).status()
                stopped = status in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
            # It may have ended since, or the word may be junk: then nothing is known.
            except (psutil.Error, ValueError, OverflowError):
                stopped = False
        return _records(LockInfo, header, held=(held,), holder_stopped=(stopped,))[0]

    def _members(self, alive: dict[int, bool]) -> list[MemberInfo]:
        table = self._layout.members
        slots, rows = _used(self._words, table), self._rows(table)
        # A row with junk in STATE is in use, too, and must not be left out.
        kinds = [_MEMBER_KINDS.get(found, "worker") for found in rows.words_at(Member.STATE)]
        peaks = rows.floats_at(Member.PEAK_MB)
        return _records(
            MemberInfo,
            rows,
            slot=slots,
            kind=kinds,
            alive=[alive.get(slot) for slot in slots],
            # Only servers are measured; the 0 of other members would look like a figure.
            peak_mb=[peak if kind == "server" else None for kind, peak in zip(kinds, peaks, strict=True)],
        )

    def _model_infos(self, instances: list[InstanceInfo]) -> list[ModelInfo]:
        rows, used = self._rows(self._layout.models), _last_used(instances)
        estimates = zip(rows.words_at(Model.KNOWN), rows.floats_at(Model.ESTIMATE_MB), strict=True)
        used_at = zip(self._models, rows.words_at(Model.USED_AT), strict=True)
        return _records(
            ModelInfo,
            rows,
            row=self._models,
            # ESTIMATE_MB means nothing unless KNOWN is set.
            estimate_mb=[mb if known else None for known, mb in estimates],
            keep_alive_s=[_kept_s(word) for word in rows.words_at(Model.KEEP_ALIVE)],
            # USED_AT is written only when a copy begins to load or is dropped, to save a store on the warm path. If
            # there are copies, they say more exactly when the model was used.
            unused_for_s=[used[row] if row in used else rows.age(then) for row, then in used_at],
        )

    def _instances(self) -> list[InstanceInfo]:
        table = self._layout.instances
        rows = self._rows(table)
        # A segment with junk may name more devices than a row has words for shares.
        lie_on = [device_rows(bits)[:MOST_SPANNED] for bits in rows.words_at(Instance.DEVICES)]
        return _records(
            InstanceInfo,
            rows,
            row=_used(self._words, table),
            device=[devices[0] if devices else 0 for devices in lie_on],
            shares_mb=[self._shares(start, devices) for start, devices in zip(rows.starts, lie_on, strict=True)],
            peak_mb=[self._server_peak(word) for word in rows.words_at(Instance.SERVER)],
            held=self._users(rows),
        )

    def _users(self, rows: Rows) -> list[int]:
        """Return for each row how many use it: of a copy with its seats, of a seat by itself."""
        numbers = _used(self._words, self._layout.instances)
        users = {row: int(state == Instance.ACTIVE) for row, state in zip(numbers, rows.words_at(0), strict=True)}
        found = dict(users)
        for row, copy in zip(numbers, rows.words_at(Instance.SEAT_OF), strict=True):
            if copy:
                # A copy's own row has a user, like each of its seats, so add theirs. `get`, because junk may name a
                # free row.
                found[copy - 1] = found.get(copy - 1, 0) + users[row]
        return [found[row] for row in numbers]

    def _shares(self, at: int, devices: list[int]) -> dict[int, float]:
        # As in `Tables.shares_of`: on a single device, only MB is written.
        if len(devices) == 1:
            return {devices[0]: self._floats[at + Instance.MB]}
        first = at + Instance.SHARES
        return dict(zip(devices, self._floats[first : first + len(devices)].tolist(), strict=True))

    def _server_peak(self, server: int) -> float | None:
        if not server:
            return None
        # Not by `Tables`, which reads the live segment, while this is a copy.
        return self._floats[self._layout.members.base + (server - 1) * Member.WORDS + Member.PEAK_MB] or None

    def _tickets(self) -> list[TicketInfo]:
        table = self._layout.tickets
        rows = self._rows(table)
        members = [word - 1 for word in rows.words_at(Ticket.MEMBER)]
        places = zip(rows.words_at(Ticket.ENQUEUED), rows.words_at(Ticket.RANK), strict=True)
        return _records(
            TicketInfo,
            rows,
            row=_used(self._words, table),
            urgency=[urgency_of(enqueued, rank) for enqueued, rank in places],
            member=members,
            pid=[self._pid_of(member) for member in members],
            time_left_s=[
                # The word of a wait without a limit is not a time.
                -rows.age(deadline) if deadline < LONGEST_NS else math.inf
                for deadline in rows.words_at(Ticket.DEADLINE)
            ],
        )

    def _pid_of(self, slot: int) -> int:
        table = self._layout.members
        # MEMBER may be junk; do not fail here, so that the checks can report it.
        return int(self._words[table.base + slot * table.words + Member.PID]) if 0 <= slot < table.capacity else 0

    def _pins(self) -> list[PinInfo]:
        return _records(PinInfo, self._rows(self._layout.pins), row=_used(self._words, self._layout.pins))

    def _devices(self, settings: Settings, instances: list[InstanceInfo]) -> list[DeviceInfo]:
        table = self._layout.devices
        numbers, rows = _used(self._words, table), self._rows(table)
        # Both as the scheduler counts them, so that the shown figures explain its decisions.
        used = [self._used_mb(row, at, instances) for row, at in zip(numbers, rows.starts, strict=True)]
        committed = [self._committed_mb(row, at, instances) for row, at in zip(numbers, rows.starts, strict=True)]
        sampled = rows.words_at(Device.SAMPLED)
        return _records(
            DeviceInfo,
            rows,
            row=numbers,
            limit_mb=[total * (1 - settings.slack_percentage) for total in rows.floats_at(Device.TOTAL_MB)],
            used_mb=used,
            # Before the first sample the word is 0, which was never measured.
            peak_mb=[mb if then else None for then, mb in zip(sampled, rows.floats_at(Device.PEAK_MB), strict=True)],
            committed_mb=committed,
            # Never below 0: if the figure exceeds the accounts, nothing is reserved.
            reserved_mb=[max(0.0, mb - (shown or 0.0)) for mb, shown in zip(committed, used, strict=True)],
            returns_mb=[self._returns(at) for at in rows.starts],
            samples=[self._samples(at + Device.RING) for at in rows.starts],
        )

    def _used_mb(self, device: int, at: int, instances: list[InstanceInfo]) -> float | None:
        """Return the last figure, None before the first; or, if nothing is measured, what is accounted for."""
        if self._words[Header.SOURCE_ACCOUNTING_ONLY]:
            here = (one for one in instances if device in one.shares_mb and one.state not in _BOOKED_BY_RESERVATION)
            return math.fsum(one.shares_mb[device] for one in here)
        return self._floats[at + Device.USED_MB] if self._words[at + Device.SAMPLED] else None

    def _committed_mb(self, device: int, at: int, instances: list[InstanceInfo]) -> float:
        """Return what admission counts as taken of a device, see `policy.ledger`."""
        # A device's row does not have this sum: admission adds up the instance rows each time, and so does this.
        here = [one for one in instances if device in one.shares_mb]
        returning = self._floats[at + Device.RETURNING_MB] if self._words[Header.SOURCE_FREES_LATE] else 0.0
        committed = math.fsum(self._committed(one, device) for one in here) + returning
        # nan before the first sample, which would make the sum nan, too.
        external = self._floats[at + Device.EXTERNAL_MB]
        return committed + (0.0 if math.isnan(external) else external)

    def _committed(self, instance: InstanceInfo, device: int) -> float:
        """Return the MB that admission counts for a copy or lease on a device; see `policy.ledger`, `CopiesReader`."""
        span = len(instance.shares_mb)
        if instance.state == "leased":
            # The lease counts even if its program takes less; if the program takes more, that counts.
            return max(instance.reserved_mb, instance.mb) / span
        if instance.state not in ("loading", "resuming"):
            return instance.shares_mb[device]
        share_mb = instance.reserved_mb / span
        if instance.server is None or not self._words[Header.SOURCE_MEASURES_PROCESSES]:
            return share_mb
        at = self._layout.members.base + instance.server * Member.WORDS
        word = Member.MEASURED_MB if span == 1 else Member.SHARES + list(instance.shares_mb).index(device)
        # It may already take more than its reservation, as in `CopiesReader`.
        measured = self._floats[at + word]
        return share_mb if math.isnan(measured) else max(share_mb, measured)

    def _returns(self, at: int) -> tuple[float, ...]:
        # Junk may claim more entries than there are words.
        awaited = min(self._words[at + Device.RETURN_COUNT], Device.RETURNS_LENGTH)
        return tuple(self._floats[at + Device.RETURNS + Device.RETURN_WORDS * n + 1] for n in range(awaited))

    def _samples(self, ring: int) -> tuple[tuple[float, float], ...]:
        end = ring + 2 * Device.RING_LENGTH
        times = self._words[ring:end:2].tolist()
        figures = self._floats[ring + 1 : end : 2].tolist()
        # By time, because the ring may begin anywhere; an entry with time 0 was never written.
        taken = sorted((then, mb) for then, mb in zip(times, figures, strict=True) if then and math.isfinite(mb))
        return tuple(((self._now - then) / 1e9, mb) for then, mb in taken)

    def _observations(self) -> Iterable[ObservationInfo]:
        words, floats = self._words, self._floats
        generations = self._rows(self._layout.models).words_at(Model.GENERATION)
        # By generation, because the row may be another tag's by now.
        by_generation = {one: self._tags[row] for one, row in zip(generations, self._models, strict=True)}
        for at in self._rows(self._layout.observations).starts:
            first = at + Observation.PAIRS
            pairs = words[first : first + min(words[at + Observation.PAIRS_USED], Observation.PAIRS_LENGTH)].tolist()
            count = min(words[at + Observation.COUNT], Observation.READINGS_KEPT)
            start = at + Observation.READINGS
            device = words[at + Observation.DEVICE]
            yield ObservationInfo(
                # A pair packs a generation and a number of copies into one word.
                {by_generation.get(pair >> 16, FORGOTTEN): pair & 0xFFFF for pair in pairs},
                tuple(floats[start : start + count].tolist()),
                device - 1 if device else None,
            )

    def _events(self, choice: EventChoice) -> list[EventInfo]:
        table, written = self._layout.events, self._words[Header.EVENTS]
        # The two rows behind the newest may be half written. (E1)
        first = max(1, written - table.capacity + 2, choice.after + 1)
        # Sequence numbers, not rows, so that each row's number can be compared with the expected one.
        sequences: Iterable[int] = range(first, written + 1)
        if choice.newest_of_each is not None:
            sequences = self._newest(first, written, choice.newest_of_each)
        places = ((sequence, table.base + (sequence - 1) % table.capacity * table.words) for sequence in sequences)
        # An event that was overwritten during the copy, or rolled back, has another number, and is left out.
        rows = self._rows_at([at for sequence, at in places if self._words[at + Event.SEQUENCE] == sequence])
        placed, kinds, reasons = [], [], []
        for word in rows.words_at(Event.KIND):
            # Devices, reason plus one, and kind share a word, so that an event takes few stores.
            devices, decided = divmod(word, 2**32)
            reason, kind = divmod(decided, 256)
            placed.append(tuple(device_rows(devices)))
            kinds.append(_EVENT_KINDS.get(kind) or f"kind {kind}")
            reasons.append(reason - 1 if reason else None)

        def figures(place: int) -> list[float | None]:
            """Return the reasons' figures; None without a reason, where the row has an older event's figure."""
            found = zip(reasons, rows.floats_at(place), strict=True)
            return [None if reason is None or math.isnan(value) else value for reason, value in found]

        others = [
            word if reason is not None else 0 for reason, word in zip(reasons, rows.words_at(Event.OTHER), strict=True)
        ]
        about = zip(reasons, rows.words_at(Event.ON), strict=True)
        return _records(
            EventInfo,
            rows,
            kind=kinds,
            reason=reasons,
            need_mb=figures(Event.NEED_MB),
            free_mb=figures(Event.FREE_MB),
            coming_mb=figures(Event.COMING_MB),
            seconds=figures(Event.SECONDS),
            tag=self._tags_then(rows, rows.words_at(Event.MODEL)),
            other=self._tags_then(rows, others),
            on=[() if reason is None else tuple(device_rows(word)) for reason, word in about],
            devices=placed,
        )

    def _tags_then(self, events: Rows, references: list[int]) -> list[str | None]:
        """Return the tags that the models or leases in events had at the time of the events."""
        table, words = self._layout.models, self._words
        last: dict[int, tuple[int, str]] = {}
        # Junk may refer to a row that does not exist: then no tag is known.
        for reference in {one for one in references if 0 < one <= table.capacity}:
            at = table.base + (reference - 1) * table.words
            # Not from `self._tags`, because a free row still has its last lease's name.
            last[reference] = words[at + Model.EVENTS_BEFORE], events.text_at(at + Model.TAG)
        found: list[str | None] = []
        for reference, sequence in zip(references, events.words_at(Event.SEQUENCE), strict=True):
            before, tag = last.get(reference, (0, ""))
            found.append(None if not reference else tag if tag and sequence > before else FORGOTTEN)
        return found

    def _newest(self, first: int, last: int, count: int) -> list[int]:
        """Return the sequence numbers of the events that `EventChoice.newest_of_each` asks for, in order."""
        table = self._layout.events
        kinds = self._words[table.base + Event.KIND : table.end : table.words].tolist()
        tickets = self._words[table.base + Event.TICKET : table.end : table.words].tolist()
        rows = self._rows(self._layout.tickets)
        # Events hold ticket numbers plus one.
        waiters = {number + 1 for number in rows.words_at(Ticket.NUMBER)}
        seen: Counter[int] = Counter()
        found = []
        # From the newest back, or it would find the oldest of each kind.
        for sequence in range(last, first - 1, -1):
            # Without the device bits, which would make a separate kind for each device.
            place = (sequence - 1) % table.capacity
            kind, ticket = kinds[place] % 2**32, tickets[place]
            is_of_waiter = kind % 256 == EventKind.WAITS and ticket in waiters
            if is_of_waiter:
                waiters.discard(ticket)
            if is_of_waiter or seen[kind] < count:
                seen[kind] += 1
                found.append(sequence)
        return found[::-1]


def _last_used(instances: list[InstanceInfo]) -> dict[int, float]:
    """Return for each model with copies how long ago one was last used, by the model's row."""
    used: dict[int, float] = {}
    for copy in instances:
        # An active copy is in use now, however long ago its use began.
        for_s = 0.0 if copy.state == "active" else copy.for_s
        used[copy.model] = min(for_s, used.get(copy.model, for_s))
    return used


def _kept_s(word: int) -> float | None:
    # The segment stores it plus one; 0 stands for a model whose users have not said.
    return None if not word else math.inf if word > LONGEST_NS else (word - 1) / 1e9


def _place_in_queue(ticket: TicketInfo) -> tuple[int, float, int]:
    # The order of `policy.fairness.queue_order` except promotions, in seconds: by class, then by rank, which is the
    # time of queueing less the head start.
    return ticket.priority, -ticket.waited_s - HEAD_START_S * ticket.urgency, ticket.number
