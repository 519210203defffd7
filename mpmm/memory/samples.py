"""The samples of a namespace, in shared memory: the leader takes them for all processes (see `mpmm.memory.monitor`)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from mpmm.errors import InvalidArgumentError
from mpmm.memory.listed_pids import ListedPids
from mpmm.memory.placement import Placement, fraction_of
from mpmm.scheduling import Scheduler
from mpmm.shared_state.layout import Device, Header, Member, device_bits, device_rows
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.tables import fit_text
from mpmm.shared_state.transaction import Transaction
from mpmm.sources import (
    DeviceInfo,
    DeviceSample,
    Measures,
    MemorySource,
    counts_named_only,
    frees_late,
    ignores_names,
    process_knowledge,
    what_it_measures,
)

__all__ = ["SharedSamples"]


@dataclass
class _News:
    """The figures in samples that no process has published before.

    measured: MB by pid, then by device row. fresh_rows, complete_rows: bits of the device rows that were read, and of
    those whose list of processes is complete. figures: row, MB in use, and the sample that says so.
    """

    measured: defaultdict[int, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    fresh_rows: int = 0
    complete_rows: int = 0
    figures: list[tuple[int, float, DeviceSample]] = field(default_factory=list)

    def taken_mb(self, row: int, pids: Sequence[int]) -> float | None:
        """Return what these processes take of a device (row): 0 if a complete list has none, None if it is unknown."""
        listed = [self.measured[pid][row] for pid in pids if row in self.measured.get(pid, ())]
        return math.fsum(listed) if listed or self.complete_rows >> row & 1 else None


class SharedSamples:
    """A `SampleStore` in a namespace's device rows. Each method is one transaction, unless it says otherwise.

    Devices are known by uuid. A process may see only some of them, by its `CUDA_VISIBLE_DEVICES` or by choice: it
    measures these, and loads onto these.
    """

    def __init__(self, namespace: Namespace, scheduler: Scheduler) -> None:
        self._namespace = namespace
        self._scheduler = scheduler
        # The row of each device that this process sees, by the index that the source gives it.
        self._rows: dict[int, int] = {}
        self._source: MemorySource | None = None
        # Whether the source can measure nothing.
        self._blind = False
        self._pids = ListedPids(namespace)
        # The pids of the model servers of which other processes, which they have started, take memory.
        self._spread: Set[int] = frozenset()

    def describe(
        self, source: MemorySource, devices: Sequence[DeviceInfo], next_in_line: Sequence[int] | None = None
    ) -> None:
        """Give rows to the devices that a source reports; they replace those of another source if this process leads.

        A source that can measure nothing describes no device beside measured ones that are in use, or that others can
        measure: its process uses those, and relies on the figures of the others, or on accounting.

        next_in_line: if given, this member polls from now on, and the members in these slots are woken, to watch it.
        """
        namespace = self._namespace
        self._source = source
        transitions = namespace.transitions
        found = [
            (fit_text(info.uuid, Device.UUID_BYTES), fit_text(info.name, Device.NAME_BYTES), info.total_mb)
            for info in devices
        ]
        name = fit_text(source.name, Header.SOURCE_NAME_BYTES)
        measures = what_it_measures(source)
        sees = measures > Measures.NOTHING
        self._blind = not sees
        with namespace.transaction() as t:
            transitions.members.note_source(t, namespace.slot, measures)
            led_by = namespace.tables.text(Header.SOURCE_NAME)
            of_another = led_by not in (b"", name)
            blind = not sees and self._others_measure()
            # A process that measures is better than a leader that does not, and is about to take its place.
            outranks = sees and namespace.tables.header.source_accounting_only
            rows: dict[bytes, int] = {}
            if not blind and (next_in_line is not None or not of_another or outranks):
                found_rows = transitions.devices.describe(t, found, replace=of_another, measured=sees)
                rows = dict(zip((uuid for uuid, *_ in found), found_rows, strict=True))
            elif not blind:
                rows = {uuid: row for row, uuid in self._uuids().items()}
            if next_in_line is not None:
                self._lead(t, source, name, led_by == name, next_in_line)
        self._rows = {info.index: rows[uuid] for info, (uuid, *_) in zip(devices, found, strict=True) if uuid in rows}

    def _lead(
        self, t: Transaction, source: MemorySource, name: bytes, is_same: bool, next_in_line: Sequence[int]
    ) -> None:
        """Note that this member polls from now on, with a source of that name, and wake those next in line.

        is_same: the last leader had the same source.
        """
        namespace = self._namespace
        knows = process_knowledge(source)
        if knows is None:
            # Findings of other processes about the same source still hold for a process that has none of its own yet.
            knows = is_same and namespace.tables.header.source_measures_processes
        flags = (knows, frees_late(source), self._blind)
        namespace.transitions.members.lead(t, namespace.slot, name, flags, counts_named_only(source))
        for slot in next_in_line:
            namespace.transitions.members.ring(t, slot)

    def _others_measure(self) -> bool:
        """Tell whether there are measured devices that are in use, or that a living process can measure.

        Needs the lock.
        """
        tables = self._namespace.tables
        rows = tables.used_rows(self._namespace.segment.layout.devices)
        measured = [row for row in rows if tables.devices[row].measured]
        in_use = any(tables.on_device(row) for row in measured)
        return bool(measured) and (in_use or bool(self.better_members(Measures.NOTHING)))

    def better_members(self, measures: int) -> set[tuple[int, int]]:
        """Return slot and generation of the living workers that can measure more than `measures`; without the lock."""
        namespace = self._namespace
        tables = namespace.tables
        return {
            (slot, tables.members[slot].generation)
            for slot, its_own in tables.measures_of_workers().items()
            if its_own > measures and namespace.member_is_alive(slot)
        }

    def forget_stated_devices(self) -> None:
        """Free the rows of devices that were only stated, and gave way to measured ones, once no instance is there."""
        namespace = self._namespace
        tables = namespace.tables
        rows = [
            row
            for row in tables.used_rows(namespace.segment.layout.devices)
            if not tables.devices[row].measured and tables.devices[row].total_mb == 0
        ]
        if not all(tables.on_device(row) for row in rows):
            with namespace.transaction() as t:
                for row in rows:
                    namespace.transitions.devices.forget_stated(t, row)

    def _uuids(self) -> dict[int, bytes]:
        tables = self._namespace.tables
        rows = tables.used_rows(self._namespace.segment.layout.devices)
        return {row: tables.device_uuid(row) for row in rows}

    def rows(self) -> list[int]:
        """Return the rows of the devices that this process sees; all if it sees none of them. Without the lock.

        The device that a source without measurements has stated no longer counts once there are measured devices.
        """
        used = self._namespace.tables.used_rows(self._namespace.segment.layout.devices)
        if self._blind:
            tables = self._namespace.tables
            measured = [row for row in used if tables.devices[row].measured]
            if measured:
                self._rows = {}
                return measured
        return sorted(self._rows.values()) or used

    def visible_bits(self) -> int:
        """Return the bits of the devices that this process sees, 0 if those are all. Without the lock."""
        used = self._namespace.tables.used_rows(self._namespace.segment.layout.devices)
        # Usually there is one, and a process that sees none of several sees them all.
        if len(used) < 2:
            return 0
        bits = device_bits(self.rows())
        return 0 if bits == device_bits(used) else bits

    def bits_of(self, chosen: Sequence[int | str]) -> int:
        """Return the bits of the devices with these indices or uuids. Without the lock. Raises InvalidArgumentError."""
        uuids = {uuid.decode("utf-8", "replace"): row for row, uuid in self._uuids().items()}
        seen = {uuid: row for uuid, row in uuids.items() if row in self._rows.values()}
        bits = 0
        for wanted in chosen:
            row = self._rows.get(wanted) if isinstance(wanted, int) else seen.get(wanted)
            if row is None or isinstance(wanted, bool):
                names = {row: uuid for uuid, row in uuids.items()}
                has = ", ".join(f"{index} ({names.get(row, '?')})" for index, row in sorted(self._rows.items()))
                raise InvalidArgumentError(
                    f"devices: {wanted!r} is not among the devices of this process: {has or 'none'}"
                )
            bits |= 1 << row
        return bits

    def placement_of(self, bits: int, mb: float) -> Placement:
        """Return the placement of `mb` spread over the devices with these bits, as this process knows them.

        Without the lock.
        """
        uuids, indices = self._uuids(), {row: index for index, row in self._rows.items()}
        rows = device_rows(bits)
        return Placement(
            tuple(indices[row] for row in rows if row in indices),
            tuple(uuids[row].decode("utf-8", "replace") for row in rows if row in uuids),
            mb,
            self.memory_fraction(bits, mb),
        )

    def memory_fraction(self, bits: int, mb: float) -> float | None:
        """Return the share of each of these devices that `mb` takes, see `Placement`. Without the lock."""
        return fraction_of(mb, [self._namespace.tables.devices[row].total_mb for row in device_rows(bits)])

    def placement_of_instance(self, row: int) -> Placement:
        """Return where an instance (row) is, and what is reserved for it there. Without the lock."""
        instance = self._namespace.tables.instances[row]
        return self.placement_of(instance.device_bits, instance.reserved_mb)

    def publish(self, samples: Sequence[DeviceSample], timeout_s: float | None = None) -> None:
        """Record the figures that could be read, and serve waiters if these show more room than before.

        If they do not, all waiters go on waiting: changes by time alone are left to the leader's next poll. Planning
        after every sample of every process would hold the lock for longer than everything else.

        timeout_s: the longest wait for the lock.
        """
        # The processes' descendants are looked up before the lock is taken.
        samples, self._spread = self._pids.with_servers(samples)
        listed: dict[int, float] = {}
        for sample in samples:
            for pid, mb in sample.process_mb.items():
                listed[pid] = listed.get(pid, 0.0) + mb
        programs = self._pids.programs()
        # Until the source has shown a process of this namespace, the pids that it lists may be such processes', too,
        # under other numbers.
        knows = self._source is None or process_knowledge(self._source)
        unrelated = self._pids.unrelated(listed) if listed and knows else set()
        proven = self._shows_ours(listed)
        here = self._pids.members_among(listed) if listed else set()
        with self._namespace.transaction(timeout_s) as t:
            before = self._scheduler.room()
            news = self._take_in(t, samples, unrelated)
            if news is None:
                return
            if proven:
                self._namespace.transitions.members.note_processes(t, True)
                self._end_isolations(t)
            # Even if nothing is listed: a process that once was listed is unknown by now.
            knew = self._namespace.tables.header.source_measures_processes and news.figures
            if news.measured or news.complete_rows or knew:
                self._measure_members(t, news, here, min(sample.taken_ns for sample in samples))
                self._share_out(t, news, programs)
            for row, used_mb, sample in news.figures:
                self._reap_what_was_freed(t, row, used_mb, sample)
                self._namespace.transitions.devices.sample(t, row, used_mb, sample.taken_ns, sample.done_ns)
            if proven or self._scheduler.shows_more_room(before):
                self._scheduler.advance(t)

    def _reap_what_was_freed(self, t: Transaction, row: int, used_mb: float, sample: DeviceSample) -> None:
        """Reap dead servers if a figure is less than what the instances on a device certainly had.

        Otherwise the ledger would take the dead servers' memory for memory that is not used. A server that lives after
        the sample was taken has lived all the time.
        """
        namespace = self._namespace
        ledgers = namespace.transitions.ledgers
        if not ledgers.is_contradicted(row, used_mb, sample.taken_ns, sample.done_ns or t.now):
            return
        for instance in namespace.tables.on_device(row):
            server = namespace.tables.instances[instance].server
            if server is not None and not namespace.reap_if_dead(t, server):
                # The leader goes on, in transactions of its own.
                return

    def _take_in(self, t: Transaction, samples: Sequence[DeviceSample], unrelated: Set[int]) -> _News | None:
        """Record that the devices were read, and return the new figures.

        None if other processes have published newer figures of all devices, as happens when many ask at once: then
        those have served the waiters, too.

        unrelated: pids of programs that do not belong to the namespace.
        """
        transitions = self._namespace.transitions
        news, late = _News(), False
        for sample in samples:
            row = self._rows.get(sample.index)
            if row is None:
                continue
            transitions.devices.note_try(t, row, sample.taken_ns)
            if sample.used_mb is not None and not transitions.devices.is_news(row, sample.taken_ns):
                late = True
                continue
            # A process's figure must come from the same sample as the whole, from which it is subtracted.
            news.fresh_rows |= 1 << row
            news.complete_rows |= sample.processes_known << row
            for pid, mb in sample.process_mb.items():
                news.measured[pid][row] = mb
            if sample.used_mb is not None:
                news.figures.append((row, sample.used_mb, sample))
                external_mb = sum(mb for pid, mb in sample.process_mb.items() if pid in unrelated)
                transitions.devices.note_unrelated(t, row, external_mb)
        return None if late and not news.fresh_rows else news

    def _end_isolations(self, t: Transaction) -> None:
        """Let others load beside an isolated instance: the source has just shown that it can measure its process."""
        tables = self._namespace.tables
        for row in tables.used_rows(self._namespace.segment.layout.devices):
            instance = tables.devices[row].isolated
            if instance is not None:
                self._namespace.transitions.isolation.end(t, instance)

    def _shows_ours(self, parts: Mapping[int, float]) -> bool:
        """Tell whether a sample shows a member's memory, and so that the source knows processes; without the lock."""
        tables = self._namespace.tables
        if not parts or tables.header.source_measures_processes:
            return False
        if self._source is None or process_knowledge(self._source) is False:
            return False
        if tables.text(Header.SOURCE_NAME) != fit_text(self._source.name, Header.SOURCE_NAME_BYTES):
            return False
        return bool(self._pids.members_among(parts))

    def _measure_members(self, t: Transaction, news: _News, here: Set[int], taken_ns: int) -> None:
        """Record what each member takes; here: the slots of those that were listed.

        A member that had memory, and is on no list of its devices any more, has none. But no list has the processes of
        another container for certain, so if there are any, the member's memory is unknown.
        """
        tables, apart = self._namespace.tables, self._pids.are_apart()
        for slot in tables.used_members():
            member = tables.members[slot]
            pid, instance = member.pid, member.instance
            devices = 0 if instance is None else tables.instances[instance].device_bits
            listed = slot in here and pid in news.measured
            if pid in self._spread and slot in here:
                self._namespace.transitions.suspensions.end_checkpoints(t, slot)
            if instance is None and member.state == Member.WORKER:
                self._measure_worker(t, slot, news, news.measured[pid] if listed else {}, taken_ns)
                continue
            if listed and not devices & ~news.fresh_rows:
                self._namespace.transitions.measurements.measure(t, slot, news.measured[pid], taken_ns)
            elif member.measured_mb > 0 and not devices & ~news.fresh_rows:
                if apart or devices & ~news.complete_rows:
                    self._namespace.transitions.measurements.forget(t, slot)
                else:
                    self._namespace.transitions.measurements.measure(t, slot, {}, taken_ns)

    def _measure_worker(
        self, t: Transaction, slot: int, news: _News, listed_mb: Mapping[int, float], taken_ns: int
    ) -> None:
        """Record what a worker takes of all devices that this process sees; `listed_mb` by device, where it is listed.

        It may use any of them, so one without a figure or a complete list makes its memory unknown: the next load there
        would be charged with what it had before.
        """
        seen = device_bits(self._rows.values())
        measurements = self._namespace.transitions.measurements
        if seen & ~news.fresh_rows:
            return
        if seen & ~device_bits(listed_mb) & ~news.complete_rows or (not listed_mb and self._pids.are_apart()):
            measurements.forget(t, slot)
        else:
            measurements.measure(t, slot, listed_mb, taken_ns)

    def stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) in MB, summed over the devices that this process sees."""
        namespace = self._namespace
        with namespace.transaction():
            rows = self.rows()
            copies = self._scheduler.read_copies()
            used = [self._scheduler.used_mb(row, copies) for row in rows]
            peaks = [namespace.tables.devices[row].peak_mb for row in rows]
            total = sum(namespace.tables.devices[row].total_mb for row in rows)
        return sum(used), sum(map(max, used, peaks)), total

    def reset_peak(self) -> None:
        """Restart the peaks at the current figures."""
        with self._namespace.transaction() as t:
            self._namespace.transitions.devices.reset_peaks(t)

    def server_pids(self) -> Sequence[int]:
        """Return the pids of the namespace's model servers, and of programs that have leases. Without the lock.

        Also those of the processes that servers have started, if the source needs them: to add up what they take, or to
        find out that it lists processes of ours, because a server may take nothing beside its engine's process.
        """
        source = self._source
        lists_them = source is not None and ignores_names(source) and process_knowledge(source) is not None
        return self._pids.to_measure(trees=not lists_them)

    def is_spread(self, pid: int) -> bool:
        """Tell whether, by this process's last sample, other processes than a server's own (pid) have its memory."""
        return pid in self._spread

    def _share_out(self, t: Transaction, news: _News, programs: Mapping[int, Sequence[int]]) -> None:
        """Record with each lease what its program takes of each device; several leases of one are filled one by one.

        programs: the pids of the processes of each program, by the program's own.
        """
        namespace = self._namespace
        # Only with a figure of the whole: the device's ledger subtracts these parts from that.
        left = {row: {pid: news.taken_mb(row, tree) for pid, tree in programs.items()} for row, *_ in news.figures}
        for lease, pid in self._pids.leases().items():
            shares = namespace.tables.shares_of(lease)
            share_mb = namespace.tables.instances[lease].reserved_mb / len(shares)
            found = []
            for row, last_mb in shares:
                left_mb = left.get(row, {}).get(pid)
                mb = last_mb if left_mb is None else min(left_mb, share_mb)
                if left_mb is not None:
                    left[row][pid] = left_mb - mb
                found.append(mb)
            namespace.transitions.leases.measure_program(t, lease, found)
