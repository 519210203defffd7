"""Run many clients with more models than memory: `python tools/workload.py [--source nvidia-smi] [--kill]`.

64 client processes make 2 000 requests, one at a time each, for 12 models of 1.2 to 5 GB (36.9 GB in all) by Zipf's
law. Each copy has a server process of its own that declares its memory to a simulated device of 16 GB; a load takes
0.3 s, an inference 10 ms. The device counts by itself: an out-of-memory event is a moment at which more is loaded or
being loaded than it has. With `--kill`, half of the clients are killed at random moments and replaced; the replacement
repeats the request during which its predecessor died. With `--cycle`, each client instead goes through the models in
order, again and again.

`--source` says what mpmm sees of the device:

    processes     memory by process, from the device itself
    whole-device  the total memory in use, from the device itself
    nvml          a simulated GPU through NVML, which measures processes
    nvidia-smi    a simulated GPU through the program, which measures whole devices
    booked        nothing: mpmm uses its own accounts

With `--suspend-budget-mb`, the simulated driver has checkpoints: evicted models are suspended in this much host memory,
and resumed without a load. `--suspend-mb-s` and `--resume-mb-s` set the rates; the defaults are an H100's. This needs a
simulated GPU.

`--answer-seconds` makes any measuring source slow. On a simulated GPU, an allocation that finds too little memory
fails, as on a real one; it counts as a load and as out of memory.

Everything but the manager is the same for both implementations. Beam's runs as in a pipeline, one manager object in one
process, with a monitor that reads the device at every call.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import mmap
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from devices.declared import CountingDevice, DeclaredDevice, DeclaredGpu, Loader
from devices.simulated_gpu import SimulatedGpus, build
from simulation.traces import SIZES_MB, cycle_requests, draw_requests

IMPLEMENTATIONS = ("mpmm", "beam")
SOURCES = ("processes", "whole-device", "nvml", "nvidia-smi", "booked")
# These sources measure a simulated GPU.
ON_GPU = ("nvml", "nvidia-smi")
_CONTEXT = multiprocessing.get_context("fork")
_PAUSE_S = 0.01


@dataclass(frozen=True)
class Workload:
    """The parameters of a run, and the folder that its processes share."""

    implementation: str
    folder: str
    requests: tuple[int, ...]
    clients: int
    seed: int
    device_mb: float
    load_s: float
    inference_s: float
    source: str
    answer_s: float
    unknown: bool
    cycle: bool
    suspend_budget_mb: float = 0.0
    suspend_mb_s: float = 0.0
    resume_mb_s: float = 0.0

    @property
    def device(self) -> CountingDevice:
        """The simulated device."""
        return self.gpu if self.source in ON_GPU else self.declared

    @property
    def declared(self) -> DeclaredDevice:
        """The device that is itself a memory source."""
        return DeclaredDevice(Path(self.folder), self.device_mb, self.source == "processes", self.answer_s)

    @property
    def gpu(self) -> DeclaredGpu:
        """The device that NVML and nvidia-smi measure; `simulate_gpu` creates it."""
        return DeclaredGpu(Path(self.folder), SimulatedGpus(Path(self.folder) / "gpus"))

    def loader(self, model: int) -> Loader:
        """Return the loader of a model."""
        package = {"mpmm": "mpmm", "beam": "apache_beam.utils"}[self.implementation]
        return Loader(f"{package}.multi_process_shared", self.device, SIZES_MB[model], self.load_s, self.inference_s)

    def manager(self) -> Any:
        """Return the manager as a client gets it."""
        return _mpmm_manager(self) if self.implementation == "mpmm" else _beam_manager(self)


def tag_of(model: int) -> str:
    """Return the name of a model."""
    return f"model-{model + 1:02}"


# ---- the two implementations -------------------------------------------------------------------------------


def _mpmm_manager(workload: Workload) -> Any:
    from mpmm import ModelManager

    source = workload.declared if workload.source in ("processes", "whole-device") else workload.source
    return ModelManager(
        namespace="workload",
        memory_source=source,
        fallback_memory_mb=workload.device_mb,
        suspend="checkpoint",
        suspend_budget_mb=workload.suspend_budget_mb,
    )


def _beam_manager(workload: Workload) -> Any:
    _stand_in_for_torch()
    from apache_beam.utils.multi_process_shared import MultiProcessShared

    def make() -> Any:
        from apache_beam.ml.inference.model_manager import ModelManager

        manager = ModelManager(monitor=_BeamMonitor(workload.device))
        _declare(manager, workload)
        return manager

    return MultiProcessShared(make, tag="model_manager", always_proxy=True).acquire()


def _declare(manager: Any, workload: Workload) -> None:
    """Tell a manager the models' sizes."""
    if not workload.unknown:
        for model in sorted(set(workload.requests)):
            manager._estimator.set_initial_estimate(tag_of(model), SIZES_MB[model])


def _stand_in_for_torch() -> None:
    """Replace torch where it is missing: Beam's manager imports it for one function."""
    try:
        import torch  # noqa: F401  # only to see whether it is there
    except ImportError:
        stand_in = types.ModuleType("torch")
        stand_in.cuda = types.SimpleNamespace(empty_cache=lambda: None)  # type: ignore[attr-defined]  # a module that is made up here
        stand_in.Tensor = type("Tensor", (), {})  # type: ignore[attr-defined]  # likewise
        sys.modules["torch"] = stand_in


class _BeamMonitor:
    """The device as Beam's monitor would see it if its figures were never late."""

    def __init__(self, device: CountingDevice) -> None:
        self._device = device
        self._peak_mb = 0.0

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

    def refresh(self) -> None:
        """Do nothing: every call measures."""

    def reset_peak(self) -> None:
        """Reset the peak."""
        self._peak_mb = 0.0

    def get_stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) in MB."""
        used = sum(self._device.by_process().values())
        self._peak_mb = max(self._peak_mb, used)
        return used, self._peak_mb, self._device.total_mb


# ---- clients -----------------------------------------------------------------------------------------------


class Ledger:
    """What the clients share: the next request, and the outcome of each. A killed client leaves no lock behind."""

    def __init__(self, workload: Workload) -> None:
        count = len(workload.requests)
        self._memory = mmap.mmap(-1, 8 * (1 + workload.clients + 2 * count))
        numbers = np.frombuffer(self._memory, dtype=np.float64)
        self._cycle = workload.cycle
        self._next = numbers[:1]
        self.doing: npt.NDArray[np.float64] = numbers[1 : 1 + workload.clients]  # request + 1, by client
        self.waits: npt.NDArray[np.float64] = numbers[1 + workload.clients : 1 + workload.clients + count]
        self.outcomes: npt.NDArray[np.float64] = numbers[1 + workload.clients + count :]
        self.waits[:] = math.nan
        self._path = Path(workload.folder) / "next.lock"
        self._path.touch()

    OPEN, SERVED, FAILED = 0, 1, 2

    def take(self, client: int) -> int | None:
        """Return a client's next request: the one during which its predecessor died, else a new one, or None."""
        unfinished = int(self.doing[client]) - 1
        if unfinished >= 0 and self.outcomes[unfinished] == self.OPEN:
            return unfinished
        if self._cycle:
            # Client c of n makes the requests c, c + n, c + 2 n, …
            request = client if unfinished < 0 else unfinished + len(self.doing)
            if request >= len(self.outcomes):
                return None
            self.doing[client] = request + 1
            return request
        with open(self._path, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            request = int(self._next[0])
            if request == len(self.outcomes):
                return None
            self.doing[client] = request + 1
            self._next[0] = request + 1
        return request

    def count(self, outcome: int) -> int:
        """Return how many requests have this outcome."""
        return int(np.count_nonzero(self.outcomes == outcome))


def run_client(workload: Workload, ledger: Ledger, client: int) -> None:
    """Make requests until none are left."""
    manager = workload.manager()
    while (request := ledger.take(client)) is not None:
        model = workload.requests[request]
        loader = workload.loader(model)
        began = time.monotonic()
        try:
            handle = manager.acquire_model(tag_of(model), loader)
            waited = time.monotonic() - began
            try:
                loader.served(handle).infer()
            finally:
                manager.release_model(tag_of(model), handle)
        except Exception:
            traceback.print_exc()
            ledger.outcomes[request] = ledger.FAILED
            continue
        ledger.waits[request] = waited
        ledger.outcomes[request] = ledger.SERVED
    if workload.implementation == "mpmm":
        manager.shutdown()


class Crowd:
    """The client processes."""

    def __init__(self, workload: Workload, ledger: Ledger) -> None:
        self._workload, self._ledger = workload, ledger
        self._processes: dict[int, BaseProcess] = {}

    def start(self, client: int) -> None:
        """Start a client, or its replacement."""
        process = _CONTEXT.Process(target=run_client, args=(self._workload, self._ledger, client))
        self._processes[client] = process
        process.start()

    def replace(self, client: int) -> None:
        """Kill a client with SIGKILL and start another in its place."""
        self._processes[client].kill()
        self._processes[client].join()
        self.start(client)

    def is_busy(self, client: int) -> bool:
        """Tell whether a client still runs."""
        return self._processes[client].is_alive()

    def end(self, timeout_s: float) -> int:
        """Wait for all clients, and kill those that do not end; return how many were killed."""
        deadline = time.monotonic() + timeout_s
        stuck = 0
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                stuck += 1
                process.kill()
                process.join()
        return stuck


# ---- the run -----------------------------------------------------------------------------------------------


@contextmanager
def surroundings() -> Iterator[str]:
    """Give the run a folder of its own, apart from the user's namespaces."""
    folder = tempfile.mkdtemp(prefix="mpmm-w")
    os.environ.update(MPMM_RUNTIME_DIR=os.path.join(folder, "run"), TMPDIR=folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def simulate_gpu(workload: Workload) -> None:
    """Make the GPU that NVML and nvidia-smi measure, and let this process and its children find it."""
    folder = Path(workload.folder)
    built = build(folder / "driver")
    built.load()
    gpus = SimulatedGpus.create(folder / "gpus", workload.device_mb)
    answer_s = workload.answer_s
    gpus.faults.hang(**{"nvml_s" if workload.source == "nvml" else "nvidia_smi_s": answer_s})
    gpus.checkpoints.set_rates(workload.suspend_mb_s, workload.resume_mb_s)
    os.environ.update(gpus.environment(built, checkpoints=True))
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)


def run(workload: Workload, kill: bool, timeout_s: float) -> dict[str, Any]:
    """Run the workload and return its figures."""
    if workload.source in ON_GPU:
        simulate_gpu(workload)
    ledger = Ledger(workload)
    rng = random.Random(workload.seed)
    victims = rng.sample(range(workload.clients), workload.clients // 2) if kill else []
    moments = sorted(rng.uniform(0.0, 0.9) * len(workload.requests) for _ in victims)
    total = len(workload.requests)
    killed = 0
    with ExitStack() as stack:
        if workload.implementation == "mpmm":
            manager = stack.enter_context(workload.manager())
            _declare(manager, workload)
        else:
            # In the process that lives longest, since Beam's manager ends with its process.
            manager = workload.manager()
        crowd = Crowd(workload, ledger)
        began = time.monotonic()
        for client in range(workload.clients):
            crowd.start(client)
        while (done := total - ledger.count(ledger.OPEN)) < total and time.monotonic() - began < timeout_s:
            if killed < len(victims) and done >= moments[killed]:
                if crowd.is_busy(victims[killed]):
                    crowd.replace(victims[killed])
                killed += 1
            time.sleep(_PAUSE_S)
        wall_s = time.monotonic() - began
        stuck = crowd.end(timeout_s=30.0 if done == total else 0.0)
        loads, too_much = workload.device.counts()
        still_loaded = len(workload.device.by_process())
        invariants = _broken_invariants() if workload.implementation == "mpmm" else []
        moved = _suspensions() if workload.suspend_budget_mb else {}
    waits = ledger.waits[ledger.outcomes == ledger.SERVED]
    p50, p99, longest = np.quantile(waits, [0.5, 0.99, 1.0]).tolist() if len(waits) else [math.nan] * 3
    return {
        "implementation": workload.implementation,
        "source": workload.source + (f", answers in {workload.answer_s:g} s" if workload.answer_s else ""),
        "demand": "each client in a cycle" if workload.cycle else "Zipf",
        "requests": total,
        "served": ledger.count(ledger.SERVED),
        "failures": ledger.count(ledger.FAILED),
        "killed_clients": killed,
        "stuck_clients": stuck,
        "loads": loads,
        "loads_per_1000_requests": round(1000 * loads / total, 1),
        "evictions": loads - still_loaded,
        **moved,
        "out_of_memory_events": too_much,
        "wait_p50_s": round(p50, 3),
        "wait_p99_s": round(p99, 3),
        "wait_max_s": round(longest, 3),
        "wall_s": round(wall_s, 1),
        "broken_invariants": invariants,
        "wait_max_s_by_model": {
            tag_of(model): round(float(np.nanmax(chosen)), 3)
            for model in sorted(set(workload.requests))
            if len(chosen := ledger.waits[(np.array(workload.requests) == model) & (ledger.outcomes == ledger.SERVED)])
        },
    }


def _suspensions() -> dict[str, int]:
    from mpmm.shared_state.snapshot import read_snapshot

    snapshot = read_snapshot("workload", events=False)
    return {
        "suspends": snapshot.suspends,
        "resumes": snapshot.resumes,
        "suspend_failures": snapshot.suspend_failures,
        "host_mb": round(sum(copy.host_mb for copy in snapshot.instances)),
    }


def _broken_invariants() -> list[str]:
    from mpmm.shared_state.invariants import check_invariants
    from mpmm.shared_state.snapshot import read_snapshot

    return check_invariants(read_snapshot("workload", events=False))


def requests_of(options: argparse.Namespace) -> list[int]:
    """Return the model of each request."""
    if options.cycle:
        return cycle_requests(options.requests, len(SIZES_MB), options.clients)
    return draw_requests(options.requests, len(SIZES_MB), options.zipf, options.seed)


def main() -> int:
    """Run the command line; the exit status is 0 if all requests were served within memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementation", choices=IMPLEMENTATIONS, default="mpmm")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--zipf", type=float, default=1.0, help="exponent of the demand")
    parser.add_argument("--device-mb", type=float, default=16000.0)
    parser.add_argument("--load-seconds", type=float, default=0.3)
    parser.add_argument("--inference-seconds", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kill", action="store_true", help="kill half of the clients and replace them")
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="processes",
        help="what mpmm sees of the device, see above (default: processes)",
    )
    parser.add_argument("--answer-seconds", type=float, default=0.0, help="how long a figure takes (default: 0)")
    parser.add_argument("--cycle", action="store_true", help="each client goes through the models in order")
    parser.add_argument("--unknown", action="store_true", help="let the manager find out the models' sizes")
    parser.add_argument(
        "--suspend-budget-mb", type=float, default=0.0, help="host memory for suspended models (default: 0, none)"
    )
    parser.add_argument("--suspend-mb-s", type=float, default=2300.0, help="rate of a checkpoint (default: 2300)")
    parser.add_argument("--resume-mb-s", type=float, default=6000.0, help="rate of a restore (default: 6000)")
    parser.add_argument("--timeout-seconds", type=float, default=1500.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.implementation == "beam" and options.source != "processes":
        parser.error("--source: Beam's manager has a monitor that reads the device itself")
    if options.suspend_budget_mb and (options.source not in ON_GPU or options.implementation == "beam"):
        parser.error("--suspend-budget-mb: only mpmm suspends, and only on --source nvml or nvidia-smi")
    with surroundings() as folder:
        workload = Workload(
            options.implementation,
            folder,
            tuple(requests_of(options)),
            options.clients,
            options.seed,
            options.device_mb,
            options.load_seconds,
            options.inference_seconds,
            options.source,
            options.answer_seconds,
            options.unknown,
            options.cycle,
            options.suspend_budget_mb,
            options.suspend_mb_s,
            options.resume_mb_s,
        )
        found = run(workload, options.kill, options.timeout_seconds)
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            if isinstance(value, dict):
                value = "  ".join(f"{key} {number:g}" for key, number in value.items())
            print(f"{name:24} {value}")
    well = found["served"] == found["requests"] and not found["out_of_memory_events"] and not found["broken_invariants"]
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
