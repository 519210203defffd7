"""Changes that wait for the lock: made together, with one decision of the policy, and none is lost if another fails."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
from harness import Seat, learn, problems, wait_until, waiting
from patience import DEADLINE_S

from mpmm import AcquireTimeoutError, Capacities, LockTimeoutError, ModelManager
from mpmm.model_manager.deferred import ATTEMPTS, DeferredChanges
from mpmm.scheduling import Scheduler
from mpmm.shared_state.layout import Header
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import read_snapshot
from mpmm.shared_state.transaction import Transaction

_names = itertools.count()


class Bench:
    """The deferred changes of a namespace that has no background thread. made: the names of those that were kept."""

    def __init__(self) -> None:
        settings = Settings(lock_timeout_seconds=0.3)
        self.namespace = Namespace.join(f"deferred{next(_names)}", capacities=Capacities(undo=2048), settings=settings)
        self.words = self.namespace.segment.words
        self.scheduler = Scheduler(self.namespace)
        self.plans = 0
        self.wakes = 0
        self.changes = DeferredChanges(self.namespace, self.scheduler, self._wake)
        self.attempts: list[str] = []

    def _wake(self) -> None:
        self.wakes += 1

    def defer(self, name: str, words: int = 1, error: Callable[[], Exception | None] = lambda: None) -> None:
        """Defer a change that overwrites `words` words, or raises what `error` returns."""

        def change(t: Transaction) -> bool:
            self.attempts.append(name)
            found = error()
            if found is not None:
                raise found
            for _ in range(words):
                t.add(Header.TIMEOUTS, 1)
            return words > 0

        self.changes.defer(change)

    def run(self) -> int:
        """Make the changes; return how many transactions that takes, those that are undone among them."""
        before = self.words[Header.CHANGE]
        with mock.patch.object(self.scheduler, "advance") as advance:
            try:
                self.changes.run()
            finally:
                self.plans = advance.call_count
        return int(self.words[Header.CHANGE] - before) // 2


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.namespace.leave()


def test_changes_that_wait_are_made_together_with_one_plan(bench: Bench) -> None:
    for number in range(50):
        bench.defer(str(number))
    assert bench.wakes == 50
    assert bench.run() == 1
    assert bench.plans == 1
    assert bench.attempts == [str(number) for number in range(50)]
    assert bench.words[Header.TIMEOUTS] == 50
    assert not bench.changes


def test_a_transaction_that_is_long_leaves_the_rest_to_the_next_one(bench: Bench) -> None:
    # A quarter of the undo log is 512 words.
    for number in range(8):
        bench.defer(str(number), words=300)
    assert bench.run() == 4
    assert bench.plans == 4
    assert bench.words[Header.TIMEOUTS] == 2400


def test_a_change_left_by_another_one_is_made_too(bench: Bench) -> None:
    def leave_another(t: Transaction) -> bool:
        bench.defer("second")
        return False

    bench.changes.defer(leave_another)
    assert bench.run() == 2
    assert bench.plans == 1
    assert bench.attempts == ["second"]


def test_what_serves_nobody_takes_no_plan(bench: Bench) -> None:
    bench.defer("nothing", words=0)
    assert bench.run() == 1
    assert bench.plans == 0
    bench.defer("nothing", words=0)
    bench.defer("something")
    bench.defer("nothing", words=0)
    assert bench.run() == 1
    assert bench.plans == 1


def test_an_error_takes_no_other_change_with_it(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.defer("before", words=2)
    bench.defer("bad", error=lambda: ValueError("never"))
    bench.defer("behind", words=3)
    with pytest.raises(ValueError, match="never"):
        bench.run()
    # That before it was made a second time, as the transaction that had both was undone.
    assert bench.attempts == ["before", "bad", "before", "bad"]
    assert bench.words[Header.TIMEOUTS] == 2
    with pytest.raises(ValueError, match="never"):
        bench.run()
    assert bench.words[Header.TIMEOUTS] == 5
    for _ in range(ATTEMPTS - 3):
        with pytest.raises(ValueError, match="never"):
            bench.run()
    assert bench.changes
    with caplog.at_level(logging.ERROR, logger="mpmm"):
        bench.run()
    assert not bench.changes
    assert f"gives up a deferred change after {ATTEMPTS} attempts" in caplog.text
    assert "never" in caplog.text
    assert bench.words[Header.TIMEOUTS] == 5


def test_a_change_that_works_later_is_made_later(bench: Bench) -> None:
    errors = iter((MemoryError(), MemoryError()))
    bench.defer("at last", error=lambda: next(errors, None))
    for _ in range(2):
        with pytest.raises(MemoryError):
            bench.run()
    assert bench.run() == 1
    assert bench.words[Header.TIMEOUTS] == 1


def test_changes_outlast_a_lock_that_is_not_free(bench: Bench) -> None:
    bench.defer("one")
    taken, may_end = threading.Event(), threading.Event()

    def change(t: Transaction) -> bool:
        t.add(Header.TIMEOUTS, 1)
        return True

    def hold() -> None:
        with bench.namespace.transaction():
            taken.set()
            may_end.wait(DEADLINE_S)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        assert taken.wait(DEADLINE_S)
        assert bench.changes.apply_or_defer(change) is None
        with pytest.raises(LockTimeoutError):
            bench.changes.run()
    finally:
        may_end.set()
        holder.join()
    assert bench.changes
    assert bench.run() == 1
    assert bench.words[Header.TIMEOUTS] == 2


def test_an_error_of_the_plan_loses_nothing(bench: Bench) -> None:
    bench.defer("one")
    with mock.patch.object(bench.scheduler, "advance", side_effect=RuntimeError("no plan")):
        for _ in range(ATTEMPTS + 1):
            with pytest.raises(RuntimeError, match="no plan"):
                bench.changes.run()
    assert bench.run() == 1
    assert bench.words[Header.TIMEOUTS] == 1


def test_many_waiters_that_give_up_while_the_lock_is_taken_leave_with_few_plans(
    namespace: str, new_manager: Callable[..., ModelManager]
) -> None:
    manager = new_manager(max_model_copies=1, wait_timeout_seconds=6)
    learn(Seat(manager), a=100)
    held = manager.acquire_model("a", lambda: "handle")
    outcomes: list[str] = []

    def wait() -> None:
        try:
            manager.acquire_model("a", lambda: "other")
        except AcquireTimeoutError:
            outcomes.append("timed out")

    threads = [threading.Thread(target=wait) for _ in range(20)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(waiting(namespace)) == 20, "all of them wait", 10)
    worker = manager._connected()
    with mock.patch.object(worker.scheduler, "advance", wraps=worker.scheduler.advance) as advance:
        with worker.namespace.transaction():
            wait_until(lambda: len(outcomes) == 20, "all of them gave up")
            assert worker.deferred
            before = advance.call_count
        wait_until(lambda: not worker.deferred, "they have left the queue", 10)
        # The background thread's own polls make plans, too.
        assert advance.call_count - before < 10
    for thread in threads:
        thread.join()
    assert read_snapshot(namespace).waiting == 0
    manager.release_model("a", held)
    assert problems(namespace) == []
