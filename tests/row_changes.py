"""What each transition changes, word by word: rows, events and wake-ups, and nothing else.

Each case makes rows, and an operation on them; its table lists everything that the operation changes. `now` is the time
of the operation, and other times are given as seconds from it.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any
from unittest import mock

import pytest
from harness import NOBODYS_PID

from mpmm.policy.view import Reason
from mpmm.shared_state.events import Cause, EventKind
from mpmm.shared_state.futex import wake_all
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import (
    WORD,
    Capacities,
    Device,
    Event,
    Header,
    Instance,
    Member,
    Model,
    Observation,
    Pin,
    Ticket,
    device_bits,
)
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.shared_state.transaction import Transaction, float_bits
from mpmm.shared_state.transitions import Transitions

SMALL = Capacities(members=6, models=8, instances=8, tickets=6, pins=4, devices=4, observations=3, events=128)
START_NS = 10**15
SECOND_NS = 10**9
ROWS = {
    "members": Member,
    "models": Model,
    "instances": Instance,
    "tickets": Ticket,
    "pins": Pin,
    "devices": Device,
    "observations": Observation,
}
# Words that every transaction changes.
OF_ALL = ("CHANGE", "UNDO_COUNT", "LOCK_HOLDER", "LOCK_TAKEN", "EVENTS", "NEXT_GENERATION", "CONTENDED", "SPIN_LOCK")
# Times that do not end in `_AT`; they are shown as seconds from now.
TIMES = {
    *("SINCE", "ENQUEUED", "DEADLINE", "ATTACHED", "SAMPLED", "PEAK_RESET", "TRIED", "UPDATED", "RANK"),
    *("LEADER_SINCE", "POLLED", "SETTINGS_CHANGED", "CALLED_UP", "STARTED_WALL"),
}
FLOATS = {"MB", "SECONDS", "SHARES", "READINGS", "SETTINGS", "WRITTEN_OFF"}
STATES = {
    "member": (Member, ("FREE", "WORKER", "SERVER", "GUEST")),
    "model": (Model, ("FREE", "MODEL", "LEASE")),
    "instance": (
        Instance,
        ("FREE", "LOADING", "ACTIVE", "IDLE", "UNLOADING", "LEASED", "SUSPENDING", "SUSPENDED", "RESUMING"),
    ),
    "ticket": (Ticket, ("FREE", "WAITING", "GRANTED", "LOAD", "REFUSED", "RESET", "ENOUGH")),
}
TEXTS = {"NAME", "TAG", "HANDLE", "UUID", "SOURCE_NAME"}
_names = itertools.count()


def _fields(row: type) -> dict[int, str]:
    """Return the fields of a row by their offsets; the names after WORDS are those of values."""
    names = [name for name in vars(row) if name.isupper()]
    names = names[: names.index("WORDS")]
    kinds = ("_BYTES", "_LENGTH", "_KEPT", "_WORDS", "IS_CLOSED")
    return {getattr(row, name): name for name in names if not name.endswith(kinds)}


Operation = Callable[[Transaction], Any]
CAUSE = Cause(Reason.CHEAPEST_RELOAD, 1.0, 2.0, 3.0, 4.0, 2, 6)


class RowChanges:
    """A namespace with four members besides this one, three devices and three models, and a clock that stands still.

    Members 1 and 2 are workers, 3 and 4 servers. Model 0 stands for models of others: it has a copy in row 0 on
    device 2, a ticket and a pin, in the first rows of their tables.
    """

    def __init__(self) -> None:
        self.now = START_NS
        self._clock = mock.patch("time.monotonic_ns", side_effect=lambda: self.now)
        self._clock.start()
        settings = Settings(memory_return_seconds=20.0, peak_window_seconds=30.0)
        self.namespace = Namespace.join(f"changes{next(_names)}", capacities=SMALL, settings=settings)
        self.tables, self.layout = self.namespace.tables, self.namespace.segment.layout
        self.words, self.floats = self.namespace.segment.words, self.namespace.segment.floats
        self.to = self.namespace.transitions
        with self.namespace.transaction() as t:
            self.to.devices.describe(t, [(f"uuid-{row}".encode(), b"gpu", 9000.0 - row) for row in range(3)])
            for slot in (1, 2):
                self.to.members.join(t, slot, Member.WORKER, NOBODYS_PID + slot, slot, b"worker")
            for slot in (3, 4):
                self.to.members.join(t, slot, Member.SERVER, NOBODYS_PID + slot, slot, b"tag of a server")
            for tag in ("nobody's", "a", "b"):
                self.to.models.claim(t, tag, tag.encode())
            self.to.members.lead(t, 2, b"made up", (True, False, False))
            # Every counter begins with a number of its own.
            for number, word in enumerate(("HITS", "LOADS", "EVICTIONS", "FAILED_LOADS", "SUSPENDS", "RESUMES"), 1):
                t.set(getattr(Header, word), 10 * number)
            for row in (1, 2):
                at = self.tables.model(row)
                for number, word in enumerate(("HITS", "LOADS", "EVICTIONS", "SUSPENDS", "RESUMES"), 1):
                    t.set(at + getattr(Model, word), 100 * row + number)
                for number, word in enumerate(("LOAD_S", "HOLD_S", "SUSPEND_S", "RESUME_S"), 1):
                    t.set_float(at + getattr(Model, word), 10.0 * row + number)
        self.wait(10)
        # The first row of each table belongs to model 0, so that a test's rows are not the first ones; and its words
        # are not 0, so that code that reads a few words before the next row finds something there.
        self.active(handle=b"h" * Instance.HANDLE_BYTES, model=0, member=2, devices=(2,), mb=150.0)
        why = Cause(Reason.EXTERNAL, 1.0, 2.0, 3.0, 4.0, 1, 4)
        self.ticket(
            model=0, member=0, preload=9, loadable_on=4, usable_on=4, span=3, nested=True, cause=why, steady=True
        )
        self.poke(self.tables.member(0) + Member.PID, NOBODYS_PID)
        for field in (Ticket.OVERTAKEN, Ticket.WARNED):
            self.poke(self.tables.ticket(0) + field, 1)
        self.do(lambda t: self.to.pins.pin(t, 0, 2))
        with self.namespace.transaction() as t:
            t.set_text(self.tables.model(0) + Model.NAME, b"n" * Model.NAME_BYTES)
            t.set_text(self.tables.member(0) + Member.NAME, b"m" * Member.NAME_BYTES)
            t.set_all([(self.tables.device(1) - number, number) for number in range(1, 80)])

    def close(self) -> None:
        """Leave the namespace, and let the clock run again."""
        self.namespace.leave()
        self._clock.stop()

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += int(seconds * SECOND_NS)

    def do(self, operation: Callable[[Transaction], Any], after_s: float = 1) -> Any:
        """Make an operation, then let time pass; return its result."""
        with self.namespace.transaction() as t:
            result = operation(t)
        self.wait(after_s)
        return result

    # ---- what there is ---------------------------------------------------------------------------------------

    def loading(self, model: int = 1, member: int = 1, devices: tuple[int, ...] = (1,), mb: float = 600.0) -> int:
        """Have a member load a copy; return its row."""
        bits = device_bits(devices)
        return int(self.do(lambda t: self.to.loads.begin(t, model, member, bits, mb, False), 2))

    def active(self, handle: bytes = b"handle", server: int = 0, **loading: Any) -> int:
        """Have a member hold a copy that it has loaded."""
        row = self.loading(**loading)
        mb = loading.get("mb", 600.0) - 100.0
        if server:
            self.do(lambda t: self.to.loads.link_server(t, row, server))
        self.do(lambda t: self.to.loads.end(t, row, handle, mb, server + 1 if server else 0, bool(server)), 3)
        return row

    def idle(self, **active: Any) -> int:
        """Return a copy that its holder has released."""
        row = self.active(**active)
        self.do(lambda t: self.to.holds.release(t, row), 4)
        return row

    def suspended(self, **idle: Any) -> int:
        """Return a suspended copy."""
        row = self.suspending(**idle)
        self.do(lambda t: self.to.suspensions.end(t, row), 6)
        return row

    def suspending(self, **idle: Any) -> int:
        """Return a copy that member 2 is suspending."""
        row = self.idle(**idle)
        self.do(lambda t: self.to.suspensions.note_way(t, row, 1))
        self.do(lambda t: self.to.suspensions.begin(t, row, 2, False), 5)
        return row

    def resuming(self, **idle: Any) -> int:
        """Return a copy that member 1 is resuming."""
        row = self.suspended(**idle)
        self.do(lambda t: self.to.suspensions.begin_resume(t, row, 1), 7)
        return row

    def unloading(self, **idle: Any) -> int:
        """Return a copy that member 2 is unloading."""
        row = self.idle(**idle)
        self.do(lambda t: self.to.unloads.begin(t, row, 2, False), 5)
        return row

    def leased(self, member: int = 1, devices: tuple[int, ...] = (1,), mb: float = 300.0) -> int:
        """Return a lease of a member."""
        model = self.do(lambda t: self.to.leases.claim(t, b"lease", mb))
        return int(self.do(lambda t: self.to.leases.begin(t, model, member, device_bits(devices), mb), 3))

    def ticket(self, model: int = 1, member: int = 2, **more: Any) -> int:
        """Return a waiting ticket of a member."""
        values = {"priority": 1, "need_mb": 700.0, "deadline_ns": self.now + 60 * SECOND_NS, **more}
        return int(self.do(lambda t: self.to.tickets.enqueue(t, model, member, **values), 2))

    def users(self, users: int, model: int = 1) -> None:
        """Let copies of a model that are loaded from now on have `users` users."""
        self.do(lambda t: self.to.models.set_users(t, model, users))

    def claim(self, tag: str) -> None:
        """Give a model a row."""
        self.do(lambda t: self.to.models.claim(t, tag, tag.encode()))

    def pin(self, model: int) -> None:
        """Have member 2 pin a model."""
        self.do(lambda t: self.to.pins.pin(t, model, 2))

    def end_lease(self, row: int) -> None:
        """End a lease."""
        self.do(lambda t: self.to.leases.end(t, row))

    def unload(self, row: int) -> None:
        """Have member 2 unload an idle copy."""
        self.begin_unload(row)
        self.do(lambda t: self.to.unloads.end(t, row))

    def unload_two(self) -> None:
        """Unload two copies from device 1, each after a sample that was taken while it was loaded."""
        for row in self.idle(handle=b"1", mb=600.0), self.idle(handle=b"2", mb=400.0):
            self.sample(1, 1100.0)
            self.unload(row)

    def sample(self, device: int, mb: float) -> None:
        """Sample a device."""
        self.do(lambda t: self.to.devices.sample(t, device, mb, self.now))

    def observe(self, copies: list[tuple[int, int]], mb: float, device: int) -> None:
        """Keep a reading of a configuration."""
        self.do(lambda t: self.to.estimates.observe(t, copies, mb, device))

    def take(self, row: int) -> None:
        """Have member 1 take an idle copy, or a seat."""
        self.do(lambda t: self.to.holds.take_idle(t, row, 2))

    def begin_unload(self, row: int) -> None:
        """Have member 2 begin to unload an idle copy."""
        self.do(lambda t: self.to.unloads.begin(t, row, 2, False))

    def poke(self, word: int, value: float) -> None:
        """Write a word, as a float if the value is one."""
        self.do(lambda t: t.set(word, float_bits(value) if isinstance(value, float) else value), 0)

    def act_as(self, slot: int) -> None:
        """Have another member make the transitions from now on; -1 for one that has no row yet."""
        actor = mock.Mock(slot=slot, settings=self.namespace.settings)
        actor.name = self.namespace.name
        self.to = Transitions(self.tables, actor)

    # ---- what changes ----------------------------------------------------------------------------------------

    def changes(self, operation: Callable[[Transaction], Any]) -> str:
        """Make an operation; return its changes, a line for each row, event and wake-up, and its result."""
        after: list[Any] = []

        def call() -> Any:
            with self.namespace.transaction() as t:
                result = operation(t)
                after.extend(t.after)
            return result

        return self.changes_of(call, after)

    def changes_of(self, call: Callable[[], Any], after: Sequence[Any] = ()) -> str:
        """Make a call with transactions of its own; return its changes. after: the calls that follow these."""
        before, events = self.words.tolist(), self.words[Header.EVENTS]
        result = call()
        lines = [*self._rows_since(before), *self._events_since(events), *map(self._call, after)]
        if result is not None:
            lines.append(f"returns {result}")
        broken = check_invariants(read_snapshot(self.namespace.name, events=False))
        return "\n".join([*lines, *broken])

    def _rows_since(self, before: list[int]) -> list[str]:
        rows: dict[str, list[str]] = {}
        words = self.words.tolist()
        for index in range(self.layout.observations.end):
            if words[index] != before[index]:
                row, field, offset = self._place(index)
                if row != "header" or field not in OF_ALL:
                    name = f"{field}[{offset}]" if offset else field
                    shown = self._shown(row.partition(" ")[0], field, offset, index)
                    rows.setdefault(row, []).append(f"{name}={shown}")
        return [f"{row}: {' '.join(changed)}" for row, changed in rows.items()]

    def _place(self, index: int) -> tuple[str, str, int]:
        """Return the row and the field of a word, and its offset in the field."""
        row, offset, fields = "header", index, _fields(Header)
        for table in self.layout.tables:
            if table.base <= index < table.end and table.name in ROWS:
                number, offset = divmod(index - table.base, table.words)
                row, fields = f"{table.name[:-1]} {number}", _fields(ROWS[table.name])
        start = max(start for start in fields if start <= offset)
        return row, fields[start], offset - start

    def _shown(self, table: str, field: str, offset: int, index: int) -> str:
        value = self.words[index]
        if field == "STATE" and table in STATES:
            row, names = STATES[table]
            return next(name for name in names if getattr(row, name) == value)
        # Entries of these consist of a time and then floats.
        in_row = {"RETURNS": offset % Device.RETURN_WORDS, "RING": offset % 2}.get(field)
        # A model's SHARES is a flag.
        if in_row or (field in FLOATS and table != "model") or field.endswith(("_MB", "_S")):
            return f"{self.floats[index]:.10g}"
        if in_row == 0 or field in TIMES or field.endswith("_AT"):
            return self._time(value)
        if offset and field in TEXTS:
            return repr(value.to_bytes(WORD, "little").rstrip(b"\0").decode())
        return f"{value}"

    def _time(self, value: int) -> str:
        seconds = (value - self.now) / SECOND_NS
        return f"now{seconds:+g}" if seconds and abs(seconds) < 1e6 else f"{value}" if seconds else "now"

    def _events_since(self, count: int) -> list[str]:
        table, found = self.layout.events, []
        for number in range(count, self.words[Header.EVENTS]):
            at = table.base + number % table.capacity * Event.WORDS
            assert self.words[at + Event.SEQUENCE] == number + 1
            assert self.words[at + Event.TIME] == self.now
            assert self.words[at + Event.PID] == self.words[Header.LOCK_HOLDER]
            kind = self.words[at + Event.KIND]
            said = [f"{EventKind(kind & 0xFF).name}:"]
            said += [f"on={kind >> 32:b}"] if kind >> 32 else []
            for name, word in (("model", Event.MODEL), ("row", Event.INSTANCE), ("ticket", Event.TICKET)):
                said += [f"{name}={self.words[at + word] - 1}"] if self.words[at + word] else []
            said.append(f"value={self.floats[at + Event.VALUE]:.10g}")
            if reason := kind >> 8 & 0xFF:
                figures = (Event.NEED_MB, Event.FREE_MB, Event.COMING_MB, Event.SECONDS)
                said.append(Reason(reason - 1).name)
                said.append("/".join(f"{self.floats[at + word]:.10g}" for word in figures))
                said.append(f"{self.words[at + Event.OTHER]}/{self.words[at + Event.ON]}")
            found.append(" ".join(said))
        return found

    def _call(self, call: Any) -> str:
        """Return a call that follows the transaction, as text."""
        if not isinstance(call, partial):
            return str(call.__name__)
        if call.func is wake_all:
            row, field, _ = self._place((call.args[0] - self.namespace.segment.address) // WORD)
            return f"wake {row} {field}"
        return f"log {call.args[0] % call.args[1:]}".replace(self.namespace.name, "NAMESPACE")


Make = Callable[[RowChanges], Operation]


class Cases:
    """The cases of one test file, by the names of the functions that make them."""

    def __init__(self) -> None:
        self._cases: dict[str, tuple[Make, str]] = {}

    @property
    def names(self) -> list[str]:
        """The names of the cases."""
        return list(self._cases)

    def case(self, expected: str) -> Callable[[Make], Make]:
        """Register a case whose operation changes what `expected` lists."""

        def keep(make: Make) -> Make:
            assert make.__name__ not in self._cases
            self._cases[make.__name__] = (make, expected)
            return make

        return keep

    def check(self, it: RowChanges, name: str) -> None:
        """Fail unless the operation of a case changes what it should."""
        make, expected = self._cases[name]
        # Long lines continue on the next one, indented.
        told = textwrap.dedent(expected.strip("\n")).replace("\n  ", " ").splitlines()
        assert it.changes(make(it)).splitlines() == told


@pytest.fixture
def it() -> Iterator[RowChanges]:
    """A namespace with invented rows."""
    with closing(RowChanges()) as made:
        yield made


def raised(call: Callable[[], object]) -> str:
    """Return the name of the error that a call raises."""
    with pytest.raises(Exception) as caught:
        call()
    return type(caught.value).__name__


def when_long(t: Transaction, call: Callable[[], object], after: int) -> object:
    """Return what a call returns in a transaction whose `is_long` is true from the `after`-th read on."""
    asked = itertools.count()
    with mock.patch.object(Transaction, "is_long", property(lambda _: next(asked) >= after)):
        return call()
