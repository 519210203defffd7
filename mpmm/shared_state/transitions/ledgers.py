"""Each device's ledger, in its row: memory in use that is not ours, and memory that unloads have yet to give back.

The arithmetic is in `policy.ledger`; this module reads and writes the words.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from mpmm.policy.ledger import Entry, Figure, Ledger, Return, expire, settle
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.events import EventKind
from mpmm.shared_state.layout import Device, Header, Instance, Member, device_rows
from mpmm.shared_state.transaction import Transaction, float_bits
from mpmm.shared_state.transitions.part import Part
from mpmm.text.printable import printable_logger

__all__ = ["Ledgers"]

_LOG = printable_logger("mpmm")


class Ledgers(Part):
    """The transitions of the ledgers in device rows."""

    def read(self, device: int) -> Ledger:
        """Return the ledger of a device (row)."""
        words, floats, at = self._segment.words, self._segment.floats, self._tables.device(device)
        first = at + Device.RETURNS
        entries = range(first, first + words[at + Device.RETURN_COUNT] * Device.RETURN_WORDS, Device.RETURN_WORDS)
        returns = tuple(Return(words[entry], floats[entry + 1], floats[entry + 2]) for entry in entries)
        return Ledger(floats[at + Device.EXTERNAL_MB], floats[at + Device.EXTERNAL_LEAST_MB], returns)

    def _write(self, t: Transaction, device: int, ledger: Ledger) -> None:
        at = self._tables.device(device)
        changes = [
            (at + Device.EXTERNAL_MB, float_bits(ledger.external_mb)),
            (at + Device.EXTERNAL_LEAST_MB, float_bits(ledger.external_least_mb)),
            # The sum of the entries (D2), so that a reader without the lock need not add them up.
            (at + Device.RETURNING_MB, float_bits(ledger.returning_mb)),
            (at + Device.RETURN_COUNT, len(ledger.returns)),
        ]
        entry = at + Device.RETURNS
        for one in ledger.returns:
            # Entries behind RETURN_COUNT are not read, and not cleared, which saves stores.
            changes += [(entry, one.ended_ns), (entry + 1, float_bits(one.mb)), (entry + 2, float_bits(one.before_mb))]
            entry += Device.RETURN_WORDS
        t.set_all(changes)

    def expect_back(self, t: Transaction, row: int) -> None:
        """Await the memory of an instance that is gone until a sample shows that it is free.

        Otherwise the next load would be admitted into memory that the driver has not given back yet.
        """
        words, floats = self._segment.words, self._segment.floats
        if words[Header.SOURCE_ACCOUNTING_ONLY]:
            # No sample would ever show it, because there are only the accounts.
            return
        for number, mb in self._tables.shares_of(row):
            if mb > 0:
                device = self._tables.device(number)
                # The figure when it was unloaded; nan if there was none, because then no fall of the figure can show
                # that the memory is free.
                before_mb = floats[device + Device.USED_MB] if words[device + Device.SAMPLED] else math.nan
                ledger = self.read(number)
                self._write(t, number, ledger.awaiting(Return(t.now, mb, before_mb), Device.RETURNS_LENGTH))

    def count_after_lease(self, t: Transaction, row: int) -> None:
        """Count what the program of a lease was measured to take, now that the lease ends, until a sample corrects it.

        The program may end later, or not at all; and an ended one's memory may come back late.
        """
        words, floats = self._segment.words, self._segment.floats
        if words[Header.SOURCE_FREES_LATE]:
            # Awaited rather than external, because nothing should be evicted for a waiter that it will serve.
            self.expect_back(t, row)
            return
        for number, mb in self._tables.shares_of(row):
            if mb > 0 and not words[Header.SOURCE_ACCOUNTING_ONLY]:
                # Both (L7): it belongs to no lease any more, so evictions cannot free it.
                for word in (Device.EXTERNAL_MB, Device.EXTERNAL_LEAST_MB):
                    at = self._tables.device(number) + word
                    t.set_float(at, floats[at] + mb)

    def await_nothing(self, t: Transaction) -> None:
        """Drop all awaited memory, because from now on no sample settles it."""
        for device in self._tables.used_rows(self._layout.devices):
            if self._segment.words[self._tables.device(device) + Device.RETURN_COUNT]:
                self._write(t, device, replace(self.read(device), returns=()))

    def expire(self, t: Transaction) -> None:
        """Stop waiting for memory that no sample shows, so that a source that does not answer delays no load."""
        words = self._segment.words
        give_up_ns = self._give_up_ns()
        for device in self._tables.used_rows(self._layout.devices):
            at = self._tables.device(device)
            # Only devices that await something, because reading a ledger makes an object for each entry.
            if words[at + Device.RETURN_COUNT]:
                ledger = self.read(device)
                left = expire(ledger, words[at + Device.SAMPLED], t.now, give_up_ns)
                if left is not ledger:
                    self._write(t, device, left)

    def settle(self, t: Transaction, device: int, figure: Figure) -> None:
        """Adjust a device's ledger to a sample."""
        before = self.read(device)
        late = bool(self._segment.words[Header.SOURCE_FREES_LATE])
        after = settle(before, figure, self._entries(device, figure), t.now, self._give_up_ns(), late)
        self._write(t, device, after)
        if after.written_off_mb:
            # From here on it counts as external: its user is unknown, and no load may be admitted into it.
            t.add_float(Header.WRITTEN_OFF, after.written_off_mb)
            t.event(EventKind.WRITTEN_OFF, value=after.written_off_mb)
            t.after.append(
                partial(
                    _LOG.warning,
                    "mpmm %s: %.0f MB of %.0f MB that were unloaded did not come back in time and are written off; "
                    "memory_return_seconds sets the limit",
                    self._actor.name,
                    after.written_off_mb,
                    before.returning_mb,
                )
            )

    def is_contradicted(self, device: int, used_mb: float, taken_ns: int, done_ns: int) -> bool:
        """Tell whether less is in use than the instances certainly had, plus what was external at the last figure."""
        figure = Figure(used_mb, taken_ns, done_ns)
        least_mb = math.fsum(entry.least_mb for entry in self._entries(device, figure))
        return figure.used_mb - least_mb < self._segment.floats[self._tables.device(device) + Device.EXTERNAL_MB]

    def _give_up_ns(self) -> int:
        return to_ns(self._actor.settings.memory_return_seconds)

    def _entries(self, device: int, figure: Figure) -> list[Entry]:
        """Return how much of a device each instance and lease may have had when a sample was taken."""
        return [self._entry(row, device, figure) for row in self._tables.on_device(device)]

    def _entry(self, row: int, device: int, figure: Figure) -> Entry:
        words, floats, at = self._segment.words, self._segment.floats, self._tables.instance(row)
        state, span = words[at + Instance.STATE], words[at + Instance.DEVICES].bit_count()
        mb = dict(self._tables.shares_of(row))[device]
        # Our part of the figure, at least and at most: the rest is external, and cannot be unloaded.
        if state == Instance.LEASED:
            if words[at + Instance.PROGRAM] and words[Header.SOURCE_MEASURES_PROCESSES]:
                return Entry(mb, mb, True)
            # A lease's program may take and free memory at any time.
            return Entry(0.0, floats[at + Instance.RESERVED_MB] / span)
        # An unload whose seats are in use has not begun.
        going = state in (Instance.UNLOADING, Instance.SUSPENDING) and not words[at + Instance.SEATS]
        measured_mb = self.measured_share(row, device)
        if measured_mb is not None:
            if state == Instance.SUSPENDED and words[at + Instance.SINCE] > figure.taken_ns:
                # Its memory may have been freed while the sample was taken, and is awaited.
                return Entry(0.0, measured_mb)
            if going and words[Header.SOURCE_FREES_LATE]:
                # An ending process is no longer listed while the driver still frees its memory.
                return Entry(measured_mb, max(measured_mb, mb))
            return Entry(measured_mb, measured_mb, True)
        if words[Header.SOURCE_COUNTS_NAMED]:
            # It is in memory, but in none of the processes that the figure counts.
            return Entry(0.0, 0.0, True)
        if state in (Instance.LOADING, Instance.RESUMING):
            # A load that began after the figure is not in it. How far other loads have come is unknown: 0 to all.
            began_later = words[at + Instance.SINCE] > figure.done_ns
            return Entry(0.0, 0.0 if began_later else floats[at + Instance.RESERVED_MB] / span)
        # A figure takes time: an instance was certainly in it only if it had loaded before the source was asked, and
        # had not begun to unload when the answer arrived.
        loaded = 0 < words[at + Instance.LOADED_AT] < figure.taken_ns
        leaves = going and words[at + Instance.SINCE] <= figure.done_ns
        return Entry(mb if loaded and not leaves else 0.0, mb)

    def measured_share(self, row: int, device: int) -> float | None:
        """Return what an instance's server was measured to take of a device; None if the source does not tell."""
        words, floats, at = self._segment.words, self._segment.floats, self._tables.instance(row)
        server = words[at + Instance.SERVER]
        if not server or not words[Header.SOURCE_MEASURES_PROCESSES]:
            return None
        member = self._tables.member(server - 1)
        # The figure belongs to the instance to which the server's row refers: only one of several twins has the memory.
        if words[member + Member.INSTANCE] != row + 1 or math.isnan(floats[member + Member.MEASURED_MB]):
            return None
        devices = device_rows(words[at + Instance.DEVICES])
        word = Member.SHARES + devices.index(device) if len(devices) > 1 else Member.MEASURED_MB
        return floats[member + word]
