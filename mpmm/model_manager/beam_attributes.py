"""The names under which Beam's manager keeps its state, as views of the shared state.

Beam's own tests, those of other projects, and scripts that people wrote to look into a stuck worker use these. They are
read-only, except that setting an entry of `_idle_lru` changes since when a copy counts as idle, and that a parameter
may be set, for all processes if it belongs to the namespace.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from mpmm.model_manager.request import AcquireOptions, read_options
from mpmm.shared_state.layout import Instance, Model
from mpmm.shared_state.tables import encode_text

if TYPE_CHECKING:
    from mpmm.memory.shared_estimator import SharedResourceEstimator
    from mpmm.model_manager.attachment import Attachment
    from mpmm.model_manager.session import Session
    from mpmm.shared_state.transaction import TransactionLock

__all__ = ["BeamNames", "Condition", "CopiesByTag"]

# How often `Condition.wait` checks whether another process has changed something.
LOOK_S = 0.01


class _Parameter:
    """A parameter of the namespace, under another name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, manager: BeamNames | None, owner: type | None = None) -> Any:
        if manager is None:
            return self
        namespace = manager._connected().namespace
        # Inside a transaction, because a process notices there that settings have changed.
        with namespace.transaction():
            return getattr(namespace.settings, self._name)

    def __set__(self, manager: BeamNames, value: float) -> None:
        manager.update_settings(**{self._name: value})


class Condition(threading.Condition):
    """The condition that Beam's tests hold while they look at a manager, and on which they wait for a change.

    It belongs to this process alone: callers' code never runs under the segment's lock. So the state may change while a
    thread holds this, but the thread may call every method of the manager, as in Beam.
    """

    def __init__(self, lock: TransactionLock) -> None:
        super().__init__()
        self.segment_lock = lock
        # Beam's tests ask it whether a lock was left held; for us that is the segment's lock.
        owned: Callable[[], bool] = vars(self)["_is_owned"]
        vars(self)["_is_owned"] = lambda: owned() or lock.held_by_this_thread()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until any process changes anything, or a thread of this one notifies; False if it times out."""
        before = self.segment_lock.changes
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (left := deadline - time.monotonic()) > 0:
            if super().wait(min(left, LOOK_S)) or self.segment_lock.changes != before:
                return True
        return False


class BeamNames:
    """Beam's attributes of a `ModelManager`, for a class that has the methods and attributes below."""

    _attachment: Attachment
    _connected: Callable[[], Session]
    _condition: Condition | None = None

    _slack_percentage = _Parameter("slack_percentage")
    _eviction_cooldown = _Parameter("eviction_cooldown_seconds")
    _min_model_copies = _Parameter("min_model_copies")
    _lock_timeout_seconds = _Parameter("lock_timeout_seconds")

    def supersede(self, old: str, new: str) -> None:
        """Have idle copies of `old` evicted before all others, because `new` has taken its place.

        Requests for `old` are served as before. It counts like other models again once it takes the place of one, in a
        later call. Raises InvalidArgumentError, ClosedError, LockTimeoutError.
        """
        encode_text(new, Model.TAG_BYTES, "model tag")
        encode_text(old, Model.TAG_BYTES, "model tag")
        namespace = self._connected().namespace
        with namespace.transaction() as t:
            for tag, superseded in ((old, old != new), (new, False)):
                row = namespace.tables.model_row(tag)
                if row is not None:
                    namespace.transitions.models.supersede(t, row, superseded)

    def set_request_defaults(
        self, tag: str, *, users: int | None = None, expect_mb: float | None = None, priority: int = 0
    ) -> None:
        """Set defaults of these options of `acquire_model` for this process's requests for a model.

        For programs whose requests are made by others: by Beam, say. None, and a priority of 0, set nothing. Another
        call for the model replaces all of these defaults. Raises InvalidArgumentError, ClosedError.
        """
        encode_text(tag, Model.TAG_BYTES, "model tag")
        session = self._connected()
        options = AcquireOptions(users=users, expect_mb=expect_mb, priority=priority)
        session.request_defaults[tag] = read_options(options, session.samples)

    def all_models(self, tag: str | None = None) -> Any:
        """See `ModelManager.all_models`."""
        raise NotImplementedError

    def force_reset(self) -> None:
        """See `ModelManager.force_reset`."""
        raise NotImplementedError

    def tickets(self) -> list[Any]:
        """See `ModelManager.tickets`."""
        raise NotImplementedError

    def update_settings(self, **changes: float | None) -> None:
        """See `ModelManager.update_settings`."""
        raise NotImplementedError

    def _force_reset(self) -> None:
        self.force_reset()

    def _delete_all_models(self) -> None:
        self.force_reset()

    @property
    def _estimator(self) -> SharedResourceEstimator:
        return self._connected().estimator

    @property
    def _monitor(self) -> Any:
        given = self._attachment.joins_with.monitor
        return self._connected().monitor if given is None else given

    @property
    def _cv(self) -> Condition:
        lock = self._connected().namespace.lock
        if self._condition is None or self._condition.segment_lock is not lock:
            self._condition = Condition(lock)
        return self._condition

    @property
    def _wait_timeout_seconds(self) -> float:
        return self._attachment.settings.wait_timeout_seconds

    @_wait_timeout_seconds.setter
    def _wait_timeout_seconds(self, seconds: float) -> None:
        self._attachment.settings = replace(self._attachment.settings, wait_timeout_seconds=seconds)

    def _demand(self, tag: str) -> int:
        """Return how many copies are in use, being loaded or waited for; read without the lock, so approximate."""
        namespace = self._connected().namespace
        row = namespace.tables.model_row(tag)
        if row is None:
            return 0
        model = namespace.tables.models[row]
        return model.active + model.loading + model.waiting

    @property
    def _wait_queue(self) -> list[Any]:
        return self.tickets()

    @property
    def _models(self) -> CopiesByTag:
        return cast("CopiesByTag", self.all_models())

    @property
    def _idle_lru(self) -> _IdleCopies:
        return _IdleCopies(self._connected())

    @property
    def _active_counts(self) -> Counter[str]:
        session = self._connected()
        tables = session.namespace.tables
        with session.namespace.transaction():
            return Counter({tables.tag_of(row): tables.models[row].active for row in tables.model_rows()})

    @property
    def _total_active_jobs(self) -> int:
        header = self._connected().namespace.tables.header
        return header.active + header.loading

    @property
    def _pending_reservations(self) -> float:
        session = self._connected()
        with session.namespace.transaction():
            return sum(session.scheduler.read_copies().reserved_mb.values())

    @property
    def _isolation_mode(self) -> bool:
        return bool(self._connected().namespace.tables.header.isolated)

    @property
    def _isolation_baseline(self) -> float:
        session = self._connected()
        tables = session.namespace.tables
        with session.namespace.transaction():
            baselines = [tables.devices[row].baseline_mb for row in tables.header.isolated]
        return next((float(mb) for mb in baselines if not math.isnan(mb)), 0.0)


class CopiesByTag(dict[str, list[Any]]):
    """Copies by tag; a tag without any has an empty list."""

    def __missing__(self, tag: str) -> list[Any]:
        return []


class _IdleCopies(MutableMapping[int, tuple[str, Any, float]]):
    """Idle copies, longest idle first: row -> (tag, instance, `time.time()` of its release)."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def _rows(self) -> dict[int, tuple[str, Any, float]]:
        session = self._session
        tables = session.namespace.tables
        now, wall = time.monotonic_ns(), time.time()
        with session.namespace.transaction():
            rows = sorted(tables.idle_copies(), key=lambda row: tables.instances[row].since)
            return {
                row: (
                    tables.tag_of(tables.instances[row].model),
                    session.owned.value_of(row),
                    wall - (now - tables.instances[row].since) / 1e9,
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
        """Change since when an idle copy is idle. Raises KeyError if the row is not idle."""
        session = self._session
        since = time.monotonic_ns() - int((time.time() - entry[2]) * 1e9)
        at = session.namespace.tables.instance(row)
        with session.namespace.transaction() as t:
            if session.namespace.tables.instances[row].state != Instance.IDLE:
                raise KeyError(row)
            t.set(at + Instance.SINCE, max(0, since))

    def __delitem__(self, row: int) -> None:
        raise TypeError("copies leave this table by being unloaded")
