"""Load a pipeline's models before their first batches arrive, if memory is free.

Without a manager, `RunInference` loads its model when a worker sets it up. With Beam's manager, the first batch of each
transform waits for the load, one transform after another: of four models that load in 5 s, the last one sees a batch
after 20 s. So a worker that sets up a transform begins to load its model at once, in a thread. For that it neither
evicts nor waits (`ModelManager.preload` with `if_free`), and only one worker loads each model; the first batch waits
for that load, or loads the model itself, as before, if memory was not free.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mpmm.interpreter.thread_starts import start_thread

__all__ = ["LOAD_AHEAD_VARIABLE", "load_ahead"]

#: If it is 0, the first batches load the models.
LOAD_AHEAD_VARIABLE = "MPMM_LOAD_AHEAD"
# The very first model may have to load alone, to be measured. The others check this often whether that is over.
LOOK_S = 0.1
LONGEST_WAIT_S = 120.0


def load_ahead(manager: Any, tag: str, loader: Callable[[], Any]) -> None:
    """Load a model in a thread, if there is no copy of it yet and memory is free for one. Raises nothing."""
    if os.environ.get(LOAD_AHEAD_VARIABLE, "1") == "0":
        return
    # If no thread can be started, the first batch loads the model.
    with suppress(RuntimeError):
        start_thread(threading.Thread(target=_load, args=(manager, tag, loader), name="mpmm-load-ahead", daemon=True))


def _load(manager: Any, tag: str, loader: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LONGEST_WAIT_S
    # If something is wrong with the model or the namespace, the first batch fails, too, and the pipeline sees why.
    with suppress(Exception):
        namespace = manager._connected().namespace
        while not _is_under_way(namespace, tag) and time.monotonic() < deadline:
            if not namespace.tables.header.isolated:
                manager.preload(tag, loader, if_free=True)
                if not namespace.tables.header.isolated:
                    return
            time.sleep(LOOK_S)


def _is_under_way(namespace: Any, tag: str) -> bool:
    """Tell whether a model has a copy, or a request waits for one; reads without the lock."""
    row = namespace.tables.model_row(tag)
    if row is None:
        return False
    model = namespace.tables.models[row]
    return any((model.active, model.idle, model.loading, model.waiting))
