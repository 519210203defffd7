"""Results that cannot be pickled: they stay in the server, and the client uses them all the same."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
from harness import NOBODYS_PID, Process, Seat, in_thread, wait_until
from patience import DEADLINE_S
from session_stand_in import Session

from mpmm.errors import ModelServerError, SharedObjectReleasedError
from mpmm.multi_process_shared import MultiProcessShared, references, unload
from mpmm.multi_process_shared.client import ServerLink
from mpmm.multi_process_shared.hosted import find_host
from mpmm.multi_process_shared.references import References, RemoteObject
from mpmm.multi_process_shared.registry import ServerRecord, registry_for
from mpmm.multi_process_shared.rpc.channel import Channel


@pytest.fixture
def shared() -> Iterator[Any]:
    handle = MultiProcessShared(Session, "session", always_proxy=True, spawn_process=True)
    session: Any = handle.acquire()
    yield session
    handle.unsafe_hard_delete()


def test_attributes_and_methods_of_what_stayed_are_those_in_the_server(shared: Any) -> None:
    # What Beam's default inference function for ONNX does.
    first, second = shared.get_inputs()
    assert (first.name, second.shape) == ("x", [3])
    assert first.renamed("z").shape == [1, 2]
    assert repr(first).startswith("<remote session_stand_in.Input of 'session' in pid ")
    with pytest.raises(AttributeError, match="nothing"):
        _ = first.nothing
    with pytest.raises(AttributeError):
        _ = first._private
    with pytest.raises(AttributeError):
        first.name = "a name of its own"
    assert isinstance(first, RemoteObject)


def test_a_generator_comes_as_a_stream_and_its_failure_where_it_occurs(shared: Any) -> None:
    stream = shared.count(5)
    assert next(stream) == 0
    assert list(stream) == [1, 2, 3, 4]
    assert list(zip(shared.count(2), shared.count(3), strict=False)) == [(0, 0), (1, 1)]
    received = []
    with pytest.raises(ZeroDivisionError, match="at the end"):
        for number in shared.count(5, fail_at=2):
            received.append(number)
    assert received == [0, 1]
    closed = shared.count(5)
    closed.close()
    assert list(closed) == []


def test_of_a_dictionary_each_part_is_sent_or_stays(shared: Any) -> None:
    views = shared.views()
    assert views["plain"] == [1, 2]
    numbers = views["numbers"]
    assert (len(numbers), sorted(numbers), 2 in list(numbers)) == (2, [1, 2], True)
    lock = shared.lock()
    with lock:
        assert lock.locked()
    assert not lock.locked()


def test_what_contains_itself_stays_as_a_whole_somewhere(shared: Any) -> None:
    found = shared.itself()
    depth = 0
    while isinstance(found, list):
        found, depth = found[1], depth + 1
    assert isinstance(found, RemoteObject)
    assert depth < 30


def test_as_an_argument_it_is_the_object_itself(shared: Any) -> None:
    first, second = shared.get_inputs()
    assert shared.knows(first)
    assert shared.knows(pickle.loads(pickle.dumps(second)))
    assert not shared.knows(first.renamed("x"))


def test_the_server_keeps_it_as_long_as_the_client_does(shared: Any) -> None:
    kept, other = shared.make_input(), shared.make_input()
    copy = pickle.loads(pickle.dumps(kept))
    del other
    gc.collect()
    assert shared.inputs_left() == 1
    assert copy.name == "made"
    del kept
    gc.collect()
    assert shared.inputs_left() == 0
    with pytest.raises(SharedObjectReleasedError, match="stayed in its server"):
        _ = copy.name


def _borrow(seat: Seat) -> None:
    session = MultiProcessShared(Session, "session", always_proxy=True).acquire()
    seat.held.append(("session", session.make_input()))


def test_what_a_killed_client_had_is_dropped(shared: Any, new_process: Any) -> None:
    client: Process = new_process()
    client.call(_borrow)
    assert shared.inputs_left() == 1
    client.kill()
    wait_until(lambda: shared.inputs_left() == 0, "the server has dropped it")


def _borrow_later(seat: Seat, wait_for: str) -> None:
    session = MultiProcessShared(Session, "session", always_proxy=True).acquire()
    seat.held.append(("session", session.make_input(wait_for)))


def test_what_a_client_would_have_had_that_was_killed_in_the_call_is_dropped(
    shared: Any, new_process: Any, tmp_path: Path
) -> None:
    client: Process = new_process()
    client.call(_borrow)
    client.send(_borrow_later, str(tmp_path / "go"))
    wait_until((tmp_path / "go.begun").exists, "its call is under way")
    client.kill()
    (tmp_path / "go").touch()
    wait_until(lambda: (shared.number_made(), shared.inputs_left()) == (2, 0), "the server has dropped both")


def test_what_an_interrupted_call_would_have_returned_is_dropped(shared: Any, tmp_path: Path) -> None:
    class InTime(Exception):
        pass

    def handler(*_: Any) -> None:
        raise InTime

    def interrupt() -> None:
        wait_until((tmp_path / "go.begun").exists, "the call is under way")
        os.kill(os.getpid(), signal.SIGALRM)

    kept = shared.make_input()
    before = signal.signal(signal.SIGALRM, handler)
    try:
        interrupting, _ = in_thread(interrupt)
        with pytest.raises(InTime):
            shared.make_input(str(tmp_path / "go"))
        interrupting.join()
    finally:
        signal.signal(signal.SIGALRM, before)
    (tmp_path / "go").touch()
    wait_until(lambda: (shared.number_made(), shared.inputs_left()) == (2, 1), "the server has dropped the second")
    assert kept.name == "made"


@pytest.mark.parametrize("fails_at", ["request", "answer"])
def test_an_interrupted_call_takes_nothing_away_that_came_before(shared: Any, fails_at: str) -> None:
    kept = shared.make_input()
    method = "send" if fails_at == "request" else "receive"
    with patch.object(Channel, method, side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        shared.make_input()
    # The server has noticed the end of the connection once it does not have the second one, if it ever had it.
    wait_until(lambda: shared.inputs_left() == 1, "only the first is left")
    assert kept.name == "made"


def test_what_a_thread_was_given_outlives_the_thread(shared: Any) -> None:
    borrowing, outcome = in_thread(lambda: shared.make_input())
    borrowing.join(DEADLINE_S)
    [made] = outcome
    del borrowing
    gc.collect()
    # The thread's connection has ended; the server has noticed that once this one is answered by another thread.
    assert shared.inputs_left() == 1
    assert made.name == "made"
    made_too = shared.make_input()
    assert (made.name, made_too.name, shared.inputs_left()) == ("made", "made", 2)


def test_to_drop_what_is_not_wanted_any_more_needs_no_new_connection(shared: Any) -> None:
    made = shared.make_input()
    with patch.object(ServerLink, "connect", side_effect=AssertionError("connected again")):
        assert shared.inputs_left() == 1
        del made
        gc.collect()
        assert shared.inputs_left() == 0


def test_a_forked_child_uses_it_and_takes_nothing_away(shared: Any) -> None:
    kept = shared.make_input()
    child = multiprocessing.get_context("fork").Process(target=_use_and_forget, args=(kept,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert (shared.inputs_left(), kept.name) == (1, "made")


def _use_and_forget(kept: Any) -> None:
    assert kept.name == "made"
    del kept
    gc.collect()


def test_of_a_server_that_is_gone_nothing_is_left(shared: Any) -> None:
    kept, stream = shared.make_input(), shared.count(3)
    assert unload("session")
    with pytest.raises(ModelServerError):
        _ = kept.name
    with pytest.raises(ModelServerError):
        next(stream)


def test_in_the_process_of_the_object_it_is_the_object_itself_and_nothing_is_kept() -> None:
    handle = MultiProcessShared(Session, "here", always_proxy=True)
    session: Any = handle.acquire()
    assert type(session.make_input()).__name__ == "Input"
    host = find_host(registry_for(None), "here")
    assert host is not None
    assert len(host.references) == 0
    handle.unsafe_hard_delete()


def test_what_an_earlier_server_of_the_tag_had_is_not_taken_for_what_this_process_has() -> None:
    handle = MultiProcessShared(Session, "here", always_proxy=True)
    session: Any = handle.acquire()
    host = find_host(registry_for(None), "here")
    assert host is not None
    lent = host.references.portable((number for number in range(3)), os.getpid(), [])
    arrive, (root, record, *parts) = lent.__reduce__()
    earlier = arrive(root, replace(record, incarnation="earlier"), *parts)
    assert isinstance(earlier, RemoteObject)
    assert len(host.references) == 1
    assert list(arrive(root, record, *parts)) == [0, 1, 2]
    assert len(host.references) == 0
    handle.release(session)
    handle.unsafe_hard_delete()


def test_what_is_lent_to_a_process_that_cannot_be_looked_at_is_kept_until_it_is_given_back(tmp_path: Path) -> None:
    """As one in another container, whose pid is nobody's here."""
    kept = References(tmp_path, ServerRecord("tag", os.getpid(), 0.0, "1", "socket", spawned=True, ready=True))
    for _ in range(2):
        kept.portable((number for number in range(0)), NOBODYS_PID, [])
    kept.forget_dead()
    assert len(kept) == 2
    kept.drop([1, 2])
    assert len(kept) == 0


def test_what_a_process_had_that_is_just_dying_is_kept_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = ServerRecord("tag", os.getpid(), 0.0, "1", "socket", spawned=True, ready=True)
    kept = References(tmp_path, record)
    kept.portable((number for number in range(0)), os.getpid(), [])
    assert len(kept) == 1
    # The kernel closes its connection before it counts it as dead.
    looks = iter([False, False, True])
    monkeypatch.setattr(references, "_is_gone", lambda pid, started: next(looks))
    kept.client_hung_up(os.getpid())
    assert len(kept) == 0


def test_a_finalizer_may_drop_something_while_its_thread_looks_for_the_dead(tmp_path: Path) -> None:
    record = ServerRecord("tag", os.getpid(), 0.0, "1", "socket", spawned=True, ready=True)
    kept = References(tmp_path, record)
    for _ in range(3):
        kept.portable(lambda: None, os.getpid(), [])

    class Finalizes(NamedTuple):
        thing: object = None
        started: float | None = None

        @property
        def pid(self) -> int | None:
            # As if the collector came by here.
            kept.drop([1])
            return None

    kept._lent[2] = Finalizes()  # type: ignore[assignment]  # it has the same attributes
    looking, _ = in_thread(kept.forget_dead)
    looking.join(DEADLINE_S)
    assert not looking.is_alive()
    assert sorted(kept._lent) == [2, 3]
