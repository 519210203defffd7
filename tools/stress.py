"""Run many processes on one namespace, kill, stop and fork them at random, and check that nothing goes wrong.

    python tools/stress.py                                          64 processes, one minute
    python tools/stress.py --processes 8 --seconds 20 --seed 5      a short run, repeated by the same seed
    python tools/stress.py --source nvml                            on a simulated GPU, measured through NVML
    python tools/stress.py --interrupt-rate 20 --remove-rate 1      exceptions from signal handlers, and a cleaner
    python tools/stress.py --full-tables                            so few rows that all tables are full at times
    python tools/stress.py --suspensions 10000                      kills at each step of suspending and resuming
    python tools/stress.py --interrupt-points 1                     an exception at every bytecode of each call

Every process acquires, uses and releases models of three kinds on a simulated device that is too small for all
of them: handles of real model servers, handles without a server, and objects that belong to their process. The
conductor (stressing/conductor.py) starts the processes, and kills and stops them (stressing/disturbances.py), sometimes
in the middle of a transaction; workers (stressing/worker.py) fork children at any time. On request, the conductor
sends signals whose handlers raise an exception in the middle of a call, and removes lock files or their folder, as
cleaners do. With `--full-tables` calls may fail with `TableFullError`, which is counted, not a violation.

Two independent checks notice double use of a copy: one reads the state and its events (stressing/checks.py), and the
other is a file lock per copy that its user takes (stressing/models.py).

With `--suspensions` a different crew suspends and resumes copies on a simulated GPU, and is killed meanwhile
(stressing/suspension_run.py). With `--interrupt-points STEP` no process dies: the tests of interrupt points run, which
otherwise try a few of a call's bytecodes, at every STEP-th bytecode.

The exit code is 1 if anything was wrong or left behind. A seed repeats a run only approximately: it determines all
random choices, but not the scheduling of processes.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import random
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from stressing.conductor import Result, conduct
from stressing.models import SOURCES, Plan
from stressing.suspension_run import SuspensionResult
from stressing.suspension_run import run as run_suspensions
from stressing.suspension_victims import AT_REST, ROLES, STEPS

TESTS = Path(__file__).resolve().parent.parent / "tests"
NAMESPACE = "stress"
INTERRUPT_TESTS = tuple(TESTS / f"test_{what}interrupt_points.py" for what in ("", "life_", "shared_", "server_"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code."""
    options = parse(arguments)
    if options.optimized and not sys.flags.optimize:
        os.execv(sys.executable, [sys.executable, "-O", __file__, *(sys.argv[1:] if arguments is None else arguments)])
    if options.interrupt_points:
        return try_interrupt_points(options.interrupt_points)
    if options.suspensions:
        say(f"seed {options.seed}: {options.suspensions} kills in {options.namespaces} namespaces")
        moved = run_suspensions(options.suspensions, options.namespaces, options.seed, say)
        print_suspensions(moved)
        if options.json:
            say(json.dumps(moved.as_json()))
        return 1 if moved.violations.total or moved.left_behind else 0
    say(f"seed {options.seed}: {options.processes} processes, {options.seconds:g} s, source {options.source}")
    result = conduct(lambda folder: make_plan(options, folder), say)
    print_table(result)
    if options.json:
        say(json.dumps(as_json(result, options.source)))
    return 1 if result.violations.total or result.left_behind else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Stress test of one namespace with many processes.")
    parser.add_argument("--processes", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, which the run prints")
    parser.add_argument("--kill-rate", type=float, default=1.0, help="kills per second, over all processes (default 1)")
    parser.add_argument("--stop-rate", type=float, default=1.0, help="stops per second, over all processes (default 1)")
    parser.add_argument(
        "--fork-rate", type=float, default=0.5, help="forks per second, over all processes (default 0.5)"
    )
    parser.add_argument(
        "--interrupt-rate",
        type=float,
        default=0.0,
        help="signals per second, over all processes, whose handlers raise in the middle of a call (default 0)",
    )
    parser.add_argument(
        "--remove-rate",
        type=float,
        default=0.0,
        help="removals per second of a lock file, the token, or the namespace's whole folder (default 0)",
    )
    parser.add_argument(
        "--full-tables",
        action="store_true",
        help="give the namespace so few rows that its tables are full at times, and count the calls that fail of that",
    )
    parser.add_argument("--optimized", action="store_true", help="run under python -O, without assertions")
    parser.add_argument("--pace", type=float, default=100.0, help="attempts to acquire per second, over all processes")
    parser.add_argument("--servers", type=int, default=2, help="tags whose copies are real model servers (default 2)")
    parser.add_argument("--threads", type=int, default=2, help="threads in each process (default 2)")
    parser.add_argument(
        "--total-mb",
        type=int,
        default=None,
        help="size of the device (default 600 + 100 per process; 600 + 25 on host, where memory is really taken)",
    )
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="simulated",
        help="source of the figures: the simulated device itself, accounting alone, a simulated GPU through NVML or "
        "nvidia-smi, or the memory of the host (default: simulated)",
    )
    parser.add_argument(
        "--per-process",
        choices=("yes", "no", "auto"),
        default="auto",
        help="whether the simulated device itself measures single processes (default: depends on the seed)",
    )
    parser.add_argument(
        "--lock-timeout",
        type=float,
        default=None,
        help="seconds (default 1; 3 with --interrupt-rate, since mpmm repairs what an exception leaves within one)",
    )
    parser.add_argument("--poll-interval", type=float, default=0.5, help="seconds (default 0.5)")
    parser.add_argument(
        "--suspensions",
        type=int,
        default=0,
        metavar="KILLS",
        help="kill this many processes that suspend and resume; of the other options, only --seed, --namespaces and "
        "--json apply",
    )
    parser.add_argument(
        "--namespaces", type=int, default=2, help="concurrent namespaces, with --suspensions (default 2)"
    )
    parser.add_argument(
        "--interrupt-points",
        type=int,
        default=0,
        metavar="STEP",
        help="try an exception at every STEP-th bytecode of each call, 1 for all; no other option applies",
    )
    parser.add_argument("--json", action="store_true", help="the last line of output is one JSON object")
    options = parser.parse_args(arguments)
    if not 1 <= options.processes <= 400:
        parser.error("--processes: expected 1 to 400")
    if options.seed is None:
        options.seed = random.SystemRandom().randrange(1, 1_000_000)
    if options.lock_timeout is None:
        options.lock_timeout = 3.0 if options.interrupt_rate else 1.0
    if options.total_mb is None:
        # Memory for each model, and for some of the objects that every process loads for itself.
        options.total_mb = 600 + (25 if options.source == "host" else 100) * options.processes
    return options


def make_plan(options: argparse.Namespace, folder: str) -> Plan:
    """Return the plan of a run in a folder."""
    return Plan(
        folder=folder,
        namespace=NAMESPACE,
        seed=options.seed,
        processes=options.processes,
        threads=options.threads,
        seconds=options.seconds,
        servers=options.servers,
        kill_rate=options.kill_rate,
        stop_rate=options.stop_rate,
        fork_rate=options.fork_rate,
        interrupt_rate=options.interrupt_rate,
        remove_rate=options.remove_rate,
        pace=options.pace,
        total_mb=options.total_mb,
        per_process=options.seed % 2 == 1 if options.per_process == "auto" else options.per_process == "yes",
        lock_timeout_s=options.lock_timeout,
        poll_interval_s=options.poll_interval,
        source=options.source,
        full_tables=options.full_tables,
        conductor_pid=os.getpid(),
    )


def print_table(result: Result) -> None:
    """Print the results of a run."""
    counts = result.counts
    rows = [
        (
            "operations",
            f"{counts['operations']} in {result.seconds:.1f} s ({counts['hits']} hits, "
            f"{counts['loads']} loads, {counts['failed_loads']} failed loads)",
        ),
        ("waits, time-outs", f"{counts['waits']}, {counts['timeouts']}; {counts['lock_timeouts']} for the lock"),
        ("kills", _listed(result.kills)),
        ("stops", _listed(result.stops)),
        ("forks", str(counts["forks"])),
        ("interrupted calls, removals", f"{counts['interrupted']}, {counts['removals']}"),
        ("calls that failed of a full table", _listed(_full_tables(counts))),
        ("recoveries", _percentiles(result.recoveries_s)),
        ("… while the lock's holder was stopped", _percentiles(result.stalled_recoveries_s)),
        ("rollbacks, leaders", f"{result.rollbacks}, {result.leaders}"),
        (
            "snapshots",
            f"{result.snapshots} ({len(result.unconfirmed)} lines not confirmed); "
            f"at most {result.most_booked_mb:.0f} MB accounted for",
        ),
        ("seen waiting, by reason", _listed(result.reasons)),
        ("written off", f"{result.written_off_mb:.0f} MB"),
        ("excused claims", _listed(result.excused)),
    ]
    for name, (first, middle, last, slope) in result.drifts.items():
        text = f"{first:.1f}, {middle:.1f}, {last:.1f}; {slope:+.2f} a minute at last ({result.survivors} survivors)"
        rows.append((f"{name} at start, middle, end", text))
    rows += _verdict(result)
    _say_rows(rows, result, [f"? seen once: {text}" for text in result.unconfirmed[:5]])


def try_interrupt_points(step: int) -> int:
    """Run the tests of interrupt points with every step-th bytecode; return pytest's exit code."""
    # Some calls have 30 000 points: no timeout fits.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "-o",
        "timeout=0",
        "-o",
        "faulthandler_timeout=0",
        *map(str, INTERRUPT_TESTS),
    ]
    return subprocess.run(command, env={**os.environ, "MPMM_INTERRUPT_STEP": str(step)}, check=False).returncode


def print_suspensions(result: SuspensionResult) -> None:
    """Print the results of a run with suspensions: how often each role was killed at each step, and what was wrong."""
    steps = [*STEPS, AT_REST, *sorted({step for _, step in result.kills} - {*STEPS, AT_REST})]
    say("")
    say(f"{'killed while a copy was':38}" + "".join(f"{role:>12}" for role in ROLES))
    for step in steps:
        say(f"{step:38}" + "".join(f"{result.kills[role, step]:12}" for role in ROLES))
    rows = [
        ("kills", f"{sum(result.kills.values())} in {result.seconds:.0f} s"),
        ("calls", _listed(result.counts)),
        ("accounts exact after the last call", _percentiles(result.exact_s)),
        ("excused claims", _listed(result.excused)),
        *_verdict(result),
    ]
    _say_rows(rows, result, [f"? {text}" for text in result.slow])


def _verdict(result: Result | SuspensionResult) -> list[tuple[str, str]]:
    """Return the last rows of each kind of run."""
    return [
        ("violations", _listed(result.violations.counts)),
        ("left behind", str(len(result.left_behind))),
        ("machine", f"{os.cpu_count()} processors, Python {platform.python_version()}"),
        ("seed", str(result.seed)),
    ]


def _say_rows(rows: Sequence[tuple[str, str]], result: Result | SuspensionResult, remarks: Sequence[str] = ()) -> None:
    """Print a table, and below it the details of remarks and violations."""
    say("")
    for name, text in rows:
        say(f"{name:38}  {text}")
    for text in [*remarks, *(f"! {text}" for text in result.violations.texts + result.left_behind[:20])]:
        say(f"\n{text}")


def as_json(result: Result, source: str) -> dict[str, object]:
    """Return the result as JSON values."""
    recoveries = result.recoveries_s
    return {
        "seed": result.seed,
        "source": source,
        "seconds": round(result.seconds, 3),
        "violations": result.violations.total,
        "violations_by_kind": dict(result.violations.counts),
        "left_behind": len(result.left_behind),
        "recoveries": len(recoveries),
        "recovery_p50_s": round(statistics.median(recoveries), 4) if recoveries else None,
        "recovery_max_s": round(max(recoveries), 4) if recoveries else None,
        "recovery_max_stopped_lock_s": round(max(result.stalled_recoveries_s, default=0.0), 4),
        "operations": result.counts["operations"],
        "counts": dict(result.counts),
        "full_tables": dict(_full_tables(result.counts)),
        "kills": sum(result.kills.values()),
        "kills_by_kind": dict(result.kills),
        "stops": sum(result.stops.values()),
        "forks": result.counts["forks"],
        "rollbacks": result.rollbacks,
        "leaders": result.leaders,
        "drifts": {name: [round(value, 3) for value in values] for name, values in result.drifts.items()},
    }


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def _listed(counts: collections.Counter[str]) -> str:
    parts = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
    return f"{sum(counts.values())}" + (f" ({parts})" if parts else "")


def _full_tables(counts: collections.Counter[str]) -> collections.Counter[str]:
    """Return how many calls failed because a table was full, by table."""
    full = {what.removeprefix("full "): count for what, count in counts.items() if what.startswith("full ")}
    return collections.Counter(full)


def _percentiles(seconds: list[float]) -> str:
    if not seconds:
        return "0"
    return f"{len(seconds)}, p50 {statistics.median(seconds):.3f} s, max {max(seconds):.3f} s"


if __name__ == "__main__":
    sys.exit(main())
