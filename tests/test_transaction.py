"""The lock of a segment and its transactions: waiting, waking, giving up, and what an exception or a death leaves."""

from __future__ import annotations

import fcntl
import math
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from harness import in_thread
from patience import DEADLINE_S

from mpmm.errors import ClosedError, LockTimeoutError, ReentrantCallError, SegmentCorruptError, TableFullError
from mpmm.policy.view import Reason
from mpmm.shared_state import transaction
from mpmm.shared_state.events import Cause, EventKind
from mpmm.shared_state.layout import STEP_WORDS, Capacities, Event, Header, Table
from mpmm.shared_state.lock_file import LockFile, is_locked
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction, TransactionLock, float_bits, roll_back

# Numbers that floats hold exactly, in the order of the real ones.
LONG_S, SHORT_S, STARVES_S, CLAIM_NS = 1 / 64, 1 / 256, 1 / 8, 5_000_000
BEGIN_S = 1024.0
BEGIN_NS = 1024 * 10**9
OTHER_PID = 4711


@pytest.fixture
def joined(namespace: str) -> Iterator[Namespace]:
    """A namespace with a small undo log."""
    made = Namespace.join(namespace, capacities=Capacities(undo=64, events=7))
    yield made
    made.leave()


@pytest.fixture
def lock(joined: Namespace) -> Iterator[TransactionLock]:
    """A lock of the segment besides that of the membership."""
    made = TransactionLock(joined.segment, 10.0)
    yield made
    made.close()


# ---- the undo log ------------------------------------------------------------------------------------------------

UNDO = Table("undo", Header.WORDS + 10, 2, 4, 0)


def with_log(*entries: tuple[int, int], change: int = 0, count: int | None = None) -> list[int]:
    """Return words with an undo log."""
    words = [*range(1000, 1000 + UNDO.base), *([0] * 2 * UNDO.capacity)]
    words[Header.CHANGE] = change
    words[Header.UNDO_COUNT] = len(entries) if count is None else count
    for number, entry in enumerate(entries):
        words[UNDO.base + 2 * number : UNDO.base + 2 * number + 2] = entry
    return words


@pytest.mark.parametrize("entries", [(), ((20, 1),), ((20, 1), (21, 2)), ((20, 1), (21, 2), (20, 3), (22, 4))])
@pytest.mark.parametrize(("change", "then"), [(0, 0), (1, 2), (6, 6), (7, 8), (2**64 - 1, 0), (2**64 - 2, 2**64 - 2)])
def test_the_undo_log_is_undone_from_its_end(entries: tuple[tuple[int, int], ...], change: int, then: int) -> None:
    words = with_log(*entries, change=change)
    expected = list(words)
    for at, value in reversed(entries):
        expected[at] = value
    expected[Header.UNDO_COUNT], expected[Header.CHANGE] = 0, then
    assert roll_back(words, UNDO) == len(entries)
    assert words == expected
    assert roll_back(words, UNDO) == 0
    assert words == expected


@pytest.mark.parametrize(
    ("entries", "count", "whole"),
    [
        ([(20, 1), (UNDO.base - 1, 1)], 2, True),
        ([(20, 1), (UNDO.base, 1)], 2, False),
        ([(UNDO.base, 1), (20, 1)], 2, False),
        ([(20, 1), (UNDO.base, 1)], 1, True),
        ([(20, 1), (2**63, 1)], 2, False),
        ([(20, 1)] * 4, 4, True),
        ([(20, 1)] * 4, 5, False),
        ([], 2**64 - 1, False),
    ],
)
def test_a_log_that_is_none_of_ours_is_refused_before_anything_is_changed(
    entries: list[tuple[int, int]], count: int, whole: bool
) -> None:
    words = with_log(*entries, count=count, change=1)
    before = list(words)
    if whole:
        assert roll_back(words, UNDO) == count
    else:
        with pytest.raises(SegmentCorruptError, match="another program has written") as caught:
            roll_back(words, UNDO)
        assert caught.value.name == "undo log"
        assert words == before


def test_a_word_holds_a_float_as_every_program_does() -> None:
    for value in (0.0, 1.0, -2.5, math.inf, 1e300):
        assert float_bits(value) == struct.unpack("<Q", struct.pack("<d", value))[0]


@pytest.mark.parametrize(
    ("entries", "change", "rollbacks"),
    [([], 0, 0), ([], 1, 0), ([(Header.LOADS, 3)], 1, 1), ([(Header.LOADS, 3), (Header.HITS, 4)], 0, 1)],
    ids=["nothing", "not begun", "begun", "committing"],
)
def test_the_next_one_undoes_what_a_dead_process_has_left_and_counts_it(
    joined: Namespace, lock: TransactionLock, entries: list[tuple[int, int]], change: int, rollbacks: int
) -> None:
    words, base = joined.segment.words, joined.segment.layout.undo.base
    before = words[Header.ROLLBACKS], words[Header.LOADS], words[Header.HITS]
    for number, (at, value) in enumerate(entries):
        words[base + 2 * number], words[base + 2 * number + 1] = at, value
    words[Header.UNDO_COUNT] = len(entries)
    words[Header.CHANGE] += change
    changes = lock.changes
    with lock():
        pass
    assert lock.changes == words[Header.CHANGE] == changes + change + 2
    assert words[Header.UNDO_COUNT] == 0
    then = {Header.LOADS: before[1], Header.HITS: before[2], **dict(entries)}
    assert (words[Header.ROLLBACKS], words[Header.LOADS], words[Header.HITS]) == (
        before[0] + rollbacks,
        then[Header.LOADS],
        then[Header.HITS],
    )


# ---- stores ------------------------------------------------------------------------------------------------------


def test_a_transaction_is_kept_whole_or_not_at_all(joined: Namespace, lock: TransactionLock) -> None:
    words, floats = joined.segment.words, joined.segment.floats
    with lock() as t:
        t.set(Header.LOADS, 5)
        t.add(Header.LOADS, 2)
        t.set_float(Header.WRITTEN_OFF, 2.5)
        t.add_float(Header.WRITTEN_OFF, 0.25)
        t.set_text(Header.SOURCE_NAME, b"a name of 21 bytes...")
    text = joined.tables.text(Header.SOURCE_NAME)
    assert (words[Header.LOADS], floats[Header.WRITTEN_OFF], text) == (7, 2.75, b"a name of 21 bytes...")
    before, changes = list(words[: joined.segment.layout.undo.base]), lock.changes
    with pytest.raises(ZeroDivisionError), lock() as t:
        t.set_all([(Header.LOADS, 8), (Header.HITS, 9)])
        t.set_text(Header.SOURCE_NAME, b"another")
        t.count_up(Header.NEXT_GENERATION)
        raise ZeroDivisionError
    assert lock.changes == changes + 2
    before[Header.NEXT_GENERATION] += 1
    for word in (Header.CHANGE, Header.LOCK_TAKEN):
        before[word] = words[word]
    assert list(words[: joined.segment.layout.undo.base]) == before
    for amount in (-8, 2**64):
        with pytest.raises(ValueError), lock() as t:
            t.add(Header.LOADS, amount)
        assert words[Header.LOADS] == 7


def test_a_transaction_has_room_for_as_many_words_as_the_log(joined: Namespace, lock: TransactionLock) -> None:
    capacity, words = joined.segment.layout.undo.capacity, joined.segment.words
    assert capacity == 64
    loads = words[Header.LOADS]
    with lock() as t:
        for number in range(capacity):
            assert t.is_long is (number >= 16)
            t.set(Header.LOADS, number)
        with pytest.raises(TableFullError, match="the undo log has room for 64 words") as caught:
            t.set(Header.LOADS, 1000)
        t._lock.words[Header.HITS] = words[Header.HITS]
    assert (caught.value.table, caught.value.capacity, caught.value.setting) == ("undo", 64, "Capacities.undo")
    assert words[Header.LOADS] == capacity - 1
    words[Header.LOADS] = loads
    with pytest.raises(TableFullError), lock() as t:
        t.set_all([(Header.LOADS, 1)] * (capacity + 1))
    assert words[Header.LOADS] == loads


def test_a_step_is_long_after_so_many_words_however_large_the_log_is(joined: Namespace, lock: TransactionLock) -> None:
    transaction_of_large = Transaction(lock)
    transaction_of_large._undo_capacity = 10 * STEP_WORDS
    for count in (0, STEP_WORDS - 1, STEP_WORDS):
        transaction_of_large._count = count
        assert transaction_of_large.is_long is (count == STEP_WORDS)


CAUSE = Cause(Reason.MEMORY, 10.5, 20.25, 30.125, 40.0625, 77, 0b101)


@pytest.mark.parametrize("cause", [None, CAUSE], ids=["without a cause", "with a cause"])
@pytest.mark.parametrize("before", [0, 1, 6, 7, 15])
def test_an_event_is_a_row_of_the_ring_and_all_of_it_is_new(
    joined: Namespace, lock: TransactionLock, before: int, cause: Cause | None
) -> None:
    words, floats, table = joined.segment.words, joined.segment.floats, joined.segment.layout.events
    words[Header.EVENTS] = before
    for word in range(table.base, table.end):
        words[word] = 12345
    with lock() as t:
        t.event(EventKind.WAITS, 3, 4, 5, 2.5, cause)
        t.event(EventKind.LEFT)
        now = t.now
    assert words[Header.EVENTS] == before + 2
    at = table.base + before % table.capacity * table.words
    row = words[at : at + table.words].tolist()
    figures = floats[at + Event.NEED_MB : at + Event.SECONDS + 1].tolist()
    kind = EventKind.WAITS if cause is None else EventKind.WAITS + 256 * (Reason.MEMORY + 1)
    assert row[: Event.VALUE] == [before + 1, now, kind, os.getpid(), 3, 4, 5]
    assert floats[at + Event.VALUE] == 2.5
    if cause is None:
        assert row[Event.NEED_MB :] == 6 * [12345], "clearing them would cost time"
    else:
        assert figures == [10.5, 20.25, 30.125, 40.0625]
        assert (row[Event.OTHER], row[Event.ON]) == (77, 0b101)
    plain = table.base + (before + 1) % table.capacity * table.words
    second = words[plain : plain + table.words].tolist()
    assert second[: Event.NEED_MB] == [before + 2, now, EventKind.LEFT, os.getpid(), 0, 0, 0, 0]
    others = [word for word in range(table.base, table.end) if not 0 <= word - at < table.words]
    assert all(words[word] == 12345 for word in others if not 0 <= word - plain < table.words)


def test_several_rows_become_events_by_one_store(joined: Namespace, lock: TransactionLock) -> None:
    words, table = joined.segment.words, joined.segment.layout.events
    before = words[Header.EVENTS]
    with lock() as t:
        assert t.next_event(EventKind.WAITS, 1) == (Header.EVENTS, before + 1)
        change = t.next_event(EventKind.LEFT, ahead=1)
        assert words[Header.EVENTS] == before
        t.set_all([change])
    assert words[Header.EVENTS] == before + 2
    rows = [table.base + (before + number) % table.capacity * table.words for number in range(2)]
    assert [words[at + Event.KIND] for at in rows] == [EventKind.WAITS, EventKind.LEFT]
    assert [words[at + Event.SEQUENCE] for at in rows] == [before + 1, before + 2]


# ---- calls that follow -------------------------------------------------------------------------------------------


def test_calls_that_follow_a_transaction_are_all_made_when_the_lock_is_free_and_the_first_error_is_raised(
    joined: Namespace, lock: TransactionLock
) -> None:
    made: list[tuple[str, bool]] = []

    def call(name: str, fails: bool) -> Callable[[], None]:
        def make() -> None:
            made.append((name, is_locked(joined.segment.path)))
            if fails:
                raise RuntimeError(name)

        return make

    with pytest.raises(RuntimeError, match="second"), lock() as t:
        t.after += [call("first", False), call("second", True), call("third", False), call("fourth", True)]
        assert made == []
    assert made == [(name, False) for name in ("first", "second", "third", "fourth")]
    with lock() as t:
        assert t.after == []
        t.after.append(call("fifth", False))
    with pytest.raises(ZeroDivisionError), lock() as t:
        t.after.append(call("never", False))
        raise ZeroDivisionError
    assert [name for name, _ in made[4:]] == ["fifth"]


def test_calls_that_an_exception_prevented_are_made_once_two_looks_have_found_them(
    joined: Namespace, lock: TransactionLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def interrupt(calls: object) -> None:
        raise KeyboardInterrupt

    for number in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(transaction, "_call_all", interrupt)
            with pytest.raises(KeyboardInterrupt), lock() as t:
                t.after.append(lambda number=number: made.append(number))  # type: ignore[misc]  # no type for a lambda's default
        assert lock.may_be_abandoned is True
        lock.finish_calls()
        assert made == [*range(number)]
    lock.finish_calls()
    assert made == [0, 1]
    assert lock.may_be_abandoned is False
    lock.finish_calls()
    assert made == [0, 1]
    with lock() as t:
        t.after.append(lambda: made.append(2))
    lock.finish_calls()
    lock.finish_calls()
    assert made == [0, 1, 2]


# ---- waiting for other processes ---------------------------------------------------------------------------------


class Waits:
    """A clock that only sleeps move, and all that a lock does: attempts, sleeps and wake-ups."""

    def __init__(self, segment: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = BEGIN_S
        self.did: list[object] = []
        # What happens after that many sleeps.
        self.then: dict[int, Callable[[], object]] = {}
        self._sleeps = 0
        self._segment = segment
        clock = SimpleNamespace(monotonic=lambda: self.now, monotonic_ns=lambda: int(self.now * 1e9))
        monkeypatch.setattr(transaction, "time", clock)
        monkeypatch.setattr(transaction, "wait_for_change", self._sleep)
        monkeypatch.setattr(transaction, "wake_one", lambda address: self.did.append(("wake", self._word(address))))
        for name, value in (
            ("LONGEST_SLEEP_S", LONG_S),
            ("STARVING_SLEEP_S", SHORT_S),
            ("STARVES_AFTER_S", STARVES_S),
            ("CLAIM_NS", CLAIM_NS),
        ):
            monkeypatch.setattr(transaction, name, value)
        for name, what in (("try_exclusive", "try"), ("take_quickly", "quick")):
            monkeypatch.setattr(LockFile, name, self._noting(getattr(LockFile, name), what))

    def _noting(self, attempt: Callable[[LockFile], bool], what: str) -> Callable[[LockFile], bool]:
        def note(lock: LockFile) -> bool:
            self.did.append(what)
            return attempt(lock)

        return note

    def _word(self, address: int) -> str:
        word, rest = divmod(address - self._segment.address, 8)
        assert rest == 0
        return {Header.CONTENDED: "contended", Header.STARVING: "starving"}[word]

    def _sleep(self, read: Callable[[], int], address: int, seen: int, seconds: float) -> None:
        word = self._word(address)
        assert read() == seen, "or it would not sleep"
        self.did.append((word, seconds) if word == "contended" else (word, seconds, seen))
        self.now += seconds
        self._sleeps += 1
        self.then.get(self._sleeps, lambda: None)()

    def claim(self, after_s: float = 0.0) -> int:
        """Return what a claim says that was made now, or later."""
        return int((self.now + after_s) * 1e9) + CLAIM_NS


@pytest.fixture
def waits(joined: Namespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """The waits in this test, at the end of which the clock goes again."""
    with monkeypatch.context() as patched:
        yield Waits(joined.segment, patched)


@pytest.fixture
def other(joined: Namespace, lock: TransactionLock) -> Iterator[LockFile]:
    """Another process's lock of the segment, which it has taken."""
    made = joined.segment.lock_file()
    fcntl.flock(made.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    joined.segment.words[Header.LOCK_HOLDER] = OTHER_PID
    yield made
    made.close()


LONG_SLEEP: list[object] = [("contended", LONG_S)]
MEETS: list[object] = ["quick", *9 * ["try"]]


def test_a_free_lock_is_taken_at_once(joined: Namespace, lock: TransactionLock, waits: Waits) -> None:
    words = joined.segment.words
    with lock() as t:
        assert words[Header.LOCK_HOLDER] == os.getpid()
        assert t.now == words[Header.LOCK_TAKEN] == BEGIN_NS
        assert words[Header.CHANGE] % 2 == 1
        assert is_locked(joined.segment.path)
        assert (lock.held_by_this_thread(), lock.is_busy_here()) == (True, True)
    assert waits.did == ["quick"]
    assert words[Header.CHANGE] % 2 == 0
    assert not is_locked(joined.segment.path)
    assert (lock.held_by_this_thread(), lock.is_busy_here()) == (False, False)


@pytest.mark.parametrize("sleeps", [1, 2, 7, 8])
def test_one_that_waits_sleeps_between_attempts_and_leaves_no_claim(
    joined: Namespace, lock: TransactionLock, waits: Waits, other: LockFile, sleeps: int
) -> None:
    words = joined.segment.words
    waits.then[sleeps] = other.unlock
    with lock():
        assert words[Header.CONTENDED] == 1
    assert waits.did == [*MEETS, *sleeps * [*LONG_SLEEP, "try"], ("wake", "contended")]
    assert (words[Header.CONTENDED], words[Header.STARVING]) == (0, 0)


def test_one_that_has_waited_for_long_claims_the_lock_until_it_has_it(
    joined: Namespace, lock: TransactionLock, waits: Waits, other: LockFile
) -> None:
    words = joined.segment.words
    claims = [BEGIN_NS + int((STARVES_S + number * SHORT_S) * 1e9) + CLAIM_NS for number in range(3)]
    seen: list[tuple[int, int]] = []
    waits.then[9] = lambda: seen.append((words[Header.STARVING], words[Header.STARVING_SINCE]))
    waits.then[11] = other.unlock
    with lock():
        assert words[Header.STARVING] == 0
    assert waits.did[10:] == [
        *7 * [*LONG_SLEEP, "try"],
        *LONG_SLEEP,
        *(one for claim in claims for one in ("try", ("starving", SHORT_S, claim))),
        "try",
        ("wake", "contended"),
    ]
    assert seen == [(claims[0], BEGIN_NS)]


@pytest.mark.parametrize("timeout_s", [0.0, LONG_S / 4, LONG_S, 1.5 * LONG_S, STARVES_S, STARVES_S + 1.5 * SHORT_S])
def test_one_whose_time_is_over_tries_once_more_and_names_the_holder(
    joined: Namespace, lock: TransactionLock, waits: Waits, other: LockFile, timeout_s: float
) -> None:
    with pytest.raises(LockTimeoutError) as caught, lock(timeout_s):
        raise AssertionError("the lock was free")
    assert waits.now == BEGIN_S + timeout_s
    sleeps = [one for one in waits.did if isinstance(one, tuple) and one[0] != "wake"]
    assert waits.did[:9] == ["quick", *8 * ["try"]]
    assert waits.did[9:-2] == [one for sleep in sleeps for one in ("try", sleep)]
    assert waits.did[-2] == "try"
    error = caught.value
    assert (error.holder_pid, error.timeout_seconds, error.path) == (OTHER_PID, timeout_s, joined.segment.path)
    assert f"was not free within {timeout_s:g} s; process {OTHER_PID} holds it" in str(error)
    # The lock can be taken again.
    other.close()
    with lock():
        pass


@pytest.mark.parametrize(
    ("later_ns", "since_ns", "stands_back"),
    [
        (1, -1, True),
        (CLAIM_NS, -1, True),
        (0, -1, False),
        (-1, -1, False),
        (CLAIM_NS + 1, -1, False),
        (10**15, -1, False),
        (CLAIM_NS, 10**9, True),
    ],
)
def test_a_newcomer_stands_back_while_a_claim_holds_that_can_be_meant(
    joined: Namespace, lock: TransactionLock, waits: Waits, later_ns: int, since_ns: int, stands_back: bool
) -> None:
    words = joined.segment.words
    words[Header.STARVING], words[Header.STARVING_SINCE] = BEGIN_NS + later_ns, BEGIN_NS + since_ns
    with lock(0.5):
        assert words[Header.STARVING] == 0, "a claim that nobody repeats is forgotten"
    assert waits.did == [*LONG_SLEEP, "try", ("wake", "contended")] if stands_back else ["try", ("wake", "contended")]


def test_a_newcomer_that_may_not_wait_takes_a_free_lock_in_spite_of_a_claim(
    joined: Namespace, lock: TransactionLock, waits: Waits
) -> None:
    words = joined.segment.words
    words[Header.STARVING], words[Header.STARVING_SINCE] = waits.claim(), BEGIN_NS - 1
    with lock(0.0):
        assert words[Header.STARVING] == waits.claim(), "it leaves the claim alone"
    assert waits.did == ["try", ("wake", "starving")]
    words[Header.STARVING] = 0


@pytest.mark.parametrize(("since_ns", "takes_over"), [(-1, False), (0, True), (1, True)])
def test_of_those_that_starve_the_one_claims_the_lock_that_has_waited_longest(
    joined: Namespace, lock: TransactionLock, waits: Waits, other: LockFile, since_ns: int, takes_over: bool
) -> None:
    words = joined.segment.words
    began_s = waits.now + STARVES_S

    def claim_too() -> None:
        words[Header.STARVING], words[Header.STARVING_SINCE] = waits.claim(), BEGIN_NS + since_ns

    waits.then[8] = claim_too
    waits.then[9] = other.unlock
    with lock():
        pass
    claim = int(began_s * 1e9) + CLAIM_NS
    if takes_over:
        assert waits.did[-4:] == ["try", ("starving", SHORT_S, claim), "try", ("wake", "contended")]
    else:
        # The other claim has lapsed by then.
        assert waits.did[-4:-2] == [*LONG_SLEEP, *LONG_SLEEP]
    assert words[Header.STARVING] == 0


@pytest.mark.parametrize(
    ("starving", "contended", "wakes"),
    [(0, 0, []), (0, 1, ["contended"]), (7, 1, ["starving"]), (7, 0, ["starving"])],
)
def test_one_that_releases_the_lock_wakes_the_one_that_starves_or_else_one_that_waits(
    joined: Namespace, lock: TransactionLock, waits: Waits, starving: int, contended: int, wakes: list[str]
) -> None:
    words = joined.segment.words
    with lock():
        words[Header.STARVING], words[Header.CONTENDED] = starving, contended
    assert waits.did[1:] == [("wake", word) for word in wakes]
    assert (words[Header.STARVING], words[Header.CONTENDED]) == (
        starving,
        1 if wakes == ["starving"] and contended else 0,
    )
    words[Header.STARVING] = words[Header.CONTENDED] = 0


@pytest.fixture
def one_sleep(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> Waits:
    """The waits, of one sleep each."""
    monkeypatch.setattr(transaction, "LONGEST_SLEEP_S", 1000.0)
    monkeypatch.setattr(transaction, "STARVES_AFTER_S", 1000.0)
    return waits


# ---- time-outs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "expected"), [(None, 10.0), (10.0, 10.0), (11.0, 10.0), (9.5, 9.5), (0.0, 0.0), (-1.0, 0.0)]
)
def test_a_time_out_that_is_named_can_only_shorten_that_of_the_lock(
    lock: TransactionLock, one_sleep: Waits, other: LockFile, named: float | None, expected: float
) -> None:
    with pytest.raises(LockTimeoutError) as caught, lock(named):
        raise AssertionError("the lock was free")
    assert (caught.value.timeout_seconds, one_sleep.now - BEGIN_S) == (expected, expected)


@pytest.mark.parametrize(
    ("deadline_s", "patient", "named", "expected"),
    [
        (math.inf, False, None, 10.0),
        (4.0, False, None, 4.0),
        (-1.0, False, None, 0.0),
        (40.0, True, None, 30.0),
        (20.0, True, None, 20.0),
        (40.0, True, 2.0, 2.0),
        (40.0, False, None, 10.0),
    ],
)
def test_patience_and_deadlines_change_how_long_a_thread_waits(
    lock: TransactionLock,
    one_sleep: Waits,
    other: LockFile,
    deadline_s: float,
    patient: bool,
    named: float | None,
    expected: float,
) -> None:
    def given_up_after() -> float:
        began = one_sleep.now
        with pytest.raises(LockTimeoutError) as caught, lock(named):
            raise AssertionError("the lock was free")
        assert one_sleep.now - began == caught.value.timeout_seconds
        return float(caught.value.timeout_seconds)

    with lock.give_up_at(BEGIN_S + deadline_s):
        if patient:
            with lock.patient_here():
                assert given_up_after() == expected
        else:
            assert given_up_after() == expected
    assert given_up_after() == (10.0 if named is None else named)
    lock.set_timeout(3.0)
    assert given_up_after() == min(3.0, named or 3.0)


def test_patience_is_no_shorter_than_the_time_out_and_is_that_of_one_thread(
    lock: TransactionLock, one_sleep: Waits, other: LockFile
) -> None:
    lock.set_timeout(50.0)
    with lock.patient_here(), pytest.raises(LockTimeoutError) as caught, lock():
        raise AssertionError("the lock was free")
    assert caught.value.timeout_seconds == 50.0
    lock.set_timeout(2.0)
    with lock.patient_here():
        elsewhere, outcome = in_thread(lambda: lock().__enter__())
        elsewhere.join(DEADLINE_S)
    assert outcome[0].timeout_seconds == 2.0


@pytest.mark.parametrize(
    ("earlier_s", "asked_s", "waited_s", "named_s"),
    [
        (0.0, None, 2.0, 2.0),
        (0.5, None, 1.5, 2.0),
        (0.5, 1.0, 1.0, 1.0),
        (1.5, 1.0, 0.5, 2.0),
        (9.0, None, transaction.LEAST_S, 2.0),
        (9.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_time_out_of_work_that_was_handed_to_a_thread_begins_then(
    lock: TransactionLock,
    waits: Waits,
    other: LockFile,
    earlier_s: float,
    asked_s: float | None,
    waited_s: float,
    named_s: float,
) -> None:
    lock.set_timeout(2.0)
    with lock.counted_from(BEGIN_S - earlier_s), pytest.raises(LockTimeoutError) as caught, lock(asked_s):
        raise AssertionError("the lock was free")
    assert waits.now - BEGIN_S == pytest.approx(waited_s)
    assert caught.value.timeout_seconds == named_s
    before = waits.now
    with pytest.raises(LockTimeoutError), lock():
        raise AssertionError("the lock was free")
    assert waits.now - before == pytest.approx(2.0)


def test_patience_ends_with_a_block_that_never_comes_to_its_end(
    lock: TransactionLock, one_sleep: Waits, other: LockFile
) -> None:
    lock.set_timeout(2.0)
    # As after an exception from a signal handler just before the end of the block.
    lock.patient_here().__enter__()
    with pytest.raises(LockTimeoutError) as caught, lock():
        raise AssertionError("the lock was free")
    assert caught.value.timeout_seconds == 2.0


# ---- threads, and what exceptions leave ----------------------------------------------------------------------------


@pytest.fixture
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let threads look for abandoned transactions all the time."""
    monkeypatch.setattr(transaction, "ABANDONED_LOOK_S", 0.001)


def abandon(lock: TransactionLock) -> None:
    """Let a thread begin a transaction, and never end it, as after an exception at a bad moment."""
    thread, _ = in_thread(lambda: lock().__enter__())
    thread.join()


def test_a_transaction_that_a_thread_has_left_is_ended_by_the_second_look(
    joined: Namespace, lock: TransactionLock
) -> None:
    words = joined.segment.words
    assert lock.end_abandoned() is False
    assert lock.may_be_abandoned is False
    abandon(lock)
    assert lock.may_be_abandoned is True
    assert words[Header.CHANGE] % 2 == 1
    assert lock.end_abandoned() is False
    assert lock.end_abandoned() is True
    assert lock.end_abandoned() is False
    assert lock.may_be_abandoned is False
    assert is_locked(joined.segment.path), "until the next transaction has undone it"
    words[Header.STARVING] = 1
    with lock():
        assert words[Header.STARVING] == 1, "the one that starves waits for this"
    words[Header.STARVING] = 0
    assert words[Header.CHANGE] % 2 == 0
    assert not is_locked(joined.segment.path)


def test_two_looks_must_find_the_same_transaction(lock: TransactionLock) -> None:
    abandon(lock)
    assert lock.end_abandoned() is False
    lock._takes += 1
    assert lock.end_abandoned() is False
    assert lock.end_abandoned() is True


def test_a_transaction_of_a_thread_at_work_is_not_abandoned(lock: TransactionLock) -> None:
    inside, done = threading.Event(), threading.Event()

    def work() -> None:
        with lock():
            inside.set()
            assert done.wait(DEADLINE_S)

    thread, outcome = in_thread(work)
    assert inside.wait(DEADLINE_S)
    assert lock.may_be_abandoned is True
    assert [lock.end_abandoned() for _ in range(3)] == [False, False, False]
    assert (lock.held_by_this_thread(), lock.is_busy_here()) == (False, False)
    done.set()
    thread.join()
    assert outcome == [None]
    with lock():
        assert [lock.end_abandoned() for _ in range(3)] == [False, False, False]


@pytest.mark.usefixtures("quick_looks")
def test_a_thread_that_waits_for_its_own_process_ends_what_was_abandoned(lock: TransactionLock) -> None:
    abandon(lock)
    with lock():
        pass


@pytest.mark.usefixtures("quick_looks")
def test_a_lock_is_closed_although_a_transaction_was_abandoned(joined: Namespace, lock: TransactionLock) -> None:
    abandon(lock)
    lock.close()
    assert not is_locked(joined.segment.path)
    with pytest.raises(ClosedError, match="has left the namespace"), lock():
        raise AssertionError
    assert lock.end_abandoned() is False
    assert lock.may_be_abandoned is False


@pytest.mark.parametrize("noted", [True, False], ids=["its frame was noted", "its frame was not noted yet"])
def test_a_thread_takes_over_what_it_has_left_itself(joined: Namespace, lock: TransactionLock, noted: bool) -> None:
    words = joined.segment.words

    def leave() -> None:
        if noted:
            lock().__enter__().set(Header.LOADS, 12345)
        else:
            lock._mutex.acquire()

    leave()
    assert (lock.held_by_this_thread(), lock.is_busy_here()) == (True, False)
    words[Header.STARVING] = 1
    with lock():
        assert words[Header.LOADS] == 0
        assert words[Header.CHANGE] % 2 == 1
    words[Header.STARVING] = 0
    assert lock.held_by_this_thread() is False
    assert not is_locked(joined.segment.path)
    assert lock._take_over(sys._getframe()) is False, "as another thread has ended it"


def test_a_thread_may_not_begin_a_transaction_inside_another_one(joined: Namespace, lock: TransactionLock) -> None:
    def again() -> None:
        with pytest.raises(ReentrantCallError, match="in the middle of a transaction of its own thread"), lock():
            raise AssertionError

    with lock() as t:
        t.set(Header.LOADS, 5)
        again()
        t.set(Header.HITS, 6)
    assert (joined.segment.words[Header.LOADS], joined.segment.words[Header.HITS]) == (5, 6)


@pytest.mark.parametrize("timeout_s", [0.0, 0.01])
def test_a_thread_gives_up_behind_another_one_and_names_its_own_process(
    lock: TransactionLock, timeout_s: float
) -> None:
    taken, give_back = threading.Event(), threading.Event()

    def hold() -> None:
        with lock():
            taken.set()
            assert give_back.wait(DEADLINE_S)

    thread, outcome = in_thread(hold)
    assert taken.wait(DEADLINE_S)
    with pytest.raises(LockTimeoutError) as caught, lock(timeout_s):
        raise AssertionError
    give_back.set()
    thread.join()
    assert outcome == [None]
    assert (caught.value.holder_pid, caught.value.timeout_seconds) == (os.getpid(), timeout_s)
    with lock(0.0):
        pass


class Interrupt(BaseException):
    """What a signal handler raises."""


@pytest.mark.parametrize("where", ["_begin", "_recover", "give_up_quickly"])
def test_an_exception_at_the_edge_of_a_transaction_leaves_the_lock_free(
    joined: Namespace, lock: TransactionLock, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    words, raised = joined.segment.words, list[bool]()
    owner: Any = {"_begin": Transaction, "_recover": TransactionLock, "give_up_quickly": LockFile}[where]
    real = getattr(owner, where)

    def interrupt(*arguments: object) -> object:
        if not raised:
            raised.append(True)
            raise Interrupt
        return real(*arguments)

    if where == "_recover":
        words[Header.CHANGE] += 1
    with monkeypatch.context() as patched:
        patched.setattr(owner, where, interrupt)
        with pytest.raises(Interrupt), lock():
            pass
    assert not is_locked(joined.segment.path)
    assert (lock.held_by_this_thread(), lock.may_be_abandoned) == (False, False)
    with lock():
        pass
    assert words[Header.CHANGE] % 2 == 0


class Words:
    """Words of which one store is interrupted."""

    def __init__(self, words: Any, store: int) -> None:
        self._words = words
        self._left = store

    def __getitem__(self, at: Any) -> Any:
        return self._words[at]

    def __setitem__(self, at: Any, value: int) -> None:
        self._left -= 1
        if not self._left:
            raise Interrupt
        self._words[at] = value


def test_an_exception_at_any_store_leaves_the_state_before_or_after(joined: Namespace) -> None:
    words = joined.segment.words
    states = set()
    for store in range(1, 30):
        before = words[Header.LOADS], words[Header.HITS]
        changes = words[Header.CHANGE]
        lock = TransactionLock(joined.segment, 10.0)
        lock.intercept_stores(lambda words, store=store: Words(words, store))  # type: ignore[misc]  # no type for a lambda's default
        try:
            with lock() as t:
                t.set(Header.LOADS, before[0] + 1)
                t.set_all([(Header.HITS, before[1] + 1), (Header.EVICTIONS, 1)])
            states.add("done")
        except Interrupt:
            pass
        lock.close()
        with joined.transaction():
            pass
        after = words[Header.LOADS] - before[0], words[Header.HITS] - before[1]
        assert after in ((0, 0), (1, 1))
        states.add(str(after))
        assert words[Header.CHANGE] % 2 == 0 and words[Header.CHANGE] > changes
    assert states == {"done", "(0, 0)", "(1, 1)"}


def test_a_lock_can_be_forgotten_without_giving_it_up(joined: Namespace, lock: TransactionLock) -> None:
    """As in a child that inherited it, whichever thread had it."""
    abandon(lock)
    inherited = os.dup(lock._file.fd)
    lock.wake_watcher = lambda: pytest.fail("there is no such thread here")
    lock.forget_after_fork()
    assert lock._file.fd < 0
    assert is_locked(joined.segment.path)
    assert lock.may_be_abandoned is False
    with pytest.raises(ClosedError), lock():
        raise AssertionError
    os.close(inherited)


@pytest.mark.parametrize(
    "end",
    [TransactionLock.close, TransactionLock.forget_after_fork, lambda lock: lock.intercept_stores(lambda words: words)],
    ids=["close", "forget", "intercept"],
)
def test_the_compiled_core_ends_with_the_lock_and_where_stores_are_watched(
    lock: TransactionLock, end: Callable[[TransactionLock], None]
) -> None:
    closed: list[bool] = []
    core: Any = SimpleNamespace(close=lambda: closed.append(lock.core is None))
    lock.core = core
    for _ in range(2):
        end(lock)
        assert closed == [True]


def test_the_thread_that_watches_is_woken_at_each_transaction_but_not_by_a_closed_lock(lock: TransactionLock) -> None:
    woken: list[bool] = []
    lock.wake_watcher = lambda: woken.append(lock.held_by_this_thread())
    for _ in range(2):
        with lock():
            pass
    assert woken == [True, True]
    lock.close()
    with pytest.raises(ClosedError), lock():
        raise AssertionError
    assert woken == [True, True]
