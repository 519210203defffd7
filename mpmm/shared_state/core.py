"""The compiled core of the warm path, where there is one: `_core.c` makes the two commonest transactions.

It takes an idle copy, and gives one back, while nobody waits, or only those who wait for a copy in this process's
tenure, and nothing else is out of the ordinary. In every other case it says so, with nothing changed. Python is the
definition, and does what the core does not: without a compiler all of it. `MPMM_CORE=python` has Python do everything,
too; `MPMM_CORE=compiled` refuses to do without.

The core knows no word's place by itself. It names the words that it needs (`OFFSETS`), and they are looked up in
`layout.py` here. A field of a model's or an instance's row that is not named in `_FAMILIAR`, because it was added
later, has to be 0 for the core to act: the one who adds it may change what these transactions have to do.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from mpmm.errors import InvalidArgumentError
from mpmm.shared_state import layout as layout_module
from mpmm.shared_state.events import EventKind
from mpmm.shared_state.layout import Capacities, Instance, Layout, Model

if TYPE_CHECKING:
    from mpmm.shared_state._core import Core
    from mpmm.shared_state.segment import Segment

__all__ = ["CORE_VARIABLE", "make_core", "which"]

CORE_VARIABLE = "MPMM_CORE"
_CHOICES = ("python", "compiled")

# What a copy's reuse leaves as it is, or changes as the core does.
_FAMILIAR: dict[type[Model | Instance], tuple[str, ...]] = {
    Model: (
        *("STATE", "GENERATION", "ESTIMATE_MB", "KNOWN", "LOADED", "ACTIVE", "IDLE", "LOADING", "UNLOADING", "WAITING"),
        *("IDLE_HEAD", "USED_AT", "LOADS", "HITS", "EVICTIONS", "MEASURED", "SHARES", "LOAD_S", "HOLD_S", "PINS"),
        *("MEAN_INTERARRIVAL_S", "REQUESTS", "REQUESTED_AT"),
        *("SD_MB", "AT_LEAST_MB", "FAILURES", "FAILED_AT", "EXPECT_MB"),
        *("SUPERSEDED", "SUSPENDED", "SUSPENDS", "RESUMES", "SUSPEND_S", "RESUME_S", "UNSUSPENDABLE", "KEEP_ALIVE"),
        *("USERS", "SEATS"),
    ),
    Instance: (
        *("STATE", "MODEL", "GENERATION", "HOLDER", "OWNER", "SERVER", "DEVICES", "MB", "RESERVED_MB", "SINCE"),
        *("SEAT_OF", "SEATS"),
        *("LOADED_AT", "NEXT", "PREVIOUS", "UNLOAD_ON_RELEASE", "HAS_SERVER", "USES", "PROGRAM"),
        *("UNLOAD_LATE", "HANDED_AT"),
        *("WAY", "DEVICE_MB", "HOST_MB"),
    ),
}
# From these fields on, to the end of the row.
_TEXTS: dict[type[Model | Instance], int] = {Model: Model.TAG, Instance: Instance.SHARES}


def which() -> str:
    """Return `compiled` or `python`, whichever makes the transactions of the warm path. Raises InvalidArgumentError."""
    return "python" if _core_class() is None else "compiled"


def make_core(segment: Segment, pid: int, smoothing: float, turn: int) -> Core | None:
    """Return the core for a segment and the process that uses it; None if Python is to do it all.

    smoothing: weight of the newest hold in the mean. turn: transactions after which a process that meets others at
    the lock offers its processor. Raises InvalidArgumentError.
    """
    core = _core_class()
    if core is None:
        return None
    layout = segment.layout
    strange = _strange(Model), _strange(Instance)
    memory = segment.words.obj
    return core(memory, layout.words, _offsets(layout.capacities), *strange, pid, smoothing, turn)


def _core_class() -> type[Core] | None:
    choice = os.environ.get(CORE_VARIABLE, "")
    if choice not in ("", *_CHOICES):
        raise InvalidArgumentError(f"{CORE_VARIABLE}={choice!r}: expected {' or '.join(_CHOICES)}, or nothing")
    if choice == "python":
        return None
    try:
        from mpmm.shared_state._core import Core
    except ImportError as error:
        if choice == "compiled":
            raise InvalidArgumentError(
                f"{CORE_VARIABLE}=compiled: the compiled core is not there ({error}); install mpmm with a C compiler "
                "and Python's headers at hand, or leave the variable out"
            ) from error
        return None
    return Core


@functools.lru_cache(maxsize=8)
def _offsets(capacities: Capacities) -> tuple[int, ...]:
    from mpmm.shared_state._core import OFFSETS

    owners: dict[str, object] = {table.name: table for table in Layout(capacities).tables}
    owners |= {"": layout_module, "EventKind": EventKind}
    values = []
    for name in OFFSETS:
        owner, _, field = name.rpartition(".")
        at = owners[owner] if owner in owners else getattr(layout_module, owner)
        values.append(int(getattr(at, field)))
    return tuple(values)


@functools.cache
def _strange(row: type[Model | Instance]) -> tuple[int, ...]:
    """Return the fields of a row that nothing is known of here."""
    known = {getattr(row, name) for name in _FAMILIAR[row]}
    return tuple(word for word in range(_TEXTS[row]) if word not in known)
