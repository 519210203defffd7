"""A dashboard in this process, requests to it, and namespaces for it to show.

Without the extra `web`, a test file that imports this module is skipped.
"""

from __future__ import annotations

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import pytest
from harness import NewManager, NewProcess, acquire, release, wait_until, waiting
from loaders import Loads

from mpmm.model_manager import ModelManager
from mpmm.observability.dashboard.watch import Watcher
from mpmm.observability.event_reader import EventReader, Step
from mpmm.policy.view import Reason
from mpmm.shared_state.snapshot import Snapshot

uvicorn = pytest.importorskip("uvicorn", reason="needs the extra web")
from mpmm.observability.dashboard import server  # noqa: E402  # needs the library

TOKEN = "a-token.of_the~tests"


@dataclass
class Answer:
    """The answer to a request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body's JSON."""
        return json.loads(self.body)


def ask(url: str, token: str | None = TOKEN, method: str = "GET", **headers: str) -> Answer:
    """Make a request."""
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers, method=method), timeout=20) as answer:
            return Answer(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, {k.lower(): v for k, v in error.headers.items()}, error.read())


class Served:
    """A dashboard in a thread of this process. Its watcher looks only when asked."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher
        config = uvicorn.Config(
            server.create_app(watcher, TOKEN), log_level="warning", access_log=False, lifespan="off", ws="none"
        )
        self._server = uvicorn.Server(config)
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listening]})
        self._thread.start()
        wait_until(lambda: self._server.started, "the server runs")

    def close(self) -> None:
        """End the dashboard."""
        self._server.should_exit = True
        self._thread.join()
        self._listening.close()

    def state(self, **query: object) -> Any:
        """Look, and return the answer about a namespace."""
        self.watcher.look()
        asked = "&".join(f"{name}={value}" for name, value in query.items())
        answer = ask(f"{self.url}/api/state?{asked}")
        assert answer.status == 200, answer.body
        return answer.json


@pytest.fixture
def served() -> Iterator[Served]:
    """A dashboard of all namespaces."""
    with closing(Served(Watcher())) as made:
        yield made


@pytest.fixture
def lively(namespace: str, new_manager: NewManager, new_process: NewProcess) -> ModelManager:
    """A namespace with 200 MB, an evicted copy, an idle one, one in use, and a request that waits for that."""
    manager, other = new_manager(fallback_memory_mb=200), new_process()
    manager.release_model("evicted", manager.acquire_model("evicted", Loads()))
    manager.acquire_model("held", Loads())
    other.call(acquire, "<b>idle</b>")
    other.call(release)
    manager.pin("<b>idle</b>")
    other.send(acquire, "held")
    wait_until(lambda: waiting(namespace, "held"), "the other one waits")
    return manager


def thousand(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot with a thousand copies and as many waiters, made from one that has some."""
    copies, tickets = snapshot.instances, snapshot.tickets
    many = [replace(copies[n % len(copies)], row=n, tag=f"model-{n:04}", for_s=float(n)) for n in range(1000)]
    queue = [
        replace(tickets[0], row=n, number=1000 + n, tag=f"model-{n:04}", reason=Reason.PINNED) for n in range(1000)
    ]
    return replace(snapshot, instances=tuple(many), tickets=tuple(queue), waiting=1000)


@pytest.fixture
def crowded(lively: ModelManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each look find a thousand copies."""
    step = EventReader.step

    def many(self: EventReader) -> Step:
        found = step(self)
        return replace(found, snapshot=thousand(found.snapshot), events=())

    monkeypatch.setattr(EventReader, "step", many)
