"""The setting of the rows: an implementation's modules, a manager as a worker gets it, models that take no memory.

A row reaches Beam's manager as Beam's workers do, through a `MultiProcessShared` proxy; with the same call, mpmm's
attaches in this process. Neither looks at a real device: mpmm uses its own accounts and Beam a monitor with constant
figures, as it has on a machine without a GPU; or both poll a simulated one.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import types
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from devices.simulated_gpu import DIRECTORY_VARIABLE, SimulatedGpus, build

from benchmarking.rows import MPMM, Task

__all__ = [
    "Stage",
    "SteadyMonitor",
    "attach",
    "make_handle",
    "modules",
    "set_up",
    "simulate_gpus",
    "timed",
    "warm_pair_seconds",
]

# Observed model n takes n + 1 times this.
OBSERVED_MB = 10.0


def modules(implementation: str) -> tuple[Any, Any]:
    """Return the implementation's model_manager and multi_process_shared.

    Beam's manager imports torch for one function; where torch is missing, a stand-in takes its place.
    """
    if implementation == MPMM:
        manager, shared = import_module("mpmm.model_manager"), import_module("mpmm.multi_process_shared")
        # Otherwise imported at their first use; a program would have imported them by name.
        _ = manager.ModelManager, shared.MultiProcessShared
        return manager, shared
    if "torch" not in sys.modules and importlib.util.find_spec("torch") is None:
        stand_in: Any = types.ModuleType("torch")
        stand_in.cuda = types.SimpleNamespace(empty_cache=lambda: None)
        stand_in.Tensor = type("Tensor", (), {})
        sys.modules["torch"] = stand_in
    return (
        import_module("apache_beam.ml.inference.model_manager"),
        import_module("apache_beam.utils.multi_process_shared"),
    )


def make_handle() -> str:
    """Load a model that takes no memory; every copy has a handle of its own."""
    return uuid.uuid4().hex


class SteadyMonitor:
    """Replaces the GPU monitor of either manager and always returns the same figures."""

    def __init__(self, used_mb: float, total_mb: float) -> None:
        self._stats = (used_mb, used_mb, total_mb)

    def start(self) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""

    def refresh(self) -> None:
        """Do nothing."""

    def reset_peak(self) -> None:
        """Do nothing."""

    def get_stats(self) -> tuple[float, float, float]:
        """Return (current, peak, total) in MB."""
        return self._stats


@dataclass(frozen=True)
class Stage:
    """The state in which a row begins.

    idle: tags of the idle copies; a tag that is listed twice has two.
    known: further tags whose size is known, so that no model runs alone to be measured.
    total_mb, need_mb: size of the device, and of each model.
    used_mb: what Beam's monitor reports as in use, including the copies of `idle`.
    observed: the number of models, `observed-0` and on, that are known from observations; further observations lead to
        new solutions. A manager without a device solves nothing, so mpmm's gets the monitor then, too.
    polls_gpu: the manager measures the GPU that `simulate_gpus` has made, in the way of each implementation.
    name: distinguishes the stages of one row.
    """

    idle: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    total_mb: float = 1e6
    need_mb: float = 1.0
    used_mb: float = 0.0
    observed: int = 0
    polls_gpu: bool = False
    name: str = "model_manager"


def attach(task: Task, stage: Stage, **settings: Any) -> Any:
    """Return this process's access to the manager of a stage; the first process makes it.

    settings: further parameters of mpmm's manager.
    """
    model_manager, shared = modules(task.implementation)
    steady = SteadyMonitor(stage.used_mb, stage.total_mb)
    if stage.polls_gpu:
        settings = {"memory_source": "nvml", **settings}

    def make() -> Any:
        if task.is_mpmm:
            return model_manager.ModelManager(
                monitor=steady if stage.observed else None,
                fallback_memory_mb=stage.total_mb,
                default_estimate_mb=stage.need_mb,
                **settings,
            )
        manager = model_manager.ModelManager(monitor=model_manager.GPUMonitor() if stage.polls_gpu else steady)
        _observe(manager._estimator, stage)
        _fill_beams_books(manager, stage)
        return manager

    return shared.MultiProcessShared(make, tag=stage.name, path=str(task.folder), always_proxy=True).acquire()


def set_up(task: Task, stage: Stage, **settings: Any) -> Any:
    """Return this process's access to the manager of a new stage, with its models loaded."""
    manager = attach(task, stage, **settings)
    if task.is_mpmm:
        _observe(manager._estimator, stage)
        # All before the first release: a manager that has seen a short hold would wait rather than load another copy.
        held = [(tag, manager.acquire_model(tag, make_handle)) for tag in stage.idle]
        for tag, handle in held:
            manager.release_model(tag, handle)
    return manager


def simulate_gpus(folder: Path, *totals_mb: float) -> SimulatedGpus:
    """Make GPUs that this process, and those forked from it, find through NVML and nvidia-smi."""
    built = build(folder / "driver")
    built.load()
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    os.environ[DIRECTORY_VARIABLE] = str(folder / "gpus")
    os.environ["PATH"] = os.pathsep.join((str(built.program.parent), os.environ["PATH"]))
    return SimulatedGpus.create(folder / "gpus", *totals_mb)


def _observe(estimator: Any, stage: Stage) -> None:
    """Feed either implementation's estimator with more configurations than there are models."""
    tags = [f"observed-{number}" for number in range(stage.observed)]
    for number, tag in enumerate(tags):
        estimator.set_initial_estimate(tag, OBSERVED_MB)
        estimator.add_observation({tag: 1}, (1 + number) * OBSERVED_MB)
    for number in range(0, stage.observed - 1, 5):
        pair = {tags[number]: 1, tags[number + 1]: 1}
        estimator.add_observation(pair, (3 + 2 * number) * OBSERVED_MB)


def _fill_beams_books(manager: Any, stage: Stage) -> None:
    """Put into Beam's manager what loading and releasing the stage's models would leave there.

    Really loading them takes minutes: every unknown model flushes all others, and each release solves for all.
    """
    for tag in (*stage.known, *stage.idle):
        manager._estimator.set_initial_estimate(tag, stage.need_mb)
    for tag in stage.idle:
        # The reading of a load: what the monitor says after it, less what it said before.
        manager._estimator.history[((tag, 1),)].append(0.0)
        handle = make_handle()
        manager._models[tag].append(handle)
        manager._idle_lru[id(handle)] = (tag, handle, time.time())


def timed(action: Callable[[], object], count: int, warm_up: int = 20) -> list[float]:
    """Return the seconds that each of `count` calls takes."""
    for _ in range(warm_up):
        action()
    seconds = []
    for _ in range(count):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return seconds


def warm_pair_seconds(manager: Any, tag: str, count: int, warm_up: int = 20) -> list[float]:
    """Return the seconds of each of `count` pairs of acquire and release of a model with an idle copy."""

    def pair() -> None:
        manager.release_model(tag, manager.acquire_model(tag, make_handle))

    return timed(pair, count, warm_up)
