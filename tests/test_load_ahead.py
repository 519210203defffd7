"""Loads that use only free memory: `preload(if_free=True)`, and a Beam worker's loads before its first batches."""

from __future__ import annotations

import threading

import pytest
from harness import NewManager, Seat, learn, problems, wait_until
from loaders import Loads

from mpmm import ModelManager
from mpmm.beam.load_ahead import LOAD_AHEAD_VARIABLE, load_ahead
from mpmm.shared_state.snapshot import Snapshot, read_snapshot


def copies(snapshot: Snapshot) -> dict[str, int]:
    """Return how many copies there are by tag."""
    return {model.tag: model.loaded + model.loading for model in snapshot.models if model.loaded + model.loading}


def threads_ahead() -> list[threading.Thread]:
    """Return the threads that load ahead."""
    return [thread for thread in threading.enumerate() if thread.name == "mpmm-load-ahead"]


@pytest.fixture
def manager(new_manager: NewManager) -> ModelManager:
    """One of 1000 MB, for which the sizes of three models are known."""
    found = new_manager(fallback_memory_mb=1000, slack_percentage=0.0)
    learn(Seat(found), big=900, half=500, small=100)
    return found


def test_a_preload_of_what_is_free_loads_and_holds_nothing(manager: ModelManager, namespace: str) -> None:
    assert manager.preload("half", Loads("half"), if_free=True) == 1
    assert manager.preload("half", Loads("not to be called"), if_free=True) == 0
    assert copies(read_snapshot(namespace)) == {"half": 1}
    assert problems(namespace) == []


def test_a_preload_of_what_is_free_evicts_nothing(manager: ModelManager, namespace: str) -> None:
    manager.release_model("half", manager.acquire_model("half", Loads("half")))
    assert manager.preload("big", Loads("not to be called"), if_free=True) == 0
    assert manager.preload("small", Loads("small"), copies=9, if_free=True) == 5
    snapshot = read_snapshot(namespace)
    assert copies(snapshot) == {"half": 1, "small": 5}
    assert (snapshot.evictions, snapshot.tickets) == (0, ())
    assert manager.preload("big", Loads("big")) == 1
    assert copies(read_snapshot(namespace))["big"] == 1


def test_a_preload_of_what_is_free_does_not_wait(manager: ModelManager, namespace: str) -> None:
    copy = manager.acquire_model("big", Loads("big"))
    assert manager.preload("half", Loads("not to be called"), if_free=True, timeout_seconds=60) == 0
    manager.release_model("big", copy)
    assert copies(read_snapshot(namespace)) == {"big": 1}


def test_of_several_that_load_ahead_one_loads(manager: ModelManager, namespace: str) -> None:
    for tag in ("half", "small", "half", "big", "small"):
        load_ahead(manager, tag, Loads(tag))
    wait_until(lambda: not threads_ahead(), "all that was to be loaded ahead is")
    found = copies(read_snapshot(namespace))
    # Whichever of the two larger ones came first has left no room for the other.
    assert found in ({"half": 1, "small": 1}, {"big": 1, "small": 1})


def test_nothing_is_loaded_ahead_where_that_is_turned_off(
    manager: ModelManager, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LOAD_AHEAD_VARIABLE, "0")
    load_ahead(manager, "half", Loads("not to be called"))
    assert threads_ahead() == []
    assert copies(read_snapshot(namespace)) == {}


def test_what_fails_ahead_fails_for_those_who_ask(manager: ModelManager) -> None:
    def fail() -> str:
        raise RuntimeError("no such file")

    load_ahead(manager, "small", fail)
    wait_until(lambda: not threads_ahead(), "the load has failed")
    with pytest.raises(RuntimeError, match="no such file"):
        manager.acquire_model("small", fail)
