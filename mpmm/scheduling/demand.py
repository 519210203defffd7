"""How often models are requested, as `policy.demand` counts it."""

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
        # Returns how often a model (row) has ever been requested.
        self.requests = namespace.reads.models.requests

    def count_all(self, t: Transaction) -> None:
        """Bring the demand of all models up to date; a reuse only increments a count."""
        for model in self._tables.used_rows(self._layout.models):
            self.count(t, model)

    def count(self, t: Transaction, model: int) -> None:
        """Bring the demand of a model (row) up to date."""
        before = self.of(model)
        after = before.counted(self.requests(model), t.now / 1e9)
        # `count_all` visits all models, and most of them have not been requested since.
        if after is not before:
            self._namespace.transitions.models.note_demand(
                t,
                model,
                after.mean_interarrival_s,
                after.requests,
                # If it is now, exactly the transaction's time: converting it to seconds would lose some ns each time.
                t.now if after.requests > before.requests else to_ns(after.counted_s),
            )

    def of(self, model: int) -> Demand:
        """Return the demand for a model (row) as last counted."""
        found = self._tables.models[model]
        return Demand(found.mean_interarrival_s, found.requests, found.requested_at / 1e9)

    def rate(self, model: int) -> float:
        """Return how often a model (row) is requested, per second."""
        now_s = time.monotonic_ns() / 1e9
        return self.of(model).counted(self.requests(model), now_s).per_second(now_s)
