"""mpmm, the multi-process model manager: loaded models for many processes on one host, without a manager process.

The names below are loaded when they are first used, so that a model server, which needs a few of them, starts fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mpmm.errors import (
    AcquireTimeoutError,
    ClosedError,
    DeadlockError,
    InvalidArgumentError,
    LayoutMismatchError,
    LeaseTooLargeError,
    LoadTimeoutError,
    LockTimeoutError,
    ModelServerError,
    ModelTooLargeError,
    MpmmError,
    NamespaceResetError,
    NotAcquiredError,
    ReentrantCallError,
    RemoteCallError,
    RuntimeDirectoryError,
    SegmentAllocationError,
    SegmentCorruptError,
    SegmentLostError,
    ServerStartError,
    SharedObjectReleasedError,
    TableFullError,
)

if TYPE_CHECKING:
    from mpmm.gpu_monitor import GPUMonitor
    from mpmm.lease import Lease
    from mpmm.model_manager import ModelManager, QueueTicket
    from mpmm.multi_process_shared import MultiProcessShared
    from mpmm.placement import Placement, current_placement
    from mpmm.resource_estimator import ResourceEstimator
    from mpmm.shared_state.layout import Capacities

__all__ = [
    "AcquireTimeoutError",
    "Capacities",
    "ClosedError",
    "DeadlockError",
    "GPUMonitor",
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
    "NotAcquiredError",
    "Placement",
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
    "TableFullError",
    "current_placement",
]

_HOMES = {
    "Capacities": "mpmm.shared_state.layout",
    "GPUMonitor": "mpmm.gpu_monitor",
    "Lease": "mpmm.lease",
    "ModelManager": "mpmm.model_manager",
    "MultiProcessShared": "mpmm.multi_process_shared",
    "Placement": "mpmm.placement",
    "QueueTicket": "mpmm.model_manager",
    "ResourceEstimator": "mpmm.resource_estimator",
    "current_placement": "mpmm.placement",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
