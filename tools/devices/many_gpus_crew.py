"""The processes of `many_gpus`, and their traces on the devices."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from devices.many_gpus_models import LARGEST_MB, Loads
from devices.simulated_gpu import SimulatedGpus
from mpmm import ModelManager
from mpmm.policy.view import Reason
from mpmm.shared_state.invariants import check_invariants
from mpmm.shared_state.snapshot import read_snapshot

__all__ = ["Report", "Setting", "measure"]

SLACK = 0.1
LOOK_S = 0.1


@dataclass(frozen=True)
class Setting:
    """The numbers of models and processes, and the run's length; hold_s: mean time for which a copy is held.

    acquires: the least number of acquires, however long a busy machine takes for them.
    """

    models: int = 24
    processes: int = 32
    seconds: float = 30.0
    hold_s: float = 0.4
    acquires: int = 0


@dataclass(frozen=True)
class Report:
    """The results, by device. reasons: why copies were placed where they are, with counts.

    highest: the most that was in use, by the device's own record; mean: what the accounts have for its copies and the
    loads in progress. Both as shares of its limit.
    """

    highest: tuple[float, ...]
    mean: tuple[float, ...]
    loads: tuple[int, ...]
    reasons: dict[str, int]
    acquires: int
    problems: tuple[str, ...]

    @property
    def spread(self) -> float:
        """The difference between the means of the fullest and the emptiest device."""
        return max(self.mean) - min(self.mean)


def measure(gpus: SimulatedGpus, setting: Setting, namespace: str, root: Path) -> Report:
    """Let processes use the models; the environment must lead them to these GPUs."""
    fork = multiprocessing.get_context("fork")
    began, done = fork.Barrier(setting.processes + 1), fork.Barrier(setting.processes + 1)
    acquires = fork.Value("q", 0)
    started_s = fork.Value("d", 0.0)

    def progress() -> float:
        """Return the share of the run that is over, by the clock and by the acquires made."""
        by_clock: float = (time.monotonic() - started_s.value) / setting.seconds
        by_work: float = acquires.value / setting.acquires if setting.acquires else by_clock
        return min(by_clock, by_work)

    def new_manager() -> ModelManager:
        return ModelManager(
            namespace=namespace,
            runtime_root=root,
            memory_source="nvml",
            slack_percentage=SLACK,
            default_estimate_mb=LARGEST_MB,
            poll_interval=0.2,
            wait_timeout_seconds=120.0,
        )

    def work(number: int) -> None:
        with new_manager() as manager:
            if number == 0:
                # Learn the sizes first: an unknown model counts as LARGEST_MB, and is placed accordingly.
                for model in range(setting.models):
                    with manager.model(f"model{model}", Loads(gpus, model)):
                        pass
                manager.force_reset()
            chance = random.Random(number)
            weights = [1 / (1 + place) ** 0.5 for place in range(setting.models)]
            began.wait()
            while progress() < 1:
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
    # No worker passes the barrier before this process does.
    started_s.value = time.monotonic()
    began.wait()
    looks = _look(namespace, root, progress)
    done.wait()
    snapshot = read_snapshot(namespace, root)
    problems = tuple(check_invariants(snapshot))
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
        tuple(
            sum(look[row_of[unit]] for look in looks) / len(looks) / limit
            for unit, limit in zip(units, limits, strict=True)
        ),
        tuple(by_row[row_of[unit]] for unit in units),
        {_name(reason): count for reason, count in sorted(reasons.items())},
        acquires.value,
        problems,
    )


def _name(reason: int) -> str:
    return Reason(reason).name.lower()


def _look(namespace: str, root: Path, progress: Callable[[], float]) -> list[Counter[int]]:
    """Return the MB accounted for on each device, by row, every LOOK_S in the second half; in the first, they fill.

    The memory in use would mislead: a load that a busy machine draws out makes its device look empty.
    """
    looks = []
    while (over := progress()) < 1:
        if over > 0.5:
            accounted: Counter[int] = Counter()
            for copy in read_snapshot(namespace, root).copies:
                accounted.update(copy.shares_mb)
            looks.append(accounted)
        time.sleep(LOOK_S)
    return looks
