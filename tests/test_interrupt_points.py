"""An exception at any bytecode of the package, as a signal handler may raise it, leaves nothing behind.

Each operation runs again and again, with an exception at the first, second, ... last bytecode that it runs inside
mpmm. Within a second after each, the lock is free, no row is in use, loading or waiting because of this process,
the invariants hold, and the same thread can continue; after an operation's last point, another process can, too. During
all this, a process that takes the lock again and again always gets it within a second.

Functions of `threading` that mpmm calls are followed as well: some of them take locks in Python.

By default, the tests try every k-th point of each operation, from an offset that changes daily, some 11 000 in all.
`MPMM_INTERRUPT_STEP=1` tries every point, `MPMM_INTERRUPT_OFFSET` begins elsewhere:

    MPMM_INTERRUPT_STEP=1 python -m pytest -s tests/test_interrupt_points.py

The interpreter checks for signals only after calls, at the beginning of functions and at jumps backwards. So five kinds
of places where no handler ever runs are left out: the return from the package to its caller; a call that has just
received the names of its arguments, which Python 3.11 would use for the next call; the way out of a `with` block up to
the call of `__exit__`, where a lock would stay taken; the beginning and the end of an `except` clause, where the
interpreter would not notice that an exception has been handled; and what `mpmm.interpreter.thread_locks` does once it
has taken a lock.
"""

from __future__ import annotations

import ast
import asyncio
import dis
import gc
import itertools
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from harness import SMALL, wait_until
from interrupt_points import (
    HEALS_WITHIN_S,
    OFFSET,
    PACKAGE,
    STEP,
    Interrupted,
    Sweep,
    points_of,
)
from interrupt_points import sweep as sweep  # the fixture
from patience import DEADLINE_S

from mpmm import AcquireTimeoutError, NotAcquiredError
from mpmm.memory.sampler import Sampler
from mpmm.model_manager import ModelManager
from mpmm.multi_process_shared import MultiProcessShared
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.layout import Header
from mpmm.shared_state.snapshot import read_snapshot

# An exception in a finalizer, such as that of a lock file, does not reach the program; Python reports it as such.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_block_of_idle_copy(sweep: Callable[..., Sweep]) -> None:
    one = sweep(5)

    def block() -> None:
        with one.manager.model("a", lambda: "handle"):
            pass

    block()
    one(block)


def test_acquire_and_release_of_idle_copy(sweep: Callable[..., Sweep]) -> None:
    one = sweep(5)

    def give_back() -> None:
        with suppress(NotAcquiredError):
            one.manager.release_model("a", "handle")

    def pair() -> None:
        copy = one.manager.acquire_model("a", lambda: "handle")
        try:
            one.manager.release_model("a", copy)
        except (KeyboardInterrupt, Interrupted):
            sys.settrace(None)
            # A release that an exception has ended may be called again, whether it had begun or not.
            give_back()
            raise

    pair()
    one(pair)


def test_seat_of_copy_in_use(sweep: Callable[..., Sweep]) -> None:
    one = sweep(5)
    with one.manager.model("a", lambda: "handle", users=2):
        pass

    def pair() -> None:
        with one.manager.model("a", lambda: "handle", users=2), one.manager.model("a", lambda: "never"):
            pass

    one(pair)
    (copy,) = one.snapshot().copies[:1]
    assert (copy.tag, copy.state, copy.held, copy.seats) == ("a", "idle", 0, 1)


class Plain:
    """A model that is an object of its process."""

    unloaded = False

    def unload_model(self) -> None:
        """Free what it has."""
        self.unloaded = True


@pytest.mark.parametrize("what", ["handle", "object"])
def test_load(sweep: Callable[..., Sweep], what: str) -> None:
    # Memory for two: the model loaded last is evicted for the next.
    one = sweep(47, fallback_memory_mb=200.0)
    tags = iter(f"tag-{number}" for number in range(10**6))

    def load() -> None:
        tag = next(tags)
        with one.manager.model(tag, lambda: f"handle of {tag}" if what == "handle" else Plain()):
            pass

    load()
    one(load)


def in_loop(one: Sweep, tag: str, model: Any) -> Callable[[], None]:
    """Return an operation that holds a copy in an event loop."""

    async def hold() -> None:
        async with one.manager.model_async(tag, lambda: model):
            pass

    def run() -> None:
        loop = asyncio.new_event_loop()
        task = loop.create_task(hold())
        try:
            loop.run_until_complete(task)
        finally:
            sys.settrace(None)
            # As `asyncio.run` does; the exception that ended the loop is in the task, too.
            task.cancel()
            with suppress(asyncio.CancelledError, KeyboardInterrupt, Interrupted):
                loop.run_until_complete(asyncio.wait_for(task, DEADLINE_S))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()
            # From Python 3.13 on, what has ended the task is part of a cycle with its frames, and with what they hold.
            if sys.version_info >= (3, 13):
                gc.collect()

    return run


# An exception between the call of a coroutine function and its await leaves a coroutine that was never awaited.
never_awaited = pytest.mark.filterwarnings("ignore:coroutine")


@never_awaited
def test_block_of_idle_copy_in_loop(sweep: Callable[..., Sweep]) -> None:
    one = sweep(5)
    run = in_loop(one, "a", "handle")
    run()
    one(run)


@never_awaited
def test_wait_for_copy_in_loop(sweep: Callable[..., Sweep]) -> None:
    one = sweep(7, max_model_copies=1, wait_timeout_seconds=10.0)
    holder = OtherHolder(one)
    run = in_loop(one, "a", "handle")
    # So that no import is part of it.
    run()

    def block() -> None:
        try:
            run()
        finally:
            sys.settrace(None)
            holder.end()

    one(block, holder.hold)


class OtherHolder:
    """A thread that holds a copy, and releases it once a request waits for it."""

    def __init__(self, one: Sweep, gives_back: bool = True) -> None:
        self._one = one
        self._held = threading.Event()
        self._gives_back = gives_back
        self._waited_for = threading.Event()
        self._thread: threading.Thread | None = None

    def hold(self) -> None:
        """Hold the copy until it is waited for."""
        self.end()
        self._held.clear()
        self._waited_for.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._held.wait(DEADLINE_S)

    def end(self) -> None:
        """Have the copy given back in any case."""
        self._waited_for.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        words = self._one.manager._connected().namespace.segment.words
        with self._one.manager.model("a", lambda: "handle"):
            self._held.set()
            while not self._waited_for.is_set():
                if self._gives_back and words[Header.WAITING]:
                    break
                self._waited_for.wait(0.0005)


def test_wait_for_copy(sweep: Callable[..., Sweep]) -> None:
    one = sweep(7, max_model_copies=1)
    holder = OtherHolder(one)

    def block() -> None:
        try:
            with one.manager.model("a", lambda: "handle"):
                pass
        finally:
            sys.settrace(None)
            holder.end()

    one(block, holder.hold)


def test_wait_that_times_out(sweep: Callable[..., Sweep]) -> None:
    one = sweep(17, max_model_copies=1)
    holder = OtherHolder(one, gives_back=False)
    impatient = ModelManager(**{**SMALL, "namespace": one.manager.namespace, "wait_timeout_seconds": 0.003})

    def block() -> None:
        try:
            with suppress(AcquireTimeoutError), impatient.model("a", lambda: "handle"):
                pass
        finally:
            sys.settrace(None)
            holder.end()

    one(block, holder.hold)
    impatient.shutdown()


def test_failing_load(sweep: Callable[..., Sweep]) -> None:
    one = sweep(47)
    tags = iter(f"tag-{number}" for number in range(10**6))

    def load() -> None:
        with suppress(ZeroDivisionError), one.manager.model(next(tags), lambda: 1 // 0):
            pass

    load()
    one(load)


def test_unload(sweep: Callable[..., Sweep]) -> None:
    one = sweep(29)

    def load() -> None:
        with one.manager.model("a", Plain), one.manager.model("a", Plain):
            pass

    def unload() -> None:
        one.manager.unload("a")

    load()
    one(unload, load)


@never_awaited
def test_load_in_loop(sweep: Callable[..., Sweep]) -> None:
    # As in `test_load`.
    one = sweep(19, fallback_memory_mb=200.0)
    tags = iter(f"tag-{number}" for number in range(10**6))

    def load() -> None:
        in_loop(one, next(tags), "handle")()

    load()
    one(load)


def test_lease(sweep: Callable[..., Sweep]) -> None:
    one = sweep(29)

    def lease() -> None:
        lease = None
        try:
            lease = one.manager.reserve(100)
            with lease:
                pass
        finally:
            sys.settrace(None)
            # By now the caller has it, and may release it as often as it likes.
            if lease is not None:
                lease.release()

    lease()
    one(lease)


def test_block_of_lease(sweep: Callable[..., Sweep]) -> None:
    one = sweep(29)

    def lease() -> None:
        with one.manager.reserve(100):
            pass

    lease()
    one(lease)


def test_preload(sweep: Callable[..., Sweep]) -> None:
    one = sweep(37, fallback_memory_mb=300.0)
    tags = iter(f"tag-{number}" for number in range(10**6))

    def preload() -> None:
        tag = next(tags)
        one.manager.preload(tag, lambda: f"handle of {tag}")

    preload()
    one(preload)


def test_preload_that_waits(sweep: Callable[..., Sweep]) -> None:
    one = sweep(127)
    tags = iter(f"tag-{number}" for number in range(10**6))
    holder = OtherHolder(one)

    def preload() -> None:
        tag = next(tags)
        try:
            # All of the memory, so it waits for the holder's copy.
            one.manager.preload(tag, lambda: f"handle of {tag}", expect_mb=1000.0)
        finally:
            sys.settrace(None)
            holder.end()

    one(preload, holder.hold)


def test_pin_and_unpin(sweep: Callable[..., Sweep]) -> None:
    one = sweep(7)

    def pin() -> None:
        one.manager.pin("a")
        one.manager.unpin("a")

    def unpin() -> None:
        with suppress(NotAcquiredError):
            one.manager.unpin("a")

    pin()
    one(pin, unpin)


def test_pin_and_unpin_for_all(sweep: Callable[..., Sweep]) -> None:
    one = sweep(7)

    def pin() -> None:
        one.manager.pin("a", for_all=True)
        one.manager.unpin("a", for_all=True)

    def unpin() -> None:
        with suppress(NotAcquiredError):
            one.manager.unpin("a", for_all=True)

    pin()
    one(pin, unpin)
    unpin()


def test_load_that_runs_out_of_memory(sweep: Callable[..., Sweep]) -> None:
    one = sweep(109, fallback_memory_mb=300.0)
    tags = iter(f"tag-{number}" for number in range(10**6))

    def load() -> None:
        tag, turns = next(tags), [1]

        def loader() -> str:
            if turns:
                turns.pop()
                raise MemoryError
            return f"handle of {tag}"

        with one.manager.model(tag, loader):
            pass

    load()
    one(load)


def test_lease_that_waits(sweep: Callable[..., Sweep]) -> None:
    one = sweep(37)
    holder = OtherHolder(one)

    def lease() -> None:
        try:
            # Of all there is, so only once the other one has given its copy back.
            with one.manager.reserve(1000):
                pass
        finally:
            sys.settrace(None)
            holder.end()

    one(lease, holder.hold)


def test_reset(sweep: Callable[..., Sweep]) -> None:
    one = sweep(29)

    def load() -> None:
        for tag in ("a", "b"):
            with one.manager.model(tag, Plain if tag == "a" else lambda: "handle of b"):
                pass

    one(one.manager.force_reset, load)


class Sleeps(Plain):
    """A model that can sleep."""

    def sleep(self) -> None:
        """Sleep."""

    def wake_up(self) -> None:
        """Be awake."""


def suspend(one: Sweep) -> None:
    """Have a copy of `a` suspended, and nothing else of it."""
    with one.manager.model("a", Sleeps):
        pass
    assert one.manager.suspend("a") == 1


def test_resume_for_request(sweep: Callable[..., Sweep]) -> None:
    one = sweep(127, suspend_budget_mb=1000.0)

    def block() -> None:
        with one.manager.model("a", Sleeps):
            pass

    one(block, lambda: suspend(one))


def test_resume_and_suspend_by_hand(sweep: Callable[..., Sweep]) -> None:
    one = sweep(127, suspend_budget_mb=1000.0)

    def move() -> None:
        one.manager.resume("a")
        one.manager.suspend("a")

    one(move, lambda: suspend(one))


def test_load_that_returns_handle_of_suspended_copy(sweep: Callable[..., Sweep]) -> None:
    one = sweep(397, suspend_budget_mb=1000.0)
    numbers = itertools.count()
    handles = [""]

    def twin() -> str:
        MultiProcessShared(Sleeps, tag=handles[0], always_proxy=True).acquire()
        return handles[0]

    def prepare() -> None:
        for tag in ("a", "twin"):
            one.manager.unload(tag)
        handles[0] = f"handle-{next(numbers)}"
        with one.manager.model("a", twin):
            pass
        assert one.manager.suspend("a") == 1

    def load() -> None:
        with one.manager.model("twin", twin):
            pass

    one(load, prepare)


def test_booking_by_hand(sweep: Callable[..., Sweep]) -> None:
    one = sweep(61, fallback_memory_mb=300.0)
    tags = iter(f"tag-{number}" for number in range(10**6))

    def use(tag: str) -> None:
        with one.manager.model(tag, lambda: f"handle of {tag}"):
            pass

    def book() -> None:
        tag = next(tags)
        try:
            if one.manager.should_spawn_model(tag, 0):
                use(tag)
        finally:
            sys.settrace(None)
            # It is the caller's by now, of whom the next acquire loads.
            if tag in one.manager._attachment.bookings.by_tag:
                use(tag)

    book()
    one(book)


def gets_sample_elsewhere(sampler: Sampler) -> bool:
    """Tell whether another thread gets a sample within a second."""
    answers: list[bool] = []
    other = threading.Thread(target=lambda: answers.append(sampler.sample(HEALS_WITHIN_S)), daemon=True)
    other.start()
    other.join(2 * HEALS_WITHIN_S)
    return answers == [True]


def test_samples() -> None:
    sampler = Sampler(lambda: None, "of the test")
    failures: list[str] = []
    points = 0

    def operate() -> None:
        sampler.sample(DEADLINE_S)
        sampler.call(lambda: None, DEADLINE_S)

    def end() -> None:
        sampler.end()
        wait_until(lambda: sampler._thread is None, "the thread has ended")

    for prepare in (end, operate):
        for at, interruption in points_of(operate, prepare, STEP or 1, failures):
            with suppress(KeyboardInterrupt, Interrupted), interruption:
                operate()
            interruption.forget()
            points += 1
            if not gets_sample_elsewhere(sampler):
                failures.append(f"{at} ({interruption.where}): another thread gets no sample")
    sampler.end()
    print(points, "points")
    assert not failures, "\n".join(failures)


def unguarded_jumps(code: CodeType) -> Iterator[int]:
    """Return the lines of loops from whose jump back an exception leaves out the `with` block that they stand in."""
    handlers = {
        place.offset
        for place, after in itertools.pairwise(dis.get_instructions(code))
        if (place.opname, after.opname) == ("PUSH_EXC_INFO", "WITH_EXCEPT_START")
    }
    # There is no public way to read it.
    table = dis._parse_exception_table(code)  # type: ignore[attr-defined]  # private to dis
    blocks = [block for block in table if block.target in handlers]

    def around(offset: int) -> set[int]:
        return {block.target for block in blocks if block.start <= offset < block.end}

    # The types are those of Python 3.10, whose instructions have no positions.
    jump: Any
    for jump in dis.get_instructions(code):
        if jump.opname == "JUMP_BACKWARD" and around(jump.argval) - around(jump.offset):
            yield jump.positions.lineno
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from unguarded_jumps(inner)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="older compilers guard each jump back")
def test_no_lock_between_threads_stays_taken_by_a_loop() -> None:
    found = []
    for file in Path(PACKAGE).rglob("*.py"):
        text = file.read_text()
        lines = set(unguarded_jumps(compile(text, str(file), "exec")))
        for block in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.With)):
            what = ast.unparse(block.items[-1].context_expr)
            inside = range(block.lineno, block.end_lineno or 0)
            # The next process that takes the lock ends an interrupted transaction.
            if re.search(r"(lock|mutex|guard)(\(\))?$", what) and lines.intersection(inside):
                found.append(f"{file}:{block.lineno} with {what}")
    assert found == []


def test_nothing_is_taken_from_calls_in_progress(
    new_manager: Callable[..., ModelManager], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpmm.model_manager.background.RECONCILE_S", 0.0005)
    manager = new_manager(max_model_copies=3)
    wrong: list[BaseException] = []
    over = threading.Event()

    def work(number: int) -> None:
        turn = number
        try:
            while not over.is_set():
                turn += 1
                tag = f"tag-{turn % 3}"
                with manager.model(tag, lambda tag=tag, turn=turn: f"{tag}-{number}-{turn}"):  # type: ignore[misc]  # mypy has no type for a lambda's defaults
                    pass
                manager.release_model(tag, manager.acquire_model(tag, partial("{}-{}-{}".format, tag, number, -turn)))
        except BaseException as error:
            wrong.append(error)

    def on_alarm(number: int, frame: Any) -> None:
        raise Interrupted

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    chance = random.Random(OFFSET)
    before = signal.signal(signal.SIGALRM, on_alarm)
    interrupted = 0
    end = time.monotonic() + 2
    try:
        while time.monotonic() < end:
            try:
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.01))
                with manager.model("tag-0", partial("main-{}".format, interrupted)):
                    pass
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                interrupted += 1
    finally:
        with suppress(Interrupted):
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        over.set()
        for thread in threads:
            thread.join()
    assert not wrong
    assert interrupted
    wait_until(lambda: not read_snapshot("test").active and not read_snapshot("test").loading, "all is back", 2)
    assert check_invariants(read_snapshot("test")) == []
