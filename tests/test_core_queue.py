"""The compiled core in the queue: joining it without a plan, and sleeps for an answer and for the lock."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from core_calls import DEADLINE_NS, Caller, built, place_of, pretend
from core_calls import lab as lab  # the fixture
from crash_lab import FROZEN_NS, Lab
from harness import wait_until
from patience import DEADLINE_S

from mpmm.model_manager.operations import LoadedInstance, Operation
from mpmm.policy.view import Reason
from mpmm.scheduling import CALLED_UP_FOR_NS
from mpmm.shared_state import core as core_module
from mpmm.shared_state.core import HANDED_OVER
from mpmm.shared_state.events import Cause
from mpmm.shared_state.futex import _SYSCALL as FUTEX_CALL
from mpmm.shared_state.futex import wait_for_change, wake_one
from mpmm.shared_state.layout import MOST_DEVICES, Header, Instance, Member, Model, Ticket
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.settings import SETTINGS
from mpmm.shared_state.transaction import CROWDED_TURNS, float_bits


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
    sleeper, signal = Sleeper(core, ticket), lab.namespace.reads.queue.signal(ticket)
    # If it came to sleep between the call and its wake-up, that would be one without a signal, which Python looks at.
    wait_until(lambda: sleeps_on(signal.address, sleeper), "it sleeps")
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


@built
@pytest.mark.parametrize("timeout_s", [0.0, 0.002, 0, -1.0, float("nan")])
@pytest.mark.parametrize("call", [Caller.take, Caller.release, Caller.queue])
def test_a_caller_with_less_time_than_a_sleep_takes_gets_an_answer_without_one(
    lab: Lab, call: Callable[..., Any], timeout_s: float
) -> None:
    row = lab.idle("a", b"h") if call is Caller.take else lab.active("a", b"h")
    if call is Caller.queue:
        lab.segment.floats[Header.SETTINGS + list(SETTINGS).index("max_model_copies")] = 1.0
    caller = Caller(lab, row)
    place, core = place_of(lab.segment)
    with open(lab.segment.path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        before = lab.comparable()
        assert call(caller, place, core, timeout_s=timeout_s) in (None, 0, -1)
        assert not lab.words[Header.CONTENDED], "it would have asked to be woken"
        assert call(caller, place, core, timeout_s=0.01) in (None, 0, -1)
        assert lab.words[Header.CONTENDED], "a sleep fits into that"
        lab.words[Header.CONTENDED] = 0
        assert lab.comparable() == before
        fcntl.flock(other, fcntl.LOCK_UN)
        assert call(caller, place, core, timeout_s=timeout_s) not in (None, -1), "what is free is taken all the same"
    assert core.done == 1
    with pytest.raises(TypeError):
        call(caller, place, core, timeout_s="soon")
    place.lock.close()


@built
def test_where_a_copy_was_taken_meanwhile_it_takes_the_next_one(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [lab.idle("a", handle) for handle in (b"first", b"second")]
    idle = lab.save()
    caller = Caller(lab, rows[0])
    for row, handle in zip(rows, ("first", "second"), strict=True):
        generation = lab.words[lab.tables.instance(row) + Instance.GENERATION]
        caller.handles[row] = LoadedInstance(row, generation, "a", handle)
    for name in ("_SPIN_NS", "_LONGEST_SPIN_NS"):
        monkeypatch.setattr(core_module, name, 10**9 * int(DEADLINE_S))
    place, core = place_of(lab.segment)
    assert caller.take(place, core) is caller.handles[rows[1]], "who was used last is used first"
    caller.held.clear()
    caller.held_at.clear()
    # The other process has the spin lock in this state, too, while it writes all of it.
    lab.words[Header.SPIN_LOCK] = FROZEN_NS
    one_taken = lab.save()
    lab.restore(idle)
    # Time stands still, so that what another process has does not lapse if that loses its processor.
    pretend(FROZEN_NS)
    lab.words[Header.SPIN_LOCK] = FROZEN_NS
    try:
        other = os.fork()
        if not other:
            # Once this process has seen the second one idle, and spins, another one takes that.
            time.sleep(0.05)
            lab.restore(one_taken)
            lab.words[Header.SPIN_LOCK] = 0
            os._exit(0)
        assert caller.take(place, core) is caller.handles[rows[0]]
    finally:
        pretend(0)
    os.waitpid(other, 0)
    at = (rows[0], caller.handles[rows[0]].generation)
    assert caller.held == {at: (caller.handles[rows[0]], lab.words[lab.tables.instance(rows[0]) + Instance.USES])}
    assert caller.held_at == {"first": at} and caller.operation.held is caller.held[at]
    assert lab.problems() == []
    place.lock.close()


@built
def test_it_sleeps_while_another_process_has_the_spin_lock(lab: Lab) -> None:
    caller = Caller(lab, lab.idle("a", b"h"))
    place, core = place_of(lab.segment)
    address, taken = lab.segment.address + 8 * Header.CONTENDED, list[object]()
    pretend(FROZEN_NS)
    lab.words[Header.SPIN_LOCK] = FROZEN_NS

    def take() -> None:
        while not any(taken):
            taken[:] = [caller.take(place, core)]

    thread = threading.Thread(target=take)
    try:
        thread.start()
        wait_until(lambda: sleeps_on(address, thread), "it sleeps")
    finally:
        # The turn of a stopped or dead process lapses.
        pretend(0)
    thread.join(DEADLINE_S)
    assert taken == [caller.handles[caller.row]]
    place.lock.close()


@built
def test_who_was_woken_for_the_lock_has_the_next_one_woken(lab: Lab) -> None:
    caller = Caller(lab, lab.idle("a", b"h"))
    place, core = place_of(lab.segment)
    address, taken = lab.segment.address + 8 * Header.CONTENDED, list[object]()
    first = threading.Thread(target=lambda: taken.append(caller.take(place, core)))
    second = threading.Thread(
        target=lambda: wait_for_change(lambda: int(lab.words[Header.CONTENDED]), address, 1, DEADLINE_S)
    )
    with open(lab.segment.path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        first.start()
        wait_until(lambda: sleeps_on(address, first), "it sleeps")
        second.start()
        wait_until(lambda: sleeps_on(address, second), "it sleeps")
        fcntl.flock(other, fcntl.LOCK_UN)
        lab.words[Header.CONTENDED] = 0
        wake_one(address)
    first.join()
    if taken == [None]:
        # On a busy machine, this took so long that the core has left the lock to Python.
        wake_one(address)
    second.join(DEADLINE_S / 2)
    assert not second.is_alive()
    place.lock.close()


class Dozer(threading.Thread):
    """Sleeps in the core on a word, and looks after the lock of a file and the words that are times."""

    def __init__(self, core: Any, word: int, seen: int, fd: int, times: Any = (), rest: Any = (None, None, None)):
        super().__init__(daemon=True)
        self.result: bool | None = None
        # It looks every millisecond if there is something to look at; in between a bare wake-up would be lost.
        tick_ns, late_ns = 10**6 if times else 10**13, 50_000_000
        self._arguments = (word, seen, DEADLINE_NS, tick_ns, fd, late_ns, times, *rest)
        self._core = core
        self.start()

    def run(self) -> None:
        self.result = self._core.doze(*self._arguments)


class Watcher(Dozer):
    """Sleeps in the core on a word, and looks whether the members of a namespace live, but for the one in a slot."""

    def __init__(self, core: Any, word: int, seen: int, folder: int, slot: int):
        super().__init__(core, word, seen, folder, (slot,))

    def run(self) -> None:
        word, seen, until_ns, tick_ns, folder, _, (slot,), *rest = self._arguments
        self.result = self._core.keep_watch(word, seen, until_ns, tick_ns, folder, slot, *rest)


@pytest.fixture
def lead(tmp_path: Path) -> Iterator[tuple[LockFile, LockFile]]:
    """The lock of a leader, who has it, and the file as a deputy has opened it."""
    leader, deputy = LockFile(tmp_path / "leader.lock"), LockFile(tmp_path / "leader.lock")
    assert leader.try_exclusive()
    yield leader, deputy
    leader.close()
    deputy.close()


@built
@pytest.mark.parametrize("what", ["the leader ends", "a poll is late", "a ring", "a wake-up", "closed"])
def test_a_background_thread_dozes_until_there_is_something_to_do(
    lab: Lab, lead: tuple[LockFile, LockFile], what: str
) -> None:
    place, core = place_of(lab.segment)
    bell = lab.namespace.tables.bell(lab.namespace.slot)
    lab.words[Header.POLLED] = time.monotonic_ns() + 10**15
    dozer = Dozer(core, bell.word, bell.seen(), lead[1].fd, (Header.POLLED,))
    dozer.join(0.02)
    assert dozer.is_alive(), "there is a leader, and its poll is not late"
    if what == "the leader ends":
        lead[0].close()
    elif what == "a poll is late":
        # Only now, because any time may have passed until the thread began.
        lab.words[Header.POLLED] = time.monotonic_ns() - 10**9
    elif what == "a ring":
        lab.words[bell.word] += 1
    elif what == "closed":
        core.close()
    while dozer.is_alive():
        if what in ("a ring", "a wake-up", "closed"):
            # Again and again, because one that does not sleep yet misses it.
            bell.wake()
        dozer.join(0.01)
    assert dozer.result is (what in ("the leader ends", "a poll is late"))
    if what == "the leader ends":
        assert lead[0].fd < 0
        assert LockFile(lead[1].path).try_exclusive(), "it has only looked"
    place.lock.close()


@built
def test_whoever_leaves_its_sleep_wakes_the_thread_that_rests_meanwhile(
    lab: Lab, lead: tuple[LockFile, LockFile]
) -> None:
    caller = Caller(lab, lab.active("a", b"h"))
    place, core = place_of(lab.segment)
    bell = lab.namespace.tables.bell(lab.namespace.slot)
    assert not core.wake_after_sleep(bell.word, 1, core.sleeps), "nobody sleeps"
    before, ticket = core.sleeps, lab.ticket("a")
    sleeper = Sleeper(core, ticket)
    wait_until(lambda: core.sleeps > before, "it sleeps")
    assert not core.wake_after_sleep(bell.word, 1, before), "it has come since"
    assert not core.wake_after_sleep(bell.word, 2, core.sleeps), "another call is awake"
    assert core.wake_after_sleep(bell.word, 1, core.sleeps)
    dozer = Dozer(core, bell.word, bell.seen(), lead[1].fd)
    wait_until(lambda: sleeps_on(bell.address, dozer), "it dozes")
    assert caller.release(place, core) == HANDED_OVER
    sleeper.join()
    dozer.join(DEADLINE_S)
    assert dozer.result is False
    place.lock.close()


@built
@pytest.mark.parametrize(
    "what",
    ["a call begins", "a transaction is left", "its calls are left", "a mutex is left", "a change is deferred"],
)
def test_a_wake_up_that_came_too_early_is_made_good(lab: Lab, lead: tuple[LockFile, LockFile], what: str) -> None:
    place, core = place_of(lab.segment)
    bell, calls, lock = lab.namespace.tables.bell(lab.namespace.slot), set[Operation](), lab.namespace.lock
    deferred = deque[object]()
    dozer = Dozer(core, bell.word, bell.seen(), lead[1].fd, (), (calls, lock, deferred))
    wait_until(lambda: sleeps_on(bell.address, dozer), "it dozes")
    if what == "a call begins":
        calls.add(Operation(None))
    elif what == "a transaction is left":
        lock._frame = sys._getframe()
    elif what == "its calls are left":
        lock._calls[0] = []
    elif what == "a change is deferred":
        deferred.append(None)
    else:
        lock._mutex.acquire()
    dozer.join(DEADLINE_S)
    assert dozer.result is False
    lock._frame = None
    lock._calls.clear()
    if what == "a mutex is left":
        lock._mutex.release()
    place.lock.close()


def sleeps_on(address: int, thread: threading.Thread) -> bool:
    """Tell whether a thread sleeps on a word; and not, say, until it may run Python."""
    try:
        call = Path(f"/proc/self/task/{thread.native_id}/syscall").read_text().split()
    except FileNotFoundError:
        return False
    return call[:2] == [str(FUTEX_CALL), hex(address)]


@pytest.fixture
def members(namespace: str) -> Iterator[list[Namespace]]:
    """Members of one namespace, more than the core looks at in a row, and fewer than have been there."""
    joined = [Namespace.join(namespace) for _ in range(20)]
    joined.pop(3).leave()
    yield joined
    for one in reversed(joined):
        if one.is_usable:
            one.leave()


def let_die(member: Namespace) -> None:
    """Free the lock by which the others see that a member lives."""
    life = member._files._life
    assert life is not None
    life.close()


@built
@pytest.mark.parametrize("what", ["dead", "gone", "another file", "free", "no folder", "closed", "of no segment"])
def test_the_core_says_that_all_members_live_only_if_it_is_certain(members: list[Namespace], what: str) -> None:
    first, last = members[0], members[-1]
    core, folder, path = first.lock.core, first.folder_fd, Path(last.member_lock_path(last.slot))
    assert core is not None
    assert not core.may_be_dead(folder, first.slot)
    assert not core.may_be_dead(folder, -1), "nor the one that asks"
    assert first.find_dead_members() == []
    dead: list[int] = []
    if what == "dead":
        let_die(last)
        dead = [last.slot]
        assert not core.may_be_dead(folder, last.slot), "it asks about the others"
    elif what == "gone":
        # Its pid decides, which Python asks for.
        path.unlink()
    elif what == "another file":
        path.unlink()
        other = LockFile(path)
        assert other.try_exclusive()
    elif what == "free":
        with first.transaction() as t:
            t.set(first.tables.member(last.slot) + Member.STATE, Member.FREE)
        let_die(last)
        assert not core.may_be_dead(folder, first.slot)
        assert first.find_dead_members() == []
        with first.transaction() as t:
            t.set(first.tables.member(last.slot) + Member.STATE, Member.WORKER)
        dead = [last.slot]
    elif what == "no folder":
        folder = -1
    elif what == "closed":
        folder = os.open(path.parent, os.O_RDONLY)
        os.close(folder)
    else:
        first.leave()
    assert core.may_be_dead(folder, first.slot)
    if what != "of no segment":
        assert first.find_dead_members() == dead
    if what == "another file":
        other.close()


@built
@pytest.mark.parametrize("what", ["a death", "a ring", "closed"])
def test_a_leader_sleeps_until_a_member_may_be_dead(members: list[Namespace], what: str) -> None:
    first, last = members[0], members[-1]
    core, bell = first.lock.core, first.tables.bell(first.slot)
    watcher = Watcher(core, bell.word, bell.seen(), first.folder_fd, first.slot)
    watcher.join(0.02)
    assert watcher.is_alive(), "all live"
    if what == "a death":
        let_die(last)
    elif what == "a ring":
        first.segment.words[bell.word] += 1
    else:
        first.leave()
    while watcher.is_alive():
        if what != "a death":
            # Again and again, because one that does not sleep yet misses it.
            wake_one(last.tables.bell(first.slot).address)
        watcher.join(0.01)
    if what == "closed":
        # It may have found the folder closed first, and then Python is to look.
        return
    assert watcher.result is (what == "a death")


@built
def test_what_leads_out_of_the_segment_is_refused(lab: Lab, lead: tuple[LockFile, LockFile]) -> None:
    place, core = place_of(lab.segment)
    words, fd = lab.segment.layout.words, lead[1].fd
    good = [0, lab.words[0], time.monotonic_ns() + 10**6, 10**6, fd, 10**9, (0,), None, None, None]
    assert core.doze(*good) is False
    # A poll, and each device that there may be.
    assert core.doze(*good[:6], (0,) * (MOST_DEVICES + 1), *good[7:]) is False
    wrong: Any = (
        (0, words),
        (0, -1),
        (3, 0),
        (4, 2**31),
        (6, (words,)),
        (6, [0]),
        (6, (0,) * (MOST_DEVICES + 2)),
        (6, ("",)),
        (7, []),
    )
    for at, value in wrong:
        with pytest.raises(TypeError, match="doze: expected"):
            core.doze(*good[:at], value, *good[at + 1 :])
    watch = [0, lab.words[0], DEADLINE_NS, 10**6, -1, -1, None, None, None]
    assert core.keep_watch(*watch) is True, "Python is to look, without the folder"
    for at, value in ((0, words), (3, 0), (4, 2**31), (4, -2), (4, None), (5, -2), (5, 2**63), (5, ""), (6, [])):
        with pytest.raises(TypeError, match="keep_watch: expected"):
            core.keep_watch(*watch[:at], value, *watch[at + 1 :])
    for pair in ((2**31, 0), (-2, 0), (0, -2), (0, None), (0,)):
        with pytest.raises(TypeError, match="may_be_dead: expected"):
            core.may_be_dead(*pair)
    for arguments in ((words, 0, 0), (-1, 0, 0), (0, 0)):
        with pytest.raises(TypeError, match="wake_after_sleep: expected"):
            core.wake_after_sleep(*arguments)
    place.lock.close()
