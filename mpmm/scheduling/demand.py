"""How often models are asked for, as `policy.demand` counts it."""

from __future__ import annotations

import time

from mpmm.policy.demand import Demand
from mpmm.shared_state.durations import to_ns
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction

__all__ = ["Demands"]


class Demands:
    """The demand for the models of one namespace. Methods need the lock."""

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._tables = namespace.tables
        self._layout = namespace.segment.layout
        # Return how often a model (row) was asked for, ever.
        self.requests = namespace.reads.models.requests

    def count_all(self, t: Transaction) -> None:
        """Bring the demand of all models up to date; a reuse only counts itself."""
        for model in self._tables.used_rows(self._layout.models):
            self.count(t, model)

    def count(self, t: Transaction, model: int) -> None:
        """Bring the demand of a model (row) up to date."""
        before = self.of(model)
        after = before.counted(self.requests(model), t.now / 1e9)
        # `count_all` comes by at all models, most of which nobody has asked for since.
        if after is not before:
            self._namespace.transitions.models.note_demand(
                t,
                model,
                after.mean_interarrival_s,
                after.requests,
                # The very word of the transaction where it is now: through seconds it would lose some ns each time.
                t.now if after.requests > before.requests else to_ns(after.counted_s),
            )

    def of(self, model: int) -> Demand:
        """Return the demand for a model (row) as it was counted last."""
        found = self._tables.models[model]
        return Demand(found.mean_interarrival_s, found.requests, found.requested_at / 1e9)

    def rate(self, model: int) -> float:
        """Return how often a model (row) is asked for, per second."""
        now_s = time.monotonic_ns() / 1e9
        return self.of(model).counted(self.requests(model), now_s).per_second(now_s)
