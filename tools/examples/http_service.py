"""An HTTP inference service with several workers that share their models. Needs starlette and uvicorn.

    uvicorn --app-dir tools/examples http_service:app --workers 4
    curl 'localhost:8000/predict?text=to+be+or+not+to+be'
    curl localhost:8000/metrics

Tasks wait for a model without blocking the event loop, and without a thread each. The model is an object in the worker
that loaded it; all workers account for its memory, and an idle one is evicted when other models need the memory.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Mount, Route

from mpmm import AcquireTimeoutError, ModelManager, QueueFullError
from mpmm.metrics import asgi_app


class Reverser:
    """Stands for a model."""

    def predict(self, text: str) -> str:
        """Return the text backwards."""
        return text[::-1]


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """Attach this worker when it starts, and release its models when it ends."""
    with ModelManager(namespace="service", memory_source="booked", wait_timeout_seconds=30) as manager:
        app.state.manager = manager
        yield


async def predict(request: Request) -> JSONResponse:
    """Answer with the prediction, or with 503 if no model is free in time, or too many requests already wait."""
    manager: ModelManager = request.app.state.manager
    try:
        async with manager.model_async("reverser", Reverser, max_waiting=64) as model:
            answer: Any = await run_in_threadpool(model.predict, request.query_params["text"])
    except (AcquireTimeoutError, QueueFullError) as error:
        retry_after = {"Retry-After": str(math.ceil(error.retry_after_seconds or 1))}
        return JSONResponse({"error": str(error)}, status_code=503, headers=retry_after)
    return JSONResponse({"answer": answer, "worker": os.getpid()})


app = Starlette(routes=[Route("/predict", predict), Mount("/metrics", asgi_app())], lifespan=lifespan)
