"""A short run of `tools/stress.py`: nothing may go wrong under kills, stops and forks, and nothing may be left."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from harness import SCALE, scaled

ROOT = Path(__file__).resolve().parent.parent
STRESS = ROOT / "tools" / "stress.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs prctl and /proc")


def stress(*options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(STRESS), "--json", *options], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )


def outcome(run: subprocess.Popen[str], timeout_s: float) -> tuple[str, dict[str, Any]]:
    try:
        output, _ = run.communicate(timeout=timeout_s)
    finally:
        run.kill()
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    return output, result


def test_short_run_with_kills_stops_and_forks_is_clean() -> None:
    run = stress(
        "--processes",
        "6",
        "--seconds",
        str(scaled(6)),
        "--seed",
        "11",
        "--servers",
        "1",
        "--kill-rate",
        "1.5",
        "--stop-rate",
        "1",
        "--fork-rate",
        "0.7",
    )
    output, result = outcome(run, 100)
    assert result["violations"] == 0, output
    assert result["left_behind"] == 0, output
    assert run.returncode == 0, output
    assert result["seed"] == 11
    assert result["operations"] > 0
    assert result["kills"] > 0
    assert {"recovery_p50_s", "recovery_max_s", "rollbacks"} <= set(result)


@pytest.mark.parametrize("source", ["booked", "nvml", "nvidia-smi", "host"])
def test_short_run_is_clean_on_each_source(source: str) -> None:
    run = stress(
        "--source",
        source,
        "--processes",
        "4",
        "--seconds",
        str(scaled(3)),
        "--seed",
        "13",
        "--servers",
        "1",
        "--kill-rate",
        "1.5",
        "--stop-rate",
        "0.7",
    )
    output, result = outcome(run, 100)
    assert result["source"] == source
    assert result["violations"] == 0, output
    assert result["left_behind"] == 0, output
    assert result["counts"]["loads"] > 0, output


@pytest.mark.parametrize(
    "options", [("--interrupt-rate", "60", "--optimized"), ("--remove-rate", "1", "--full-tables")], ids=" ".join
)
def test_short_run_with_interrupted_calls_or_vanishing_files_and_full_tables_is_clean(options: tuple[str, ...]) -> None:
    run = stress("--processes", "4", "--seconds", str(scaled(4)), "--seed", "14", "--servers", "0", *options)
    output, result = outcome(run, 100)
    assert result["violations"] == 0, output
    assert result["left_behind"] == 0, output
    assert result["counts"].get("removals" if "--remove-rate" in options else "interrupted", 0) > 0, output
    assert bool(result["full_tables"]) == ("--full-tables" in options), output


def test_short_run_with_kills_at_steps_of_suspending_and_resuming_is_clean() -> None:
    run = stress("--suspensions", str(scaled(24)), "--namespaces", "1", "--seed", "15")
    output, result = outcome(run, 100 * max(1.0, SCALE))
    assert result["violations"] == 0, output
    assert result["left_behind"] == [], output
    assert run.returncode == 0, output
    assert result["kills"] == scaled(24)
    assert {role for role, _, _ in result["kills_by_step"]} == {"helper", "target", "requester", "leader"}, output


def test_interrupted_run_ends_cleanly_and_removes_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    # A folder of its own for temporary files: others make such folders, too.
    with tempfile.TemporaryDirectory(prefix="mpmm-t") as folder:
        interrupt_a_run(monkeypatch, folder)
        assert not list(Path(folder).iterdir())


def interrupt_a_run(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Start a run whose temporary files go to `folder`, interrupt it, and look at what it says."""
    monkeypatch.setenv("TMPDIR", folder)
    run = stress("--processes", "3", "--seconds", "240", "--seed", "12", "--servers", "0", "--kill-rate", "0")
    assert run.stdout is not None
    # The first line comes before the first process; the handler is there a moment later.
    assert "seed 12" in run.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=2)
    run.send_signal(signal.SIGINT)
    output, result = outcome(run, 200)
    assert run.returncode == 0, output
    assert result["seconds"] < 120
    assert result["left_behind"] == 0
