"""`tools/gpu_check.py` on a simulated GPU: all its checks run, and meet their expected values."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gpu_check import CHECKS, chosen_checks
from harness import SCALE

TOOL = Path(__file__).resolve().parent.parent / "tools" / "gpu_check.py"
LEARNING, SUSPEND = "learning", "suspend"
# Of a simulated process, beside its weights.
CONTEXT_MB = 300


def table() -> list[dict[str, Any]]:
    """Run the tool; its exit code says whether all of its table is met."""
    sizes = (
        ["--minutes", "0.05", "--processes", "2", "--quick"]
        if SCALE <= 1
        else ["--minutes", "0.5", "--suspend-minutes", "0.5"]
    )
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
        SUSPEND,
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


def test_models_are_suspended_intact_and_accounted_for_on_device_and_host(rows: list[dict[str, Any]]) -> None:
    found = {row["figure"]: row for row in rows if row["check"] == SUSPEND}
    intact = [figure for figure in found if figure.endswith("intact, same process")]
    assert intact and all(found[figure]["value"] == "3 of 3 rounds" for figure in intact)
    for figure in intact:
        size, taken_mb = figure.partition(" MB")[0], int(figure.partition(" MB")[0]) + CONTEXT_MB
        assert found[f"{size} MB accounted, host"]["value"] == f"{taken_mb} MB, +0 MB in truth"
        assert found[f"{size} MB accounted, device"]["value"] == f"{taken_mb}, 0, {taken_mb} MB: 0.00% off"
        assert found[f"{size} MB device, less empty"]["value"] == "+0 MB, in 0 rounds listed"


def test_models_that_do_not_fit_together_are_suspended_for_each_other(rows: list[dict[str, Any]]) -> None:
    found = {row["figure"]: row["value"] for row in rows if row["check"] == SUSPEND}
    _, evicted, suspended, resumed = map(int, found["uses, evicted, suspended, resumed"].split(", "))
    assert 0 < resumed <= suspended <= evicted
    assert found["uses with wrong weights"] == found["out of memory"] == found["other failures"] == "0"


def test_the_helper_is_killed_in_both_directions_and_a_suspended_server_too(rows: list[dict[str, Any]]) -> None:
    found = {row["figure"]: row for row in rows if row["check"] == SUSPEND}
    killed = found["helper killed while it moves"]
    assert killed["value"].startswith(killed["expected"]) and int(killed["expected"]) >= 2
    assert found["wrong after that"]["value"] == "0"
    assert found["killed while suspended"]["value"] == "+0 MB on the device, 0 accounted"
    assert found["left on the device"]["value"] == "+0 MB"


def test_chosen_checks_run_in_the_order_of_all_and_once() -> None:
    chosen = chosen_checks("recovery, attribution,figures")
    assert chosen == [CHECKS["figures"], CHECKS["recovery"]]


def test_only_what_is_chosen_runs() -> None:
    command = [sys.executable, str(TOOL), "--simulated", "--json", "--quick", "--only", "recovery"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert [row["check"] for row in json.loads(done.stdout)["rows"]] == ["device", "device", "recovery"]


def test_a_check_that_there_is_not_is_an_error_that_names_those_there_are() -> None:
    command = [sys.executable, str(TOOL), "--simulated", "--only", "figures,speed"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "there is no check 'speed'; there are figures, attribution, learning" in done.stderr


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
