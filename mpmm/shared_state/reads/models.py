"""Reads about models: how often they are requested, how large they are, and what their copies do."""

from __future__ import annotations

from dataclasses import dataclass

from mpmm.shared_state.layout import Header, Instance, Model
from mpmm.shared_state.tables import Tables

__all__ = ["ModelFigures", "ModelReads", "ModelSize"]

# Each request counts in exactly one of these: a waiter moves from the last to the others. So the sum never decreases,
# and its growth is the number of new requests.
_REQUESTS = (Model.HITS, Model.LOADS, Model.RESUMES, Model.LOADING, Model.WAITING)
_CAN_BE_SHARED = (Instance.ACTIVE, Instance.IDLE, Instance.LOADING)


@dataclass(slots=True)
class ModelSize:
    """What is known about the memory of a copy, in MB, 0 for nothing.

    known: there is an estimate. fitted: a copy has taken that much: it was read from processes, in this run or an
    earlier one, or copies have been loaded, and it was inferred from what whole devices had in use meanwhile.
    """

    known: bool
    estimate_mb: float
    expect_mb: float
    at_least_mb: float
    fitted: bool = False


@dataclass(slots=True)
class ModelFigures:
    """What a model's row says about its copies and its past. Times are in ns, durations in seconds, 0 for unknown.

    active, idle: copies and seats; seats: how many of these are seats. users: how many may use the next copy at a time,
    0 for one.
    """

    lease: bool
    waiting: int
    active: int
    idle: int
    loading: int
    shares: bool
    load_s: float
    hold_s: float
    resume_s: float
    failures: int
    failed_at: int
    superseded: bool
    users: int
    seats: int


class ModelReads:
    """Reads about models (rows). Methods need the lock, unless they say otherwise."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables
        self._words = tables.segment.words
        self._floats = tables.segment.floats
        self._instances = tables.segment.layout.instances

    def figures(self, model: int) -> ModelFigures:
        """Return what the row says, except sizes."""
        words, floats, at = self._words, self._floats, self._tables.model(model)
        return ModelFigures(
            words[at] == Model.LEASE,
            words[at + Model.WAITING],
            words[at + Model.ACTIVE],
            words[at + Model.IDLE],
            words[at + Model.LOADING],
            words[at + Model.SHARES] != 0,
            floats[at + Model.LOAD_S],
            floats[at + Model.HOLD_S],
            floats[at + Model.RESUME_S],
            words[at + Model.FAILURES],
            words[at + Model.FAILED_AT],
            words[at + Model.SUPERSEDED] != 0,
            words[at + Model.USERS],
            words[at + Model.SEATS],
        )

    def durations_s(self, model: int) -> tuple[float, float]:
        """Return how long a hold, and a load, of a copy takes on average."""
        floats, at = self._floats, self._tables.model(model)
        return floats[at + Model.HOLD_S], floats[at + Model.LOAD_S]

    def size(self, model: int) -> ModelSize:
        """Return what is known about a copy's memory."""
        words, floats, at = self._words, self._floats, self._tables.model(model)
        return ModelSize(
            words[at + Model.KNOWN] != 0,
            floats[at + Model.ESTIMATE_MB],
            floats[at + Model.EXPECT_MB],
            floats[at + Model.AT_LEAST_MB],
            self._has_fitted(at),
        )

    def _has_fitted(self, at: int) -> bool:
        words = self._words
        if words[at + Model.MEASURED]:
            return True
        # What users say has no deviation, and where nothing is measured, it is all that is known.
        is_inferred = self._floats[at + Model.SD_MB] > 0 and not words[Header.SOURCE_ACCOUNTING_ONLY]
        return is_inferred and words[at + Model.LOADS] > 0

    def is_sized(self, model: int) -> bool:
        """Tell whether there is an estimate, or users have said what a copy takes."""
        words, at = self._words, self._tables.model(model)
        return bool(words[at + Model.KNOWN] or words[at + Model.EXPECT_MB])

    def is_lease(self, model: int) -> bool:
        """Tell whether the row is that of a lease."""
        return self._words[self._tables.model(model)] == Model.LEASE

    def requests(self, model: int) -> int:
        """Return how often a model was requested so far; the number never decreases."""
        words, at = self._words, self._tables.model(model)
        return sum(words[at + count] for count in _REQUESTS)

    def in_use(self, model: int) -> bool:
        """Tell whether a copy of a model is in use; without the lock."""
        return self._words[self._tables.model(model) + Model.ACTIVE] != 0

    def copies_serve_everybody(self, model: int) -> bool:
        """Tell whether any process can get each copy of a model, now or after its current user."""
        words, tables = self._words, self._tables
        for row in tables.rows_where(self._instances, Instance.MODEL, model):
            at = tables.instance(row)
            # Without a plan, a waiter does not get a copy that is UNLOADING or SUSPENDED.
            if words[at] not in _CAN_BE_SHARED or words[at + Instance.OWNER] or words[at + Instance.UNLOAD_ON_RELEASE]:
                return False
        return True
