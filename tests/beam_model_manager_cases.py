"""All of Beam's own tests of the model manager, against mpmm's; `test_beam_model_manager` runs them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from beam_wheel import load_beam_tests, names_of
from harness import wait_until

from mpmm.model_manager import GPUMonitor, ModelManager
from mpmm.policy import eviction

beam_tests = load_beam_tests(
    "ml/inference/model_manager_test.py",
    {
        "from apache_beam.utils import multi_process_shared": "from mpmm import multi_process_shared",
        "apache_beam.ml.inference.model_manager": "mpmm.model_manager",
    },
)
BOOKED: dict[str, Any] = {"memory_source": "booked", "default_estimate_mb": 10.0}
globals().update(names_of(beam_tests))


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep the tests out of the user's namespaces, and let a patched nvidia-smi be the only GPU there is.

    Beam's tests leave monitors that poll. They would run the programs of later tests.
    """
    monkeypatch.setenv("MPMM_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setitem(sys.modules, "pynvml", None)
    # Their loads take no time, so that Beam's order decides; on a busy machine one may take as long as if it did.
    monkeypatch.setattr(eviction, "RESOLUTION_S", 5.0)
    monitors: list[GPUMonitor] = []
    start = GPUMonitor.start

    def start_and_note(monitor: GPUMonitor) -> None:
        monitors.append(monitor)
        start(monitor)

    monkeypatch.setattr(GPUMonitor, "start", start_and_note)
    yield
    for monitor in monitors:
        monitor.stop()
    assert "mpmm-gpu-monitor" not in {thread.name for thread in threading.enumerate()}


def test_names_that_other_projects_tests_use_show_the_shared_state() -> None:
    manager: Any = ModelManager(slack_percentage=0.2, min_model_copies=2, eviction_cooldown_seconds=3.0, **BOOKED)
    with manager._cv:
        assert manager._cv._is_owned()
        instance = manager.acquire_model("a", object)
        assert (manager._total_active_jobs, manager._models["a"], manager._models["b"]) == (1, [instance], [])
        assert manager._wait_queue == []
        manager.release_model("a", instance)
    assert not manager._cv._is_owned()
    assert manager._cv is manager._cv
    assert (manager._slack_percentage, manager._min_model_copies, manager._eviction_cooldown) == (0.2, 2, 3.0)
    manager._slack_percentage = 0.3
    assert manager._slack_percentage == manager.settings["slack_percentage"] == 0.3
    manager._wait_timeout_seconds = 0.01
    assert manager._wait_timeout_seconds == 0.01
    assert manager._isolation_baseline == 0.0
    manager._delete_all_models()
    assert manager._models == {}
    manager.shutdown()


def test_the_condition_waits_for_a_change_and_no_longer_than_asked() -> None:
    manager = ModelManager(**BOOKED)
    with manager._cv:
        # The background thread changes something now and then.
        wait_until(lambda: not manager._cv.wait(timeout=0.02), "nothing changes for a moment")
        threading.Timer(0.05, manager.acquire_model, ("a", object)).start()
        assert manager._cv.wait_for(lambda: manager._total_active_jobs == 1, timeout=10.0)
    manager.shutdown()


def test_the_tests_use_mpmm_and_not_beam() -> None:
    assert beam_tests.ModelManager.__module__ == "mpmm.model_manager"
    assert beam_tests.multi_process_shared.__name__ == "mpmm.multi_process_shared"
