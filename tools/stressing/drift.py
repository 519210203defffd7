"""Whether a process's descriptors and memory keep growing, by samples over a run."""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Iterable, Sequence

import psutil

from stressing.processes import RunningWorker

__all__ = ["find_drifts", "take_samples"]

MIB = 2**20


def take_samples(workers: Iterable[RunningWorker], at_s: float) -> None:
    """Sample memory and descriptors of the workers that should survive. at_s: seconds since the run's start."""
    for worker in workers:
        if worker.protected:
            with contextlib.suppress(psutil.Error, OSError):
                worker.fds.append((at_s, float(len(os.listdir(f"/proc/{worker.pid}/fd")))))
                worker.rss_mb.append((at_s, psutil.Process(worker.pid).memory_info().rss / MIB))


def find_drifts(survivors: Sequence[RunningWorker], run_s: float) -> dict[str, tuple[float, float, float, float]]:
    """Return for fds and rss_mb the means over the survivors' first, middle and last part, and the slope per minute.

    The slope is that of the second half, because a process first has to meet all models.
    """
    drifts = {}
    for name in ("fds", "rss_mb"):
        parts: list[list[float]] = [[], [], []]
        slopes = []
        for worker in survivors:
            points: list[tuple[float, float]] = getattr(worker, name)
            if len(points) < 9 or points[0][0] > run_s / 4:
                continue
            third = len(points) // 3
            for part, chosen in zip(parts, (points[:third], points[third:-third], points[-third:]), strict=True):
                part.append(statistics.fmean(value for _, value in chosen))
            slopes.append(60 * _fit_slope(points[len(points) // 2 :]))
        if slopes:
            means = [statistics.fmean(part) for part in parts]
            drifts[name] = (means[0], means[1], means[2], statistics.fmean(slopes))
    return drifts


def _fit_slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the least-squares slope of (time, value) points; 0 for fewer than three."""
    if len(points) < 3:
        return 0.0
    mean_t = sum(t for t, _ in points) / len(points)
    mean_v = sum(v for _, v in points) / len(points)
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    return sum((t - mean_t) * (v - mean_v) for t, v in points) / spread if spread else 0.0
