"""Changes that people make by hand: unloading a model, pinning it for all processes, changing the settings.

Both managers and the command line do these. The command line joins with `visit`, as a guest, which neither leads nor
measures, so that joining takes only a moment. The processes of the namespace carry out the unloads.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from mpmm.errors import ClosedError, NotAcquiredError, UnloadTimeoutError
from mpmm.scheduling import Scheduler
from mpmm.shared_state.layout import Instance, Member, Model
from mpmm.shared_state.namespace import Namespace
from mpmm.shared_state.settings import Settings
from mpmm.shared_state.tables import encode_text
from mpmm.shared_state.transaction import Transaction
from mpmm.text.printable import printable

__all__ = [
    *("Unload", "change_settings", "pin_for_all", "pin_once", "unload_model", "unpin_for_all"),
    *("visit", "wait_for_unload"),
]

# How often `wait_for_unload` checks whether the copies are gone.
LOOK_S = 0.01
# In the order in which copies are unloaded.
_LOADED = (Instance.IDLE, Instance.ACTIVE, Instance.LOADING, Instance.RESUMING)
_STAYING = (Instance.SUSPENDED, Instance.SUSPENDING, *_LOADED)


class Unload(NamedTuple):
    """The request of a call to unload `copies` copies of a tag: all those older than a generation."""

    tag: str
    copies: int
    generation: int


@contextlib.contextmanager
def visit(name: str, root: Path | None = None) -> Iterator[Namespace]:
    """Be a guest in a namespace for the length of a `with` block.

    Raises FileNotFoundError if none of its processes is alive, and what `Namespace.join` raises.
    """
    namespace = Namespace.join(name, root=root, kind=Member.GUEST, must_exist=True)
    try:
        yield namespace
    finally:
        namespace.leave()


def unload_model(namespace: Namespace, scheduler: Scheduler, tag: str) -> Unload:
    """Have all copies of a model unloaded: idle ones at once, the others when they are given back.

    Copies that are loaded later stay. Raises LockTimeoutError, ClosedError.
    """
    before: int | None = None
    copies, done = 0, False
    while not done:
        with namespace.transaction() as t:
            if before is None:
                before = namespace.tables.header.next_generation
            model = namespace.tables.model_row(tag)
            rows = [] if model is None else _staying(namespace, model, before, _STAYING)
            unloaded = _unload(namespace, t, rows)
            copies += unloaded
            done = unloaded == len(rows)
            scheduler.advance(t)
    return Unload(tag, copies, before or 0)


def _staying(namespace: Namespace, model: int, before: int, states: tuple[int, ...]) -> list[int]:
    """Return a model's copies in these states, in this order: older than a generation, not yet marked for unloading."""
    tables, found = namespace.tables, []
    for row in tables.rows_where(namespace.segment.layout.instances, Instance.MODEL, model):
        instance = tables.instances[row]
        # A seat is freed with its copy.
        staying = instance.state in states and not instance.unload_on_release and instance.seat_of is None
        if staying and instance.generation < before:
            state = Instance.ACTIVE if tables.is_in_use(row) else instance.state
            found.append((states.index(state), instance.since, row))
    return [row for _, _, row in sorted(found)]


def _unload(namespace: Namespace, t: Transaction, rows: list[int]) -> int:
    """Have these copies unloaded, until the transaction gets long; return for how many that was done."""
    unloader = _unloader(namespace)
    for count, row in enumerate(rows):
        if t.is_long:
            return count
        namespace.transitions.unloads.ask(t, row, unloader)
    return len(rows)


def _unloader(namespace: Namespace) -> int:
    """Return the slot of the process that is to unload handles: this one, or for a guest the leader."""
    tables = namespace.tables
    workers = tables.rows_where(namespace.segment.layout.members, Member.STATE, Member.WORKER)
    for slot in (namespace.slot, tables.header.leader):
        if slot in workers:
            return slot
    return workers[0] if workers else namespace.slot


def wait_for_unload(
    namespace: Namespace, asked: Unload, timeout_s: float, is_closing: Callable[[], bool] = lambda: False
) -> None:
    """Wait until the copies are gone. Raises UnloadTimeoutError, and ClosedError once `is_closing()`."""
    began = time.monotonic()
    while left := _left(namespace, asked):
        waited = time.monotonic() - began
        if waited >= timeout_s:
            shown = printable(namespace.tables.shown_for(asked.tag))
            raise UnloadTimeoutError(
                f"model {shown}: after {waited:.1f} s, {left} of {asked.copies} copies are still there; "
                "those in use are unloaded when they are given back (`mpmm inspect` shows which processes hold them)",
                tag=asked.tag,
                left=left,
                waited_seconds=waited,
            )
        time.sleep(LOOK_S)
        if is_closing():
            called = namespace.tables.called(asked.tag)
            raise ClosedError(f"the model manager was shut down while a thread waited for {called} to be unloaded")


def _left(namespace: Namespace, asked: Unload) -> int:
    """Return how many of the copies are still there; takes no lock."""
    tables = namespace.tables
    model = tables.model_row(asked.tag)
    rows = [] if model is None else tables.rows_where(namespace.segment.layout.instances, Instance.MODEL, model)
    copies = (instance for instance in (tables.instances[row] for row in rows) if instance.seat_of is None)
    return sum(instance.generation < asked.generation for instance in copies)


def change_settings(namespace: Namespace, scheduler: Scheduler, changes: Mapping[str, object]) -> Settings:
    """Change parameters of the namespace for all its processes, and return all of them.

    If `max_model_copies` falls, surplus copies are unloaded: idle ones first, those in use when they are given back;
    pinned models keep theirs. Raises InvalidArgumentError, and then nothing has changed; LockTimeoutError, ClosedError.
    """
    while True:
        with namespace.transaction() as t:
            settings = namespace.settings.changed(changes)
            surplus = _surplus(namespace, settings.max_model_copies)
            if _unload(namespace, t, surplus) == len(surplus):
                if settings != namespace.settings:
                    namespace.transitions.members.set_settings(t, settings)
                scheduler.advance(t)
                return settings


def _surplus(namespace: Namespace, most: float) -> list[int]:
    """Return the surplus copies, beyond `most` of one model, of all models that are not pinned."""
    # A pin promises that only `unload` and a reset unload its copies.
    models = [model for model in namespace.tables.model_rows() if not namespace.tables.models[model].pins]
    before = namespace.tables.header.next_generation
    staying = (_staying(namespace, model, before, _LOADED) for model in models)
    return [row for rows in staying for row in rows[: max(0, len(rows) - int(min(most, len(rows))))]]


def pin_for_all(namespace: Namespace, tag: str) -> None:
    """Keep the idle copies of a model until `unpin_for_all`; does nothing if the namespace has pinned it already.

    Raises TableFullError, InvalidArgumentError, LockTimeoutError, ClosedError.
    """
    pin_once(namespace, tag, -1)


def pin_once(namespace: Namespace, tag: str, member: int) -> None:
    """Pin a model for a member (slot), or for the namespace (-1), unless that one has pinned it already.

    Raises TableFullError, InvalidArgumentError, LockTimeoutError, ClosedError.
    """
    encoded = encode_text(tag, Model.TAG_BYTES, "model tag")
    # In one transaction, because another thread of the process may be about to do the same.
    with namespace.transaction() as t:
        found = namespace.tables.model_row(tag)
        if found is None or namespace.tables.pin_row(found, member + 1) is None:
            # First, because `claim` may remove a model to make room, in vain if there is no free row for the pin.
            namespace.tables.free_row(namespace.segment.layout.pins)
            namespace.transitions.pins.pin(t, namespace.transitions.models.claim(t, tag, encoded), member)


def unpin_for_all(namespace: Namespace, scheduler: Scheduler, tag: str) -> None:
    """End the namespace's pin on a model. Raises NotAcquiredError if there is none, LockTimeoutError, ClosedError."""
    with namespace.transaction() as t:
        model = namespace.tables.model_row(tag)
        row = None if model is None else namespace.tables.pin_row(model, 0)
        if row is None:
            called = namespace.tables.called(tag)
            raise NotAcquiredError(f"unpin of {called}: namespace {namespace.name!r} has no pin on it", tag=tag)
        namespace.transitions.pins.unpin(t, row)
        scheduler.advance(t)
