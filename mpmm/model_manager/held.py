"""Which instances this process and its threads hold.

In the shared tables the process is one member, and an instance row names the member that holds it. Only the process
itself knows which of its threads holds what: that is recorded here. An acquire and a release pass through
`HeldInstances`, in the compiled core where it suffices (see `shared_state/core.py`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any

from mpmm import multi_process_shared
from mpmm.model_manager.operations import Held, LoadedInstance, Operation, key_of
from mpmm.model_manager.owned import OwnedObjects
from mpmm.model_manager.tenure import Tenure, Tenures
from mpmm.scheduling import Scheduler
from mpmm.shared_state.core import HANDED_OVER, KEEP, KEEP_AND_CALL_UP, KEPT, TO_NEXT
from mpmm.shared_state.layout import Instance, Ticket
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.tables import encoded_handle
from mpmm.shared_state.transaction import Transaction

__all__ = ["HeldInstances"]


class HeldInstances:
    """The instances that this process holds. All of its threads share it.

    holds: what the process holds, by row and generation. It needs no mutex: each change is one step of the interpreter,
    which neither threads nor finalizers can split.
    """

    def __init__(self, namespace: Namespace, scheduler: Scheduler, tenures: Tenures, owned: OwnedObjects) -> None:
        self._namespace = namespace
        self._scheduler = scheduler
        self._tenures = tenures
        # Kept here, because the warm path would look these up again and again.
        self._lock = namespace.lock
        self._reference = namespace.reference
        self._rows_of_tags = namespace.tables.rows_of_tags
        self._queue = namespace.reads.queue
        self._instances = namespace.reads.instances
        self._owned = owned
        self._objects = owned.in_rows
        self._rows_of_model = owned.rows_of_model
        # Handles that this process has held, by row; the generation tells whether the row still holds that copy.
        self._handles: dict[int, LoadedInstance] = {}
        self.holds: dict[tuple[int, int], Held] = {}
        # Where a value was last seen to be held; also without a mutex.
        self._held_at: dict[Hashable, tuple[int, int]] = {}
        # Row and number of tickets whose grants this process has acted on, see `take_granted`.
        #
        # Threads change these without a mutex, and so may finalizers and signal handlers of a thread that iterates. It
        # iterates over a copy that is made in one step: `list` of keys or values, or `copy`. Not `list` of items, nor
        # `tuple`: both make tuples as they go, so in Python 3.11 a garbage collection may run finalizers in between.
        self._taken_grants: set[tuple[int, int]] = set()

    def find_idle(self, tag: str, usable_on: int = 0) -> int | None:
        """Return the row of an idle copy that this process can use, or None. Needs the lock.

        usable_on: bits of the devices on which it must lie, 0 for all.
        """
        model = self._namespace.tables.model_row(tag)
        if model is None:
            return None
        shared = self._instances.first_idle(model, usable_on)
        return self._owned.find_idle(model, usable_on) if shared is None else shared

    def add(self, row: int, tag: str, operation: Operation) -> LoadedInstance:
        """Record that this process holds the copy of `tag` in an ACTIVE row, and return it. Needs the lock."""
        generation, uses = self._instances.use(row)
        copy = self._copy_in(row, generation, tag)
        self._note_held(copy, uses, operation)
        return copy

    def take_quickly(self, tag: str, operation: Operation, timeout_s: float, kept: int = 0) -> LoadedInstance | None:
        """Take an idle copy that this process can use, record it as held, and return it, in the compiled core.

        Return None, with nothing changed, if there is no core, or if the request needs Python: requests wait, a copy
        runs alone, the lock is not free, there is no such copy, or this is its first use here. Takes the lock itself.

        timeout_s: for how long it may sleep for the lock, which is a tenth of a second at most. kept: generation of a
        copy in this process's tenure, the only one that may be taken, although requests wait for it; 0 for none.
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
            timeout_s,
        )
        return copy

    def may_find_idle(self, tag: str) -> bool:
        """Tell whether `find_idle` may find a copy; takes no lock. If False, none is idle at this moment."""
        model = self._namespace.tables.model_row(tag)
        return model is None or self._namespace.tables.models[model].idle > 0

    def take_at_once(self, tag: str, operation: Operation, timeout_s: float) -> LoadedInstance | None:
        """Take a copy like `take_quickly`, or, if others wait for the model, like `take_kept`."""
        if not self._scheduler.may_have_to_wait(tag):
            return self.take_quickly(tag, operation, timeout_s)
        return self.take_kept(tag, operation, timeout_s) if self.comes_back(tag) else None

    def take_kept(self, tag: str, operation: Operation, timeout_s: float) -> LoadedInstance | None:
        """Take the copy in this process's tenure like `take_quickly`; None also if there is none."""
        tenure = self._tenures.kept(tag)
        return None if tenure is None else self.take_quickly(tag, operation, timeout_s, tenure.generation)

    def give_back_quickly(self, copy: LoadedInstance, timeout_s: float | None = None) -> bool:
        """Give back a copy that `take_off` has struck off, in the compiled core.

        It becomes idle, stays with this process for the rest of its tenure, or is handed to the first waiter. Return
        False, with nothing changed, if the release needs Python. Takes the lock itself.

        timeout_s: as for `take_quickly`; None for the lock's own.
        """
        core = self._lock.core
        if core is None:
            return False
        tenure = self._keeping(copy) if self._scheduler.must_queue() else None
        way = TO_NEXT if tenure is None else KEEP if tenure.called_up else KEEP_AND_CALL_UP
        timeout_s = self._lock.timeout_seconds if timeout_s is None else timeout_s
        done = core.release(
            self._namespace,
            self._reference,
            self._taken_grants,
            copy.row,
            copy.generation,
            way,
            timeout_s,
        )
        if done == HANDED_OVER:
            self._tenures.end(copy.tag)
            self._scheduler.wakes.yield_to_waiter()
            # Not before the waiter has had a chance to run on this processor.
            self._tenures.leave(copy.tag)
        elif done == KEPT and tenure is not None:
            tenure.called_up = True
            self._tenures.leave(copy.tag)
        return done != 0

    def _keeping(self, copy: LoadedInstance) -> Tenure | None:
        """Return this process's tenure of a copy if the process usually comes back at once; else None."""
        tenure = self._tenures.current(copy.tag)
        if tenure is None or (tenure.row, tenure.generation) != (copy.row, copy.generation):
            return None
        return tenure if self._tenures.comes_back_at_once(copy.tag) else None

    def comes_back(self, tag: str) -> bool:
        """Record that this process asks for a model that others wait for; tell whether a copy is kept for it."""
        self._tenures.come_back(tag)
        tenure = self._tenures.kept(tag)
        return tenure is not None and self._instances.is_idle(tenure.row, tenure.generation)

    def has_tenure(self, tag: str, row: int) -> bool:
        """Tell whether a copy was handed to this process a moment ago, so that the process comes before others."""
        tenure = self._tenures.kept(tag)
        return tenure is not None and tenure.row == row and self._instances.is_still(row, tenure.generation)

    def keeps(self, t: Transaction, copy: LoadedInstance, used: bool) -> bool:
        """Give back a copy, but leave it idle for this process, if the process may keep it; else return False."""
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
        """Record that this process holds what its ticket `row` was granted, and return it; takes no lock.

        Return None if that is not certain, because transactions come too fast, or because this machine's processors may
        reorder reads. `free_taken_tickets` frees the ticket later: a transaction for that alone would double the
        waiter's part of a hand-over.
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
            # Recorded only once it is certain, because another copy may have the row by now.
            return answer.number, uses, self._seen_in(answer.instance, generation, tag)

        found = self._queue.unlocked(granted)
        if found is None:
            return None
        number, uses, copy = found
        self._note_handle(copy)
        # The hold comes first, so that no transaction finds a copy in use that no thread of this process holds.
        self._note_held(copy, uses, operation)
        self._taken_grants.add((row, number))
        self._tenures.begin(tag, copy.row, copy.generation)
        return copy

    def _take_granted_quickly(self, row: int, operation: Operation) -> LoadedInstance | None:
        """Do what `take_granted` does in the compiled core; return None if that needs Python."""
        core = self._lock.core
        if core is None:
            return None
        notes = (self._handles, self._objects, self.holds, self._held_at, self._taken_grants)
        copy: LoadedInstance | None = core.take_granted(row, *notes, operation)
        return copy

    def free_taken_tickets(self, t: Transaction) -> None:
        """Free the tickets whose grants this process acted on without the lock.

        A transaction in which this process gives up a copy must call this first.
        """
        if not self._taken_grants:
            return
        grants = list(self._taken_grants)
        for row, number in grants:
            # If not, another thread has just freed it, and is about to take it off the list.
            if self._queue.is_still(row, number):
                self._namespace.transitions.hand_over.consume_answer(t, row)
        t.after.append(partial(self._forget_freed, grants))

    def _forget_freed(self, grants: Sequence[tuple[int, int]]) -> None:
        """Strike off tickets that are free; checks, because `after` calls are also made if a transaction is undone."""
        for grant in grants:
            if not self._queue.is_still(*grant):
                self._taken_grants.discard(grant)

    @property
    def has_taken_tickets(self) -> bool:
        """Tell whether `free_taken_tickets` has anything to do."""
        return bool(self._taken_grants)

    def _copy_in(self, row: int, generation: int, tag: str) -> LoadedInstance:
        """Return the copy of this generation in a row, as this process knows it or can read it; record it."""
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
        """Record a copy that this process has just loaded and holds, and owns from now on if it is an object."""
        generation, uses = self._instances.use(row)
        copy = LoadedInstance(row, generation, tag, value)
        if not encoded_handle(value):
            self._owned.add(copy)
        self._note_held(copy, uses, operation)
        return copy

    def is_loaded(self, row: int, generation: int) -> bool:
        """Tell whether a row stands for a copy whose load has ended. Needs the lock."""
        instance = self._namespace.tables.instances[row]
        return instance.generation == generation and instance.state not in (Instance.FREE, Instance.LOADING)

    def forget_loaded(self, row: int, generation: int) -> LoadedInstance | None:
        """Strike off what `add_loaded` has recorded, because its transaction was undone; return it if it is an object.

        Otherwise the object would live as long as the process, with its memory, though no row stands for it.
        """
        held = self.holds.pop((row, generation), None)
        if held is not None:
            self._held_at.pop(held[0].key, None)
        return self._owned.forget(row, generation)

    def take_off(self, value: Any, tag: str, operation: Operation) -> LoadedInstance | None:
        """Strike a held copy off the list and return it; None if this process holds no such copy.

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
            # This is another hold of the same copy, which has begun since.
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
        """Tell whether this process holds copies of models; takes no lock."""
        return bool(self.holds)

    def is_held(self, copy: LoadedInstance) -> bool:
        """Tell whether the row still says that this process holds the copy. Needs the lock."""
        return self._instances.is_held(copy.row, copy.generation, self._namespace.reference)

    def handle_is_alive(self, copy: LoadedInstance) -> bool:
        """Tell whether the server behind a handle is alive; a handle that never named a server is taken on trust."""
        if not self._instances.named_server(copy.row):
            return True
        server = self._instances.server(copy.row)
        if server is not None:
            return self._namespace.member_is_alive(server)
        return multi_process_shared.server_pid(copy.value) is not None
