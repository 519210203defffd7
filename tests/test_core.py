"""The compiled core of the warm path does exactly what Python does, or nothing.

Both make the same operation from the same state, at the same pretended time, and all words of the segment are
compared: those of the rows, of the undo log and of the ring of events. If the core leaves an operation to Python, it
must have changed nothing. A process is killed at each of the core's stores, and Python takes the lock next.
"""

from __future__ import annotations

import fcntl
import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy, deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from core_calls import DEADLINE_NS, PATIENTLY_S, Caller, CoreCall, built, place_of, pretend
from core_calls import lab as lab  # the fixture
from crash_lab import FROZEN_NS, KILLED, SMALL, Lab, run_in_child, some_of
from crash_lab import Operation as LabOperation
from harness import CRASH_POINTS, scaled

from mpmm.memory.monitor import GPUMonitor
from mpmm.model_manager.acquisition import Acquisition
from mpmm.model_manager.operations import LoadedInstance, Operation
from mpmm.model_manager.release import give_back
from mpmm.model_manager.request import ANYWHERE
from mpmm.model_manager.session import Session
from mpmm.policy.view import Reason
from mpmm.shared_state import core as core_module
from mpmm.shared_state.core import KEEP, KEEP_AND_CALL_UP
from mpmm.shared_state.events import Cause
from mpmm.shared_state.layout import Header, Instance, Model, Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.settings import SETTINGS
from mpmm.shared_state.transaction import CORE_TURN, CROWDED_TURNS, Transaction
from mpmm.shared_state.transitions import SMOOTHING, Transitions
from mpmm.sources import choose_source

# ---- the same words as Python's ---------------------------------------------------------------------------------


class Twins:
    """A process's worker, of which two do the same from the same state: one in Python, one by the core."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        monitor = GPUMonitor(1000.0, 0.5, 30.0, source=choose_source("booked", fallback_memory_mb=1000.0))
        # It is not started: no thread of it changes anything meanwhile.
        self.worker = Session(self.lab.namespace, monitor, False)
        self.namespace: Namespace = self.lab.namespace
        self.taken = self.released = self.queued = self.declined = 0

    def restore_tenures(self, saved: dict[str, Any]) -> None:
        vars(self.worker.tenures).update(deepcopy(saved))

    def _noted_in(self) -> tuple[Any, ...]:
        held, owned = self.worker.held, self.worker.owned
        of_held = (held.holds, held._held_at, held._handles, held._taken_grants)
        return (*of_held, owned.in_rows, owned.rows_of_model)

    def notes(self) -> list[Any]:
        return [copy(noted) for noted in self._noted_in()]

    def restore(self, saved: bytes, notes: list[Any]) -> None:
        self.lab.restore(saved)
        for noted, value in zip(self._noted_in(), notes, strict=True):
            noted.clear()
            noted.update(value)

    def without_lock_words(self) -> bytes:
        """Return the segment without the words about the lock's last holder."""
        copied = bytearray(self.lab.save())
        words = memoryview(copied).cast("Q")
        words[Header.LOCK_HOLDER] = words[Header.LOCK_TAKEN] = 0
        return bytes(copied)

    def take(self, tag: str) -> LoadedInstance | None:
        """Take an idle copy in both ways, and compare."""
        saved, before, notes = self.lab.save(), self.without_lock_words(), self.notes()
        python, compiled = Operation(None), Operation(None)
        wanted = Acquisition(self.worker, python, tag, ANYWHERE, 0.0, 1.0, print).take_idle(1.0)
        words, noted = self.lab.save(), self.notes()
        self.restore(saved, notes)
        held = self.worker.held
        got = held.take_kept(tag, compiled, PATIENTLY_S) or held.take_quickly(tag, compiled, PATIENTLY_S)
        if got is None:
            self.declined += 1
            assert self.without_lock_words() == before
            assert self.notes() == notes
            assert compiled.held is None
            self.restore(words, noted)
            return wanted
        self.taken += 1
        assert self.lab.save() == words
        assert self.notes() == noted
        assert (got, compiled.held, compiled.gives_back) == (wanted, python.held, False)
        return got

    def release(self, copy: LoadedInstance) -> None:
        """Give a copy back in both ways, and compare."""
        assert self.worker.held.take_off(copy.value, copy.tag, Operation(None)) == copy
        saved, before, notes = self.lab.save(), self.without_lock_words(), self.notes()
        tenures = deepcopy(vars(self.worker.tenures))
        give_back(self.worker, copy.tag, copy)
        words, noted, after = self.lab.save(), self.notes(), deepcopy(vars(self.worker.tenures))
        self.restore(saved, notes)
        self.restore_tenures(tenures)
        if self.worker.held.give_back_quickly(copy):
            self.released += 1
            assert self.lab.save() == words
            assert self.notes() == noted
            assert vars(self.worker.tenures).keys() == after.keys()
            assert self.worker.tenures._by_tag == after["_by_tag"]
        else:
            self.declined += 1
            assert self.without_lock_words() == before
            self.restore(words, noted)
            self.restore_tenures(after)

    def queue(self, tag: str) -> int:
        """Join the queue in both ways where others have to be waited for, and compare; return the row, or -1."""
        saved, before = self.lab.save(), self.without_lock_words()
        python, compiled = Operation(None), Operation(None)
        by_python = Acquisition(self.worker, python, tag, ANYWHERE, 0.0, 1e9, print)
        by_core = Acquisition(self.worker, compiled, tag, ANYWHERE, 0.0, 1e9, print)
        assert by_python._take_or_wait() is None
        words = self.lab.save()
        self.restore(saved, self.notes())
        if by_core._queue_quickly():
            self.queued += 1
            assert self.lab.save() == words
            assert (by_core.row, compiled.ticket) == (by_python.row, python.ticket)
        else:
            self.declined += 1
            assert self.without_lock_words() == before
            assert compiled.ticket is None
            self.restore(words, self.notes())
        return by_python.row


def load(twins: Twins, tag: str, handle: bytes) -> None:
    """Load a copy, a handle or an object of the process itself, and leave it idle."""
    namespace, lab, worker = twins.namespace, twins.lab, twins.worker
    model = lab.model(tag)
    row = lab.do(lambda t, tr: tr.loads.begin(t, model, namespace.slot, 1, 100.0, False))
    lab.do(lambda t, tr: tr.loads.end(t, row, handle, 90.0, 0, False))
    operation = Operation(None)
    held = worker.held.add_loaded(row, tag, handle.decode() if handle else object(), operation)
    assert worker.held.take_off_hold((held, lab.words[lab.tables.instance(row) + Instance.USES]), operation) is False
    worker.held.holds.clear()
    worker.held._held_at.clear()
    lab.do(lambda t, tr: tr.holds.release(t, row))


def leave_queue(ticket: int, t: Transaction, tr: Transitions) -> None:
    """Let a waiter leave."""
    tr.hand_over.leave_queue(t, ticket)


def disturb(twins: Twins, chance: random.Random) -> None:
    """Make something about the namespace extraordinary, or ordinary again."""
    lab, words = twins.lab, twins.lab.words
    active = [row for row in range(SMALL.instances) if words[lab.tables.instance(row)] == Instance.ACTIVE]
    waiting = words[Header.WAITING]
    kind = chance.choice(("wait", "wait", "doom", "pin", "keep", "sample"))
    if kind == "wait" and waiting:
        ticket = next(row for row in range(SMALL.tickets) if words[lab.tables.ticket(row)] == 1)
        lab.do(lambda t, tr: tr.hand_over.leave_queue(t, ticket))
    elif kind == "wait":
        lab.ticket(chance.choice("ab"))
    elif kind == "doom" and active:
        lab.do(lambda t, tr: tr.unloads.ask(t, chance.choice(active), lab.namespace.slot))
    elif kind == "pin" and not words[lab.tables.model(lab.model("a")) + Model.PINS]:
        model = lab.model("a")
        lab.do(lambda t, tr: tr.pins.pin(t, model, lab.victim))
    elif kind == "keep":
        model = lab.model("b")
        lab.do(lambda t, tr: tr.models.keep_alive(t, model, chance.choice((0, Model.AT_ONCE, 1000))))
    elif kind == "sample":
        lab.do(lambda t, tr: tr.devices.sample(t, 0, 500.0, FROZEN_NS))


@built
@pytest.mark.parametrize("seed", range(scaled(6)))
def test_it_stores_the_words_that_python_stores(lab: Lab, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    twins = Twins(lab)
    chance = random.Random(seed)
    now = FROZEN_NS
    held: list[LoadedInstance] = []
    # With the true time, the durations of loads and holds would decide which requests queue.
    monkeypatch.setattr(time, "monotonic_ns", lambda: FROZEN_NS)
    lab.segment.floats[Header.SETTINGS + list(SETTINGS).index("max_model_copies")] = 1.0
    lab.words[Header.SETTINGS_CHANGED] = 1
    try:
        for number, tag in enumerate(chance.choices("ab", k=chance.randrange(2, SMALL.instances))):
            load(twins, tag, b"" if chance.random() < 0.3 else b"handle %d" % number)
        for _ in range(90):
            now += chance.choice((1, 1000, 10**6, 10**12))
            clock = now - chance.choice((0, 0, 0, 2000))
            monkeypatch.setattr(time, "monotonic_ns", lambda clock=clock: clock)
            pretend(clock)
            if chance.random() < 0.08:
                disturb(twins, chance)
            elif lab.words[Header.WAITING] and chance.random() < 0.4:
                ticket = lab.tables.rows_where(lab.layout.tickets, Ticket.STATE, Ticket.WAITING)[0]
                lab.do(partial(leave_queue, ticket))
            elif chance.random() < 0.2 and twins.worker.held.find_idle("a") is None:
                twins.queue("a")
            elif held and chance.random() < 0.5:
                twins.release(held.pop(chance.randrange(len(held))))
            elif (got := twins.take(chance.choice("abc"))) is not None:
                held.append(got)
        assert twins.taken > 3 and twins.released > 2
    finally:
        pretend(0)


@built
def test_within_a_tenure_it_stores_the_words_that_python_stores(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpmm.model_manager.tenure.TENURE_S", 1000.0)
    monkeypatch.setattr(time, "monotonic_ns", lambda: FROZEN_NS)
    pretend(FROZEN_NS)
    twins = Twins(lab)
    load(twins, "a", b"handle")
    load(twins, "b", b"other")
    got = twins.take("a")
    assert got is not None
    ticket = lab.ticket("a")
    twins.worker.tenures.begin("a", got.row, got.generation)
    tenure = twins.worker.tenures.current("a")
    assert tenure is not None
    try:
        # The first use of the copy here is Python's. The first release calls the waiter up.
        for declined, released, taken in ((1, 1, 1), (1, 2, 2), (1, 3, 3)):
            twins.release(got)
            assert tenure.called_up
            got = twins.take("a")
            assert got is not None
            assert (twins.declined, twins.released, twins.taken) == (declined, released, taken)
        assert lab.words[lab.tables.ticket(ticket) + Ticket.CALLED_UP] == FROZEN_NS
        # A waiter for another model may need this copy evicted, so it is handed over.
        lab.ticket("b")
        twins.release(got)
        assert (twins.declined, twins.released) == (1, 4)
        assert lab.words[lab.tables.ticket(ticket)] == Ticket.GRANTED
        assert lab.problems() == []
    finally:
        pretend(0)


@built
def test_where_a_wait_is_sooner_than_a_load_it_stores_the_words_that_python_stores(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: FROZEN_NS)
    pretend(FROZEN_NS)
    try:
        lab.active("a", b"h")
        model = lab.tables.model(lab.model("a"))
        lab.segment.floats[model + Model.HOLD_S] = 0.3
        lab.segment.floats[model + Model.LOAD_S] = 1.0
        twins = Twins(lab)
        assert [twins.queue("a") for _ in range(4)] == [0, 1, 2, -1], "the fourth would have to wait for 1.2 s"
        assert (twins.queued, twins.declined) == (3, 1)
        ticket = lab.tables.tickets[2]
        assert ticket.reason == Reason.SHARING
        assert ticket.seconds == pytest.approx(0.9)
    finally:
        pretend(0)


@built
@pytest.mark.parametrize("reason", [Reason.MEMORY, Reason.IN_USE, Reason.UNLOADING, Reason.RETURNING, Reason.LEASED])
@pytest.mark.parametrize("others", [False, True])
def test_behind_one_that_waits_for_memory_it_stores_the_words_that_python_stores(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, reason: Reason, others: bool
) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: FROZEN_NS)
    pretend(FROZEN_NS)
    try:
        row = lab.active("a", b"h")
        head = lab.tables.ticket(lab.ticket("a"))
        if others:
            lab.ticket("b")
        twins = Twins(lab)

        def queues() -> bool:
            """Tell whether it queues as Python does; take it out of the queue again."""
            before = twins.queued
            ticket = twins.queue("a")
            if ticket >= 0:
                assert lab.tables.tickets[ticket].reason == Reason.BEHIND
                lab.do(partial(leave_queue, ticket))
            return twins.queued > before

        lab.words[head + Ticket.REASON] = reason
        assert not queues(), "it is not the head"
        lab.words[head + Ticket.HEAD_OF_LINE_AT] = FROZEN_NS
        known = reason != Reason.LEASED and not (others and reason == Reason.MEMORY)
        assert queues() == known
        model = lab.tables.model(lab.model("a"))
        for at, value in (
            (head + Ticket.PRIORITY, 2),
            (head + Ticket.DEADLINE, FROZEN_NS),
            (head + Ticket.RANK, FROZEN_NS + 10**12),
            (model + Model.SHARES, 0),
            (model + Model.FAILURES, 1),
            (model + Model.KNOWN, 0),
            (Header.ISOLATED, 1),
            # No process that comes later has this copy, so another one may be loaded for it.
            (lab.tables.instance(row) + Instance.OWNER, Lab.victim + 1),
            (lab.tables.instance(row) + Instance.UNLOAD_ON_RELEASE, Instance.ASKED),
            (lab.tables.instance(row) + Instance.STATE, Instance.SUSPENDED),
        ):
            usual, lab.words[at] = lab.words[at], value
            assert not queues(), at
            lab.words[at] = usual
        assert queues() == known
        # Only a plan gives away an idle copy, unless a process's tenure keeps it.
        lab.do(lambda t, tr: tr.holds.release(t, row))
        assert not queues()
        lab.words[head + Ticket.CALLED_UP] = FROZEN_NS - 1
        assert queues() == known
    finally:
        pretend(0)


# ---- deaths ------------------------------------------------------------------------------------------------------


def take(caller: Caller, lab: Lab) -> tuple[LabOperation, CoreCall]:
    """Take the idle copy."""
    return (lambda t, tr: tr.holds.take_idle(t, caller.row, Lab.victim + 1)), caller.take


def release(caller: Caller, lab: Lab) -> tuple[LabOperation, CoreCall]:
    """Release the copy while no request waits."""
    return (lambda t, tr: tr.holds.release(t, caller.row)), caller.release


def hand_over(caller: Caller, lab: Lab) -> tuple[LabOperation, CoreCall]:
    """Hand the copy to the first of two waiters, and free the ticket by which it was had."""
    grant, first = lab.ticket("a"), lab.ticket("a")
    lab.ticket("a")
    lab.do(lambda t, tr: tr.hand_over.from_holder(t, grant, caller.row, Cause(Reason.IDLE_COPY)))
    number = lab.words[lab.tables.ticket(grant) + Ticket.NUMBER]

    def by_python(t: Transaction, tr: Transitions) -> None:
        tr.hand_over.consume_answer(t, grant)
        tr.hand_over.from_holder(t, first, caller.row, Cause(Reason.IDLE_COPY))

    def by_core(place: Any, core: Any) -> int:
        caller.taken_grants = {(grant, number)}
        return caller.release(place, core)

    return by_python, by_core


def keep(caller: Caller, lab: Lab) -> tuple[LabOperation, CoreCall]:
    """Keep the copy, and call the first waiter up."""
    first = lab.ticket("a")

    def by_python(t: Transaction, tr: Transitions) -> None:
        tr.holds.release(t, caller.row)
        tr.tickets.call_up(t, first)

    return by_python, partial(caller.release, way=KEEP_AND_CALL_UP)


def keep_again(caller: Caller, lab: Lab) -> tuple[LabOperation, CoreCall]:
    """Keep the copy; the first waiter was called up before."""
    first = lab.ticket("a")
    lab.do(lambda t, tr: tr.tickets.call_up(t, first))
    return (lambda t, tr: tr.holds.release(t, caller.row)), partial(caller.release, way=KEEP)


def keep_for_the_next(caller: Caller, lab: Lab) -> tuple[LabOperation, CoreCall]:
    """Keep the copy; the waiter called up before has been served meanwhile, so the first waiter is called up now."""
    by_python, _ = keep(caller, lab)
    return by_python, partial(caller.release, way=KEEP)


def join_queue(caller: Caller, lab: Lab) -> tuple[LabOperation, CoreCall]:
    """Wait for a copy that another process has, in a row of the table that was never in use."""
    model = lab.model("a")
    lab.do(lambda t, tr: t.set_float(Header.SETTINGS + list(SETTINGS).index("max_model_copies"), 2.0))

    def by_python(t: Transaction, tr: Transitions) -> None:
        need_mb = lab.segment.floats[lab.tables.model(model) + Model.ESTIMATE_MB]
        tr.tickets.enqueue(t, model, Lab.victim, 1, need_mb, DEADLINE_NS, cause=Cause(Reason.COPIES))

    return by_python, lambda place, core: caller.queue(place, core) + 1


@built
@pytest.mark.parametrize("what", [take, release, hand_over, keep, keep_again, keep_for_the_next, join_queue])
def test_death_at_any_store_leaves_what_python_leaves(
    lab: Lab,
    what: Callable[[Caller, Lab], tuple[LabOperation, CoreCall]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    (lab.active if what is join_queue else lab.idle)("a", b"first")
    row = lab.idle("a", b"h") if what is take else lab.active("a", b"h")
    caller = Caller(lab, row)
    by_python, by_core = what(caller, lab)

    def compiled(store: int, killed: bool = False) -> None:
        place, core = place_of(lab.segment)
        try:
            pretend(FROZEN_NS, store, killed)
            assert by_core(place, core)
        finally:
            pretend(0)
            place.lock.close()

    saved, before = lab.save(), lab.comparable()
    images = lab.images(by_python, tmp_path / "images")
    after = lab.comparable()
    for store, image in enumerate(images, 1):
        lab.restore(saved)
        compiled(store)
        assert lab.without_pids(lab.save()) == lab.without_pids(image), f"store {store}"
        lab.recover()
        assert lab.comparable() == (before if store < len(images) else after)
    lab.restore(saved)
    compiled(len(images) + 1)
    assert lab.comparable() == after
    for store in some_of(len(images)):
        lab.restore(saved)
        assert run_in_child(partial(compiled, store, True)) == KILLED
        assert lab.without_pids(lab.save()) == lab.without_pids(images[store - 1]), f"killed at store {store}"
    assert lab.problems() == []
    record_property(CRASH_POINTS, len(images))


# ---- what it leaves to Python ------------------------------------------------------------------------------------


@built
def test_it_does_not_wait_for_long_nor_undo_what_others_left(lab: Lab) -> None:
    caller = Caller(lab, lab.idle("a", b"h"))
    place, core = place_of(lab.segment)

    def declines() -> bool:
        before, taken = lab.comparable(), caller.take(place, core)
        # As Python does, so that a process that releases the lock wakes one of the sleeping ones.
        lab.words[Header.CONTENDED] = 0
        return taken is None and lab.comparable() == before and not caller.held and caller.operation.held is None

    with ExitStack() as stack:
        other = stack.enter_context(open(lab.segment.path, "rb"))
        fcntl.flock(other, fcntl.LOCK_EX)
        assert declines()
        assert not lab.words[Header.SPIN_LOCK], "it has given back what it did not use"
        fcntl.flock(other, fcntl.LOCK_UN)
        lab.words[Header.STARVING] = 1
        assert declines()
        lab.words[Header.STARVING] = 0
        lab.words[Header.CHANGE] += 1
        assert declines()
        lab.recover()
    # In the middle of a transaction of this very lock, be it this thread's or another one's.
    with place.lock():
        assert declines()
        assert caller.release(place, core) == 0
    place._usable = False
    assert declines()
    place._usable = True
    assert caller.take(place, core) == LoadedInstance(caller.row, caller.generation, "a", "h")
    caller.taken_grants = {(0, number) for number in range(9)}
    assert not caller.release(place, core)
    caller.taken_grants.clear()
    assert not caller.release(place, core, reference=Lab.server + 1)
    assert caller.release(place, core)
    place.lock.close()
    assert place.lock.core is None
    caller.held.clear()
    caller.operation = Operation(None)
    assert declines() and core.done == 2


@built
@pytest.mark.parametrize("since_ns", [-(10**12), -(10**9), 10**9, 10**12])
def test_a_spin_lock_whose_owner_is_dead_or_stopped_keeps_nobody_out(lab: Lab, since_ns: int) -> None:
    caller = Caller(lab, lab.idle("a", b"h"))
    place, core = place_of(lab.segment)
    for use in (caller.take, caller.release):
        # A time that has not come yet is no owner's: something else has written there.
        lab.words[Header.SPIN_LOCK] = max(1, time.monotonic_ns() + since_ns)
        assert use(place, core)
        assert not lab.words[Header.SPIN_LOCK]
    assert core.done == 2
    place.lock.close()


@built
@pytest.mark.parametrize("kind", [Model, Instance])
def test_a_field_that_it_does_not_know_has_to_be_0(
    lab: Lab, kind: type[Model | Instance], monkeypatch: pytest.MonkeyPatch
) -> None:
    caller = Caller(lab, lab.idle("a", b"h"))
    monkeypatch.setitem(
        core_module._FAMILIAR,
        kind,
        tuple(name for name in core_module._FAMILIAR[kind] if name not in ("LOADS", "LOADED_AT")),
    )
    core_module._strange.cache_clear()
    place, core = place_of(lab.segment)
    assert caller.take(place, core) is None
    lab.words[lab.tables.model(0) + Model.LOADS] = lab.words[lab.tables.instance(0) + Instance.LOADED_AT] = 0
    assert caller.take(place, core) is not None
    monkeypatch.undo()
    core_module._strange.cache_clear()
    place.lock.close()


# ---- broken segments ---------------------------------------------------------------------------------------------

ODD_WORDS = (0, 1, 2, 3, 5, 6, 7, 4096, 2**31, 2**32 + 1, 2**62, 2**63, 2**64 - 2, 2**64 - 1)


@built
def test_a_broken_segment_cannot_harm_it(lab: Lab) -> None:
    lab.idle("a", b"first")
    caller = Caller(lab, lab.idle("a", b"h"))
    other = lab.active("a", b"other")
    lab.segment.floats[Header.SETTINGS + list(SETTINGS).index("max_model_copies")] = 3.0
    chance = random.Random(11)
    saved = [lab.save()]
    granted = lab.ticket("a")
    lab.do(lambda t, tr: tr.hand_over.from_holder(t, granted, other, Cause(Reason.IDLE_COPY)))
    for row in (0, 1):
        lab.do(partial(lab._take, row))
    saved.append(lab.save())
    for _ in range(3):
        lab.do(lambda t, tr: tr.tickets.enqueue(t, 0, 1, 1, 1.0, DEADLINE_NS, cause=Cause(Reason.COPIES)))
    saved.append(lab.save())
    ends = lab.layout.tickets.end
    within = [*range(Header.WORDS), *range(lab.layout.models.base, ends)] * 2 + list(range(lab.layout.words))
    # Those on which the way depends come up more often.
    model, instance = lab.tables.model(0), lab.tables.instance(caller.row)
    often = [*range(model, model + Model.TAG), *range(instance, instance + Instance.SHARES), Header.EVENTS]
    often += [Header.WAITING, Header.NEWEST_TICKET, *range(lab.layout.tickets.base, ends)]

    def fuzz() -> None:
        place, core = place_of(lab.segment)
        operation = caller.operation
        queued = granted_to = 0
        for _ in range(scaled(6000)):
            lab.restore(chance.choice(saved))
            operation.held = None
            for _ in range(chance.choice((1, 1, 2, 5, 40))):
                word = chance.choice(within if chance.random() < 0.5 else often)
                lab.words[word] = chance.choice((*ODD_WORDS, chance.getrandbits(64), chance.randrange(16)))
            caller.row = chance.choice((0, 1, 2, chance.choice(ODD_WORDS)))
            caller.generation = chance.choice((*range(12), 2**64 - 1))
            caller.handles[0] = LoadedInstance(0, caller.generation, "a", "h")
            taken = caller.take(place, core)
            assert (taken is None) == (operation.held is None)
            grants = ((chance.choice((granted, *ODD_WORDS)), chance.randrange(8)) for _ in range(2))
            caller.taken_grants = set(grants) if chance.random() < 0.3 else set()
            caller.release(place, core, chance.choice((1, 2, 2**64 - 1)), chance.randrange(KEEP_AND_CALL_UP + 2))
            queued += caller.queue(place, core) >= 0
            granted_to += caller.take_granted(core, granted) is not None
            core.await_answer(granted, 1, 0, 1, 0)
            caller.held.clear()
        assert core.done > 100 and queued > 100 and granted_to > 0, (core.done, queued, granted_to)

    assert run_in_child(fuzz) == 0


@built
def test_a_layout_that_leads_outside_is_refused(lab: Lab) -> None:
    from mpmm.shared_state._core import OFFSETS, Core

    memory, count = lab.segment.words.obj, lab.layout.words
    offsets = core_module._offsets(lab.layout.capacities)

    def made(changed: dict[str, int], words: int = count, strange: tuple[int, ...] = ()) -> Any:
        values = tuple(changed.get(name, value) for name, value in zip(OFFSETS, offsets, strict=True))
        return Core(memory, words, values, strange, (), 1, SMOOTHING, CORE_TURN, CROWDED_TURNS, 0)

    made({}).close()
    for name in OFFSETS:
        # Not the constants, which are compared and lead nowhere.
        if name.split(".")[0] in ("Header", "Event", "Undo", "models", "instances", "tickets", "events", "undo"):
            with pytest.raises(ValueError):
                made({name: 2**40})
    with pytest.raises(ValueError, match="layout version"):
        made({"LAYOUT_VERSION": 1})
    with pytest.raises(ValueError, match="too small"):
        made({}, words=2**40)
    with pytest.raises(ValueError, match="outside of its row"):
        made({}, strange=(10**6,))
    with pytest.raises(ValueError):
        Core(memory, count, offsets[1:], (), (), 1, SMOOTHING, CORE_TURN, CROWDED_TURNS, 0)
    for name in ("take_idle", "release", "queue", "await_answer", "take_granted"):
        with pytest.raises(TypeError):
            getattr(made({}), name)(1)
