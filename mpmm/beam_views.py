"""The names under which Beam's manager keeps its state, as views of the shared state.

Beam's own tests, and scripts that people wrote to look into a stuck worker, read these. They are for looking,
except that an entry of `_idle_lru` may be set again to change since when a copy counts as idle.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING, Any, cast

from mpmm.shared_state.layout import Header, Instance, Model
from mpmm.shared_state.tables import encode_text

if TYPE_CHECKING:
    from mpmm.board import MonitorLike
    from mpmm.gpu_monitor import GPUMonitor
    from mpmm.shared_estimator import SharedResourceEstimator
    from mpmm.shared_state.transaction import TransactionLock
    from mpmm.worker import Worker

__all__ = ["BeamNames", "CopiesByTag"]


class BeamNames:
    """Beam's attributes of a `ModelManager`, for a class that has `_connected`, `all_models` and `force_reset`."""

    _given_monitor: GPUMonitor | MonitorLike | None

    def _connected(self) -> Worker:
        raise NotImplementedError

    def supersede(self, old: str, new: str) -> None:
        """Have idle copies of `old` evicted before all others, because `new` has taken its place.

        Requests for `old` are served as before. It counts like every other model again once it takes the place of one.
        Raises InvalidArgumentError, ClosedError, LockTimeoutError.
        """
        encode_text(new, Model.TAG_BYTES, "model tag")
        encode_text(old, Model.TAG_BYTES, "model tag")
        namespace = self._connected().namespace
        with namespace.transaction() as t:
            for tag, superseded in ((old, old != new), (new, False)):
                row = namespace.tables.model_row(tag)
                if row is not None:
                    namespace.transitions.supersede(t, row, superseded)

    def all_models(self, tag: str | None = None) -> Any:
        """See `ModelManager.all_models`."""
        raise NotImplementedError

    @property
    def _estimator(self) -> SharedResourceEstimator:
        return self._connected().estimator

    @property
    def _monitor(self) -> Any:
        return self._given_monitor or self._connected().monitor

    @property
    def _cv(self) -> TransactionLock:
        return self._connected().namespace.lock

    @property
    def _models(self) -> CopiesByTag:
        return cast("CopiesByTag", self.all_models())

    @property
    def _idle_lru(self) -> _IdleCopies:
        return _IdleCopies(self._connected())

    @property
    def _active_counts(self) -> Counter[str]:
        worker = self._connected()
        words, tables = worker.namespace.segment.words, worker.namespace.tables
        with worker.namespace.transaction():
            rows = tables.model_rows()
            return Counter({tables.tag_of(row): words[tables.model(row) + Model.ACTIVE] for row in rows})

    @property
    def _total_active_jobs(self) -> int:
        words = self._connected().namespace.segment.words
        return int(words[Header.ACTIVE] + words[Header.LOADING])

    @property
    def _pending_reservations(self) -> float:
        worker = self._connected()
        with worker.namespace.transaction():
            return sum(worker.scheduler.read_copies().reserved_mb.values())

    @property
    def _isolation_mode(self) -> bool:
        return bool(self._connected().namespace.segment.words[Header.ISOLATED])


class CopiesByTag(dict[str, list[Any]]):
    """Copies by tag; a tag without any has an empty list."""

    def __missing__(self, tag: str) -> list[Any]:
        return []


class _IdleCopies(MutableMapping[int, tuple[str, Any, float]]):
    """Idle copies, the one that has been idle longest first: row -> (tag, instance, `time.time()` of its release)."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def _rows(self) -> dict[int, tuple[str, Any, float]]:
        worker = self._worker
        words, tables = worker.namespace.segment.words, worker.namespace.tables
        now, wall = time.monotonic_ns(), time.time()
        with worker.namespace.transaction():
            rows = tables.rows_where(worker.namespace.segment.layout.instances, Instance.STATE, Instance.IDLE)
            rows.sort(key=lambda row: words[tables.instance(row) + Instance.SINCE])
            return {
                row: (
                    tables.tag_of(words[tables.instance(row) + Instance.MODEL]),
                    worker.value_of(row),
                    wall - (now - words[tables.instance(row) + Instance.SINCE]) / 1e9,
                )
                for row in rows
            }

    def __getitem__(self, row: int) -> tuple[str, Any, float]:
        return self._rows()[row]

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows())

    def __len__(self) -> int:
        return len(self._rows())

    def __setitem__(self, row: int, entry: tuple[str, Any, float]) -> None:
        """Change since when an idle copy is idle. Raises KeyError when the row is not idle."""
        worker = self._worker
        since = time.monotonic_ns() - int((time.time() - entry[2]) * 1e9)
        at = worker.namespace.tables.instance(row)
        with worker.namespace.transaction() as t:
            if worker.namespace.segment.words[at + Instance.STATE] != Instance.IDLE:
                raise KeyError(row)
            t.set(at + Instance.SINCE, max(0, since))

    def __delitem__(self, row: int) -> None:
        raise TypeError("copies leave the books by being unloaded")
