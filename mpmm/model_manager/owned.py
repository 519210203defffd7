"""The objects that this process has loaded for itself, and the rows that stand for them.

Every process can use a handle, but only its owner can use an object. The instances table knows of such a copy, and to
which process it belongs, but does not contain the object.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from mpmm.interpreter.thread_locks import new_rlock
from mpmm.model_manager.operations import LoadedInstance
from mpmm.shared_state.namespace import Namespace

__all__ = ["OwnedObjects"]


class OwnedObjects:
    """The objects of this process. All of its threads share it.

    in_rows: the objects by row, including seats. rows_of_model: those rows by the model's row. `HeldInstances` and the
    compiled core read both; only this class changes them.
    """

    def __init__(self, namespace: Namespace) -> None:
        self._namespace = namespace
        self._instances = namespace.reads.instances
        # An RLock, because a finalizer or signal handler may need it while its own thread has it.
        self._mutex = new_rlock()
        self.in_rows: dict[int, LoadedInstance] = {}
        self.rows_of_model: dict[int, list[int]] = defaultdict(list)
        # Those of the rows that are seats.
        self._seats: set[int] = set()

    def find_idle(self, model: int, usable_on: int = 0) -> int | None:
        """Return the row of an idle copy of a model (row), or None. Needs the lock.

        usable_on: see `HeldInstances.find_idle`.
        """
        for row in reversed(self.rows_of_model.get(model, ())):
            # A thread that unloads it may have struck it off since.
            copy = self.in_rows.get(row)
            if copy is not None and self._instances.is_idle(row, copy.generation, usable_on):
                return row
        return None

    def add(self, copy: LoadedInstance) -> None:
        """Record an object that this process has just loaded, with its seats. Needs the lock."""
        self._put(copy, self._instances.held(copy.row).model)
        self.add_seats(copy.row)

    def add_seats(self, row: int) -> None:
        """Record the seats of a copy in a row that has just become ACTIVE, if it is an object of this process.

        Needs the lock.
        """
        copy, tables = self.in_rows.get(row), self._namespace.tables
        if copy is None:
            return
        for seat in tables.seats_of(row):
            instance = tables.instances[seat]
            self._put(LoadedInstance(seat, instance.generation, copy.tag, copy.value), instance.model)
            self._seats.add(seat)

    def forget(self, row: int, generation: int) -> LoadedInstance | None:
        """Strike an object off the list and return it; None if the row no longer stands for that copy."""
        with self._mutex:
            copy = self.in_rows.get(row)
            if copy is None or copy.generation != generation:
                return None
            self._strike_off(row)
            # Not a loop here: see `LocalSamples._drop_before`.
            self._strike_off_seats(copy)
            return copy

    def all(self) -> list[LoadedInstance]:
        """Return the objects that this process has loaded, each once."""
        return [copy for row, copy in self.in_rows.copy().items() if row not in self._seats]

    def value_of(self, row: int) -> Any:
        """Return the object or handle of a row if this process can know it, else None."""
        owned = self.in_rows.get(row)
        # A seat's row may belong to another copy by now.
        is_ours = owned is not None and self._instances.is_still(row, owned.generation)
        return owned.value if owned is not None and is_ours else (self._namespace.tables.handle_of(row) or None)

    def _put(self, copy: LoadedInstance, model: int) -> None:
        with self._mutex:
            # A seat's row is freed without telling this process, so this row may still be listed for another model.
            self._strike_off(copy.row)
            self.in_rows[copy.row] = copy
            self.rows_of_model[model].append(copy.row)

    def _strike_off_seats(self, copy: LoadedInstance) -> None:
        """Strike off the seats of a copy whose rows are free by now, or belong to another copy."""
        for other in [other for other in list(self.in_rows.values()) if other.value is copy.value]:
            instance = self._namespace.tables.instances[other.row]
            if not instance.state or instance.generation != other.generation:
                self._strike_off(other.row)

    def _strike_off(self, row: int) -> None:
        for rows in list(self.rows_of_model.values()):
            if row in rows:
                rows.remove(row)
        self.in_rows.pop(row, None)
        self._seats.discard(row)
