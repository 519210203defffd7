"""The compiled core in the queue: who may join it without a plan, and the sleeps, for an answer and for the lock."""

from __future__ import annotations

import fcntl
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from core_calls import DEADLINE_NS, Caller, built, place_of
from crash_lab import Lab
from harness import wait_until

from mpmm.model_manager.operations import Operation
from mpmm.policy.view import Reason
from mpmm.scheduling import CALLED_UP_FOR_NS
from mpmm.shared_state.core import HANDED_OVER
from mpmm.shared_state.events import Cause
from mpmm.shared_state.futex import wake_one
from mpmm.shared_state.layout import Header, Instance, Model, Ticket
from mpmm.shared_state.settings import SETTINGS
from mpmm.shared_state.transaction import CROWDED_TURNS, float_bits


@pytest.fixture
def lab() -> Iterator[Lab]:
    lab = Lab("lab")
    yield lab
    lab.namespace.leave()


@built
def test_what_a_ticket_was_granted_is_noted(lab: Lab) -> None:
    caller = Caller(lab, lab.active("a", b"h"))
    place, core = place_of(lab.segment)
    ticket = lab.ticket("a")
    assert caller.take_granted(core, ticket) is None
    lab.do(lambda t, tr: tr.hand_over.from_holder(t, ticket, caller.row, Cause(Reason.IDLE_COPY)))
    lab.words[Header.CHANGE] += 1
    assert caller.take_granted(core, ticket) is None, "the transaction may yet be undone"
    lab.words[Header.CHANGE] += 1
    assert caller.held == {} and caller.operation.held is None
    uses = lab.words[lab.tables.instance(caller.row) + Instance.USES]
    got = caller.take_granted(core, ticket)
    assert got is caller.handles[caller.row]
    at = (caller.row, caller.generation)
    assert caller.operation.held == (got, uses)
    assert caller.held[at] is caller.operation.held
    assert caller.held_at == {"h": at}
    assert caller.taken_grants == {(ticket, lab.words[lab.tables.ticket(ticket) + Ticket.NUMBER])}
    place.lock.close()
    assert caller.take_granted(core, ticket) is None


class Sleeper(threading.Thread):
    """Sleeps in the core until a ticket has its answer."""

    def __init__(self, core: Any, ticket: int, until: int = DEADLINE_NS) -> None:
        super().__init__()
        self.state = -1
        self._arguments = (ticket, until, 0, CALLED_UP_FOR_NS, 1000)
        self._core = core
        self.start()

    def run(self) -> None:
        self.state = self._core.await_answer(*self._arguments)


@built
def test_a_waiter_sleeps_until_its_answer(lab: Lab) -> None:
    caller = Caller(lab, lab.active("a", b"h"))
    place, core = place_of(lab.segment)
    ticket = lab.ticket("a")
    assert core.await_answer(ticket, time.monotonic_ns() + 10**6, 0, CALLED_UP_FOR_NS, 0) == Ticket.WAITING
    sleeper = Sleeper(core, ticket)
    assert caller.release(place, core) == HANDED_OVER
    sleeper.join()
    assert sleeper.state == Ticket.GRANTED
    place.lock.close()


@built
@pytest.mark.parametrize("how", ["woken", "called up", "closed"])
def test_a_waiter_returns_for_python_to_look(lab: Lab, how: str) -> None:
    lab.active("a", b"h")
    place, core = place_of(lab.segment)
    ticket = lab.ticket("a")
    sleeper = Sleeper(core, ticket)
    signal = lab.namespace.reads.queue.signal(ticket)
    if how == "called up":
        lab.do(lambda t, tr: tr.tickets.call_up(t, ticket))
        called_up = lab.words[lab.tables.ticket(ticket) + Ticket.CALLED_UP]
        sleeper.join()
        assert time.monotonic_ns() >= called_up + CALLED_UP_FOR_NS
        # It has looked for that call.
        soon = time.monotonic_ns() + 10**6
        assert core.await_answer(ticket, soon, called_up, 0, 0) == Ticket.WAITING
        assert time.monotonic_ns() >= soon
    elif how == "closed":
        core.close()
    while sleeper.is_alive():
        # Again and again, because one that does not sleep yet misses it.
        signal.wake()
        sleeper.join(0.01)
    assert sleeper.state == Ticket.WAITING
    place.lock.close()


@built
def test_a_signal_ends_the_sleep(lab: Lab) -> None:
    lab.active("a", b"h")
    place, core = place_of(lab.segment)
    ticket = lab.ticket("a")
    came: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: came.append(number))
    try:
        # Again and again: the first one may come before the sleep.
        signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
        assert core.await_answer(ticket, DEADLINE_NS, 0, CALLED_UP_FOR_NS, 0) == Ticket.WAITING
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert came
    place.lock.close()


@built
def test_it_queues_only_where_the_wait_is_known(lab: Lab) -> None:
    caller = Caller(lab, lab.active("a", b"h"))
    model = lab.tables.model(lab.model("a"))
    place, core = place_of(lab.segment)
    setting = {name: Header.SETTINGS + number for number, name in enumerate(SETTINGS)}

    def declines() -> bool:
        before = lab.comparable()
        return caller.queue(place, core) == -1 and lab.comparable() == before and caller.operation.ticket is None

    # Another copy may be loaded, and how long the holds and the loads take is not known.
    assert declines()
    lab.segment.floats[setting["max_model_copies"]] = 1.0
    for at, value in (
        (model + Model.FAILURES, 1),
        (model + Model.SHARES, 0),
        (model + Model.AT_LEAST_MB, float_bits(1.0)),
        (model + Model.SEATS, 1),
        (Header.ISOLATED, 1),
        (setting["max_waiting"], float_bits(0.0)),
        (lab.tables.instance(caller.row) + Instance.OWNER, Lab.victim + 1),
        (lab.tables.instance(caller.row) + Instance.UNLOAD_ON_RELEASE, Instance.ASKED),
        (lab.tables.instance(caller.row) + Instance.STATE, Instance.SUSPENDED),
    ):
        usual, lab.words[at] = lab.words[at], value
        assert declines(), at
        lab.words[at] = usual
    assert caller.queue(place, core) == 0
    assert caller.operation.ticket == (0, lab.words[lab.tables.ticket(0) + Ticket.NUMBER])
    caller.operation = Operation(None)
    # The newest waiter was told something else than that it waits for one of these copies.
    lab.words[lab.tables.ticket(0) + Ticket.REASON] = Reason.IN_USE
    assert declines()
    lab.words[lab.tables.ticket(0) + Ticket.REASON] = Reason.COPIES
    while (row := caller.queue(place, core)) >= 0:
        last = row
    assert last == lab.layout.tickets.capacity - 1, "the table is full"
    assert lab.problems() == []
    place.lock.close()


@built
def test_it_sleeps_until_the_lock_is_free(lab: Lab) -> None:
    caller = Caller(lab, lab.idle("a", b"h"))
    place, core = place_of(lab.segment)
    with open(lab.segment.path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def give_up() -> None:
            wait_until(lambda: bool(lab.words[Header.CONTENDED]), "it is about to sleep")
            fcntl.flock(other, fcntl.LOCK_UN)
            wake_one(lab.segment.address + 8 * Header.CONTENDED)

        thread = threading.Thread(target=give_up)
        thread.start()
        assert caller.take(place, core) is not None
        thread.join()
    # It expects others from now on.
    assert place.lock._crowded_turns == CROWDED_TURNS
    place.lock.close()
