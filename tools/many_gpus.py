"""Many models on several simulated GPUs: what `placement` makes of it.

Processes acquire models of 200 to 1500 MB at random, popular ones more often, each in a model server that takes its
memory where `CUDA_VISIBLE_DEVICES` sends it. Told for each device: the most that was ever in use, by the device's own
record, the mean share of its limit that was in use, and the loads; and how far apart the devices are.

    tools/many_gpus.py              24 models, 32 processes; 1, 2 and 8 GPUs, one of which is cut into two slices
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from simulated_gpu import SimulatedGpus, build

from mpmm import ModelManager, MultiProcessShared
from mpmm.shared_state.invariants import find_problems
from mpmm.shared_state.snapshot import read_snapshot

__all__ = ["LAYOUTS", "Report", "Setting", "measure"]

GPU_MB = 8192.0
#: GPUs, and the slices of the first one.
LAYOUTS: dict[str, tuple[int, tuple[float, ...]]] = {
    "1 GPU": (1, ()),
    "2 GPUs": (2, ()),
    "8 GPUs, one of them two slices": (8, (4096.0, 4096.0)),
}
SLACK = 0.1
SMALLEST_MB, LARGEST_MB = 200.0, 1500.0
LOOK_S = 0.02


@dataclass(frozen=True)
class Setting:
    """How many, and for how long; hold_s: mean time for which a copy is held."""

    models: int = 24
    processes: int = 32
    seconds: float = 20.0
    hold_s: float = 0.02


@dataclass(frozen=True)
class Report:
    """What was found. highest, mean: in shares of a device's limit, by device. reasons: of placements."""

    highest: tuple[float, ...]
    mean: tuple[float, ...]
    loads: tuple[int, ...]
    reasons: dict[str, int]
    acquires: int
    problems: tuple[str, ...]

    @property
    def spread(self) -> float:
        """How much fuller the fullest device was than the emptiest, in the mean."""
        return max(self.mean) - min(self.mean)


def size_mb(model: int) -> float:
    """Return what a model takes."""
    return SMALLEST_MB + (LARGEST_MB - SMALLEST_MB) * (model * 7 % 24) / 23


class Taken:
    """A model in its server."""

    def __init__(self, gpus: SimulatedGpus, mb: float) -> None:
        gpus.allocate(mb)


@dataclass(frozen=True)
class Makes:
    """Its constructor, called in the server."""

    gpus: SimulatedGpus
    mb: float

    def __call__(self) -> Taken:
        """Make it."""
        return Taken(self.gpus, self.mb)


@dataclass(frozen=True)
class Loads:
    """Its loader."""

    gpus: SimulatedGpus
    model: int

    def __call__(self) -> str:
        """Start a server, and return the handle."""
        tag = f"many-{self.model}-{uuid.uuid4().hex[:8]}"
        makes = Makes(self.gpus, size_mb(self.model))
        MultiProcessShared(makes, tag=tag, always_proxy=True, spawn_process=True).acquire()
        return tag


def measure(gpus: SimulatedGpus, setting: Setting, namespace: str, root: Path) -> Report:
    """Let processes use the models, in an environment in which these GPUs are found."""
    fork = multiprocessing.get_context("fork")
    began, done = fork.Barrier(setting.processes + 1), fork.Barrier(setting.processes + 1)
    acquires = fork.Value("q", 0)

    def work(number: int) -> None:
        with ModelManager(
            namespace=namespace,
            runtime_root=root,
            memory_source="nvml",
            slack_percentage=SLACK,
            default_estimate_mb=LARGEST_MB,
            poll_interval=0.2,
            wait_timeout_seconds=120.0,
        ) as manager:
            chance = random.Random(number)
            weights = [1 / (1 + place) ** 0.5 for place in range(setting.models)]
            began.wait()
            until = time.monotonic() + setting.seconds
            while time.monotonic() < until:
                model = chance.choices(range(setting.models), weights)[0]
                with manager.model(f"model{model}", Loads(gpus, model)):
                    time.sleep(chance.expovariate(1 / setting.hold_s))
                with acquires.get_lock():
                    acquires.value += 1
            done.wait()
            done.wait()

    workers = [fork.Process(target=work, args=(number,)) for number in range(setting.processes)]
    for worker in workers:
        worker.start()
    units = gpus.units()
    limits = [gpus.total_mb(unit) * (1 - SLACK) for unit in units]
    began.wait()
    looks = _look(gpus, units, setting.seconds)
    done.wait()
    snapshot = read_snapshot(namespace, root)
    problems = tuple(find_problems(snapshot))
    done.wait()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise RuntimeError(f"exit codes {[worker.exitcode for worker in workers]}")
    loads = [event for event in snapshot.events if event.kind == "load_began"]
    by_row = Counter(row for event in loads for row in event.devices)
    row_of = {device.uuid: device.row for device in snapshot.devices}
    reasons = Counter(event.reason for event in loads if event.reason is not None)
    return Report(
        tuple(gpus.highest_mb(unit) / limit for unit, limit in zip(units, limits, strict=True)),
        tuple(sum(look[at] for look in looks) / len(looks) / limit for at, limit in enumerate(limits)),
        tuple(by_row[row_of[unit]] for unit in units),
        {_name(reason): count for reason, count in sorted(reasons.items())},
        acquires.value,
        problems,
    )


def _name(reason: int) -> str:
    from mpmm.policy.view import Reason

    return Reason(reason).name.lower()


def _look(gpus: SimulatedGpus, units: Sequence[str], seconds: float) -> list[list[float]]:
    """Return the MB in use on each device, again and again; not of the first third, in which it all is empty."""
    looks = []
    begin = time.monotonic() + seconds / 3
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if time.monotonic() > begin:
            looks.append([gpus.used_mb(unit) for unit in units])
        time.sleep(LOOK_S)
    return looks


def main() -> int:
    """Measure all layouts and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=int, default=Setting.models)
    parser.add_argument("--processes", type=int, default=Setting.processes)
    parser.add_argument("--seconds", type=float, default=Setting.seconds)
    options = parser.parse_args()
    setting = Setting(options.models, options.processes, options.seconds)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        built = build(Path(folder) / "driver")
        built.load()
        for number, (layout, (count, slices)) in enumerate(LAYOUTS.items()):
            sizes = {0: slices} if slices else None
            gpus = SimulatedGpus.create(Path(folder) / f"gpus{number}", *[GPU_MB] * count, slices_mb=sizes)
            os.environ.update(gpus.environment(built))
            report = measure(gpus, setting, f"many{number}", Path(folder) / "run")
            print(f"{layout}: {report.acquires} acquires, {report.reasons}")
            for unit, highest, mean, loads in zip(
                gpus.units(), report.highest, report.mean, report.loads, strict=True
            ):
                print(f"  {unit:42} at most {highest:6.1%} of its limit, {mean:6.1%} in the mean, {loads} loads")
            print(f"  furthest apart in the mean: {report.spread:.1%}; broken invariants: {len(report.problems)}")
            failed |= bool(report.problems) or max(report.highest) > 1 or report.spread > 0.1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
