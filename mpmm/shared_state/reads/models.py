"""Models: how often they are asked for, how large they are, and what their copies do."""

from __future__ import annotations

from dataclasses import dataclass

from mpmm.shared_state.layout import Instance, Model
from mpmm.shared_state.tables import Tables

__all__ = ["ModelFigures", "ModelReads", "ModelSize"]

# Each request is counted in one of these at any time: a waiter moves from the last to the others. So the sum never goes
# down, and what has come since it was looked at last is the difference.
_REQUESTS = (Model.HITS, Model.LOADS, Model.RESUMES, Model.LOADING, Model.WAITING)
_CAN_BE_SHARED = (Instance.ACTIVE, Instance.IDLE, Instance.LOADING)


@dataclass(slots=True)
class ModelSize:
    """What is known of the memory that a copy takes, in MB; 0 where nothing is. known: there is an estimate."""

    known: bool
    estimate_mb: float
    expect_mb: float
    at_least_mb: float


@dataclass(slots=True)
class ModelFigures:
    """What a model's row says of its copies and its past. Times are in ns, durations in seconds, 0 for unknown.

    active, idle: copies and seats; seats: how many of these. users: how many may use the next copy at a time, 0 one.
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
        """Return what the row says, but for sizes."""
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
        """Return for how long a copy is held, and loads, on average."""
        floats, at = self._floats, self._tables.model(model)
        return floats[at + Model.HOLD_S], floats[at + Model.LOAD_S]

    def size(self, model: int) -> ModelSize:
        """Return what is known of a copy's memory."""
        words, floats, at = self._words, self._floats, self._tables.model(model)
        return ModelSize(
            words[at + Model.KNOWN] != 0,
            floats[at + Model.ESTIMATE_MB],
            floats[at + Model.EXPECT_MB],
            floats[at + Model.AT_LEAST_MB],
        )

    def is_sized(self, model: int) -> bool:
        """Tell whether there is an estimate, or a user's word."""
        words, at = self._words, self._tables.model(model)
        return bool(words[at + Model.KNOWN] or words[at + Model.EXPECT_MB])

    def is_lease(self, model: int) -> bool:
        """Tell whether the row is that of a lease."""
        return self._words[self._tables.model(model)] == Model.LEASE

    def requests(self, model: int) -> int:
        """Return how often a model was asked for, ever: it never goes down."""
        words, at = self._words, self._tables.model(model)
        return sum(words[at + count] for count in _REQUESTS)

    def in_use(self, model: int) -> bool:
        """Tell whether somebody holds a copy of a model; without the lock."""
        return self._words[self._tables.model(model) + Model.ACTIVE] != 0

    def copies_serve_everybody(self, model: int) -> bool:
        """Tell whether every process can have each copy of a model, now or after somebody else."""
        words, tables = self._words, self._tables
        for row in tables.rows_where(self._instances, Instance.MODEL, model):
            at = tables.instance(row)
            # UNLOADING and SUSPENDED ones are not coming back for a waiter without a plan.
            if words[at] not in _CAN_BE_SHARED or words[at + Instance.OWNER] or words[at + Instance.UNLOAD_ON_RELEASE]:
                return False
        return True
