"""One process's part in a namespace: it acquires, loads, releases and unloads models.

The public names are those of `apache_beam.ml.inference.model_manager`. They are imported at their first use: a model
server needs a few modules of this package, and should start without the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpmm.memory.estimator import ResourceEstimator
    from mpmm.memory.monitor import GPUMonitor
    from mpmm.model_manager.manager import ModelManager, QueueTicket

__all__ = ["GPUMonitor", "ModelManager", "QueueTicket", "ResourceEstimator"]

_HOMES = {
    "GPUMonitor": "mpmm.memory.monitor",
    "ModelManager": "mpmm.model_manager.manager",
    "QueueTicket": "mpmm.model_manager.manager",
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
