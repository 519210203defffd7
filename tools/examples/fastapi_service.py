"""FastAPI with several uvicorn workers that share one copy of a model. Needs fastapi and uvicorn.

    uvicorn --app-dir tools/examples fastapi_service:app --workers 4
    curl 'localhost:8000/predict?text=to+be+or+not+to+be'

The copy lives in a process of its own, started by the first worker that needs it. The others find it loaded.
"""

# FastAPI may be missing where types are checked.
# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from fastapi import FastAPI

from mpmm import ModelManager, MultiProcessShared


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


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Attach this worker when it starts, and release its models when it ends."""
    with ModelManager(namespace="fastapi", memory_source="booked", max_model_copies=1) as app.state.manager:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/predict")
def predict(text: str) -> dict[str, str | int]:
    """Answer with the prediction; FastAPI runs this in a thread, which may wait for a copy."""
    with app.state.manager.model("reverser", load) as handle, shared(handle).using() as model:
        answer, server = model.predict(text)
    return {"answer": answer, "worker": os.getpid(), "server": server}
