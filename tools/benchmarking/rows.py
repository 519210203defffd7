"""Rows of the benchmark, and how the values of their repeats become figures."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "BEAM",
    "IMPLEMENTATIONS",
    "MPMM",
    "Figure",
    "Measured",
    "Row",
    "Summary",
    "Task",
    "percentile",
    "ratio",
    "stands",
    "summarise",
]

MPMM, BEAM = "mpmm", "beam"
IMPLEMENTATIONS = (MPMM, BEAM)

# Values by the name of their figure. Times are in seconds, in whatever unit the figure is shown.
Measured = Mapping[str, Sequence[float]]

# The factor from seconds, or from a bare number, to a unit.
_SCALES = {"µs": 1e6, "ms": 1e3, "%": 1e2}


@dataclass(frozen=True)
class Task:
    """One measurement: its implementation, its own folder, and its seed."""

    implementation: str
    folder: Path
    seed: int

    @property
    def is_mpmm(self) -> bool:
        return self.implementation == MPMM

    def random(self) -> random.Random:
        """Return a generator that starts from the seed."""
        return random.Random(self.seed)


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    name: its name within its row; empty for the row's only one.
    unit: "µs", "ms", "s", "%", "pairs/s" or "×".
    must, reach: the required value and the limit that seems possible, in `unit`; for information.
    of_worst: the worst value is the figure, not the median.
    more_is_better: most figures are costs; a rate is not.
    against_beam: `must` and `reach` are about the ratio to Beam, not about mpmm's own value.
    size: set for a figure of a series: the cost among this number of models, waiters and so on.
    """

    name: str
    unit: str
    must: float | None = None
    reach: float | None = None
    of_worst: bool = False
    more_is_better: bool = False
    against_beam: bool = False
    size: int | None = None


@dataclass(frozen=True)
class Row:
    """Something that is measured, in a process of its own for each implementation and repeat.

    implementations: those that can do it.
    repeats_at_most: bound on the repeats of a row that takes long.
    timeout_s: seconds after which a measurement is aborted.
    """

    name: str
    description: str
    figures: tuple[Figure, ...]
    measure: Callable[[Task], Measured]
    implementations: tuple[str, ...] = IMPLEMENTATIONS
    repeats_at_most: int | None = None
    timeout_s: float = 90.0


@dataclass(frozen=True)
class Summary:
    """One implementation's values of a figure, in the figure's unit.

    value: the value that is compared: the median, or the worst where the figure says so.
    tail: the 99th percentile on the bad side; with less than a hundred values, the worst.
    """

    value: float
    median: float
    tail: float
    worst: float
    count: int


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` (0 to 1) of all values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summarise(figure: Figure, values: Sequence[float]) -> Summary:
    """Summarise the values of all repeats; there must be at least one."""
    scale = _SCALES.get(figure.unit, 1.0)
    scaled = [value * scale for value in values]
    median = statistics.median(scaled)
    if figure.more_is_better:
        tail, worst = -percentile([-value for value in scaled], 0.99), min(scaled)
    else:
        tail, worst = percentile(scaled, 0.99), max(scaled)
    return Summary(worst if figure.of_worst else median, median, tail, worst, len(scaled))


def ratio(figure: Figure, ours: Summary | None, beams: Summary | None) -> float | None:
    """Return how many times better mpmm is; None if one of the two is missing or 0."""
    if ours is None or beams is None:
        return None
    better, worse = (beams.value, ours.value) if figure.more_is_better else (ours.value, beams.value)
    return worse / better if better > 0 and worse > 0 else None


def stands(figure: Figure, ours: Summary | None, times: float | None) -> str:
    """Return what mpmm reaches: "reach", "must", "short" of both, or "" where nothing was required or measured."""
    got = times if figure.against_beam else ours.value if ours else None
    if got is None:
        return ""
    at_least = figure.more_is_better or figure.against_beam
    for name, wanted in (("reach", figure.reach), ("must", figure.must)):
        if wanted is not None and (got >= wanted if at_least else got <= wanted):
            return name
    return "" if figure.must is None else "short"
