"""`tools/gpu_check.py` on a simulated GPU: all its checks run, and what it expects is met."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import SCALE

TOOL = Path(__file__).resolve().parent.parent / "tools" / "gpu_check.py"
LEARNING = "learning"


def table() -> list[dict[str, Any]]:
    """Run the tool; its exit code says whether all of its table is met."""
    sizes = ["--minutes", "0.05", "--processes", "2", "--quick"] if SCALE <= 1 else ["--minutes", "0.5"]
    command = [sys.executable, str(TOOL), "--simulated", "--json", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    found: list[dict[str, Any]] = result["rows"]
    assert result["met"] == (done.returncode == 0) == all(row["met"] is not False for row in found)
    return found


@pytest.fixture(scope="module")
def rows(once_per_run: Callable[[str, Callable[[], Any]], Any]) -> list[dict[str, Any]]:
    """The table of one run."""
    found: list[dict[str, Any]] = once_per_run("gpu_check", table)
    return found


def test_all_checks_run_and_are_met_on_a_simulated_gpu(rows: list[dict[str, Any]]) -> None:
    assert {row["check"] for row in rows} == {
        "device",
        "figures",
        "attribution",
        LEARNING,
        "isolation",
        "recovery",
        "turns",
        "pipeline",
    }
    assert [row for row in rows if row["met"] is False] == []
    by_figure = {row["figure"]: row["value"] for row in rows}
    assert by_figure["process, NVML less torch"] == "300 to 300 MB"
    assert by_figure["device less processes"] == "+0 MB"
    assert by_figure["out of memory"] == "0"


def test_a_model_that_ran_out_of_memory_once_is_learnt_exactly(rows: list[dict[str, Any]]) -> None:
    learnt = {row["figure"]: row for row in rows if row["check"] == LEARNING}
    assert learnt["ran out of memory"]["met"] and learnt["out of memory, learnt"]["met"], learnt


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="needs Apache Beam")
def test_the_pipeline_makes_every_prediction_in_model_servers(rows: list[dict[str, Any]]) -> None:
    by_figure = {row["figure"]: row for row in rows if row["check"] == "pipeline"}
    assert by_figure["predictions"]["value"] == by_figure["predictions"]["expected"]
    assert int(by_figure["predictions"]["value"]) >= 32
    assert by_figure["out of memory in Beam"]["value"] == "0"


def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check")
