"""What the checks of `gpu_check.py` share: the device, the options, and the table that they fill."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from devices.gpu_check_models import Loader
from devices.simulated_gpu import Build, SimulatedGpus
from mpmm.sources import DeviceInfo, DeviceSample
from mpmm.sources.nvml import NvmlSource

__all__ = ["CONTEXT_AT_MOST_MB", "PATIENCE_S", "PAUSE_S", "Check", "Row", "as_line", "at_work", "settled_mb"]

_CONTEXT = multiprocessing.get_context("spawn")

SIZES_MB = tuple(1024.0 * gigabytes for gigabytes in (3, 1, 6, 2, 8, 4, 5, 7))
# What a process takes of the device besides the memory that torch knows of.
CONTEXT_AT_MOST_MB = 1500.0
PAUSE_S = 0.005
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Row:
    """A line of the table. `met` is None where nothing was expected, or nothing could be measured."""

    check: str
    figure: str
    value: str
    expected: str = ""
    met: bool | None = None


@dataclass
class Check:
    """What the checks share: the device, the source of its figures, the models' sizes, and the lines so far.

    gpus, built: the simulated GPU and its programs; None for a real one.
    """

    source: NvmlSource
    device: DeviceInfo
    gpus: SimulatedGpus | None
    built: Build | None
    options: argparse.Namespace
    rows: list[Row] = field(default_factory=list)

    def sample(self, pids: Sequence[int] = ()) -> DeviceSample:
        """Measure the device. Raises RuntimeError if it cannot be read."""
        (sample,) = self.source.sample(pids)
        if sample.used_mb is None:
            raise RuntimeError(f"the device cannot be read: {sample.trouble}")
        return sample

    def used_mb(self) -> float:
        """Return the MB used on the device."""
        used_mb = self.sample().used_mb
        assert used_mb is not None
        return used_mb

    def loader(self, mb: float) -> Loader:
        """Return a loader of a model of a size."""
        return Loader(mb, self.gpus)

    def sizes_mb(self) -> list[float]:
        """Return the model sizes that fit three times."""
        return [mb for mb in SIZES_MB if 3 * mb < 0.85 * self.device.total_mb] or [self.device.total_mb / 8]

    def say(self, check: str, figure: str, value: str, expected: str = "", met: bool | None = None) -> None:
        """Add a line."""
        self.rows.append(Row(check, figure, value, expected, met))
        if not self.options.json:
            print(as_line(self.rows[-1]), flush=True)


def as_line(row: Row) -> str:
    """Return a line of the table."""
    verdict = "" if row.met is None else "met" if row.met else "NOT MET"
    return f"{row.check:12}{row.figure:34}{row.value:48}{row.expected:16}{verdict}"


def settled_mb(check: Check) -> float:
    """Wait until the device's figure no longer changes, at most PATIENCE_S; return it."""
    figures = [check.used_mb()]
    deadline = time.monotonic() + PATIENCE_S
    still = 0
    while still < 20 and time.monotonic() < deadline:
        time.sleep(0.02)
        figures.append(check.used_mb())
        still = still + 1 if abs(figures[-1] - figures[-2]) < 1.0 else 0
    return figures[-1]


@contextmanager
def at_work(work: Callable[..., None], *arguments: Sequence[Any]) -> Iterator[list[Connection]]:
    """Start a process that calls `work` for each of `arguments`; yield once each has reported that it is ready.

    `work` gets one end of a connection as its first argument; the block gets the other ends. At the end of the block,
    processes that do not end within PATIENCE_S are killed.
    """
    processes: list[tuple[Any, Connection]] = []
    try:
        for one in arguments:
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=work, args=(theirs, *one))
            process.start()
            processes.append((process, ours))
        connections = [connection for _, connection in processes]
        for connection in connections:
            connection.recv()
        yield connections
    finally:
        for process, connection in processes:
            connection.close()
            process.join(PATIENCE_S)
            if process.is_alive():
                process.kill()
                process.join()
