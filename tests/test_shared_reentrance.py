"""Calls from a signal handler at any bytecode of an acquire, a use or a release of a shared object in its thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from harness import in_thread, returned_frame
from interrupt_points import OFFSET, STEP, Handler, Recording
from patience import DEADLINE_S
from payload_store import Store

from mpmm import ReentrantCallError
from mpmm.multi_process_shared import MultiProcessShared, server_pid
from mpmm.multi_process_shared.client import _known
from mpmm.multi_process_shared.hosted import find_host
from mpmm.multi_process_shared.registry import leave_all_registries, registry_for
from mpmm.multi_process_shared.shared import _attached, _looking

# A handler that waits for its own thread waits for ever.
HANGS_AFTER_S = DEADLINE_S / 4
ENOUGH_FAILURES = 2


class AttachedStore(Store):
    """Each process makes its own."""

    attach_in_place = True


def shared_store(kind: str) -> MultiProcessShared[Store]:
    """Return a handle of an object in a server, in this process, or attached."""
    made = AttachedStore if kind == "attached" else Store
    return MultiProcessShared(made, tag="store", always_proxy=kind == "server", spawn_process=kind == "server")


def on_alarm(number: int, frame: object) -> None:
    raise TimeoutError("it waits for its own thread")


@pytest.fixture
def alarmed(runtime_root: Path) -> Iterator[None]:
    """Has a wait end with an exception that lasts too long."""
    before = signal.signal(signal.SIGALRM, on_alarm)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def use(shared: MultiProcessShared[Store]) -> None:
    """Acquire, call, release."""
    store = shared.acquire()
    try:
        assert store.echo(1) == 1
    finally:
        shared.release(store)


def left_of(tag: str) -> list[str]:
    """Return what this process still has of a tag that it has released."""
    registry, left = registry_for(None), []
    host = find_host(registry, tag)
    if host is not None and (host._users or host._has_object or host._shared is not None):
        left.append(f"the host has users {host._users}, an object {host._shared}")
    if (registry, tag) in _attached._by_tag:
        left.append("it is attached")
    return left


class Calls:
    """What a signal handler may do while its thread uses a shared object."""

    def __init__(self, kind: str, act: str) -> None:
        self.shared = shared_store(kind)
        self.other = MultiProcessShared(Store, tag="other")
        self._act = act
        self._held: list[Any] = []

    def prepare(self) -> None:
        """Forget what makes a use quick, and acquire what the handler is to release."""
        self.release()
        _known.clear()
        leave_all_registries()
        if self._act == "release":
            self._held.append(self.shared.acquire())

    def release(self) -> None:
        """Release it."""
        while self._held:
            self.shared.release(self._held.pop())

    def __call__(self) -> None:
        if self._act == "use":
            # It may have to wait for what its thread is about to do.
            with suppress(ReentrantCallError):
                use(self.shared)
        elif self._act == "release":
            self.release()
        elif self._act == "use another":
            use(self.other)
        elif self._act == "delete another":
            self.other.unsafe_hard_delete()
        else:
            server_pid("store")


@pytest.mark.usefixtures("alarmed")
@pytest.mark.parametrize("kind", ["server", "own process", "attached"])
@pytest.mark.parametrize("act", ["use", "release", "use another", "delete another", "ask"])
def test_a_signal_handler_may_call_at_any_point_of_a_use(kind: str, act: str) -> None:
    calls, failures, points = Calls(kind, act), [], 0
    shared = calls.shared
    # Or a server would be started for each point.
    kept = [shared.acquire()] if kind == "server" else []
    recording = Recording()
    calls.prepare()
    with recording:
        use(shared)
    step = STEP or (41 if kind == "server" else 11)
    for at in range(1 + OFFSET % step, recording.count + 1, step):
        calls.prepare()
        handler = Handler(*recording.point(at), calls)
        signal.setitimer(signal.ITIMER_REAL, HANGS_AFTER_S)
        try:
            with handler:
                use(shared)
        except Exception as error:
            failures.append(f"{at} ({handler.where}): {error!r}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        points += bool(handler.where)
        if handler.failure is not None:
            failures.append(f"{at} ({handler.where}), in the handler: {handler.failure!r}")
        calls.release()
        failures += [f"{at} ({handler.where}): {left}" for left in left_of("store")]
        if len(failures) >= ENOUGH_FAILURES:
            break
    another, outcome = in_thread(lambda: use(shared))
    another.join(DEADLINE_S)
    assert outcome == [None]
    for store in kept:
        shared.release(store)
    # So that this process removes the registry; `prepare` has left it.
    registry_for(None).join()
    shared.unsafe_hard_delete()
    calls.other.unsafe_hard_delete()
    print(f"{points} points, {len(failures)} failures")
    assert failures == []
    assert points


@pytest.mark.usefixtures("alarmed")
def test_a_constructor_that_acquires_its_own_tag_is_refused() -> None:
    refused: list[str] = []

    def make() -> Store:
        with pytest.raises(ReentrantCallError, match="'store' while its own thread makes it") as error:
            shared.acquire()
        refused.append(str(error.value))
        return Store()

    shared = MultiProcessShared(make, tag="store")
    signal.setitimer(signal.ITIMER_REAL, HANGS_AFTER_S)
    use(shared)
    # The object is made again for the next first user.
    use(shared)
    assert len(refused) == 2
    shared.unsafe_hard_delete()


@pytest.mark.usefixtures("alarmed")
def test_a_signal_handler_that_deletes_an_object_in_the_middle_of_an_acquire() -> None:
    made: list[Store] = []

    def make() -> Store:
        made.append(Store())
        if len(made) == 2:
            # As a handler would in the middle of this.
            shared.unsafe_hard_delete()
        return made[-1]

    shared = MultiProcessShared(make, tag="store")
    signal.setitimer(signal.ITIMER_REAL, HANGS_AFTER_S)
    use(shared)
    use(shared)
    # The second was made for a host that is gone.
    assert len(made) == 3
    assert left_of("store") == []
    shared.unsafe_hard_delete()


def test_an_acquire_that_an_exception_has_ended_does_not_count_as_in_progress(runtime_root: Path) -> None:
    shared = MultiProcessShared(Store, tag="store")
    # As if the exception had come just before the block began.
    _looking[registry_for(None), "store", threading.get_ident()] = returned_frame()
    use(shared)
    assert not _looking
    shared.unsafe_hard_delete()
