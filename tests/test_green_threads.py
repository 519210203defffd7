"""Greenlets: if they replace threads, every public call raises an error; next to threads they work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import NewManager, in_thread
from patience import DEADLINE_S

from mpmm import GreenThreadsError
from mpmm.model_manager.operations import ended_calls

PROGRAM = """
from gevent import monkey

monkey.patch_all()

from mpmm import GreenThreadsError, ModelManager, MultiProcessShared

for use in (
    lambda: ModelManager(namespace="green", memory_source="booked").acquire_model("a", dict),
    MultiProcessShared(dict, tag="green").acquire,
):
    try:
        use()
    except GreenThreadsError as error:
        print(error)
"""


def test_where_gevent_has_replaced_threads_an_error_says_so(runtime_root: Path) -> None:
    pytest.importorskip("gevent", reason="needs the extra dev")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    of_manager, of_object = done.stdout.splitlines()
    assert of_manager.startswith("ModelManager(namespace='green') cannot be used in pid ")
    assert of_object.startswith("the shared object 'green' cannot be used in pid ")
    for text in (of_manager, of_object):
        assert "gevent has replaced threads with greenlets" in text
        assert "--worker-class gthread" in text
    assert not (runtime_root / "green").exists()


@pytest.mark.parametrize("replaced", ["thread", "socket"])
def test_eventlet_is_asked_for_threads(new_manager: NewManager, monkeypatch: pytest.MonkeyPatch, replaced: str) -> None:
    patcher = SimpleNamespace(is_monkey_patched=lambda module: module == replaced)
    monkeypatch.setitem(sys.modules, "eventlet.patcher", patcher)
    if replaced == "thread":
        with pytest.raises(GreenThreadsError, match="eventlet has replaced threads"):
            new_manager()
        return
    manager = new_manager()
    manager.release_model("a", manager.acquire_model("a", dict))


def test_a_loader_may_switch_to_another_greenlet_and_back(new_manager: NewManager) -> None:
    greenlet = pytest.importorskip("greenlet", reason="comes with gevent, which the extra dev has")
    manager, this = new_manager(), greenlet.getcurrent()
    operations = manager._connected().operations

    def load() -> dict[str, int]:
        this.switch("loads")
        return {"weights": 1}

    def use() -> str:
        model = manager.acquire_model("a", load)
        this.switch("uses")
        manager.release_model("a", model)
        return "has released"

    other = greenlet.greenlet(use)
    assert other.switch() == "loads"
    # As the background thread asks.
    looks, found = in_thread(lambda: (len(operations), ended_calls(operations)))
    looks.join()
    assert found == [(1, [])]
    assert [other.switch(), other.switch()] == ["uses", "has released"]


def test_what_a_greenlet_had_in_hand_that_ended_in_a_loader_is_given_back(new_manager: NewManager) -> None:
    greenlet = pytest.importorskip("greenlet", reason="comes with gevent, which the extra dev has")
    manager, this = new_manager(fallback_memory_mb=100.0), greenlet.getcurrent()
    other = greenlet.greenlet(lambda: manager.acquire_model("a", lambda: this.switch("loads")))
    assert other.switch() == "loads"
    # It is collected, and ends by GreenletExit, in the middle of the load.
    del other
    manager.release_model("b", manager.acquire_model("b", dict))
