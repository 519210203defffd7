"""gunicorn with `--preload`: it loads one copy before it forks the workers, which all use it. Needs gunicorn.

    gunicorn --preload --workers 4 --chdir tools/examples 'gunicorn_service:make_app()'
    curl 'localhost:8000/?text=to+be+or+not+to+be'

A manager may cross a fork: each worker becomes a member of its own. The program also works without `--preload`; the
first worker then loads the copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qs

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


def make_app() -> Callable[..., Iterable[bytes]]:
    """Load the model, and return the WSGI application. gunicorn calls this once; the model's server does not."""
    manager = ModelManager(namespace="gunicorn", memory_source="booked", max_model_copies=1)
    manager.preload("reverser", load)

    def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
        text = parse_qs(environ["QUERY_STRING"])["text"][0]
        with manager.model("reverser", load) as handle, shared(handle).using() as model:
            answer, server = model.predict(text)
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps({"answer": answer, "worker": os.getpid(), "server": server}).encode()]

    return app
