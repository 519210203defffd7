"""A short run of `tools/benchmark.py`: its JSON has the figures, and nothing is left behind. No figure is judged."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import benchmark
import psutil
import pytest
from harness import NewProcess, segments_of

ROOT = Path(__file__).resolve().parent.parent
BENCHMARK = ROOT / "tools" / "benchmark.py"
MARK = "MPMM_TEST_OF_BENCHMARK"
# Of quick rows that measure one process, a shared object, and several processes.
UNITS = {"warm-pair": "µs", "small-call": "µs", "hand-over": "µs"}


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARK), *options], capture_output=True, text=True, cwd=ROOT, timeout=300
    )


def processes_with(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_rows_give_their_figures_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    # Short, because the paths of Unix sockets are.
    with tempfile.TemporaryDirectory(prefix="mpmm-t") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        done = run(*UNITS, "--only", "mpmm", "--repeats", "1", "--json")
        assert not list(Path(folder).iterdir())
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(result["rows"]) == set(UNITS)
    assert {"machine", "versions", "load", "seed", "repeats", "seconds"} <= set(result["about"])
    for name, row in result["rows"].items():
        assert row["problems"] == {}
        for figure in row["figures"].values():
            assert figure["unit"] == UNITS[name]
            assert figure["beam"] is None
            assert figure["ratio"] is None
            assert 0 < figure["mpmm"]["value"] <= figure["mpmm"]["tail"] <= figure["mpmm"]["worst"]
    assert processes_with(mark) == []


def test_a_row_that_there_is_not_is_named_and_so_are_those_there_are() -> None:
    done = run("warm-pear")
    assert done.returncode == 2
    assert "'warm-pear'" in done.stderr
    assert "warm-pair" in done.stderr


def test_what_killed_processes_leave_of_a_measurement_is_reported_and_removed(
    runtime_root: Path, namespace: str, new_process: NewProcess
) -> None:
    assert benchmark.remove_namespaces(runtime_root) == []
    new_process().kill()
    [segment] = segments_of(runtime_root)
    assert benchmark.remove_namespaces(runtime_root) == [f"left behind: /dev/shm/{segment}"]
    assert segments_of(runtime_root) == set()
    assert not (runtime_root / namespace).exists()
