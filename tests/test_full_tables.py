"""A table full of idle rows makes room; a table full of rows in use leads to an error that says so."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from harness import (
    NewGate,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    copies_of,
    model_of,
    problems,
    release,
    wait_until,
    waiting,
)
from loaders import Loads, LoadsObject
from patience import Stopwatch

from mpmm import AcquireTimeoutError, ModelManager, TableFullError
from mpmm.shared_state.layout import Capacities, Model
from mpmm.shared_state.snapshot import read_snapshot


def tags(namespace: str) -> set[str]:
    return {model.tag for model in read_snapshot(namespace).models}


def use(manager: ModelManager, tag: str, loader: Callable[[], object] | None = None) -> None:
    manager.release_model(tag, manager.acquire_model(tag, loader or Loads(tag)))


@pytest.mark.parametrize("loader", [Loads("x"), LoadsObject("x")], ids=["handles", "objects"])
def test_a_table_full_of_idle_models_makes_room_with_the_one_used_least_recently(
    namespace: str, new_manager: NewManager, loader: Loads
) -> None:
    # Garbage collection in a process with this many objects takes seconds on a busy machine, and late unloads are not
    # waited for.
    manager = new_manager(capacities=Capacities(models=3), memory_return_seconds=60)
    for tag in ("a", "b", "c", "a"):
        use(manager, tag, loader)
    began = time.monotonic()
    use(manager, "new")
    print(f"a new tag after {time.monotonic() - began:.3f} s")
    assert tags(namespace) == {"a", "c", "new"}
    assert (copies_of(namespace, "b"), read_snapshot(namespace).evictions) == ([], 1)
    assert problems(namespace) == []


def test_a_lease_a_pin_and_a_preload_find_a_row_in_a_table_full_of_idle_models(
    namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager(capacities=Capacities(models=2))
    use(manager, "a")
    use(manager, "b")
    with manager.reserve(100, name="lease"):
        assert tags(namespace) == {"b", "lease"}
    use(manager, "c")
    manager.pin("pinned")
    assert tags(namespace) == {"c", "pinned"}
    manager.preload("loaded", Loads("loaded"))
    assert tags(namespace) == {"loaded", "pinned"}
    assert problems(namespace) == []


def test_a_model_with_several_copies_goes_as_a_whole(namespace: str, new_manager: NewManager) -> None:
    manager = new_manager(capacities=Capacities(models=1))
    manager.preload("a", Loads("a"), copies=3)
    assert len(copies_of(namespace, "a")) == 3
    use(manager, "new")
    assert tags(namespace) == {"new"}
    assert problems(namespace) == []


def test_many_newcomers_at_once_each_find_a_row(namespace: str, new_process: NewProcess) -> None:
    processes = [new_process(capacities=Capacities(models=4)) for _ in range(4)]
    for number in range(4):
        processes[0].call(acquire, f"old{number}", Loads())
        processes[0].call(release)
    for number, process in enumerate(processes):
        process.send(acquire, f"new{number}", Loads())
    for process in processes:
        process.result()
    assert tags(namespace) == {f"new{number}" for number in range(4)}
    assert problems(namespace) == []


def test_models_that_are_used_pinned_or_waited_for_do_not_make_room(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager(capacities=Capacities(models=3), fallback_memory_mb=200)
    waiter = new_process()
    use(manager, "pinned")
    manager.pin("pinned")
    held = manager.acquire_model("held", Loads("held"))
    waiter.send(acquire, "waited for", Loads())
    wait_until(lambda: waiting(namespace, "waited for"), "the table is full")
    before = read_snapshot(namespace)
    with pytest.raises(TableFullError, match=r"models.*Capacities\.models"):
        manager.acquire_model("new", Loads())
    assert [copy.tag for copy in read_snapshot(namespace).instances] == [copy.tag for copy in before.instances]
    manager.unpin("pinned")
    manager.release_model("held", held)
    waiter.result()
    assert problems(namespace) == []


def test_the_wait_for_a_row_ends_in_time(
    namespace: str, new_manager: NewManager, new_process: NewProcess, new_gate: NewGate
) -> None:
    owner = new_process(capacities=Capacities(models=1), memory_return_seconds=60.0)
    owner.call(acquire, "stuck", LoadsObject("stuck", unloading=new_gate()))
    owner.call(release)
    manager, impatient = new_manager(), new_manager(wait_timeout_seconds=0.5)
    watch = Stopwatch()
    with pytest.raises(AcquireTimeoutError, match="no row"):
        impatient.acquire_model("new", Loads())
    assert watch.s() >= 0.5
    assert watch.calm_s() < 2.0
    assert read_snapshot(namespace).waiting == 0
    owner.kill()
    wait_until(lambda: not copies_of(namespace, "stuck"), "its owner's death frees the row", 5)
    use(manager, "new")
    assert problems(namespace) == []


def test_a_table_of_tickets_full_of_grants_that_were_acted_upon_makes_room(
    namespace: str, new_process: NewProcess
) -> None:
    holder, waiter = new_process(capacities=Capacities(tickets=1), max_model_copies=1), new_process()
    holder.call(acquire, "a", Loads("a"))
    waiter.send(acquire_both)
    wait_until(lambda: waiting(namespace, "a"), "the other one waits")
    holder.call(release)
    waiter.result()
    assert (model_of(namespace, "a").active, model_of(namespace, "b").active) == (1, 1)
    assert problems(namespace) == []


def acquire_both(seat: Seat) -> None:
    """Wait for one model, and load another one as soon as it is there."""
    acquire(seat, "a", Loads("a"))
    acquire(seat, "b", Loads("b"))


def test_a_look_at_a_row_that_another_model_takes_meanwhile_leaves_no_hint_to_it(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = new_manager()
    use(manager, "ours")
    tables = manager._attachment.session.namespace.tables  # type: ignore[union-attr]  # it is attached
    tables.rows_of_tags.clear()
    text = tables.text

    def text_and_then_another_model(at: int) -> bytes:
        found = text(at)
        if found == b"ours":
            monkeypatch.undo()
            tables.segment.words[at - Model.TAG + Model.GENERATION] += 1
        return found

    monkeypatch.setattr(tables, "text", text_and_then_another_model)
    row = tables.model_row("ours")
    assert row is not None
    assert tables.rows_of_tags["ours"] != (row, tables.models[row].generation)
    assert tables.model_row("nobody's") is None
