"""Measure what mpmm costs, next to Beam's own manager in the same run.

    python tools/benchmark.py                        every row, takes some minutes
    python tools/benchmark.py warm-pair hand-over    these rows
    python tools/benchmark.py --list                 list the rows

Every row is measured `--repeats` times for each implementation, in turn: each time in a process and a runtime
directory of its own, without a GPU. Processes and files that it leaves behind are removed and reported. A row that
fails says why, and the others continue. The table shows the median of all values, or the worst where the row is about
that, and the 99th percentile as their tail; `ratio` is how many times better mpmm is; n/a marks what Beam cannot do.
Other programs share the machine, so only the ratios can be compared between runs; `--busy` keeps some processors busy
on purpose.

`must` is what mpmm is required to reach and `reach` where the limit seems to lie, on a machine with two processors;
the last column says which of the two it meets, or `short`. The exit code does not depend on the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from benchmarking import contended, cpu, devices, manager, pipeline, scaling, seen, shared
from benchmarking.report import as_json, header, machine, plot, row_lines
from benchmarking.rows import IMPLEMENTATIONS, Measured, Row, Summary, Task, summarise

from mpmm.shared_state.removal import remove_deserted
from mpmm.shared_state.runtime_dir import RUNTIME_DIR_VARIABLE, root_below
from mpmm.shared_state.segment import segment_name

ROWS = {
    row.name: row
    for module in (
        manager,
        contended,
        shared,
        pipeline,
        cpu,
        devices,
        scaling,
        seen,
    )
    for row in module.ROWS
}
# All processes of one measurement inherit it in their environment, however they were started.
MARK = "MPMM_BENCHMARK"
RESULT, RUNTIME_FOLDER = "result.json", "run"
SHARED_MEMORY = Path("/dev/shm")
# Within this time, model servers and the process that forks them notice that no process needs them.
LEAVE_TIMEOUT_S = 8.0


@dataclass
class Result:
    """The result of a row: `values` by implementation and figure, `problems` by implementation."""

    row: Row
    values: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    problems: dict[str, list[str]] = field(default_factory=dict)

    def add(self, implementation: str, measured: Measured) -> None:
        """Add the values of one repeat."""
        mine = self.values.setdefault(implementation, {})
        for name, values in measured.items():
            mine.setdefault(name, []).extend(values)

    def summaries(self, name: str) -> dict[str, Summary]:
        """Return the summaries of a figure by implementation, omitting those without values."""
        figure = next(figure for figure in self.row.figures if figure.name == name)
        return {
            implementation: summarise(figure, values[name])
            for implementation, values in self.values.items()
            if values.get(name)
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = parse(arguments)
    if options.child:
        measured = ROWS[options.rows[0]].measure(Task(options.child, options.folder, options.seed))
        (options.folder / RESULT).write_text(json.dumps({name: list(values) for name, values in measured.items()}))
        return 0
    if options.list:
        for row in ROWS.values():
            print(f"{row.name:18}{row.description}")
        return 0
    # A process ended by SIGTERM cleans up as well.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    began = time.monotonic()
    about = {**machine(), "seed": options.seed, "repeats": options.repeats, "busy": options.busy}
    for name, value in about.items():
        print(f"{name}: {value}")
    print(header(), flush=True)
    results = []
    with busy_processors(options.busy):
        for name in options.rows or ROWS:
            result = run_row(ROWS[name], options)
            results.append(result)
            print("\n".join(row_lines(result.row, result.summaries, result.problems)), flush=True)
    ending = {"load_at_end": machine()["load"], "seconds": round(time.monotonic() - began, 1)}
    for name, value in ending.items():
        print(f"{name}: {value}")
    about.update(ending)
    if options.plot:
        plot([(result.row, result.summaries) for result in results], about, options.plot)
    if options.json:
        print(json.dumps(as_json([(result.row, result.summaries, result.problems) for result in results], about)))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure mpmm next to Beam's own model manager.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="rows to measure, see --list (default: all)")
    parser.add_argument("--list", action="store_true", help="list the rows and exit")
    parser.add_argument("--only", choices=IMPLEMENTATIONS, help="measure one implementation only")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each implementation (some rows take fewer)")
    parser.add_argument(
        "--seed", type=int, default=1, help="for the data, and for which implementation runs first (default: 1)"
    )
    parser.add_argument("--busy", type=int, default=0, metavar="N", help="keep N processors busy meanwhile")
    parser.add_argument("--json", action="store_true", help="print everything once more as JSON, on the last line")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the figures (needs the extra 'plot')")
    parser.add_argument("--child", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in options.rows:
        if name not in ROWS:
            parser.error(f"there is no row {name!r}; there are {', '.join(ROWS)}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        # Report it now, not after ten minutes of measuring.
        parser.error("--plot needs matplotlib; try: pip install 'mpmm[plot]'")
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}: expected 1 or more")
    return options


def run_row(row: Row, options: argparse.Namespace) -> Result:
    """Measure a row as often as asked, the implementations in turn. Problems are part of the result."""
    result = Result(row)
    wanted = [name for name in row.implementations if options.only in (None, name)]
    turns = random.Random(options.seed)
    for repeat in range(min(options.repeats, row.repeats_at_most or options.repeats)):
        # Shuffled, because the second one finds warm caches, or a machine that is still cleaning up.
        for implementation in turns.sample(wanted, len(wanted)):
            problems = result.problems.setdefault(implementation, [])
            if not problems:
                measured, problem = measure(row, implementation, options.seed + repeat)
                result.add(implementation, measured)
                problems += problem
    return result


def measure(row: Row, implementation: str, seed: int) -> tuple[Measured, list[str]]:
    """Measure a row once, in a process and a runtime directory of its own; return its values, and problems."""
    mark = uuid.uuid4().hex
    problems = []
    measured: Measured = {}
    # A short prefix, because paths of Unix sockets must be short.
    with tempfile.TemporaryDirectory(prefix="mpmm-b", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        roots = (folder / RUNTIME_FOLDER, Path(root_below(str(folder))))
        for root in roots:
            # mpmm does not remove a folder with files of others, and segment names contain the folder's identity.
            root.mkdir(mode=0o700)
            (root / ".keep").touch()
        environment = {
            **os.environ,
            MARK: mark,
            RUNTIME_DIR_VARIABLE: str(folder / RUNTIME_FOLDER),
            "TMPDIR": name,
            "MPMM_MEMORY_SOURCE": "booked",
        }
        command = [sys.executable, __file__, row.name, "--child", implementation, "--folder", name, "--seed", str(seed)]
        with open(folder / "log", "w", encoding="utf-8") as log:
            child = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = child.wait(row.timeout_s)
            if code == 0:
                measured = json.loads((folder / RESULT).read_text())
            else:
                problems.append(f"ended with exit code {code}: {_last_words(folder / 'log')}")
        except subprocess.TimeoutExpired:
            problems.append(f"aborted after {row.timeout_s:.0f} s")
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            problems += end_processes(mark)
            for root in roots:
                problems += remove_namespaces(root)
    return measured, problems


def _last_words(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def end_processes(mark: str) -> list[str]:
    """Wait for the marked processes to exit, kill those that stay, and return a line about each of these."""
    deadline = time.monotonic() + LEAVE_TIMEOUT_S
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    said = []
    for process in left:
        with contextlib.suppress(psutil.Error):
            said.append(f"left behind: process {process.pid} ({process.name()})")
            process.kill()
    return said


def marked_processes(mark: str) -> list[psutil.Process]:
    """Return the running processes that have the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def remove_namespaces(root: Path) -> list[str]:
    """Remove the namespaces that killed processes have left below a root; return a line about each."""
    prefix = segment_name(root, "")
    left = sorted(file for file in SHARED_MEMORY.iterdir() if file.name.startswith(prefix))
    for file in left:
        remove_deserted(root, file.name.removeprefix(prefix))
    return [f"left behind: {file}" for file in left]


@contextlib.contextmanager
def busy_processors(count: int) -> Iterator[None]:
    """Keep `count` processors busy for the length of a `with` block."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
