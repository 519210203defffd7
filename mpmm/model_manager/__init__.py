"""One process's part in a namespace: it acquires, loads, releases and unloads models.

One acquire, `manager.acquire_model(tag, loader)` or `with manager.model(tag, loader)`, goes through these files:

    manager.py           checks tag and loader
    attachment.py        joins the namespace at the first use, and returns this process's session
    session.py           ties together what the process has in the namespace; `begin` notes the call in operations.py,
                         so that an exception between two bytecodes leaves nothing behind
    acquire.py           drives the rest, and sleeps where it has to wait:
      request.py           reads the caller's options
      held.py              takes an idle instance by the compiled core; most acquires end here
      acquisition.py       takes one with the policy's consent (`take_idle`), or joins the queue (`enqueue`)
      queued_request.py    acts on the answer (`act`): an instance, or a booking; or leaves the queue (`leave`)
      load.py              runs the loader for a booking, measures what it has made, and writes that down; or resumes a
                           suspended instance. A model server that the loader starts joins by server_duty.py
    release.py           gives the instance back, when the caller or the end of the block (block.py) says so

The same steps serve the other calls: `async_block.py` takes an idle instance in an event loop, where `async_acquire.py`
awaits what `acquire.py` sleeps for, `lease.py` queues for memory without a model, `preload.py` for instances ahead of
use, and for loads that are reserved by hand (bookings.py), and `uses.py` is the decorator. `nested.py` knows what the
calling thread holds itself (thread_holds.py), `refusals.py` words the errors, `waits.py` says who has what a request
waits for.

Beside the calls: `background.py` is the process's one thread, which sleeps on doorbell.py. It makes the changes that
had to wait for the lock (deferred.py), takes back what interrupted calls had in hand (reconcile.py), unloads
(unload.py, late_unloads.py), and does the duties of the namespace while the process is its leader (leader.py).
`owned.py` knows the objects that this process has loaded for itself, and which rows stand for them. `fresh_figures.py`
has memory figures taken when a decision needs them, `returns.py` until they show what was unloaded,
`out_of_memory.py` learns from loads that found too little, `tenure.py` and `look_again.py` say who comes first, and
when a waiter looks for itself. `administration.py` and `pins.py` are what people ask for by hand, `run_command.py` is
`mpmm run`. `beam_attributes.py` and `queue_ticket.py` are names of Beam's manager.

The public names are those of `apache_beam.ml.inference.model_manager`. They are imported at their first use: a model
server needs a few modules of this package, and starts without the others.
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
    # Not kept here, because a test may have replaced it in its own module for a while.
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
