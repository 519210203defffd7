"""Every transition fits into the undo log that follows from the tables, even when all tables are full.

The scenarios of `crash_scenarios` prepare each transition. Then the rest of every table is filled with rows that the
transition, or one like it, has most work with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import pytest
from crash_lab import Lab, Operation
from crash_scenarios import scenarios
from harness import NOBODYS_PID

from mpmm import TableFullError
from mpmm.shared_state import layout, transaction
from mpmm.shared_state.layout import MOST_USERS, Capacities, Header, Instance, Member, Model, Pin
from mpmm.shared_state.transaction import Transaction
from mpmm.shared_state.transitions import Transitions

TABLES = ("members", "models", "instances", "tickets", "pins")
FULL = {
    "members": 8,
    "models": 12,
    "instances": 24,
    "tickets": 16,
    "pins": 12,
    "devices": 2,
    "observations": 3,
    "events": 32,
}
# Far less than a full table of instances, so that what is done in steps takes many.
SHORT_STEP = 64
# Of these, a call stops when its transaction is long, and the next one continues. All others do everything at once.
IN_STEPS = ("members.reap", "members.leave", "reset")
# Transitions that need free rows, and of which tables. They raise TableFullError, and succeed if there is one row each.
NEED_ROWS = {
    "models.claim": ["models"],
    "leases.claim": ["models", "tickets"],
    "pins.pin": ["pins"],
    "pins.pin/for all": ["pins"],
    "tickets.enqueue": ["tickets"],
    "tickets.enqueue/preload": ["tickets"],
    "tickets.enqueue/nested": ["tickets"],
    "tickets.enqueue/known to wait": ["tickets"],
    "hand_over.allow_load": ["instances"],
    "hand_over.allow_load/alone": ["instances"],
    "hand_over.allow_load/lease": ["instances"],
    "hand_over.allow_load/steady": ["instances"],
    "loads.begin": ["instances"],
    "loads.begin/spanning": ["instances"],
    "leases.begin": ["instances"],
    # Here a device has gone, whose row stays while copies lie on it.
    "devices.describe/others": ["devices"],
}

# Makes a copy of a model (row) on devices (bits), the n-th one, in a server (slot, None without one).
MakeCopy = Callable[[Lab, int, int, int, int | None], object]
NewLab = Callable[[Capacities], Lab]


def loading(lab: Lab, number: int, model: int, devices: int, server: int | None) -> int:
    row: int = lab.do(lambda t, tr: tr.loads.begin(t, model, Lab.victim, devices, 1.0, False))
    if server is not None:
        lab.do(lambda t, tr: tr.loads.link_server(t, row, server))
    return row


def end_load(lab: Lab, row: int, handle: bytes, server: int | None) -> None:
    reference = 0 if server is None else server + 1
    lab.do(lambda t, tr: tr.loads.end(t, row, handle, 1.0, reference, bool(reference)))


def held(lab: Lab, number: int, model: int, devices: int, server: int | None) -> int:
    row = loading(lab, number, model, devices, server)
    end_load(lab, row, b"handle-%d" % number, server)
    return row


def idle(lab: Lab, number: int, model: int, devices: int, server: int | None) -> int:
    row = held(lab, number, model, devices, server)
    lab.do(lambda t, tr: tr.holds.release(t, row))
    return row


def unloading(lab: Lab, number: int, model: int, devices: int, server: int | None) -> None:
    row = idle(lab, number, model, devices, server)
    lab.do(lambda t, tr: tr.unloads.begin(t, row, Lab.victim, evicted=True))


def twin(lab: Lab, number: int, model: int, devices: int, server: int | None) -> None:
    # With the handle of the scenarios' copies, and of their model, which no pin keeps from being evicted.
    row = loading(lab, number, lab.model("a"), devices, None)
    end_load(lab, row, b"h", None)
    lab.do(lambda t, tr: tr.holds.release(t, row))


def figures_of_all(lab: Lab) -> Operation:
    """Record a figure for each process, as a sample does."""

    def measure(t: Transaction, tr: Transitions) -> None:
        for slot in lab.tables.used_members():
            tr.measurements.measure(t, slot, {0: 500.0, 1: 400.0})

    return measure


SCENARIOS = {**scenarios(), "measurements.measure/each": figures_of_all}
# The transitions that write many rows at once.
MOST_WORK = (
    "unloads.begin/twins idle",
    "holds.release/asked to go",
    "estimates.estimate",
    "estimates.expect",
    "measurements.measure/each",
    "members.reap",
    "reset",
)


def fillings(name: str) -> list[MakeCopy]:
    """Return which copies to fill the table with in the scenario of a name: those that are most work."""
    if name.startswith(IN_STEPS):
        return [held, loading, unloading]
    if name.startswith(("unloads.", "holds.")) and "suspended" not in name:
        return [twin]
    if name in ("hand_over.allow_load/alone", "loads.begin/spanning"):
        # What is to run alone begins when no other copy is in use.
        return [idle]
    return [held]


def fill(lab: Lab, name: str, make_copy: MakeCopy, left_free: list[str]) -> None:
    """Fill all tables in the scenario of a name, except for one row of those in `left_free`."""

    def free_rows(table: str) -> Iterator[int]:
        """Count up from 0 until a table is full, however many rows the caller makes at a time."""
        rows = getattr(lab.layout, table)
        wanted = rows.capacity - left_free.count(table)
        return itertools.takewhile(lambda _: len(lab.tables.used_rows(rows)) < wanted, itertools.count())

    # `members.join` takes slot 4, of which its caller knows that it is free.
    servers = [slot for slot in lab.tables.free_members() if slot != 4 or name != "members.join"]
    for slot in servers:
        lab.do(partial(join, slot))
    for number in free_rows("models"):
        lab.do(partial(fail_to_load, lab.model(f"filler-{number}", known=number % 2 > 0)))
    words, tables = lab.words, lab.tables
    models = [row for row in tables.used_rows(lab.layout.models) if words[tables.model(row)] == Model.MODEL]
    if name == "models.claim/recycling":
        # A model to which nothing refers loses its row.
        models.pop()
    devices = [bit for bit in (1, 2) if not words[Header.ISOLATED] & bit]
    if not devices:
        # Where a copy runs alone, no other one may be in use.
        make_copy, devices = idle, [1]
    for number in free_rows("instances"):
        server = servers.pop() if servers else None
        # What a server has may lie on several devices, whose shares are words of their own.
        make_copy(lab, number, models[number % len(models)], devices[0] if server is None else sum(devices), server)
    for _ in free_rows("tickets"):
        lab.do(lambda t, tr: tr.tickets.enqueue(t, models[0], Lab.victim, 0, math.nan, 2**62))
    pins = [tables.pin(row) for row in tables.used_rows(lab.layout.pins)]
    pinned = {(words[pin + Pin.MEMBER] - 1, words[pin + Pin.MODEL]) for pin in pins}
    # The first model is the one that the scenarios pin.
    pairs = [pair for pair in itertools.product((Lab.victim, Lab.server), models[1:]) if pair not in pinned]
    for number in free_rows("pins"):
        lab.do(partial(pin_model, *pairs[number]))


def join(slot: int, t: Transaction, tr: Transitions) -> None:
    """Take a slot for a model server with the longest name: what it loads is unloaded under that name."""
    tr.members.join(t, slot, Member.SERVER, NOBODYS_PID + 9 + slot, 9 + slot, b"s" * Member.NAME_BYTES)


def fail_to_load(model: int, t: Transaction, tr: Transitions) -> None:
    tr.models.note_failure(t, model)


def pin_model(member: int, model: int, t: Transaction, tr: Transitions) -> None:
    tr.pins.pin(t, model, member)


@pytest.fixture
def used_words(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list of how many words the transactions from now on have overwritten."""
    used: list[int] = []
    end = Transaction._end

    def note_and_end(self: Transaction, committed: bool) -> None:
        used.append(self._count)
        end(self, committed)

    monkeypatch.setattr(Transaction, "_end", note_and_end)
    return used


@pytest.fixture
def new_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewLab]:
    monkeypatch.setenv("MPMM_RUNTIME_DIR", str(tmp_path / "run"))
    labs: list[Lab] = []

    def new(capacities: Capacities) -> Lab:
        labs.append(Lab(f"lab{len(labs)}", capacities))
        return labs[-1]

    yield new
    for lab in labs:
        lab.namespace.leave()


def full_table(lab: Lab, name: str, operation: Operation) -> str | None:
    """Do the operation of a scenario; return the table of which it would have needed a free row, None if it is done."""
    try:
        # Each call in a transaction of its own.
        while lab.do(operation) not in (None, True) and name.startswith(IN_STEPS):
            pass
    except TableFullError as error:
        return error.table
    return None


def costs(lab: Lab, names: Iterable[str], used: list[int]) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Do these scenarios at full tables, and check the state after each.

    Return the words that the longest transaction of each overwrote, and the tables of which each needed a free row.
    """
    clean = lab.save()
    largest: dict[str, int] = {}
    needed: dict[str, list[str]] = {}
    for name, make_copy in ((one, make_copy) for one in names for make_copy in fillings(one)):
        left_free: list[str] = []
        while True:
            lab.restore(clean)
            lab.tables.close()
            operation = SCENARIOS[name](lab)
            fill(lab, name, make_copy, left_free)
            before = lab.comparable()
            used.clear()
            table = full_table(lab, name, operation)
            largest[name] = max(largest.get(name, 0), *used)
            if table is None:
                break
            assert lab.comparable() == before, f"{name} raises an error, and has changed something"
            needed[name] = left_free = [*left_free, table]
            if table not in TABLES:
                break
        assert lab.problems() == [], name
    lab.restore(clean)
    return largest, needed


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a transaction count as long after `SHORT_STEP` words, and new undo logs have room for as much."""
    for module in (layout, transaction):
        monkeypatch.setattr(module, "STEP_WORDS", SHORT_STEP)


@pytest.mark.usefixtures("short_steps")
def test_every_transition_at_full_tables_fits_into_the_undo_log(new_lab: NewLab, used_words: list[int]) -> None:
    lab = new_lab(Capacities(**FULL))
    largest, needed = costs(lab, SCENARIOS, used_words)
    assert needed == NEED_ROWS
    most = max(largest, key=lambda name: largest[name])
    print(f"at most {largest[most]} words ({most}), the log has room for {lab.layout.capacities.undo}")
    assert largest[most] <= lab.layout.capacities.undo


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("table", ["members", "models", "instances", "tickets"])
def test_a_row_takes_no_more_of_the_undo_log_than_it_adds_to_it(
    table: str, new_lab: NewLab, used_words: list[int]
) -> None:
    small, large = (new_lab(Capacities(**{**FULL, table: FULL[table] + more})) for more in (0, 16))
    added = large.layout.capacities.undo - small.layout.capacities.undo
    before, after = (costs(lab, MOST_WORK, used_words)[0] for lab in (small, large))
    growth = {name: after[name] - before[name] for name in MOST_WORK}
    print(f"16 {table} add {added} words, and take {growth}")
    assert max(growth.values()) <= added


def test_the_seats_of_a_copy_with_the_longest_handle_fit_into_the_undo_log(
    new_lab: NewLab, used_words: list[int]
) -> None:
    lab = new_lab(Capacities(**{**FULL, "instances": MOST_USERS}))
    model = lab.model()
    lab.do(lambda t, tr: tr.models.set_users(t, model, MOST_USERS))
    row = lab.loading()
    used_words.clear()
    lab.do(lambda t, tr: tr.loads.end(t, row, b"h" * Instance.HANDLE_BYTES, 1.0, 0, False))
    assert len(lab.tables.seats_of(row)) == MOST_USERS - 1
    print(f"{used_words} words, the log has room for {lab.layout.capacities.undo}")
    assert max(used_words) <= lab.layout.capacities.undo
    assert lab.problems() == []
