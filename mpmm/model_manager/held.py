"""Which instances this process and its threads hold, and which objects it has loaded.

The members table knows the process as one member, and an instance row names its holder. Which thread holds what, and
which object a row stands for, only the process itself knows: here. An acquire and a release pass through
`HeldInstances`, by the compiled core where that will do (see `shared_state/core.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

from mpmm import multi_process_shared
from mpmm.model_manager.operations import Held, LoadedInstance, Operation, key_of
from mpmm.model_manager.tenure import Tenure, Tenures
from mpmm.scheduling import Scheduler
from mpmm.shared_state.core import HANDED_OVER, KEEP, KEEP_AND_CALL_UP, KEPT, TO_NEXT
from mpmm.shared_state.layout import Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.transaction import Transaction
from mpmm.text.printable import printable_logger
from mpmm.thread_locks import new_rlock

__all__ = ["HeldInstances", "server_pid_of"]

_LOG = printable_logger("mpmm")


class HeldInstances:
    """The instances that this process holds, and the objects that it owns. All of its threads share it.

    holds: what the process holds, by row and generation. Without a mutex: each change is one step of the interpreter,
    which neither threads nor finalizers can split.
    """

    def __init__(self, namespace: Namespace, scheduler: Scheduler, tenures: Tenures) -> None:
        self._namespace = namespace
        self._scheduler = scheduler
        self._tenures = tenures
        # What the warm path would look up again and again.
        self._lock = namespace.lock
        self._reference = namespace.reference
        self._rows_of_tags = namespace.tables.rows_of_tags
        self._queue = namespace.reads.queue
        self._instances = namespace.reads.instances
        # An RLock, because a finalizer or signal handler may come by while its own thread has it.
        self._mutex = new_rlock()
        # Objects loaded here, by row: nobody else can use them.
        self._objects: dict[int, LoadedInstance] = {}
        self._rows_of_model: dict[int, list[int]] = defaultdict(list)
        # Of the objects' rows those that are seats.
        self._seats: set[int] = set()
        # Handles that this process has held, by row; the generation tells whether one still stands there.
        self._handles: dict[int, LoadedInstance] = {}
        self.holds: dict[tuple[int, int], Held] = {}
        # Where a value was last seen to be held; without a mutex, too.
        self._held_at: dict[Hashable, tuple[int, int]] = {}
        # Row and number of tickets whose grants this process has acted upon, see `take_granted`.
        self._taken_grants: set[tuple[int, int]] = set()
        # Tags whose loaders were seen to return handles of others.
        self._twins_of_tags: set[str] = set()

    def find_idle(self, tag: str, usable_on: int = 0) -> int | None:
        """Return the row of an idle copy that this process can use, or None. Needs the lock.

        usable_on: bits of the devices on which it must lie, 0 for all.
        """
        model = self._namespace.tables.model_row(tag)
        if model is None:
            return None
        shared = self._instances.first_idle(model, usable_on)
        if shared is not None:
            return shared
        for row in reversed(self._rows_of_model.get(model, ())):
            if self._instances.is_idle(row, self._objects[row].generation, usable_on):
                return row
        return None

    def add(self, row: int, tag: str, operation: Operation) -> LoadedInstance:
        """Note that this process holds the copy of `tag` in an ACTIVE row, and return it. Needs the lock."""
        generation, uses = self._instances.use(row)
        copy = self._copy_in(row, generation, tag)
        self._note_held(copy, uses, operation)
        return copy

    def take_quickly(self, tag: str, operation: Operation, kept: int = 0) -> LoadedInstance | None:
        """Take an idle copy that this process can use, note that it holds it, and return it, by the compiled core.

        None, with nothing changed, where there is no core, or if it takes Python: somebody waits, a copy runs alone,
        the lock is not free, there is no such copy, or this is its first use here. Takes the lock itself.

        kept: generation of a copy, the only one to be taken, that is in this process's tenure: those who wait for it
        may wait. 0: none.
        """
        core = self._lock.core
        if core is None:
            return None
        copy: LoadedInstance | None = core.take_idle(
            self._namespace,
            self._reference,
            self._rows_of_tags,
            self._handles,
            self._objects,
            self._rows_of_model,
            self.holds,
            self._held_at,
            tag,
            operation,
            kept,
        )
        return copy

    def may_find_idle(self, tag: str) -> bool:
        """Tell whether `find_idle` may find a copy; without the lock. False: none is idle, unless in a moment."""
        model = self._namespace.tables.model_row(tag)
        return model is None or self._namespace.tables.models[model].idle > 0

    def take_at_once(self, tag: str, operation: Operation) -> LoadedInstance | None:
        """Take a copy like `take_quickly`, or where others wait for the model, like `take_kept`."""
        if not self._scheduler.may_have_to_wait(tag):
            return self.take_quickly(tag, operation)
        return self.take_kept(tag, operation) if self.comes_back(tag) else None

    def take_kept(self, tag: str, operation: Operation) -> LoadedInstance | None:
        """Take the copy that is in this process's tenure like `take_quickly`; None also if there is none."""
        tenure = self._tenures.kept(tag)
        return None if tenure is None else self.take_quickly(tag, operation, tenure.generation)

    def give_back_quickly(self, copy: LoadedInstance) -> bool:
        """Give a copy back, that `take_off` has struck off, by the compiled core; False where it takes Python.

        It becomes idle, stays with this process for the rest of its tenure, or is handed to the first waiter. Where
        False is returned, nothing has changed. Takes the lock itself.
        """
        core = self._lock.core
        if core is None:
            return False
        tenure = self._keeping(copy) if self._scheduler.must_queue() else None
        way = TO_NEXT if tenure is None else KEEP if tenure.called_up else KEEP_AND_CALL_UP
        done = core.release(self._namespace, self._reference, self._taken_grants, copy.row, copy.generation, way)
        if done == HANDED_OVER:
            self._tenures.end(copy.tag)
            self._scheduler.wakes.yield_to_waiter()
            # Not before the waiter was let run on this processor.
            self._tenures.leave(copy.tag)
        elif done == KEPT and tenure is not None:
            tenure.called_up = True
            self._tenures.leave(copy.tag)
        return done != 0

    def _keeping(self, copy: LoadedInstance) -> Tenure | None:
        """Return this process's tenure of a copy if it mostly comes back at once; else None."""
        tenure = self._tenures.current(copy.tag)
        if tenure is None or (tenure.row, tenure.generation) != (copy.row, copy.generation):
            return None
        return tenure if self._tenures.comes_back_at_once(copy.tag) else None

    def comes_back(self, tag: str) -> bool:
        """Note that this process asks for a model that others wait for; tell whether a copy is kept for it."""
        self._tenures.come_back(tag)
        tenure = self._tenures.kept(tag)
        return tenure is not None and self._instances.is_idle(tenure.row, tenure.generation)

    def has_tenure(self, tag: str, row: int) -> bool:
        """Tell whether a copy was handed to this process a moment ago, so that it comes before others."""
        tenure = self._tenures.kept(tag)
        return tenure is not None and tenure.row == row and self._instances.is_still(row, tenure.generation)

    def keeps(self, t: Transaction, copy: LoadedInstance, used: bool) -> bool:
        """Give a copy back, but leave it idle for this process if it may keep it; else return False."""
        tenure = self._keeping(copy)
        if tenure is None or not self._scheduler.keep(t, copy.row, used, call_up=not tenure.called_up):
            return False
        tenure.called_up = True
        return True

    def _note_held(self, copy: LoadedInstance, uses: int, operation: Operation) -> None:
        at = (copy.row, copy.generation)
        operation.gives_back = False
        operation.held = held = (copy, uses)
        self.holds[at] = held
        self._held_at[copy.key] = at

    def take_granted(self, row: int, tag: str, operation: Operation) -> LoadedInstance | None:
        """Note that this process holds what its ticket `row` was granted, and return it; without the lock.

        None if that cannot be told, because transactions come too fast or this machine's processors may reorder reads.
        The ticket is freed later, by `free_taken_tickets`: a transaction of its own would double the waiter's part of a
        hand-over.
        """

        copy = self._take_granted_quickly(row, operation)
        if copy is not None:
            self._tenures.begin(tag, copy.row, copy.generation)
            return copy

        def granted() -> tuple[int, int, LoadedInstance] | None:
            answer = self._queue.answer(row)
            if answer.state != Ticket.GRANTED:
                return None
            generation, uses = self._instances.use(answer.instance)
            # Noted only once it is certain, as the row may be another copy's by now.
            return answer.number, uses, self._seen_in(answer.instance, generation, tag)

        found = self._queue.unlocked(granted)
        if found is None:
            return None
        number, uses, copy = found
        self._note_handle(copy)
        # First the hold, so that no transaction finds a copy in use that nobody in this process has.
        self._note_held(copy, uses, operation)
        self._taken_grants.add((row, number))
        self._tenures.begin(tag, copy.row, copy.generation)
        return copy

    def _take_granted_quickly(self, row: int, operation: Operation) -> LoadedInstance | None:
        """Do what `take_granted` does by the compiled core; None where it takes Python."""
        core = self._lock.core
        if core is None:
            return None
        notes = (self._handles, self._objects, self.holds, self._held_at, self._taken_grants)
        copy: LoadedInstance | None = core.take_granted(row, *notes, operation)
        return copy

    def free_taken_tickets(self, t: Transaction) -> None:
        """Free the tickets whose grants were acted upon without the lock.

        To be called before anything else in a transaction in which this process gives up a copy.
        """
        if not self._taken_grants:
            return
        grants = tuple(self._taken_grants)
        for row, number in grants:
            # If not, another thread has just done so, and is about to take it off the list.
            if self._queue.is_still(row, number):
                self._namespace.transitions.hand_over.consume_answer(t, row)
        t.after.append(partial(self._forget_freed, grants))

    def _forget_freed(self, grants: Sequence[tuple[int, int]]) -> None:
        """Strike tickets off that are free. Looks, as calls after a transaction that was undone may be made, too."""
        for grant in grants:
            if not self._queue.is_still(*grant):
                self._taken_grants.discard(grant)

    @property
    def has_taken_tickets(self) -> bool:
        """Tell whether there is something to settle."""
        return bool(self._taken_grants)

    def _copy_in(self, row: int, generation: int, tag: str) -> LoadedInstance:
        """Return what this process knows, or can read, of the copy of this generation in a row; note it."""
        copy = self._seen_in(row, generation, tag)
        self._note_handle(copy)
        return copy

    def _seen_in(self, row: int, generation: int, tag: str) -> LoadedInstance:
        copy = self._objects.get(row) or self._handles.get(row)
        if copy is None or copy.generation != generation:
            copy = LoadedInstance(row, generation, tag, self._namespace.tables.handle_of(row))
        return copy

    def _note_handle(self, copy: LoadedInstance) -> None:
        if self._objects.get(copy.row) is not copy:
            self._handles[copy.row] = copy

    def add_loaded(self, row: int, tag: str, value: Any, operation: Operation) -> LoadedInstance:
        """Note a copy that this process has just loaded and holds; an object is its own from now on."""
        generation, uses = self._instances.use(row)
        copy = LoadedInstance(row, generation, tag, value)
        if not isinstance(value, str):
            self._own(copy, self._instances.held(row).model)
            self.add_seats(row)
        self._note_held(copy, uses, operation)
        return copy

    def add_seats(self, row: int) -> None:
        """Note the seats of a copy in a row that has just become ACTIVE, if it is an object of this process.

        Needs the lock.
        """
        copy, tables = self._objects.get(row), self._namespace.tables
        if copy is None:
            return
        for seat in tables.seats_of(row):
            instance = tables.instances[seat]
            self._own(LoadedInstance(seat, instance.generation, copy.tag, copy.value), instance.model)
            self._seats.add(seat)

    def _own(self, copy: LoadedInstance, model: int) -> None:
        """Note that an object of this process stands in a row, for a model (row)."""
        with self._mutex:
            # A seat leaves its row without a word, and another model may have that row by now.
            self._strike_off(copy.row)
            self._objects[copy.row] = copy
            self._rows_of_model[model].append(copy.row)

    def _strike_off(self, row: int) -> None:
        for rows in self._rows_of_model.values():
            if row in rows:
                rows.remove(row)
        self._objects.pop(row, None)
        self._seats.discard(row)

    def take_off(self, value: Any, tag: str, operation: Operation) -> LoadedInstance | None:
        """Strike a held copy off the list and return it; None when this process holds no such thing.

        Several copies can have equal handles, or be the same object: one of `tag` is preferred.
        """
        while True:
            held = self._find_held(value, tag)
            if held is None:
                return None
            if self.take_off_hold(held, operation):
                return held[0]

    def take_off_hold(self, held: Held, operation: Operation) -> bool:
        """Strike a hold off the list; return False if it was struck off before."""
        copy = held[0]
        at = (copy.row, copy.generation)
        operation.held, operation.gives_back = held, True
        found = self.holds.pop(at, None)
        if found is held:
            self._held_at.pop(copy.key, None)
            return True
        operation.held, operation.gives_back = None, False
        if found is not None:
            # Another hold of the same copy, which has begun since.
            self.holds[at] = found
        return False

    def _find_held(self, value: Any, tag: str) -> Held | None:
        key = key_of(value)
        at = self._held_at.get(key)
        held = None if at is None else self.holds.get(at)
        if held is not None and held[0].tag == tag and held[0].key == key:
            return held
        found = [held for held in list(self.holds.values()) if held[0].key == key]
        return next((held for held in reversed(found) if held[0].tag == tag), found[-1] if found else None)

    def put_back(self, held: Held) -> None:
        """Put back on the list what `take_off` has struck off."""
        copy = held[0]
        self.holds[copy.row, copy.generation] = held

    @property
    def has_any(self) -> bool:
        """Tell whether this process holds copies of models; without the lock."""
        return bool(self.holds)

    def is_held(self, copy: LoadedInstance) -> bool:
        """Tell whether the row still says that this process holds the copy. Needs the lock."""
        return self._instances.is_held(copy.row, copy.generation, self._namespace.reference)

    def value_of(self, row: int) -> Any:
        """Return the object or handle of a row as far as this process can know it, else None."""
        owned = self._objects.get(row)
        # A seat's row may be another copy's by now.
        is_ours = owned is not None and self._instances.is_still(row, owned.generation)
        return owned.value if owned is not None and is_ours else (self._namespace.tables.handle_of(row) or None)

    def is_twin(self, copy: LoadedInstance) -> bool:
        """Tell whether others stand for the same handle as a copy. Looks without the lock, which a holder may do."""
        return self._namespace.transitions.twins.any_of(copy.row)

    def warn_of_twins(self, t: Transaction, tag: str, handle: str) -> None:
        """Say, once a tag, that a loader has returned a handle that another one has returned before."""
        if tag not in self._twins_of_tags:
            self._twins_of_tags.add(tag)
            text = (
                "mpmm %s: pid %d: the loader of %s has returned the handle %r, whose object is "
                "loaded already: it is counted once, and unloaded with the last copy; let the loader return a new "
                "handle each time, or set max_model_copies=1"
            )
            t.after.append(partial(_LOG.warning, text, self._namespace.name, self._namespace.pid, tag, handle))

    def handle_is_alive(self, copy: LoadedInstance) -> bool:
        """Tell whether what a handle stands for still lives; a handle that never named a server is taken on trust."""
        has_server, server = self._instances.server(copy.row)
        if not has_server:
            return True
        if server is not None:
            return self._namespace.member_is_alive(server)
        return multi_process_shared.server_pid(copy.value) is not None

    def forget_object(self, row: int, generation: int) -> LoadedInstance | None:
        """Strike an object off the list and return it; None if the row is no longer that copy's."""
        with self._mutex:
            copy = self._objects.get(row)
            if copy is None or copy.generation != generation:
                return None
            self._strike_off(row)
            # Those of its seats, which are free rows by now or somebody else's.
            for other in [other for other in self._objects.values() if other.value is copy.value]:
                instance = self._namespace.tables.instances[other.row]
                if not instance.state or instance.generation != other.generation:
                    self._strike_off(other.row)
            return copy

    def objects(self) -> list[LoadedInstance]:
        """Return what this process has loaded for itself."""
        return [copy for row, copy in list(self._objects.items()) if row not in self._seats]


def server_pid_of(value: Any) -> int | None:
    """Return the pid of the process behind a handle; None for an object, or a handle without a server."""
    return multi_process_shared.server_pid(value) if isinstance(value, str) else None
