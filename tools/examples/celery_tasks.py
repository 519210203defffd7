"""A Celery worker whose prefork processes share one copy of a model. Needs celery, and a broker.

    cd tools/examples
    celery --app celery_tasks worker --concurrency 4
    python -c 'from celery_tasks import reverse; print(reverse.delay("to be or not to be").get(timeout=30))'

`BROKER_FOLDER` stands for the broker here: a folder in which both commands exchange messages, by default ./broker.
"""

# Celery has no types.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import worker_process_init, worker_process_shutdown

from mpmm import ModelManager, MultiProcessShared

folder = Path(os.environ.get("BROKER_FOLDER", "broker")).resolve()
for name in ("messages", "control", "results"):
    (folder / name).mkdir(parents=True, exist_ok=True)
app = Celery("celery_tasks", broker="filesystem://", backend=f"file://{folder / 'results'}")
app.conf.broker_transport_options = {
    "data_folder_in": folder / "messages",
    "data_folder_out": folder / "messages",
    "control_folder": folder / "control",
    "polling_interval": 0.1,
}


class Reverser:
    """Stands for a model: it takes memory, and a while to load."""

    def predict(self, text: str) -> tuple[str, int]:
        """Return the text backwards, and the pid of the process that did it."""
        return text[::-1], os.getpid()


def load() -> str:
    """Start a server for the model; its tag is a handle that works in every process."""
    shared("reverser").acquire()
    return "reverser"


def shared(handle: str) -> MultiProcessShared[Reverser]:
    """Return the shared object for a handle."""
    return MultiProcessShared(Reverser, tag=handle, always_proxy=True, spawn_process=True)


manager: ModelManager


@worker_process_init.connect
def attach(**_: Any) -> None:
    """Run once in each process of the pool."""
    global manager
    manager = ModelManager(namespace="celery", memory_source="booked", max_model_copies=1)


@worker_process_shutdown.connect
def leave(**_: Any) -> None:
    """Release the models: the pool's processes run no exit handlers."""
    manager.shutdown()


@app.task
def reverse(text: str) -> dict[str, str | int]:
    """Borrow the copy, use it, give it back."""
    with manager.model("reverser", load) as handle, shared(handle).using() as model:
        answer, server = model.predict(text)
    return {"answer": answer, "worker": os.getpid(), "server": server}
