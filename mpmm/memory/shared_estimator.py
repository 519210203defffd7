"""`ResourceEstimator` on shared state: the same methods, for all processes of a namespace.

Estimates live in the model rows, readings in the observation rows. Only the leader solves, between two polls
(`mpmm.model_manager.leader`), or a caller that adds an observation by hand.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from mpmm.memory.beam_metrics import report_estimate
from mpmm.memory.estimator import (
    ALONE_SD,
    Estimate,
    Observation,
    checked_counts,
    checked_mb,
    reconcile,
    solve_footprints,
)
from mpmm.shared_state.layout import Model
from mpmm.shared_state.layout import Observation as ObservationRow
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.tables import encode_text
from mpmm.text.printable import printable_logger

__all__ = ["SharedResourceEstimator"]

_LOG = printable_logger(__name__)


class SharedResourceEstimator:
    """Estimates of one namespace, seen from one of its members. Methods take the lock; none solves under it."""

    def __init__(self, namespace: Namespace, verbose_logging: bool = False) -> None:
        self._namespace = namespace
        self.verbose_logging = verbose_logging

    @property
    def smoothing_factor(self) -> float:
        """The share of a new solution in an estimate that exists."""
        return self._namespace.settings.smoothing_factor

    @property
    def min_data_points(self) -> int:
        """How many readings the first solution needs."""
        return int(self._namespace.settings.min_data_points)

    def logging_info(self, message: str, *args: Any) -> None:
        """Log at level INFO if `verbose_logging` is on."""
        if self.verbose_logging:
            _LOG.info(message, *args)

    def is_unknown(self, model_tag: str) -> bool:
        """Tell whether there is no estimate for a tag yet."""
        return math.isnan(self.get_estimate(model_tag, math.nan))

    def get_estimate(self, model_tag: str, default_mb: float = 4000.0) -> float:
        """Return the estimate of a tag in MB, or `default_mb`. Raises InvalidArgumentError if it is no tag."""
        encode_text(model_tag, Model.TAG_BYTES, "model tag")
        namespace = self._namespace
        with namespace.transaction():
            row = namespace.tables.model_row(model_tag)
            if row is None or not namespace.tables.models[row].known:
                return default_mb
            return namespace.tables.models[row].estimate_mb

    def set_initial_estimate(self, model_tag: str, cost: float) -> None:
        """Set the estimate of a tag to `cost` MB, as measured with the model alone on a device.

        It counts even if the model has run out of memory with more than that free.

        Raises InvalidArgumentError, TableFullError.
        """
        encoded = encode_text(model_tag, Model.TAG_BYTES, "model tag")
        cost = checked_mb("cost", cost)
        namespace = self._namespace
        with namespace.transaction() as t:
            row = namespace.transitions.models.claim(t, model_tag, encoded)
            sd_mb = ALONE_SD * cost
            namespace.transitions.estimates.estimate(t, row, cost, measured=False, sd_mb=sd_mb, forget_bound=True)
        report_estimate(model_tag, cost)
        self.logging_info("Initial estimate of %s: %s MB", model_tag, cost)

    def add_observation(self, active_snapshot: Mapping[str, int], peak_memory: float) -> None:
        """Add a reading of `peak_memory` MB with these copies of each tag loaded, and solve.

        Raises InvalidArgumentError, TableFullError.
        """
        counts = checked_counts(active_snapshot)
        peak_memory = checked_mb("peak_memory", peak_memory)
        encoded = {tag: encode_text(tag, Model.TAG_BYTES, "model tag") for tag in counts}
        namespace = self._namespace
        with namespace.transaction() as t:
            copies = []
            for tag, count in counts.items():
                row = namespace.transitions.models.claim(t, tag, encoded[tag])
                copies.append((namespace.tables.models[row].generation, count))
            namespace.transitions.estimates.observe(t, copies, peak_memory)
        self.solve()

    @property
    def estimates(self) -> dict[str, float]:
        """All estimates by tag, in MB."""
        namespace = self._namespace
        tables = namespace.tables
        with namespace.transaction():
            return {
                tables.tag_of(row): tables.models[row].estimate_mb
                for row in tables.model_rows()
                if tables.models[row].known
            }

    @property
    def known_models(self) -> set[str]:
        """Tags that have an estimate or were observed."""
        return set(self.estimates) | {tag for observation in self.observations()[0] for tag in observation.counts}

    @property
    def history(self) -> dict[tuple[tuple[str, int], ...], deque[float]]:
        """Recent readings in MB by configuration, as in Beam."""
        found: dict[tuple[tuple[str, int], ...], deque[float]] = {}
        for observation, readings in zip(*self.observations(), strict=True):
            configuration = tuple(sorted(observation.counts.items()))
            found.setdefault(configuration, deque(maxlen=ObservationRow.READINGS_KEPT)).extend(readings)
        return found

    def observations(self) -> tuple[list[Observation], list[list[float]]]:
        """Return the configurations whose tags all still exist, and the readings of each."""
        namespace = self._namespace
        tables, layout = namespace.tables, namespace.segment.layout
        found: list[Observation] = []
        readings_of: list[list[float]] = []
        with namespace.transaction():
            tags = {tables.models[row].generation: tables.tag_of(row) for row in tables.model_rows()}
            for row in tables.used_rows(layout.observations):
                observed = tables.observations[row]
                pairs, readings = observed.pairs, observed.readings
                if not all(generation in tags for generation, _ in pairs):
                    continue
                counts = {tags[generation]: copies for generation, copies in pairs}
                mean = sum(readings) / len(readings)
                spread = sum((mb - mean) ** 2 for mb in readings) / len(readings)
                found.append(Observation(counts, mean, len(readings), spread, observed.device))
                readings_of.append(readings)
        return found, readings_of

    def solve(self) -> None:
        """Solve for the footprints and update the estimates, unless nothing is new or the readings are too few.

        For how much a solution counts, see `reconcile`: figures read from processes are exact already and stay.
        """
        namespace = self._namespace
        made = namespace.tables.header.observations_made
        if made == namespace.tables.header.solved_at:
            return
        observations, _ = self.observations()
        models = sorted({tag for observation in observations for tag in observation.counts})
        try:
            footprints = solve_footprints(observations, models, self.min_data_points, relative=True)
        except ArithmeticError as error:
            _LOG.error("Estimates are unchanged: %s", error)
            footprints = None
        changed: dict[str, float] = {}
        with namespace.transaction() as t:
            namespace.transitions.estimates.note_solution(t, made)
            for tag, mb in footprints.model_mb.items() if footprints else ():
                row = namespace.tables.model_row(tag)
                if row is None:
                    continue
                model = namespace.tables.models[row]
                known, measured = model.known, model.measured
                if not known and mb <= model.at_least_mb:
                    # The readings are from before the model ran out of memory with more than that free.
                    continue
                old = Estimate(model.estimate_mb, model.sd_mb) if known else None
                new = reconcile(old, Estimate(mb, footprints.sd_mb[tag] if footprints else 0.0), self.smoothing_factor)
                if new != old:
                    changed[tag] = new.mb
                    namespace.transitions.estimates.estimate(
                        t, row, new.mb, measured=measured and known, sd_mb=new.sd_mb
                    )
        for tag, mb in changed.items():
            report_estimate(tag, mb)
            self.logging_info("Estimate of %s: %.1f MB", tag, mb)
