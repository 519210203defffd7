"""The compiled core of the warm path, where there is one: `_core.c` makes the commonest transactions.

It takes an idle copy, and gives one back: so that it is idle, or kept in this process's tenure, or handed to the first
waiter. It queues where a newcomer is known to wait for a copy that others have, sleeps until there is an answer, and
takes what that gives. In every case that is out of the ordinary it says so, with nothing changed. Python is the
definition, and does what the core does not: without a compiler all of it. `MPMM_CORE=python` has Python do everything,
too; `MPMM_CORE=compiled` refuses to do without.

The core knows no word's place by itself. It names the words that it needs (`OFFSETS`), and they are looked up in
`layout.py` here. A field of a model's or an instance's row that is not named in `_FAMILIAR`, because it was added
later, has to be 0 for the core to act: the one who adds it may change what these transactions have to do.

**The spin lock.** Processes that run at the same time, on a processor each, must not all try for the file lock: the
kernel guards that by a lock of its own, and on 16 processors the holder, who wanted to let go, stood in line behind
those who tried in vain, for 4 us instead of 0.4. So a process of the core looks at a word of shared memory,
`Header.SPIN_LOCK`, until it has that, and only then tries for the file lock. The word holds the time when it was taken,
and lapses, because its owner may be stopped or dead. It guards nothing: the file lock alone decides who is in, and
Python, whose transactions are few beside a core's, goes without.
"""

from __future__ import annotations

import functools
import os
from dataclasses import fields
from types import SimpleNamespace
from typing import TYPE_CHECKING

from mpmm.errors import InvalidArgumentError
from mpmm.policy.fairness import rank_ns
from mpmm.policy.view import Reason
from mpmm.shared_state import layout as layout_module
from mpmm.shared_state.events import EventKind
from mpmm.shared_state.layout import Capacities, Header, Instance, Layout, Model
from mpmm.shared_state.settings import Settings

if TYPE_CHECKING:
    from mpmm.shared_state._core import Core
    from mpmm.shared_state.segment import Segment

__all__ = [
    "CORE_VARIABLE",
    "HANDED_OVER",
    "KEEP",
    "KEEP_AND_CALL_UP",
    "KEPT",
    "TO_NEXT",
    "is_compiled",
    "make_core",
    "which",
]

CORE_VARIABLE = "MPMM_CORE"
_CHOICES = ("python", "compiled")

# What `Core.release` is told to do with a copy for which others wait: hand it to the first of them, or leave it idle
# for this process, which has called the first of them up, or is to.
TO_NEXT, KEEP, KEEP_AND_CALL_UP = range(3)
# What has become of it; 0 if Python decides, 1 if it is idle because nobody waits.
KEPT, HANDED_OVER = 2, 3

# What a copy's reuse leaves as it is, or changes as the core does.
_FAMILIAR: dict[type[Model | Instance], tuple[str, ...]] = {
    Model: (
        *("STATE", "GENERATION", "ESTIMATE_MB", "KNOWN", "LOADED", "ACTIVE", "IDLE", "LOADING", "UNLOADING", "WAITING"),
        *("IDLE_HEAD", "USED_AT", "LOADS", "HITS", "EVICTIONS", "MEASURED", "SHARES", "LOAD_S", "HOLD_S", "PINS"),
        *("MEAN_INTERARRIVAL_S", "REQUESTS", "REQUESTED_AT"),
        *("SD_MB", "AT_LEAST_MB", "FAILURES", "FAILED_AT", "EXPECT_MB"),
        *("SUPERSEDED", "SUSPENDED", "SUSPENDS", "RESUMES", "SUSPEND_S", "RESUME_S", "UNSUSPENDABLE", "KEEP_ALIVE"),
        *("USERS", "SEATS", "EVENTS_BEFORE"),
    ),
    Instance: (
        *("STATE", "MODEL", "GENERATION", "HOLDER", "OWNER", "SERVER", "DEVICES", "MB", "RESERVED_MB", "SINCE"),
        *("SEAT_OF", "SEATS"),
        *("LOADED_AT", "NEXT", "PREVIOUS", "UNLOAD_ON_RELEASE", "HAS_SERVER", "USES", "PROGRAM"),
        *("UNLOAD_LATE", "HANDED_AT"),
        *("WAY", "DEVICE_MB", "HOST_MB"),
    ),
}
# A process spins for so long before it sleeps, for each processor besides its own: so many others may be before it. On
# the 16 processors of an H200's host, 16 processes with a copy each made 73 000 to 85 000 pairs a second without the
# spin lock, 272 000 if they spun for 20 us, 278 000 for 100, and 300 000 for 400.
_SPIN_NS, _LONGEST_SPIN_NS = 10_000, 160_000
# Words that are not looked up by their names in `layout.py`: where each setting lies, and what a request without
# urgency adds to the time when it came.
_SETTINGS = SimpleNamespace(**{field.name: Header.SETTINGS + row for row, field in enumerate(fields(Settings))})
_DERIVED = SimpleNamespace(USUAL_RANK_NS=rank_ns(0, 0))
# From these fields on, to the end of the row.
_TEXTS: dict[type[Model | Instance], int] = {Model: Model.TAG, Instance: Instance.SHARES}


def which() -> str:
    """Return `compiled` or `python`, whichever makes the transactions of the warm path. Raises InvalidArgumentError."""
    return "python" if _core_class() is None else "compiled"


def is_compiled() -> bool:
    """Tell whether `which` returns `compiled`, for who chooses a figure by it; False where that raises."""
    try:
        return which() == "compiled"
    except InvalidArgumentError:
        return False


def make_core(segment: Segment, pid: int, smoothing: float, turn: int, crowded_turns: int) -> Core | None:
    """Return the core for a segment and the process that uses it; None if Python is to do it all.

    smoothing: weight of the newest hold in the mean. turn: transactions after which a process that meets others at
    the lock offers its processor. crowded_turns: for so many of these it expects others. Raises InvalidArgumentError.
    """
    core = _core_class()
    if core is None:
        return None
    layout = segment.layout
    strange = _strange(Model), _strange(Instance)
    memory = segment.words.obj
    offsets = _offsets(layout.capacities)
    return core(memory, layout.words, offsets, *strange, pid, smoothing, turn, crowded_turns, _spin_ns())


def _spin_ns() -> int:
    """Return for how long a process spins: not at all if it has the only processor, for then nobody else runs."""
    return min((len(os.sched_getaffinity(0)) - 1) * _SPIN_NS, _LONGEST_SPIN_NS)


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
    owners |= {"": layout_module, "EventKind": EventKind, "Reason": Reason, "Settings": _SETTINGS, "Derived": _DERIVED}
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
