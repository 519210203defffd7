"""A process dies at every store of every operation that writes the segment.

Each *transition* (a public method of a part of `Transitions`) runs in a forked child that keeps an image of the
segment before its first, second, … n-th store: what a child that is killed there leaves. Some children are really
killed, with SIGKILL, and must leave exactly that image. From each image, another process takes the lock, and must
find all words exactly as before the operation or as after it. The list of operations comes from the classes, so that
a transition without a scenario fails the test.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from crash_lab import FROZEN_NS, KillAt, Lab, Operation, _Actor, some_of
from crash_lab import lab as lab  # the fixture
from crash_scenarios import STEPS, scenarios, transitions_of
from harness import CRASH_POINTS

import mpmm
from mpmm.shared_state.layout import Event
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.shared_state.transaction import Transaction, TransactionLock
from mpmm.shared_state.transitions import Transitions


def test_every_transition_has_a_scenario(lab: Lab) -> None:
    assert {name.partition("/")[0] for name in scenarios()} == transitions_of(lab.namespace.transitions) - STEPS


def test_nobody_takes_a_step_of_a_transition_from_outside() -> None:
    package = Path(mpmm.__file__).parent
    step = re.compile(rf"transitions\.({'|'.join(map(re.escape, STEPS))})\(")
    inside = package / "shared_state" / "transitions"
    assert [
        path for path in package.rglob("*.py") if inside not in path.parents and step.search(path.read_text())
    ] == []


@pytest.mark.parametrize("name", scenarios())
def test_death_at_any_store_leaves_before_or_after(
    lab: Lab, name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    operation = scenarios()[name](lab)
    assert lab.problems() == []
    saved, before, asleep = lab.save(), lab.comparable(), lab.seen_by_sleepers()
    images = lab.images(operation, tmp_path / "images")
    after = lab.comparable()
    assert lab.problems() == []
    # A ring alone leaves nothing to undo.
    assert after != before or lab.seen_by_sleepers() != asleep, "the scenario changes nothing"
    done = []
    for store, image in enumerate(images, 1):
        lab.restore(image)
        seen = lab.seen_by_sleepers()
        lab.recover()
        # A process that has seen a word later rolled back would miss the next news if that stored the same word again.
        assert lab.seen_by_sleepers() == seen
        state = lab.comparable()
        assert state in (before, after), f"store {store} of {name} left something in between"
        done.append(state == after)
    # One store empties the log: a death before it leaves the old state, a death after it the new one.
    assert after == before or (not done[0] and done == sorted(done))
    assert lab.problems() == []
    for store in some_of(len(images)):
        lab.restore(saved)
        left = lab.killed_at(operation, store)
        assert lab.without_pids(left) == lab.without_pids(images[store - 1]), f"killed at store {store}"
        lab.recover()
        assert lab.comparable() == (after if done[store - 1] else before)
    record_property(CRASH_POINTS, len(images))


@pytest.mark.parametrize("name", ["reset", "members.reap", "loads.end", "hand_over.from_holder"])
def test_death_at_any_store_of_the_recovery_leaves_before(
    lab: Lab, name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    operation = scenarios()[name](lab)
    before = lab.comparable()
    images = lab.images(operation, tmp_path / "images")
    died = 0
    # The two last stores are the commit's, so the death before them leaves the longest log.
    for died_at in (len(images) - 1, len(images) // 2, 3):
        torn = images[died_at - 1]
        lab.restore(torn)
        recovery = lab.images(None, tmp_path / "recovery")
        assert lab.comparable() == before
        for store, image in enumerate(recovery, 1):
            lab.restore(image)
            lab.recover()
            assert lab.comparable() == before, f"recovery store {store} after store {died_at}"
        for store in some_of(len(recovery)):
            lab.restore(torn)
            left = lab.killed_at(None, store)
            assert lab.without_pids(left) == lab.without_pids(recovery[store - 1])
            lab.recover()
            assert lab.comparable() == before
        died += len(recovery)
    assert lab.problems() == []
    record_property(CRASH_POINTS, died)


class RaiseAt(KillAt):
    """Words that raise an exception at the n-th store, as a signal handler or a full memory would."""

    error: BaseException = KeyboardInterrupt("in the middle of a transaction")

    def __setitem__(self, index: int, value: int) -> None:
        self._left -= 1
        if self._left == 0:
            raise self.error
        self._words[index] = value


def lock_and_run(lock: TransactionLock, transitions: Transitions, operation: Operation) -> None:
    with lock() as t:
        operation(t, transitions)


def raises(error: BaseException, action: Callable[[], object]) -> bool:
    """Tell whether `action` ends with this very exception; any other one passes through."""
    try:
        action()
    except BaseException as caught:
        if caught is not error:
            raise
        return True
    return False


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("now"), MemoryError("now")], ids=lambda error: type(error).__name__
)
def test_an_exception_at_any_store_is_rolled_back_and_reaches_the_caller(
    lab: Lab,
    error: BaseException,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: FROZEN_NS)
    monkeypatch.setattr(RaiseAt, "error", error)
    clean = lab.save()
    lock = TransactionLock(lab.segment, 5.0)
    transitions = Transitions(lab.tables, _Actor(lab.victim, lab.namespace.settings))
    raised = 0
    for name, scenario in scenarios().items():
        lab.restore(clean)
        lab.tables.close()
        operation = scenario(lab)
        saved, before = lab.save(), lab.comparable()
        lock.intercept_stores(lambda words: words)
        with lock() as t:
            operation(t, transitions)
        after = lab.comparable()
        store, finished = 0, False
        while not finished:
            store += 1
            lab.restore(saved)
            lock.intercept_stores(lambda words, store=store: RaiseAt(words, store))  # type: ignore[misc]  # mypy has no type for a lambda's default
            finished = not raises(error, partial(lock_and_run, lock, transitions, operation))
            assert not lock.held_by_this_thread()
            lab.recover()
            assert lab.comparable() in (before, after), f"{name}, store {store}"
        raised += store - 1
    record_property(CRASH_POINTS, raised)
    lock.close()
    lab.restore(clean)


def test_events_of_a_rolled_back_transaction_are_not_shown(lab: Lab, tmp_path: Path) -> None:
    operation = scenarios()["holds.take_idle"](lab)
    before = [event.sequence for event in read_snapshot("lab").events]
    images = lab.images(operation, tmp_path / "images")
    ended, after = lab.save(), [*before, before[-1] + 1]
    assert [event.sequence for event in read_snapshot("lab").events] == after
    for image in images:
        lab.restore(image)
        lab.recover()
        assert [event.sequence for event in read_snapshot("lab").events] in (before, after)
    lab.restore(ended)
    table = lab.layout.events
    assert lab.words[table.base + Event.SEQUENCE] != 0


def test_a_row_of_an_undone_transaction_is_not_taken_for_the_next_one_there(lab: Lab) -> None:
    def claim(tag: str) -> Operation:
        return lambda t, tr: tr.models.claim(t, tag, tag.encode())

    def claim_and_raise(t: Transaction, tr: Transitions) -> None:
        claim("a")(t, tr)
        # As another thread may without the lock, or another process.
        assert lab.tables.model_row("a") is not None
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.do(claim_and_raise)
    row = lab.do(claim("b"))
    assert (lab.tables.model_row("a"), lab.tables.model_row("b")) == (None, row)
