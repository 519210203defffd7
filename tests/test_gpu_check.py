"""`tools/gpu_check.py` on a simulated GPU: all its checks run, and what it expects is met."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TOOL = Path(__file__).resolve().parent.parent / "tools" / "gpu_check.py"


def test_all_checks_run_and_are_met_on_a_simulated_gpu() -> None:
    command = [sys.executable, str(TOOL), "--simulated", "--minutes", "0.05", "--processes", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    unmet = [row for row in result["rows"] if row["met"] is False]
    assert done.returncode == 0 and result["met"], unmet
    assert {row["check"] for row in result["rows"]} == {
        "device",
        "figures",
        "attribution",
        "isolation",
        "recovery",
        "turns",
    }
    by_figure = {row["figure"]: row["value"] for row in result["rows"]}
    assert by_figure["process, NVML less torch"] == "300 to 300 MB"
    assert by_figure["out of memory"] == "0"


def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(TOOL)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check")
