"""The manager: pickled, forked, several of one process; reset and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import pickle
import subprocess
import sys
import threading
import weakref
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from harness import (
    NewGate,
    NewManager,
    NewProcess,
    Seat,
    acquire,
    copies_of,
    files_in,
    import_path,
    in_thread,
    know,
    learn,
    model_of,
    problems,
    release,
    segments_of,
    shut_down,
    wait_until,
    waiting,
)
from loaders import LoadFails, Loads, LoadsObject, Weights
from patience import DEADLINE_S

from mpmm.errors import (
    ClosedError,
    InvalidArgumentError,
    LockTimeoutError,
    MpmmError,
    NamespaceResetError,
    NotAcquiredError,
)
from mpmm.model_manager import ModelManager, attachment
from mpmm.model_manager.attachment import Attachment, JoinsWith
from mpmm.model_manager.out_of_memory import OutOfMemory
from mpmm.model_manager.session import Session
from mpmm.policy import eviction
from mpmm.shared_state.lock_file import LockFile
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.snapshot import find_namespaces, read_snapshot

TOLD_NOTHING = JoinsWith.checked(None, "booked", None, None, None, verbose_logging=False)


# ---- copies of the manager: pickled, forked, several ---------------------------------------------------------


def test_a_pickled_manager_is_a_manager_on_the_same_state(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(), new_process(attached=False)
    copy = manager.acquire_model("a", Loads())
    with pickle.loads(pickle.dumps(manager)) as twin:
        assert twin.namespace == namespace
        twin.release_model("a", copy)
    assert other.call(take_over, manager, "a") == copy
    assert model_of(namespace, "a").active == 1
    other.call(release)
    # The twin has left, and this one has not.
    with manager.model("a", LoadFails("not to be called")):
        pass


def take_over(seat: Seat, manager: ModelManager, tag: str) -> Any:
    """Go on with a manager that came by pickle."""
    seat.manager = manager
    return acquire(seat, tag, LoadFails("not to be called"))


def test_a_private_namespace_goes_along_with_the_pickled_manager(new_process: NewProcess, runtime_root: Any) -> None:
    with ModelManager(memory_source="booked") as manager:
        manager.release_model("a", manager.acquire_model("a", Loads()))
        other = new_process(attached=False)
        assert other.call(take_over, manager, "a") in manager.all_models("a")
        other.call(release)
        other.call(shut_down)


def test_private_namespaces_are_separate() -> None:
    with ModelManager(memory_source="booked") as one, ModelManager(memory_source="booked") as two:
        assert one.namespace != two.namespace
        one.acquire_model("a", Loads())
        assert (len(one.all_models("a")), two.all_models("a")) == (1, [])


def test_a_forked_child_uses_the_manager_but_has_no_claim_on_what_its_parent_holds(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager = new_manager()
    handle = manager.acquire_model("handle", Loads("h"))
    thing = manager.acquire_model("object", LoadsObject("o"))
    manager.release_model("object", thing)
    _inherited.update(manager=manager, handle=handle, thing=thing)
    try:
        child = new_process(attached=False)
    finally:
        _inherited.clear()
    with pytest.raises(NotAcquiredError):
        child.call(release_inherited, "handle", "handle")
    with pytest.raises(NotAcquiredError):
        child.call(release_inherited, "object", "thing")
    # The parent's object is idle, but it is the parent's.
    assert child.call(acquire_inherited, "object") is False
    assert model_of(namespace, "object").loaded == 2
    assert len(read_snapshot(namespace).members) == 2
    manager.release_model("handle", handle)
    assert child.call(acquire, "handle", LoadFails("not to be called")) == handle
    assert manager.acquire_model("object", LoadFails("not to be called")) is thing
    child.call(shut_down)
    assert (model_of(namespace, "handle").idle, model_of(namespace, "object").active) == (1, 1)
    manager.release_model("object", thing)
    assert problems(namespace) == []


_inherited: dict[str, Any] = {}


def release_inherited(seat: Seat, tag: str, what: str) -> None:
    """Try to release what the parent holds."""
    seat.manager = _inherited["manager"]
    seat.manager.release_model(tag, _inherited[what])


def acquire_inherited(seat: Seat, tag: str) -> bool:
    """Acquire an object, and return whether it is the parent's."""
    with seat.manager.model(tag, LoadsObject("child's")) as thing:
        return thing is _inherited["thing"]


def test_other_values_than_the_creators_are_reported_and_have_no_effect(
    new_manager: NewManager, caplog: pytest.LogCaptureFixture
) -> None:
    new_manager(slack_percentage=0.25)
    with caplog.at_level(logging.WARNING, "mpmm"):
        new_manager(slack_percentage=0.25, wait_timeout_seconds=1.0)
        assert caplog.text == ""
        later = new_manager(slack_percentage=0.5)
    assert "slack_percentage stays 0.25, chosen by the creator of the namespace; ignoring 0.5" in caplog.text
    know(later, a=750)
    with later.model("a", Loads()):
        pass


def test_all_models_shows_handles_own_objects_and_none_for_those_of_others(
    new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(), new_process()
    handle = other.call(acquire, "handle")
    other.call(acquire, "object", LoadsObject())
    thing = manager.acquire_model("object", LoadsObject())
    assert manager.all_models("handle") == [handle]
    assert {type(copy) for copy in manager.all_models("object")} == {type(None), Weights}
    assert thing in manager.all_models()["object"]
    assert manager.all_models("nothing") == []
    assert manager.all_models()["nothing"] == [], "Beam asks for a model that was evicted"
    manager.release_model("object", thing)


def test_an_old_version_makes_room_first_and_the_current_one_again_does_not(
    namespace: str, new_manager: NewManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where one of the loads is slow, as on a busy machine, costs count, and not how long a copy has been idle.
    monkeypatch.setattr(eviction, "RESOLUTION_S", DEADLINE_S)
    manager = new_manager(fallback_memory_mb=300.0)
    for tag in ("other", "v1", "v2"):
        manager.release_model(tag, manager.acquire_model(tag, LoadsObject()))
    manager.supersede("v1", "v2")
    manager.release_model("new", manager.acquire_model("new", LoadsObject()))
    assert set(manager.all_models()) == {"other", "v2", "new"}, "`other` has been idle for longer"
    manager.supersede("v2", "v1")
    manager.supersede("v1", "v2")
    manager.release_model("more", manager.acquire_model("more", LoadsObject()))
    assert set(manager.all_models()) == {"v2", "new", "more"}, "back at its place"
    with pytest.raises(InvalidArgumentError):
        manager.supersede("v1", "x" * 600)


# ---- reset and shutdown ------------------------------------------------------------------------------------


def test_a_reset_from_another_process_tells_everybody(
    namespace: str, new_process: NewProcess, new_gate: NewGate
) -> None:
    holder, waiter, loading, other = (new_process(fallback_memory_mb=300) for _ in range(4))
    other.call(learn, big=300, known=150)
    holder.call(acquire, "held")
    began, go = new_gate(), new_gate()
    loading.send(acquire, "loading", Loads("l", began, go))
    began.wait()
    waiter.send(acquire, "big")
    wait_until(lambda: waiting(namespace, "big"), "somebody waits")
    other.call(reset)
    with pytest.raises(NamespaceResetError, match="ended the wait for 'big'"):
        waiter.result()
    with pytest.raises(NamespaceResetError, match="took 'held' away"):
        holder.call(release)
    go.open()
    with pytest.raises(NamespaceResetError, match="ended the load of 'loading'"):
        loading.result()
    snapshot = read_snapshot(namespace)
    assert (snapshot.instances, snapshot.tickets, snapshot.resets) == ((), (), 1)
    assert model_of(namespace, "known").estimate_mb == 150, "estimates stay"
    for process in (holder, waiter, loading):
        assert process.call(acquire, "again")
        process.call(release)
    assert problems(namespace) == []


def reset(seat: Seat) -> None:
    """Reset the namespace."""
    seat.manager.force_reset()


def test_shutdown_unloads_what_is_ours_and_the_last_one_everything(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    manager, other = new_manager(), new_process()
    thing = manager.acquire_model("object", LoadsObject())
    manager.release_model("object", thing)
    handle = manager.acquire_model("handle", Loads())
    manager.shutdown()
    manager.shutdown()
    assert thing.unloaded
    with pytest.raises(ClosedError):
        manager.acquire_model("handle", Loads())
    assert {copy.tag: copy.state for copy in read_snapshot(namespace).instances} == {"handle": "idle"}
    assert other.call(acquire, "handle", LoadFails("not to be called")) == handle
    assert problems(namespace) == []
    other.call(shut_down)
    with pytest.raises(FileNotFoundError):
        read_snapshot(namespace)


class Interrupted(BaseException):
    """Raised by a signal handler."""


class Ends:
    """An object whose unload raises, by its own or in a signal handler."""

    def __init__(self, error: BaseException, unloaded: list[Any]) -> None:
        self.error = error
        self.unloaded = unloaded

    def unload_model(self) -> None:
        self.unloaded.append(self)
        raise self.error


@pytest.mark.parametrize("error", [SystemExit(3), Interrupted(), asyncio.CancelledError()], ids=repr)
def test_what_an_unload_raises_leaves_the_shutdown_once_that_has_ended(
    error: BaseException, namespace: str, new_manager: NewManager
) -> None:
    manager = new_manager()
    unloaded: list[Any] = []
    for tag in ("a", "b", "c"):
        with manager.model(tag, lambda: Ends(error, unloaded)):
            pass
    with pytest.raises(type(error)) as caught:
        manager.shutdown()
    assert caught.value is error
    assert len(set(map(id, unloaded))) == len(unloaded) == 3
    with pytest.raises(FileNotFoundError):
        read_snapshot(namespace)


def test_an_object_that_cannot_be_asked_for_its_unload_is_unloaded_nevertheless(
    namespace: str, new_manager: NewManager, caplog: pytest.LogCaptureFixture
) -> None:
    class Hostile:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(name)

    manager = new_manager()
    for tag in ("a", "b"):
        with manager.model(tag, Hostile):
            pass
    assert manager.unload("a") == 1
    manager.shutdown()
    assert [record.getMessage() for record in caplog.records] == ["mpmm: unload_model of a Hostile failed"] * 2
    with pytest.raises(FileNotFoundError):
        read_snapshot(namespace)


@pytest.mark.parametrize(
    "how", ["raise SystemExit(3)", "raise KeyboardInterrupt", "signal.raise_signal(signal.SIGINT)"]
)
def test_the_end_of_a_process_leaves_all_namespaces_whatever_unloads_raise(runtime_root: Path, how: str) -> None:
    program = f"""
import signal, sys
from mpmm import ModelManager, MultiProcessShared

class Ends:
    def unload_model(self):
        {how}

managers = [ModelManager(namespace=name, memory_source="booked") for name in ("one", "two")]
for manager in managers:
    with manager.model("a", Ends), manager.model("b", Ends):
        pass
MultiProcessShared(dict, tag="shared", always_proxy=True).acquire()
"""
    subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": import_path()}, timeout=60, check=True
    )
    assert files_in(runtime_root) == []
    assert segments_of(runtime_root) == set()


def test_two_managers_of_one_process_are_one_member_that_leaves_with_the_second(
    namespace: str, new_manager: NewManager
) -> None:
    one, two = new_manager(), new_manager()
    copy = one.acquire_model("a", Loads())
    one.shutdown()
    assert len(read_snapshot(namespace).members) == 1
    two.release_model("a", copy)
    two.shutdown()
    with pytest.raises(FileNotFoundError):
        read_snapshot(namespace)


def test_a_thread_that_waits_is_sent_away_by_its_own_processs_shutdown(
    namespace: str, new_manager: NewManager, new_process: NewProcess
) -> None:
    holder, manager = new_process(fallback_memory_mb=100), new_manager()
    holder.call(acquire, "a")
    thread, outcome = in_thread(lambda: manager.acquire_model("b", Loads()))
    wait_until(lambda: waiting(namespace, "b"), "the thread waits")
    manager.shutdown()
    thread.join(DEADLINE_S)
    assert [type(error) for error in outcome] == [ClosedError]
    assert waiting(namespace) == []


def test_a_forgotten_manager_leaves_by_itself_also_when_an_unload_collects_it(
    namespace: str, new_manager: NewManager
) -> None:
    forgotten = ModelManager(memory_source="booked")
    private = forgotten.namespace
    # In a cycle, so that only the collector finds it: that of the unload of an object, in the middle of leaving.
    cycle: list[Any] = [forgotten]
    cycle.append(cycle)
    manager = new_manager()
    manager.release_model("a", manager.acquire_model("a", LoadsObject()))
    del forgotten, cycle
    manager.shutdown()
    gc.collect()
    wait_until(lambda: private not in find_namespaces(), "it has left")


def use_in_block(manager: ModelManager, loader: Any) -> None:
    with manager.model("a", loader):
        pass


def use_as_beam_does(manager: ModelManager, loader: Any) -> None:
    manager.release_model("a", manager.acquire_model("a", loader))


def use_in_task(manager: ModelManager, loader: Any) -> None:
    async def use() -> None:
        async with manager.model_async("a", loader):
            pass

    asyncio.run(use())


def fail_to_load(manager: ModelManager, loader: Any) -> None:
    def fail() -> None:
        loader()
        raise LookupError

    with contextlib.suppress(LookupError):
        use_in_block(manager, fail)


def run_out_of_memory(manager: ModelManager, loader: Any) -> None:
    def fail() -> None:
        loader()
        raise MemoryError

    def make_no_room(*_: object) -> None:
        raise MpmmError("not now")

    with patch.object(OutOfMemory, "make_room", make_no_room), contextlib.suppress(MemoryError):
        use_in_block(manager, fail)


@pytest.mark.parametrize("loader", [Loads(), LoadsObject()])
@pytest.mark.parametrize("use", [use_in_block, use_as_beam_does, use_in_task, fail_to_load, run_out_of_memory])
def test_a_forgotten_manager_leaves_though_no_garbage_can_be_collected(use: Any, loader: Loads) -> None:
    """A program may have turned the collector off; or a finalizer of another thread's collection takes long."""
    began, go = threading.Event(), threading.Event()

    class Slow:
        def __del__(self) -> None:
            began.set()
            go.wait(DEADLINE_S)

    def collect() -> None:
        slow: Any = Slow()
        slow.itself = slow
        del slow
        gc.collect()

    forgotten = ModelManager(memory_source="booked")
    private = forgotten.namespace
    # It joins, and what that leaves is collected.
    forgotten.preload("first", Loads())
    gc.collect()
    collecting, _ = in_thread(collect)
    try:
        assert began.wait(DEADLINE_S)
        use(forgotten, loader)
        del forgotten
        assert gc.collect() == 0, "another thread collects"
        wait_until(lambda: private not in find_namespaces(), "it has left", 2.0)
    finally:
        go.set()
        collecting.join(DEADLINE_S)


def test_a_join_that_is_too_late_is_given_up_in_time_though_others_have_the_locks(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch, new_manager: NewManager
) -> None:
    others: list[LockFile] = []
    start = Session.start

    def start_too_late(session: Session) -> None:
        others.extend((session.namespace.segment.lock_file(), LockFile(runtime_root / namespace / "lifecycle.lock")))
        assert all(lock.try_exclusive() for lock in others)
        start(session)

    with monkeypatch.context() as patched:
        patched.setattr(Session, "start", start_too_late)
        joins = Attachment(runtime_root, namespace, Settings(), TOLD_NOTHING)
        joining, outcome = in_thread(lambda: joins.connected(0.2))
        joining.join(DEADLINE_S)
        in_time = not joining.is_alive()
        for lock in others:
            lock.close()
        joining.join()
    assert in_time and isinstance(outcome[0], LockTimeoutError)
    # It could not know whether it was the last, so the next one clears away what it has left.
    new_manager()
    assert [member.pid for member in read_snapshot(namespace).members] == [os.getpid()]


def test_a_join_that_waits_in_vain_for_another_thread_names_its_own_process(runtime_root: Path, namespace: str) -> None:
    joins = Attachment(runtime_root, namespace, Settings(), TOLD_NOTHING)
    with attachment._guard:
        joining, outcome = in_thread(lambda: joins.connected(0.1))
        joining.join(DEADLINE_S)
    assert isinstance(outcome[0], LockTimeoutError)
    assert outcome[0].holder_pid == os.getpid()
    assert f"another thread of pid {os.getpid()} has been joining" in str(outcome[0])


JOINS_IN_A_CHILD = """
import os, sys, time
from unittest import mock

from mpmm import AcquireTimeoutError, LockTimeoutError, ModelManager
from mpmm.model_manager.session import Session
from mpmm.shared_state.lifecycle import LIFECYCLE_TIMEOUT_S
from mpmm.shared_state.lock_file import LockFile

manager = ModelManager(namespace="life", memory_source="booked", wait_timeout_seconds=0.2)
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
# As a process has it that is stopped while it joins.
lock = LockFile(os.path.join(sys.argv[1], "life", "lifecycle.lock"))

def is_interrupted(*_):
    raise KeyboardInterrupt

def fails(*_):
    lock.exclusive(10)
    raise LockTimeoutError("the lock was not free", timeout_seconds=0.2)

if sys.argv[2] == "after an interrupted join":
    with mock.patch.object(Session, "start", is_interrupted), mock.patch.object(Session, "close"):
        try:
            manager.acquire_model("a", dict)
        except KeyboardInterrupt:
            pass
starts = fails if sys.argv[2] == "fails to start" else Session.start
if starts is not fails:
    lock.exclusive(10)
began = time.monotonic()
with mock.patch.object(Session, "start", starts):
    try:
        manager.acquire_model("a", dict)
    except AcquireTimeoutError:
        assert time.monotonic() - began < LIFECYCLE_TIMEOUT_S / 2
    else:
        raise AssertionError("it has joined")
lock.close()
manager.release_model("a", manager.acquire_model("a", dict))
manager.shutdown()
os._exit(0)
"""


@pytest.mark.parametrize("case", ["joins", "after an interrupted join", "fails to start"])
def test_a_request_that_has_to_join_first_keeps_to_its_own_time(runtime_root: Path, case: str) -> None:
    environment = {**os.environ, "PYTHONPATH": import_path()}
    command = [sys.executable, "-c", JOINS_IN_A_CHILD, str(runtime_root), case]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert not (runtime_root / "life").exists()


def test_a_model_whose_block_was_collected_is_freed_once_it_is_unloaded(
    new_manager: NewManager,
) -> None:
    manager = new_manager()
    models: weakref.WeakSet[Weights] = weakref.WeakSet()

    def load() -> Weights:
        model = Weights()
        models.add(model)
        return model

    # Not a `with` statement, so that the block is collected.
    manager.model("a", load).__enter__()
    wait_until(lambda: copies_of(manager.namespace, "a")[0].state == "idle", "the copy is given back")
    assert len(models) == 1
    manager.unload("a")
    wait_until(lambda: not models, "the model is freed")


def test_shutdown_does_not_unload_again_what_a_late_thread_unloads(new_manager: NewManager) -> None:
    manager = new_manager()
    owned, unloaded = manager._connected().owned, list[str]()

    class Model:
        def __init__(self, name: str) -> None:
            self.name = name

        def unload_model(self) -> None:
            unloaded.append(self.name)
            # What a thread does first that unloads them meanwhile.
            for copy in owned.all():
                owned.forget(copy.row, copy.generation)

    for tag in "ab":
        with manager.model(tag, partial(Model, tag)):
            pass
    manager.shutdown()
    assert len(unloaded) == 1


def test_a_shutdown_while_another_thread_joins_is_not_lost(
    namespace: str, runtime_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, attachment = Session.start, Attachment(runtime_root, namespace, Settings(), TOLD_NOTHING)

    def start_as_it_is_shut_down(session: Session) -> None:
        start(session)
        thread, _ = in_thread(attachment.shutdown)
        thread.join(DEADLINE_S)
        assert not thread.is_alive()

    monkeypatch.setattr(Session, "start", start_as_it_is_shut_down)
    with pytest.raises(ClosedError):
        attachment.connected()
    assert not find_namespaces()
