"""mpmm, the multi-process model manager: loaded models for many processes on one host, without a manager process.

Each process creates a manager of the same namespace and asks it for models by tag. It gets a loaded copy: an idle one
if there is one, otherwise one that it loads itself as soon as there is memory. To make room, the manager unloads idle
copies; requests that need memory wait in a fair queue.

    from mpmm import ModelManager, MultiProcessShared

    manager = ModelManager(namespace="inference")

    with manager.model("detector", load) as detector:      # load() returns the model, or a handle of its server
        detector.predict(image)

- If the loader returns an object, only the process that loaded it reuses it. If it returns a str, that is a handle,
  which every process can use: the tag of a `MultiProcessShared`, whose object lives in a server process of its own.
- `manager.model_async(tag, load)` and `@manager.uses(tag, load)` do the same for event loops and functions;
  `acquire_model` and `release_model` are the two halves, with Beam's names.
- `manager.preload(tag, load)` loads ahead of use, `manager.pin(tag)` keeps idle copies, and
  `with manager.reserve(6000, name="training"):` takes memory (in MB, which are MiB) for a program that is not a model.
- `mpmm.beam.install()` makes Apache Beam use mpmm as its model manager; `mpmm.metrics` exports for Prometheus.
- Errors are children of `MpmmError`, and of the built-in exception that fits.

In a shell, `mpmm inspect` shows which processes hold or wait for which models, and why; `mpmm help` explains settings,
errors and more, and `mpmm --help` lists the commands.

The packages, from the entry points down; each imports only from lines below its own (`tests/test_imports.py`):

    cli  commands  beam  metrics   entry points: people, pipelines, Prometheus
    observability                  inspect, events, trace, plot, metrics, dashboard
    model_manager                  one process's acquire, load, release, unload
    multi_process_shared           one object, one process, many users: model servers and their clients
    suspend                        copies in host memory
    memory  sources                how much memory is in use, and how much a model takes
    scheduling  policy             policy applied to shared state; pure decisions
    shared_state                   the only place that touches the shared bytes
    errors  interpreter  text      errors, forks and threads, text for people

The public names are those of `__all__`. Most of them are imported at first use, so that a model server, which needs
few of them, starts fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mpmm.errors import (
    AcquireTimeoutError,
    ClosedError,
    DeadlockError,
    GreenThreadsError,
    InvalidArgumentError,
    LayoutMismatchError,
    LeaseTooLargeError,
    LoadTimeoutError,
    LockTimeoutError,
    ModelServerError,
    ModelTooLargeError,
    MpmmError,
    NamespaceResetError,
    NoEventLoopError,
    NotAcquiredError,
    ProcessLimitError,
    QueueFullError,
    ReentrantCallError,
    RemoteCallError,
    RuntimeDirectoryError,
    SegmentAllocationError,
    SegmentCorruptError,
    SegmentLostError,
    ServerStartError,
    SharedObjectReleasedError,
    SourceUnavailableError,
    SuspendError,
    SuspendTimeoutError,
    TableFullError,
    UnloadTimeoutError,
)

if TYPE_CHECKING:
    from mpmm.memory.estimator import ResourceEstimator
    from mpmm.memory.monitor import GPUMonitor
    from mpmm.memory.placement import Placement, current_placement
    from mpmm.model_manager import ModelManager, QueueTicket
    from mpmm.model_manager.lease import Lease
    from mpmm.multi_process_shared import MultiProcessShared
    from mpmm.shared_state.layout import Capacities

# Defined only here; setup.cfg reads it without importing anything.
__version__ = "0.1.0"

__all__ = [
    "AcquireTimeoutError",
    "Capacities",
    "ClosedError",
    "DeadlockError",
    "GPUMonitor",
    "GreenThreadsError",
    "InvalidArgumentError",
    "LayoutMismatchError",
    "Lease",
    "LeaseTooLargeError",
    "LoadTimeoutError",
    "LockTimeoutError",
    "ModelManager",
    "ModelServerError",
    "ModelTooLargeError",
    "MpmmError",
    "MultiProcessShared",
    "NamespaceResetError",
    "NoEventLoopError",
    "NotAcquiredError",
    "Placement",
    "ProcessLimitError",
    "QueueFullError",
    "QueueTicket",
    "ReentrantCallError",
    "RemoteCallError",
    "ResourceEstimator",
    "RuntimeDirectoryError",
    "SegmentAllocationError",
    "SegmentCorruptError",
    "SegmentLostError",
    "ServerStartError",
    "SharedObjectReleasedError",
    "SourceUnavailableError",
    "SuspendError",
    "SuspendTimeoutError",
    "TableFullError",
    "UnloadTimeoutError",
    "__version__",
    "current_placement",
]

_HOMES = {
    "Capacities": "mpmm.shared_state.layout",
    "GPUMonitor": "mpmm.memory.monitor",
    "Lease": "mpmm.model_manager.lease",
    "ModelManager": "mpmm.model_manager.manager",
    "MultiProcessShared": "mpmm.multi_process_shared",
    "Placement": "mpmm.memory.placement",
    "QueueTicket": "mpmm.model_manager.queue_ticket",
    "ResourceEstimator": "mpmm.memory.estimator",
    "current_placement": "mpmm.memory.placement",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the names of the API, including those that are imported at first use, without importing them."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
