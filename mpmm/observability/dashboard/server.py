"""The HTTP side of `mpmm dashboard`. Needs starlette and uvicorn, the extra `web`.

Every request needs the token, as `?token=` or as `Authorization: Bearer`: without one the answer is 401 (in a browser,
with a field to paste it into), with a wrong one 403. The page keeps the token in its own address, so that a reload and
a bookmark work; it leaves no trace elsewhere: no cookie, no referrer, no line in a log.

The server only answers GET and HEAD, never names another origin, and lets the browser load nothing but its own files.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import socket
import sys
from importlib import resources
from pathlib import Path
from urllib.parse import parse_qs

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpmm.errors import InvalidArgumentError
from mpmm.observability.dashboard.history import LONGEST_WINDOW_S
from mpmm.observability.dashboard.watch import Watcher
from mpmm.observability.hosts import first_address

__all__ = ["checked_token", "create_app", "run"]

SHORTEST_TOKEN = 8
DEFAULT_WINDOW_S = 600.0
_TOKEN = re.compile(r"[A-Za-z0-9._~-]+")
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_ASKED_FOR = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>mpmm: token</title></head>
<body><h1>mpmm</h1><p>{text} The URL that <code>mpmm dashboard</code> printed contains it.</p>
<form action="/" method="get"><label>Token: <input name="token" autofocus required autocomplete="off"></label>
<button>Open</button></form></body></html>
"""


class _Guard:
    """Lets nothing through without the token, and gives every answer its headers."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            # Nothing else is served; the server closes a websocket when its application returns.
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        given = _given_token(scope)
        if given is None:
            text, status = "This page needs its token.", 401
        elif not secrets.compare_digest(given, self._token):
            text, status = "This is not the token.", 403
        else:
            await self._app(scope, receive, with_headers)
            return
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
        await HTMLResponse(_ASKED_FOR.format(text=text), status, headers)(scope, receive, with_headers)


def _given_token(scope: Scope) -> bytes | None:
    """Return the token of a request, None if it has none."""
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return bytes(value[7:].strip())
    asked = parse_qs(scope["query_string"].decode("latin-1"))
    return asked["token"][0].encode("utf-8", "replace") if "token" in asked else None


def create_app(watcher: Watcher, token: str) -> Starlette:
    """Return the dashboard as an ASGI application; the caller starts and closes the watcher."""
    page = resources.files("mpmm.observability.dashboard") / "page"
    index = page.joinpath("index.html").read_text("utf-8").replace("{{token}}", token)
    files = {one.name: one.read_bytes() for one in page.iterdir() if Path(one.name).suffix in _TYPES}

    async def home(request: Request) -> Response:
        return HTMLResponse(index)

    async def file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            return Response("not found\n", 404, media_type="text/plain")
        return Response(files[name], media_type=_TYPES[Path(name).suffix])

    # Not a coroutine, so that it runs in a thread: an answer about a thousand copies takes milliseconds.
    def state(request: Request) -> Response:
        asked = request.query_params
        try:
            look, window_s = int(asked.get("look", "0")), float(asked.get("window", DEFAULT_WINDOW_S))
        except ValueError:
            look, window_s = -1, -1.0
        if look < 0 or not 0 < window_s <= LONGEST_WINDOW_S:
            error = f"expected look as a whole number and window as seconds from 0 to {LONGEST_WINDOW_S:.0f}"
            return JSONResponse({"error": error}, 400)
        found = watcher.state(asked.get("namespace"), asked.get("epoch", ""), look, window_s)
        return Response(json.dumps(found, separators=(",", ":")), media_type="application/json")

    routes = [Route("/", home), Route("/api/state", state), Route("/{name}", file)]
    return Starlette(routes=routes, middleware=[Middleware(_Guard, token=token)])


def checked_token(token: str | None) -> str:
    """Return the token to use: the one given, else a new random one of 192 bits. Raises InvalidArgumentError."""
    if token is None:
        return secrets.token_urlsafe(24)
    if len(token) < SHORTEST_TOKEN or not _TOKEN.fullmatch(token):
        raise InvalidArgumentError(
            f"--token: expected at least {SHORTEST_TOKEN} of the characters A to Z, a to z, 0 to 9 and . _ ~ -, "
            f"found {len(token)} characters; without --token a random one is made"
        )
    return token


def run(host: str, port: int, token: str, root: Path | None, namespace: str | None) -> int:
    """Serve until an interrupt; return 0. Raises OSError if it cannot listen there.

    port: 0 for any that is free.
    """
    watcher = Watcher(root, namespace)
    with _listen(host, port) as listening, contextlib.closing(watcher):
        watcher.start()
        config = uvicorn.Config(
            create_app(watcher, token),
            log_level="warning",
            # Its lines would contain the token.
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        bound_port = listening.getsockname()[1]
        print(f"mpmm: dashboard at {_url(host, bound_port)}/?token={token}", file=sys.stderr)
        if not _is_local(listening):
            print(
                "mpmm: note: others on the network can reach this, and the token is sent unencrypted; "
                f"`ssh -L {bound_port}:127.0.0.1:{bound_port} HOST` to a dashboard on 127.0.0.1 encrypts it",
                file=sys.stderr,
            )
        sys.stderr.flush()
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(config).run(sockets=[listening])
    return 0


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, _, _, address = first_address(host, port)
        listening = socket.socket(family, kind)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(128)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise OSError(f"cannot listen at {host} port {port}: {error}; choose another by --host and --port") from error
    return listening


def _is_local(listening: socket.socket) -> bool:
    address = str(listening.getsockname()[0])
    return address.startswith("127.") or address == "::1"


def _url(host: str, port: int) -> str:
    """Return an address that a browser of this host can open."""
    if host in ("0.0.0.0", "::", ""):
        host = socket.gethostname()
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
