"""Metrics for Prometheus, of all namespaces of this user on this host or of one.

    from mpmm.metrics import Exporter, asgi_app, wsgi_app
    app.mount("/metrics", asgi_app())                      # Starlette, FastAPI
    prometheus_client.REGISTRY.register(Exporter())        # beside your own metrics; needs the extra `metrics`

or `mpmm metrics --serve 9400`. The workers need none of this: the exporter reads the shared state from outside, as
`mpmm inspect` does. One exporter per host is enough; if there are several, each counts its own histograms, beginning
with the events that the ring holds when it starts. `mpmm.observability.histograms` says why.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpmm.errors import MpmmError
from mpmm.interpreter.latch import Latch
from mpmm.interpreter.thread_locks import new_lock
from mpmm.interpreter.thread_starts import start_thread
from mpmm.observability.event_reader import LONGEST_PAUSE_S, EventReader
from mpmm.observability.histograms import Histograms
from mpmm.observability.hosts import first_address
from mpmm.observability.prometheus import Family, families, text
from mpmm.shared_state.snapshot import Snapshot, find_namespaces

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["Exporter", "asgi_app", "serve", "wsgi_app"]

OPENMETRICS = "application/openmetrics-text"
_CONTENT_TYPES = {
    False: "text/plain; version=0.0.4; charset=utf-8",
    True: f"{OPENMETRICS}; version=1.0.0; charset=utf-8",
}
CLIENT_TIMEOUT_S = 10.0
Environ = dict[str, Any]
Message = MutableMapping[str, Any]


class Exporter:
    """Reads namespaces and counts their events. Thread-safe. Also a collector for `prometheus_client`.

    namespace: None for all of this user, including those that are created later. root: folder of the runtime
    directories. follow: from the first reading on, a thread reads the events at least four times a second, so that none
    is missed between two readings. After a fork the child's exporter starts afresh.
    """

    def __init__(self, namespace: str | None = None, root: Path | None = None, *, follow: bool = True) -> None:
        self._namespace = namespace
        self._root = root
        self._follow = follow
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._mutex = new_lock()
        self._followed: dict[str, tuple[EventReader, Histograms]] = {}
        # Until the thread reads the next time.
        self._pause_s = LONGEST_PAUSE_S
        self._thread: threading.Thread | None = None
        self._closing = Latch()

    def families(self) -> list[Family]:
        """Read the namespaces; return all metrics."""
        if self._pid != os.getpid():
            self._begin()
        with self._mutex:
            found = families(self._look())
            if self._follow and self._thread is None and not self._closing.is_set:
                thread = threading.Thread(target=self._run, name="mpmm-metrics", daemon=True)
                start_thread(thread)
                self._thread = thread
        return found

    def text(self, *, openmetrics: bool = False) -> str:
        """Read the namespaces; return all metrics as text, see `mpmm.observability.prometheus.text`."""
        return text(self.families(), openmetrics=openmetrics)

    def close(self) -> None:
        """End the thread; metrics can still be read."""
        self._closing.set()
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join()
            self._thread = None

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as objects of `prometheus_client`, which must be installed."""
        from prometheus_client.core import Metric

        for family in self.families():
            metric = Metric(family.name, family.help, family.kind)
            for suffix, labels, value in family.samples:
                metric.add_sample(family.name + suffix, dict(labels), value)
            yield metric

    def describe(self) -> Iterator[Metric]:
        """Yield nothing, so that registering does not read the namespaces; `collect` yields the names."""
        return iter(())

    def _look(self) -> list[tuple[Snapshot, Histograms]]:
        names = find_namespaces(self._root) if self._namespace is None else [self._namespace]
        seen = []
        self._pause_s = LONGEST_PAUSE_S
        for ended in self._followed.keys() - set(names):
            del self._followed[ended]
        for name in names:
            reader, counted = self._followed.setdefault(name, (EventReader(name, self._root), Histograms()))
            try:
                step = reader.step()
            except (OSError, MpmmError):
                # It has ended, has another layout version, or no descriptor is free: leave it out.
                continue
            self._pause_s = min(self._pause_s, reader.pause_s)
            counted.add(step)
            seen.append((step.snapshot, counted))
        return seen

    def _run(self) -> None:
        pause_s = LONGEST_PAUSE_S
        while not self._closing.wait(pause_s):
            # Carry on after any error: if the thread ended, events would be missed unnoticed.
            with self._mutex, contextlib.suppress(Exception):
                self._look()
            pause_s = self._pause_s


def wsgi_app(exporter: Exporter | None = None) -> Callable[[Environ, Callable[..., Any]], Iterable[bytes]]:
    """Return a WSGI application that answers every request with the metrics."""
    source = exporter or Exporter()

    def app(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        kind, body = _answer(source, environ.get("HTTP_ACCEPT", ""))
        start_response("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body)))])
        return [body]

    return app


def asgi_app(
    exporter: Exporter | None = None,
) -> Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]:
    """Return an ASGI application that answers every request with the metrics."""
    source = exporter or Exporter()

    async def app(
        scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            return
        import asyncio

        accept = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"accept"), "")
        # In a thread, because it takes milliseconds.
        kind, body = await asyncio.get_running_loop().run_in_executor(None, _answer, source, accept)
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def _answer(exporter: Exporter, accept: str) -> tuple[str, bytes]:
    openmetrics = OPENMETRICS in accept
    return _CONTENT_TYPES[openmetrics], exporter.text(openmetrics=openmetrics).encode()


def serve(exporter: Exporter, host: str, port: int) -> ThreadingHTTPServer:
    """Return an HTTP server for the metrics, bound and listening; `serve_forever` runs it. Raises OSError."""

    class Handler(BaseHTTPRequestHandler):
        # A silent client occupies a thread and a descriptor no longer than this.
        timeout = CLIENT_TIMEOUT_S

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            kind, body = _answer(exporter, self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing: a line for each scrape would be noise."""

    class Server(ThreadingHTTPServer):
        address_family = first_address(host, port)[0]

        def handle_error(self, request: Any, client_address: Any) -> None:
            # A client that hangs up is not our error.
            if not isinstance(sys.exc_info()[1], OSError):
                super().handle_error(request, client_address)

    return Server((host, port), Handler)
