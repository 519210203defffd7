"""One process's part in a namespace: it acquires, loads, releases and unloads models.

One acquire, `manager.acquire_model(tag, loader)` or `with manager.model(tag, loader)`, goes through these files:

    manager.py           checks tag and loader
    attachment.py        joins the namespace at the first use, and returns this process's session
    session.py           ties together what the process has in the namespace; `begin` records the call in operations.py,
                         so that an exception between two bytecodes leaves nothing behind
    acquire.py           drives the rest, and sleeps where it has to wait:
      request.py           reads the caller's options
      held.py              takes an idle instance through the compiled core; most acquires end here
      acquisition.py       takes one with the policy's consent (`take_idle`), or joins the queue (`enqueue`)
      queued_request.py    acts on the answer (`act`): an instance, or a booking; or leaves the queue (`leave`)
      load.py              runs the loader for a booking, measures and records the result; or resumes a suspended
                           instance. A model server that the loader starts joins through server_duty.py
    release.py           gives the instance back when the caller asks for it, or when the block (block.py) ends

The same steps serve the other calls: in an event loop `async_block.py` takes an idle instance, and `async_acquire.py`
awaits what `acquire.py` sleeps for; `lease.py` queues for memory without a model, and `preload.py` for instances ahead
of use and for loads that are reserved by hand (bookings.py); `uses.py` is the decorator. `nested.py` checks what the
calling thread holds itself (thread_holds.py), `refusals.py` words the errors, and `waits.py` finds out which processes
hold what a request waits for.

Beside the calls, `background.py` is the process's one thread, which sleeps on doorbell.py. It makes the changes that
had to wait for the lock (deferred.py), cleans up after interrupted calls (reconcile.py), unloads (unload.py,
late_unloads.py), and does the duties of the namespace while the process is its leader (leader.py). `owned.py` knows the
objects that this process has loaded for itself, and the rows that stand for them. `fresh_figures.py` has memory figures
taken when a decision needs them, `returns.py` waits until they show that unloaded memory has come back,
`out_of_memory.py` learns from loads that found too little memory, `tenure.py` decides which process uses an instance
first, and `look_again.py` when a waiter runs the policy itself. `administration.py` and `pins.py` do what people ask
for by hand, and `run_command.py` is `mpmm run`. `beam_attributes.py` and `queue_ticket.py` hold names of Beam's
manager.

The public names are those of `apache_beam.ml.inference.model_manager`. They are imported at their first use, because a
model server needs only a few modules of this package, and starts without the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpmm.memory.estimator import ResourceEstimator
    from mpmm.memory.monitor import GPUMonitor
    from mpmm.model_manager.manager import ModelManager
    from mpmm.model_manager.queue_ticket import QueueTicket

__all__ = ["GPUMonitor", "ModelManager", "QueueTicket", "ResourceEstimator"]

_HOMES = {
    "GPUMonitor": "mpmm.memory.monitor",
    "ModelManager": "mpmm.model_manager.manager",
    "QueueTicket": "mpmm.model_manager.queue_ticket",
    "ResourceEstimator": "mpmm.memory.estimator",
    # Tests written for Beam replace the solver here.
    "nnls": "mpmm.memory.estimator",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not cached here, because a test may replace it in its own module for a while.
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
