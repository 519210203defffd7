"""Short runs of `tools/workload.py` on each kind of source: all requests are served in memory. No time is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from simulation.traces import cycle_requests

TOOL = Path(__file__).resolve().parent.parent / "tools" / "workload.py"
SHORT = ("--clients", "4", "--requests", "24", "--load-seconds", "0.02", "--inference-seconds", "0.001")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def run(*options: str) -> dict[str, Any]:
    command = [sys.executable, str(TOOL), "--json", *SHORT, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == 0, (result, done.stderr)
    return result


@pytest.mark.parametrize("source", ["processes", "whole-device", "nvml", "nvidia-smi", "booked"])
def test_all_requests_are_served_within_memory_on_each_source(source: str) -> None:
    answers = () if source == "booked" else ("--answer-seconds", "0.02")
    result = run("--source", source, "--kill", *answers)
    assert result["source"].startswith(source)
    assert result["served"] == result["requests"] == 24
    assert result["out_of_memory_events"] == 0
    # 36.9 GB were asked for on 16 GB, so something had to go.
    assert result["loads"] > result["loads"] - result["evictions"] > 0


def test_models_are_suspended_instead_of_loaded_anew_within_memory_and_budget() -> None:
    rates = ("--suspend-mb-s", "50000", "--resume-mb-s", "50000", "--suspend-budget-mb", "48000")
    result = run("--source", "nvml", "--zipf", "0", *rates, "--load-seconds", "2.5", "--device-mb", "8000")
    assert result["served"] == result["requests"] == 24
    assert result["suspends"] >= result["resumes"] > 0
    assert result["suspend_failures"] == result["out_of_memory_events"] == 0
    assert not result["broken_invariants"]


def test_clients_that_cycle_make_all_of_their_requests_although_some_are_killed() -> None:
    result = run("--cycle", "--kill", "--clients", "3")
    assert result["demand"] == "each client in a cycle"
    assert result["served"] == 24
    # 3 clients of 8 requests each, from models 1, 2 and 3 on.
    assert list(result["wait_max_s_by_model"]) == [f"model-{number:02}" for number in range(1, 11)]


def test_each_cycling_client_goes_through_the_models_in_order() -> None:
    requests = cycle_requests(12, models=3, clients=2)
    assert requests[0::2] == [0, 1, 2, 0, 1, 2]
    assert requests[1::2] == [1, 2, 0, 1, 2, 0]
