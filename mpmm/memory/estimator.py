"""How much memory one copy of a model takes, worked out from readings of the whole device.

A reading says how much memory was in use while certain copies were loaded. Many readings make a linear system with one
unknown per model and one for the memory that is always in use (the bias), solved with none allowed below zero.
`solve_footprints` and `smooth` are pure; `ResourceEstimator` is Beam's class around them, for use alone
in a process, and the manager calls the same two with readings from shared memory. All figures are in MB.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpmm.errors import InvalidArgumentError
from mpmm.interpreter.thread_locks import new_lock
from mpmm.memory.beam_metrics import report_estimate
from mpmm.text.arguments import checked_number, checked_whole, in_brief
from mpmm.text.printable import printable_logger

__all__ = [
    "ALONE_SD",
    "GROWTH_SD",
    "Estimate",
    "Footprints",
    "Observation",
    "ResourceEstimator",
    "checked_counts",
    "checked_mb",
    "nnls",
    "reconcile",
    "smooth",
    "solve_footprints",
]

logger = printable_logger(__name__)

READINGS_KEPT = 20  # per configuration, as in Beam
CONFIGURATIONS_KEPT = 256
MOST_DATA_POINTS = sys.maxsize
# The most that an observation in shared memory has room for.
MOST_COPIES = 2**16 - 1
# A null vector of a small matrix of small integers is exact to some 1e-15; models it involves have far larger entries.
NULL_TOLERANCE = 1e-9


# How certain figures are, as standard deviations in shares of the figure. Other programs blur the memory that a model
# alone on a device adds to it; memory that libraries keep blurs the growth of a process.
ALONE_SD = 0.03
GROWTH_SD = 0.02
# Of a solution: readings have errors in common, so more of them do not make it more certain than this.
SOLUTION_SD = 0.005


@dataclass(frozen=True)
class Observation:
    """The readings of one configuration on one device: copies loaded per model, mean of the readings, their number.

    spread: variance of the readings, MB squared. device: any number that tells devices apart.
    """

    counts: Mapping[str, int]
    mean_mb: float
    readings: int
    spread: float = 0.0
    device: int = 0


@dataclass(frozen=True)
class Footprints:
    """MB of one copy of each model that the observations pin down, and MB that are in use regardless, on all devices.

    sd_mb: standard deviations of the models' figures, infinite if there are no more readings than unknowns.
    """

    model_mb: dict[str, float]
    bias_mb: float
    sd_mb: dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """The MB that a copy takes, and the standard deviation of that figure; 0: read from its process."""

    mb: float
    sd_mb: float


def nnls(a: Any, b: Any) -> tuple[Any, float]:
    """Call `scipy.optimize.nnls`. SciPy takes half a second to import, so that happens at the first solve."""
    from scipy.optimize import nnls as scipy_nnls

    solution, residual = scipy_nnls(a, b)
    return solution, float(residual)


_OURS = nnls


def solve_footprints(
    observations: Sequence[Observation], models: Sequence[str], min_data_points: int, *, relative: bool = False
) -> Footprints | None:
    """Return the footprints that fit `observations` best (least squares, none negative), None if they are too few.

    models: the tags to solve for. Those that occur in no observation are left out, and so are those
        that the observations cannot tell apart (always loaded together, or a constant number of copies
        at all times): NNLS would give one of them everything and the others 0.
    relative: errors grow with the reading, so a small reading counts for more; else all count the same, as in Beam.
    Too few: fewer configurations than models that occur plus one for each device, or fewer than `min_data_points`
    readings.

    With n readings y of mean m in one configuration, sum((ax - y)^2) = n (ax - m)^2 + a constant. So
    one row per configuration, of weight sqrt(n), has the same solution as one row per reading.

    Raises ArithmeticError if the numbers cannot be solved (the solver gives up, or yields no finite numbers).
    """
    columns = sorted({tag for tag in models if any(observation.counts.get(tag, 0) for observation in observations)})
    devices = sorted({observation.device for observation in observations})
    unknowns, readings = len(columns) + len(devices), sum(observation.readings for observation in observations)
    if len(observations) < unknowns or readings < min_data_points:
        return None
    import numpy as np  # as late as SciPy: a process that never solves need not load it

    try:
        rows, means, weights = _weighted_rows(observations, columns, devices, relative)
        # Tests written for Beam put another solver where Beam's manager has it.
        there = getattr(sys.modules.get("mpmm.model_manager"), "nnls", _OURS)
        solver = nnls if there is _OURS else there
        solution = np.asarray(solver(rows * weights[:, None], means * weights)[0], dtype=float)
        _, singular, basis = np.linalg.svd(rows, full_matrices=False)  # no fewer rows than columns: all of the basis
    except Exception as error:
        raise ArithmeticError(f"cannot solve for {len(columns)} models: {error!r}") from error
    if solution.shape != (unknowns,) or not np.isfinite(solution).all():
        raise ArithmeticError(f"solver returned {solution!r}: expected {unknowns} finite numbers")
    rank = int((singular > singular[0] * max(rows.shape) * np.finfo(float).eps).sum())
    # A model is pinned down when no direction that leaves every row unchanged moves it.
    free = np.abs(basis[rank:]).max(axis=0, initial=0.0) > NULL_TOLERANCE
    # The variance of one reading comes from the misfit of all.
    misfit = weights**2 * ((rows @ solution - means) ** 2 + np.array([o.spread for o in observations]))
    variance = float(misfit.sum()) / (readings - unknowns) if readings > unknowns else math.inf
    deviations = _deviations(rows * weights[:, None], variance)
    pinned = [i for i in range(len(columns)) if not free[i]]
    return Footprints(
        {columns[i]: float(solution[i]) for i in pinned},
        float(solution[len(columns) :].sum()),
        {columns[i]: float(deviations[i]) for i in pinned},
    )


def _weighted_rows(
    observations: Sequence[Observation], columns: Sequence[str], devices: Sequence[int], relative: bool
) -> tuple[Any, Any, Any]:
    """Return one row for each observation: how many copies of each model, and on which device; its mean and weight."""
    import numpy as np

    counts = [
        [*(o.counts.get(tag, 0) for tag in columns), *(o.device == device for device in devices)] for o in observations
    ]
    means = np.array([o.mean_mb for o in observations])
    weights = np.sqrt([float(o.readings) for o in observations])
    return np.array(counts, dtype=float), means, weights / np.maximum(means, 1.0) if relative else weights


def _deviations(weighted: Any, variance: float) -> Any:
    """Return the standard deviation of each unknown, by the textbook covariance of a weighted solution.

    variance: of one reading, `inf` if it is not known.
    """
    import numpy as np

    if not math.isfinite(variance):
        return np.full(weighted.shape[1], np.inf)
    return np.sqrt(variance * np.maximum(np.diag(np.linalg.pinv(weighted.T @ weighted)), 0.0))


def reconcile(old: Estimate | None, new: Estimate, smoothing_factor: float) -> Estimate:
    """Return the estimate of a model after the solution `new`; the more certain of the two figures counts for more.

    A solution that is at least as certain as the old figure moves it by `smoothing_factor`, as in Beam; a less certain
    one moves it less, by the ratio of the variances. So a figure that was read from a process (deviation 0) stays, and
    one that was measured alone on the device yields to many good readings and not to a few poor ones.
    """
    floor = SOLUTION_SD * new.mb
    if old is None:
        return Estimate(new.mb, max(floor, min(new.sd_mb, new.mb)))
    ratio = old.sd_mb / new.sd_mb if new.sd_mb else math.inf
    weight = smoothing_factor * min(1.0, ratio**2) if old.sd_mb else 0.0
    if not weight:
        return old
    rest = ((1 - weight) * old.sd_mb, weight * new.sd_mb)
    return Estimate(smooth(old.mb, new.mb, weight), max(floor, math.hypot(*rest)))


def smooth(old: float | None, new: float, factor: float) -> float:
    """Return `old` moved towards `new` by `factor` (0 = stay, 1 = jump); `new` itself if nothing was known."""
    return new if old is None else old * (1 - factor) + new * factor


class ResourceEstimator:
    """Estimates per model in one process, as in Beam; every method may be called by several threads."""

    def __init__(self, smoothing_factor: float = 0.2, min_data_points: int = 5, verbose_logging: bool = False) -> None:
        """Start with no estimates.

        smoothing_factor: share of a new solution in an estimate that exists, 0 to 1.
        min_data_points: readings needed before the first solution.
        verbose_logging: log observations and solutions.
        Raises InvalidArgumentError for a factor outside 0 to 1 or a number of readings below 0.
        """
        self.smoothing_factor = checked_number("smoothing_factor", smoothing_factor, 0.0, 1.0, "a fraction")
        self.min_data_points = checked_whole("min_data_points", min_data_points, 0, MOST_DATA_POINTS)
        self.verbose_logging = verbose_logging
        self.estimates: dict[str, float] = {}
        # Configuration as sorted (tag, copies) pairs: its last readings. Ordered by latest reading, oldest first.
        self.history: OrderedDict[tuple[tuple[str, int], ...], deque[float]] = OrderedDict()
        self.known_models: set[str] = set()
        self._lock = new_lock()  # guards the fields above; never held while solving
        self._solve_lock = new_lock()  # one solution after the other; taken before _lock

    def logging_info(self, message: str, *args: Any) -> None:
        """Log at level INFO if `verbose_logging` is on."""
        if self.verbose_logging:
            logger.info(message, *args)

    def is_unknown(self, model_tag: str) -> bool:
        """Return whether there is no estimate for this model."""
        _check_tag(model_tag)
        with self._lock:
            return model_tag not in self.estimates

    def get_estimate(self, model_tag: str, default_mb: float = 4000.0) -> float:
        """Return the estimate in MB, `default_mb` if there is none."""
        _check_tag(model_tag)
        with self._lock:
            return self.estimates.get(model_tag, default_mb)

    def set_initial_estimate(self, model_tag: str, cost: float) -> None:
        """Take `cost` in MB as the estimate, as measured with the model alone on the device.

        Raises InvalidArgumentError for a tag that is no str, or a cost that is negative or not finite.
        """
        _check_tag(model_tag)
        cost = checked_mb("cost", cost)
        with self._lock:
            self.estimates[model_tag] = cost
            self.known_models.add(model_tag)
        report_estimate(model_tag, cost)
        self.logging_info("Initial estimate of %s: %s MB", model_tag, cost)

    def add_observation(self, active_snapshot: Mapping[str, int], peak_memory: float) -> None:
        """Add a reading of `peak_memory` MB with these copies loaded, and solve again if there are enough.

        An empty snapshot is ignored, as in Beam. A failed solution is logged and leaves the estimates unchanged.
        Raises InvalidArgumentError for tags that are no str, counts that are negative, or a reading that
        is negative or not finite; nothing is changed then.
        """
        counts = checked_counts(active_snapshot)
        peak_memory = checked_mb("peak_memory", peak_memory)
        if not counts:
            return
        self.logging_info("Observed %.1f MB with %s", peak_memory, dict(sorted(counts.items())))
        configuration = tuple(sorted((tag, count) for tag, count in counts.items() if count))
        with self._solve_lock:
            with self._lock:
                self.history.setdefault(configuration, deque(maxlen=READINGS_KEPT)).append(peak_memory)
                self.history.move_to_end(configuration)
                if len(self.history) > CONFIGURATIONS_KEPT:
                    self.history.popitem(last=False)
                self.known_models.update(counts)
            self._solve()

    def _solve(self) -> None:
        """Solve from the history and move the estimates. Needs `_solve_lock`."""
        with self._lock:
            models = sorted(self.known_models)
            observations = [
                Observation(dict(configuration), sum(readings) / len(readings), len(readings))
                for configuration, readings in self.history.items()
            ]
        try:
            footprints = solve_footprints(observations, models, self.min_data_points)
        except ArithmeticError as error:
            logger.error("Estimates are unchanged: %s", error)
            return
        if footprints is None:
            return
        moved: dict[str, float] = {}
        with self._lock:
            for tag, mb in footprints.model_mb.items():
                moved[tag] = smooth(self.estimates.get(tag), mb, self.smoothing_factor)
            self.estimates.update(moved)
        for tag, mb in moved.items():
            report_estimate(tag, mb)
            self.logging_info("Estimate of %s: %.1f MB", tag, mb)
        self.logging_info("In use regardless: %.1f MB", footprints.bias_mb)


def _check_tag(tag: object) -> None:
    if not isinstance(tag, str):
        raise InvalidArgumentError(f"model tag {in_brief(tag)}: expected a str")


def checked_mb(name: str, value: object) -> float:
    """Return a finite number of MB, 0 or more. Raises InvalidArgumentError."""
    return checked_number(name, value, 0.0, math.inf, "MB", finite=True)


def checked_counts(counts: object) -> dict[str, int]:
    """Return how many copies of each tag there are, as plain numbers. Raises InvalidArgumentError."""
    if not isinstance(counts, Mapping):
        raise InvalidArgumentError(f"active_snapshot={in_brief(counts)}: expected a mapping of tags to counts")
    for tag in counts:
        _check_tag(tag)
    return {tag: checked_whole(f"copies of {tag!r}", count, 0, MOST_COPIES) for tag, count in counts.items()}
