"""The compiled core of the warm path, where there is one: `_core.c` makes the most frequent transactions.

It takes an idle copy, and gives one back, which then is idle, or kept in this process's tenure, or handed to the first
waiter. It queues a newcomer that certainly has to wait for a copy in use, sleeps until there is an answer, and takes
the copy that the answer grants. In every unusual case it says so, and changes nothing. Python is the definition, and
does what the core does not; without a compiler, everything. `MPMM_CORE=python` makes Python do everything, too;
`MPMM_CORE=compiled` refuses to run without the core.

The core does not know where any word lies. It names the words that it needs (`OFFSETS`), and this module looks them up
in `layout.py`. A field of a model or instance row that `_FAMILIAR` does not name, because it was added later, must be 0
for the core to act: the new field may change what these transactions have to do.

**The spin lock.** Processes that run at the same time, on a processor each, must not all try for the file lock: the
kernel guards it by a lock of its own, and on 16 processors the holder, to release it, queued behind the processes that
tried in vain, for 4 us instead of 0.4. So a process of the core first spins until it has a word of shared memory,
`Header.SPIN_LOCK`, and only then tries for the file lock. The word holds the time when it was taken, and lapses,
because its owner may be stopped or dead. It guards nothing: the file lock alone decides which process has the lock, and
Python, which makes few transactions compared to a core, does without the spin lock.
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

# What `Core.release` does with a copy for which others wait: hand it to the first waiter; or leave it idle for this
# process, and call the first waiter up, with KEEP only if that has not been done yet.
TO_NEXT, KEEP, KEEP_AND_CALL_UP = range(3)
# What it returns; also 0 if Python has to decide, 1 if the copy is idle because it has no waiter.
KEPT, HANDED_OVER = 2, 3

# Fields that a copy's reuse leaves alone, or changes as the core does.
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
# How long a process spins before it sleeps, for each processor but its own, because one process on each may be ahead of
# it. On the 16 processors of an H200's host, 16 processes with a copy each made 73 000 to 85 000 pairs a second without
# the spin lock, 272 000 if they spun for 20 us, 278 000 for 100, and 300 000 for 400.
_SPIN_NS, _LONGEST_SPIN_NS = 10_000, 160_000
# Numbers that have no name in `layout.py`: where each setting lies, and what the rank of a request of usual urgency
# adds to the time when it came.
_SETTINGS = SimpleNamespace(**{field.name: Header.SETTINGS + row for row, field in enumerate(fields(Settings))})
_DERIVED = SimpleNamespace(USUAL_RANK_NS=rank_ns(0, 0))
# The first of the fields at the end of the row that `_strange` ignores.
_TEXTS: dict[type[Model | Instance], int] = {Model: Model.TAG, Instance: Instance.SHARES}


def which() -> str:
    """Return what makes the warm path's transactions: `compiled` or `python`. Raises InvalidArgumentError."""
    return "python" if _core_class() is None else "compiled"


def is_compiled() -> bool:
    """Tell whether `which` returns `compiled`, for callers that choose a figure by it; False if it raises."""
    try:
        return which() == "compiled"
    except InvalidArgumentError:
        return False


def make_core(segment: Segment, pid: int, smoothing: float, turn: int, crowded_turns: int) -> Core | None:
    """Return the core for a segment and the process that uses it; None if Python does everything.

    smoothing: weight of the newest hold in the mean. turn: after how many transactions a process that meets others at
    the lock yields its processor. crowded_turns: for how many turns it then expects others. Raises
    InvalidArgumentError.
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
    """Return how long a process spins: 0 if it has only one processor, because then no other process runs."""
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
                f"{CORE_VARIABLE}=compiled: the compiled core is missing ({error}); install mpmm where there are a C "
                "compiler and Python's headers, or unset the variable"
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
    """Return the fields of a row that `_FAMILIAR` does not name."""
    known = {getattr(row, name) for name in _FAMILIAR[row]}
    return tuple(word for word in range(_TEXTS[row]) if word not in known)
