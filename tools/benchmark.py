"""What mpmm costs, beside Beam's own manager in the same run: `python tools/benchmark.py [ROW ...]`.

Every row is measured in a process of its own, mpmm and Beam in turn, `--repeats` times; shown are the median and
the 99th percentile of all repeats, and the ratio of the medians. The machine is shared with whatever else runs on
it, so only the ratios mean something.

Beam's manager imports torch, of which it uses one function; where torch is missing a stand-in takes its place.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

IMPLEMENTATIONS = ("mpmm", "beam")
Timings = list[float]


class Counter:
    """The object of the rows about shared objects."""

    def add(self, numbers: Any) -> Any:
        """Return what came."""
        return numbers


def timed(action: Callable[[], object], count: int, warm_up: int = 20) -> Timings:
    """Return the seconds that each of `count` calls takes."""
    for _ in range(warm_up):
        action()
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return seconds


def modules(implementation: str) -> tuple[Any, Any]:
    """Return the implementation's model_manager and multi_process_shared."""
    if implementation == "mpmm":
        return import_module("mpmm.model_manager"), import_module("mpmm.multi_process_shared")
    try:
        # Only to see whether Beam will find it.
        import torch  # noqa: F401
    except ImportError:
        torch_stand_in = types.ModuleType("torch")
        torch_stand_in.cuda = types.SimpleNamespace(empty_cache=lambda: None)  # type: ignore[attr-defined]
        torch_stand_in.Tensor = type("Tensor", (), {})  # type: ignore[attr-defined]
        sys.modules["torch"] = torch_stand_in
    return import_module("apache_beam.ml.inference.model_manager"), import_module(
        "apache_beam.utils.multi_process_shared"
    )


def remote_manager(implementation: str) -> Any:
    """Return a manager as a worker gets it: Beam's through its proxy, ours attached in place."""
    model_manager, shared = modules(implementation)
    handle = shared.MultiProcessShared(
        lambda: model_manager.ModelManager(), tag="benchmark_manager", path=tempfile.mkdtemp(), always_proxy=True
    )
    return handle.acquire()


def warm_pair(implementation: str) -> Timings:
    """acquire_model and release_model of an idle model."""
    manager = remote_manager(implementation)

    def pair() -> None:
        manager.release_model("model", manager.acquire_model("model", make_handle))

    return timed(pair, 2000)


def make_handle() -> str:
    """The loader of a model that takes nothing."""
    return "handle"


def acquire_again(implementation: str) -> Timings:
    """MultiProcessShared.acquire() of a live tag, in a process that has used it before."""
    _, shared = modules(implementation)
    place = tempfile.mkdtemp()

    def acquire() -> None:
        shared.MultiProcessShared(Counter, tag="counter", path=place, always_proxy=True).acquire()

    return timed(acquire, 30, warm_up=2)


def small_call(implementation: str) -> Timings:
    """A method call with an array of 320 bytes."""
    import numpy

    _, shared = modules(implementation)
    counter = shared.MultiProcessShared(
        Counter, tag="counter", path=tempfile.mkdtemp(), always_proxy=True, spawn_process=True
    ).acquire()
    numbers = numpy.zeros(40)
    return timed(lambda: counter.add(numbers), 2000)


def server_start(implementation: str) -> Timings:
    """Start of a model server with a trivial model, after the first."""
    _, shared = modules(implementation)
    place = tempfile.mkdtemp()
    numbers = iter(range(1000))

    def start() -> None:
        shared.MultiProcessShared(
            Counter, tag=f"server-{next(numbers)}", path=place, always_proxy=True, spawn_process=True
        ).acquire()

    return timed(start, 4, warm_up=1)


ROWS: dict[str, Callable[[str], Timings]] = {
    "warm-pair": warm_pair,
    "acquire-again": acquire_again,
    "small-call": small_call,
    "server-start": server_start,
}


def measure(row: str, implementation: str) -> Timings:
    """Measure a row in a process of its own, in a runtime directory of its own."""
    with tempfile.TemporaryDirectory(prefix="mpmm-b") as folder:
        environment = dict(os.environ, MPMM_RUNTIME_DIR=folder, TMPDIR=folder, MPMM_MEMORY_SOURCE="booked")
        done = subprocess.run(
            [sys.executable, __file__, "--child", implementation, row],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=True,
            timeout=300,
            text=True,
        )
    timings: Timings = json.loads(done.stdout.splitlines()[-1])
    return timings


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Measure mpmm beside Beam's own model manager.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"which of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--repeats", type=int, default=3, help="times that each implementation takes its turn")
    parser.add_argument("--json", action="store_true", help="print one JSON object in the end")
    parser.add_argument("--child", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(ROWS[options.rows[0]](options.child)))
        return 0
    print(f"{os.cpu_count()} processors, {platform.machine()}, Python {platform.python_version()}")
    print(f"{'row':15} {'mpmm p50':>10} {'p99':>10} {'Beam p50':>10} {'p99':>10} {'ratio':>7}   in microseconds")
    results = {}
    for row in options.rows or ROWS:
        timings: dict[str, Timings] = {implementation: [] for implementation in IMPLEMENTATIONS}
        for _ in range(options.repeats):
            for implementation in IMPLEMENTATIONS:
                timings[implementation] += measure(row, implementation)
        figures = {
            name: (statistics.median(values), sorted(values)[int(0.99 * (len(values) - 1))])
            for name, values in timings.items()
        }
        ours, beams = figures["mpmm"], figures["beam"]
        results[row] = {"mpmm_p50_s": ours[0], "mpmm_p99_s": ours[1], "beam_p50_s": beams[0], "beam_p99_s": beams[1]}
        cells = " ".join(f"{seconds * 1e6:10.0f}" for seconds in (*ours, *beams))
        print(f"{row:15} {cells} {beams[0] / ours[0]:7.1f}", flush=True)
    if options.json:
        print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
