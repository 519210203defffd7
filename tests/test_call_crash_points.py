"""A process dies at every store of whole calls of the manager, and the others go on; see `test_crash_points`.

In the creation of a namespace, and in calls that make and remove files, a process is really killed at every store,
since an image has no files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path
from typing import Any

import pytest
from crash_lab import KILLED, SMALL, KeepImages, KillAt, images_in, run_in_child, some_of
from harness import CRASH_POINTS

from mpmm import ModelManager
from mpmm.model_manager import acquire
from mpmm.model_manager.session import Session
from mpmm.shared_state.core import CORE_VARIABLE
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.runtime_dir import RuntimeDirectory
from mpmm.shared_state.segment import Segment
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import read_snapshot

# ---- whole calls of the manager ---------------------------------------------------------------------------------


class SteadyMonitor:
    """A monitor whose device is always half full."""

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def refresh(self) -> None: ...

    def reset_peak(self) -> None: ...

    def get_stats(self) -> tuple[float, float, float]:
        return 100.0, 100.0, 1000.0


def new_manager() -> ModelManager:
    return ModelManager(
        SteadyMonitor(), namespace="calls", capacities=SMALL, slack_percentage=0.0, wait_timeout_seconds=30.0
    )


def call_acquire_warm(manager: ModelManager) -> None:
    manager.acquire_model("warm", lambda: "never")


def call_acquire_and_load(manager: ModelManager) -> None:
    manager.acquire_model("cold", lambda: "cold handle")


def call_acquire_object(manager: ModelManager) -> None:
    manager.acquire_model("cold", object)


def call_acquire_and_load_for_three(manager: ModelManager) -> None:
    manager.release_model("cold", manager.acquire_model("cold", lambda: "cold handle", users=3))


def call_acquire_evicting(manager: ModelManager) -> None:
    manager.acquire_model("big", lambda: "big handle")


def call_acquire_unknown(manager: ModelManager) -> None:
    manager.acquire_model("unknown", lambda: "unknown handle")


def call_failing_load(manager: ModelManager) -> None:
    with pytest.raises(ZeroDivisionError):
        manager.acquire_model("cold", lambda: 1 // 0)


def call_too_large(manager: ModelManager) -> None:
    with pytest.raises(MemoryError):
        manager.acquire_model("huge", lambda: "never")


def call_acquire_and_release(manager: ModelManager) -> None:
    manager.release_model("warm", manager.acquire_model("warm", lambda: "never"))


def call_load_and_release_unknown(manager: ModelManager) -> None:
    manager.release_model("unknown", manager.acquire_model("unknown", lambda: "unknown handle"))


def call_reserve(manager: ModelManager) -> None:
    manager.reserve(200)


def call_reserve_evicting_and_give_back(manager: ModelManager) -> None:
    with manager.reserve(700):
        pass


def call_reserve_too_much(manager: ModelManager) -> None:
    with pytest.raises(MemoryError):
        manager.reserve(5000)


def call_pin_and_unpin(manager: ModelManager) -> None:
    manager.pin("warm")
    manager.unpin("warm")


def call_preload(manager: ModelManager) -> None:
    # The copy that an earlier child had loaded may be there.
    assert manager.preload("warm", lambda: "second handle", copies=2) <= 1


def call_load_out_of_memory(manager: ModelManager) -> None:
    attempts = iter((MemoryError("at first"), None))
    # Earlier children have raised it.
    manager._estimator.set_initial_estimate("cold", 100.0)

    def load() -> str:
        error = next(attempts)
        if error is not None:
            raise error
        return "cold handle"

    manager.acquire_model("cold", load)


def call_reset(manager: ModelManager) -> None:
    manager.force_reset()


def call_shutdown(manager: ModelManager) -> None:
    manager.shutdown()


CALLS = [call for name, call in sorted(globals().items()) if name.startswith("call_")]


# They remove files, which no image has.
KILLED_AT_EVERY_STORE = {call_shutdown}


class Survivor:
    """The manager of this process, which cleans up after children and uses its own copy again."""

    def __init__(self) -> None:
        self.manager = new_manager()
        for tag, mb in (("warm", 300.0), ("cold", 100.0), ("big", 800.0), ("huge", 5000.0)):
            self.manager._estimator.set_initial_estimate(tag, mb)
        self.worker = self.manager._connected()
        self.use()
        self._segment = self.worker.namespace.segment
        # The process's notes about its copies when the children's images are made.
        owned, held = self.worker.owned, self.worker.held
        self._known: Any = [(notes, copy(notes)) for notes in (owned.in_rows, owned.rows_of_model, held._handles)]
        self._image = self._segment.copy()

    def use(self) -> None:
        with self.manager.model("warm", lambda: "warm handle"):
            pass

    def restore(self, image: bytes | None = None) -> None:
        """Go back to the beginning, or to what a child has left."""
        self._segment.words[:] = memoryview(image or self._image).cast("Q")
        self.worker.namespace.tables.close()
        for notes, known in self._known:
            notes.clear()
            notes.update(known)

    def child(self, call: Callable[[ModelManager], None], wrap: Callable[[Any], Any]) -> int:
        """Make a call in a child whose stores go through `wrap(words)`."""

        def action() -> None:
            manager = new_manager()
            manager._connected().namespace.lock.intercept_stores(wrap)
            call(manager)

        status = run_in_child(action)
        assert status in (0, KILLED)
        return status

    def go_on(self, what: str) -> None:
        """Clean up as any survivor does; nothing of the child may be left, and the own copy can be used."""
        self.worker.namespace.reap_dead_members()
        self.worker.unloads.unload_assigned()
        snapshot = read_snapshot("calls", events=False)
        assert check_invariants(snapshot) == [], what
        assert [member.pid for member in snapshot.members] == [os.getpid()], what
        assert not snapshot.tickets, what
        assert not [copy for copy in snapshot.instances if copy.state != "idle"], what
        assert {model.estimate_mb for model in snapshot.models if model.tag == "warm"} == {300.0}
        self.use()


@pytest.fixture
def survivor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Survivor]:
    monkeypatch.setenv("MPMM_RUNTIME_DIR", str(tmp_path / "run"))
    # The children are told apart from the survivor by what they do in the foreground alone.
    start = "mpmm.model_manager.background.BackgroundThread.start"
    monkeypatch.setattr(start, lambda thread: thread._leader.lead_if_free(1.0))
    # These models are in no cycle, and a collection takes 0.1 s in a process that has imported Beam.
    monkeypatch.setattr("mpmm.model_manager.unload.gc.collect", lambda: 0)
    sleep = acquire._sleep

    def unload_and_sleep(session: Session, row: int, deadline: float) -> int | None:
        session.unloads.unload_assigned()
        return sleep(session, row, deadline)

    monkeypatch.setattr(acquire, "_sleep", unload_and_sleep)
    survivor = Survivor()
    yield survivor
    survivor.manager.shutdown()


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.removeprefix("call_"))
def test_death_at_any_store_of_a_call_costs_the_others_nothing(
    call: Callable[[ModelManager], None],
    survivor: Survivor,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    path = tmp_path / "images"
    assert survivor.child(call, lambda words: KeepImages(words, survivor.worker.namespace.segment, path)) == 0
    images = images_in(path, survivor.worker.namespace.segment.layout.size_bytes)
    survivor.go_on("ended")
    if call not in KILLED_AT_EVERY_STORE:
        for store, image in enumerate(images, 1):
            survivor.restore(image)
            survivor.go_on(f"image of store {store}")
    killed = set()
    for store in range(1, len(images) + 1) if call in KILLED_AT_EVERY_STORE else sorted(some_of(len(images))):
        survivor.restore()
        status = survivor.child(call, lambda words, store=store: KillAt(words, store))  # type: ignore[misc]  # mypy has no type for a lambda's default
        survivor.go_on(f"killed at store {store}")
        if status == KILLED:
            killed.add(store)
    # Not every run of a call makes as many stores as the first one, because they go by the clock.
    assert {1, (len(images) + 1) // 2} <= killed
    record_property(CRASH_POINTS, len(images))


def test_kill_at_any_store_of_the_creation_leaves_a_namespace_that_the_next_one_replaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.setenv("MPMM_RUNTIME_DIR", str(tmp_path / "run"))
    # The compiled core cannot use the words that count stores; and it makes none of a creation's stores.
    monkeypatch.setenv(CORE_VARIABLE, "python")
    original = Segment.__init__
    store = 0
    while True:
        store += 1

        def action(store: int = store) -> None:
            def counting(self: Segment, *arguments: Any) -> None:
                original(self, *arguments)
                self.words = KillAt(self.words, store)  # type: ignore[assignment]  # behaves like it

            monkeypatch.setattr(Segment, "__init__", counting)
            Namespace.join("born", capacities=SMALL)

        status = run_in_child(action)
        joined = Namespace.join("born", capacities=SMALL)
        assert joined.settings == Settings()
        snapshot = read_snapshot("born")
        assert check_invariants(snapshot) == []
        assert [member.pid for member in snapshot.members] == [os.getpid()]
        joined.leave()
        assert not RuntimeDirectory("born").path.exists()
        if status == 0:
            break
        assert status == KILLED
    assert store > 40
    record_property(CRASH_POINTS, store - 1)
